"""The examples run as a user runs them, in a process of their own; the store shows the result."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Span, Trace

import spanguard
from tests import jobs
from tests.store import Store, outcome, status

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, store: Store, uri: str | None = None) -> str:
    """Run an example against the test's store, or another, and return what it printed."""
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": uri or store.uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONPATH": str(Path(spanguard.__file__).parent.parent),
        "PYTHONIOENCODING": "utf-8",
        "COLUMNS": "200",
    }
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished.stdout


def named(trace: Trace, name: str) -> list[Span]:
    return [span for span in trace.data.spans if span.name == name]


def test_every_example_is_tested() -> None:
    tested = {
        "async_streaming.py",
        "custom_ids.py",
        "dask_batch.py",
        "guard_existing_code.py",
        "fastapi_app.py",
        "long_lived_app.py",
        "migrate_from_raw_client.py",
        "quickstart.py",
        "test_with_plugin.py",  # by test_pytest_plugin.py
        "threads_and_processes.py",
    }
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_quickstart(store: Store) -> None:
    printed = run("quickstart.py", store)
    trace = store.trace()
    assert trace.info.state.value == "OK"
    assert trace.info.tags["shop"] == "corner"
    (root,) = named(trace, "checkout")
    assert root.outputs == {"total": 2.9}
    assert root.get_attribute("without_price") == "caviar"
    found = {span.inputs["item"]: span for span in named(trace, "price_of")}
    statuses = {item: status(span) for item, span in found.items()}
    assert statuses == {"apple": "OK", "bread": "OK", "caviar": "ERROR"}
    assert found["caviar"].get_attribute("error_type") == "KeyError"
    assert {span.parent_id for span in found.values()} == {root.span_id}
    assert "total: 2.9" in printed
    assert "KeyError: 'caviar'" in printed


def test_long_lived_app(store: Store) -> None:
    printed = run("long_lived_app.py", store)
    traces = store.traces()
    assert len(traces) == 4
    chats = {t.info.trace_metadata["mlflow.trace.user"]: t for t in traces if is_chat(t)}
    assert set(chats) == {"ada", "bob", "cy"}
    for user, trace in chats.items():
        assert len(trace.data.spans) == 5, user
        first, second = named(trace, "message")
        assert (first.outputs, outcome(first)) == (f"{user}: hello!", "ok")
        assert first.get_attribute("clean") is True
        assert outcome(second) == ("orphaned" if user == "bob" else "ok")
        assert {s.parent_id for s in named(trace, "moderate")} == {first.span_id, second.span_id}
    assert "opened at" in printed
    assert "in on_message" in printed


def is_chat(trace: Trace) -> bool:
    return bool(named(trace, "chat session"))


def test_long_lived_app_ends_batch_stages_in_other_threads(store: Store) -> None:
    run("long_lived_app.py", store)
    (trace,) = (trace for trace in store.traces() if not is_chat(trace))
    assert trace.info.tags["app"] == "batch"
    (root,) = named(trace, "nightly batch")
    for name in ("extract", "load"):
        (stage,) = named(trace, name)
        assert stage.parent_id == root.span_id
        assert stage.get_attribute("by") == f"{name}-1"
        assert (status(stage), stage.outputs) == ("OK", f"{name}: 3 rows")


def finished(store: Store) -> list[Trace]:
    """Return the traces that are whole. What raw code has lost at the exit has not even a name."""
    return [trace for trace in store.traces() if "mlflow.traceName" in trace.info.tags]


def test_migrate_from_raw_client(store: Store) -> None:
    printed = run("migrate_from_raw_client.py", store)
    assert "before: 0 readable traces" in printed
    assert "after: 1 readable trace" in printed
    (trace,) = finished(store)
    assert trace.info.tags["label"].startswith("after-")
    (slow,) = named(trace, "fetch slow")
    assert (status(slow), outcome(slow)) == ("ERROR", "cancelled")
    for page in ("index", "news"):
        (fetched,) = named(trace, f"fetch {page}")
        assert (status(fetched), fetched.outputs) == ("OK", f"<h1>{page}</h1>")


def test_threads_and_processes(store: Store) -> None:
    printed = run("threads_and_processes.py", store)
    trace = store.trace()
    assert trace.info.state.value == "OK"
    (root,) = named(trace, "count a site")
    assert (root.parent_id, root.outputs) == (None, 12)
    for stage, work, times in (
        ("download all", "download", 3),
        ("count all", "count_words", 3),
        ("announce all", "announce", 2),
    ):
        (parent,) = named(trace, stage)
        assert parent.parent_id == root.span_id
        assert [span.parent_id for span in named(trace, work)] == [parent.span_id] * times
    assert len(trace.data.spans) == 12
    assert "12 spans in one trace" in printed
    assert "announce all" in printed


def test_async_streaming(store: Store) -> None:
    printed = run("async_streaming.py", store)
    trace = store.trace()
    assert trace.info.state.value == "OK"
    for reader, ending, words in (
        ("patient reader", "ok", "Spans always close , once , in order ."),
        ("impatient reader", "closed_early", "Spans always close"),
    ):
        (parent,) = named(trace, reader)
        (answer,) = (span for span in named(trace, "answer") if span.parent_id == parent.span_id)
        assert (status(answer), outcome(answer), answer.outputs) == ("OK", ending, words)
        assert f"{reader}: OK, {ending}, '{words}'" in printed


@pytest.fixture(scope="module")
def dask_batch() -> Any:
    """The Dask example as a module."""
    pytest.importorskip("distributed")
    spec = importlib.util.spec_from_file_location("dask_batch", EXAMPLES / "dask_batch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server(dask_batch: Any) -> Iterator[str]:
    """The MLflow server that the Dask example starts."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("MLFLOW_TRACKING_URI", raising=False)
        with dask_batch.tracking_server() as uri:
            yield uri


def test_dask_batch(store: Store, server: str) -> None:
    printed = run("dask_batch.py", store, uri=server)
    mlflow.set_tracking_uri(server)
    trace = mlflow.get_trace(printed.split()[1].rstrip(":"))
    assert trace.info.state.value == "OK"
    (root,) = named(trace, "batch")
    assert (root.parent_id, status(root)) == (None, "OK")
    assert root.outputs == {"processed_count": 20, "sum": 2470.0}
    scores = named(trace, "score")
    assert sorted(span.inputs["item"] for span in scores) == list(range(20))
    assert {span.parent_id for span in scores} == {root.span_id}
    squares = named(trace, "square")
    assert sorted(s.parent_id for s in squares) == sorted(s.span_id for s in scores)
    assert "41 spans: {'batch': 1" in printed


def test_a_dask_worker_dies_in_the_middle_of_a_batch(
    store: Store, server: str, tmp_path: Path
) -> None:
    from distributed import Client, LocalCluster

    mlflow.set_tracking_uri(server)
    marker = tmp_path / "killed"
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        with spanguard.traced_span("batch") as root:
            work = spanguard.carry(jobs.killed_once)
            client.gather(client.map(work, range(20), marker=str(marker)))
    assert marker.exists()
    assert spanguard.flush(60)
    trace = mlflow.get_trace(root.trace_id)
    assert trace.info.state.value == "OK"
    (found,) = named(trace, "batch")
    assert (found.parent_id, status(found)) == (None, "OK")
    # A job whose result was lost with the worker ran twice, and is there twice.
    assert {span.inputs for span in named(trace, "job")} == set(range(20))
    assert {span.parent_id for span in named(trace, "job")} == {root.span_id}


def test_custom_ids(store: Store) -> None:
    printed = run("custom_ids.py", store)
    traces = {trace.info.tags["mlflow.traceName"]: trace for trace in store.traces()}
    assert len(traces) == 4
    (shipped,) = named(traces.pop("ship"), "ship")
    first, again, second = (traces[order] for order in sorted(traces))
    for trace, customer in ((first, "ada"), (second, "bob")):
        order = trace.info.tags["custom_trace_id"]
        (root,) = named(trace, order)
        assert trace.info.trace_id == spanguard.trace_id_for(order)
        assert trace.info.trace_metadata["mlflow.trace.user"] == customer
        assert (status(root), root.outputs) == ("OK", "paid")
        (reserved,) = named(trace, "reserve stock")
        assert reserved.parent_id == root.span_id
    order = first.info.tags["custom_trace_id"]
    again_id = again.info.tags["custom_trace_id"]
    assert re.fullmatch(f"{order}_[0-9a-f]{{8}}", again_id)
    assert shipped.parent_id is None
    assert f"placed again as: {again_id}" in printed
    assert f"{order!r} is in use" in printed
    # The process that knew nothing but the order's number.
    assert f"{order} is {first.info.trace_id}, of ada" in printed
    assert "reserve stock" in printed


def test_guard_existing_code(store: Store) -> None:
    printed = run("guard_existing_code.py", store)
    assert "raw: 0 readable traces" in printed
    assert "guarded: 1 readable trace" in printed
    assert "nested: 1 readable trace" in printed
    assert "told: Span 'order A2'" in printed
    guarded, nested = finished(store)
    assert [len(guarded.data.spans), len(nested.data.spans)] == [7, 8]
    for trace in (guarded, nested):
        (orders,) = named(trace, "orders")
        assert (status(orders), orders.outputs) == ("OK", {"total": 11.0})
        (invalid,) = named(trace, "order A2")
        assert (status(invalid), outcome(invalid)) == ("ERROR", "ok")
        (leaked,) = (s for s in named(trace, "validate") if s.parent_id == invalid.span_id)
        assert (status(leaked), outcome(leaked)) == ("ERROR", "orphaned")
        assert "guard_existing_code.py" in leaked.get_attribute("spanguard.opened_at")
    (request,) = named(nested, "request")
    assert named(nested, "orders")[0].parent_id == request.span_id


def test_fastapi_app(store: Store) -> None:
    printed = run("fastapi_app.py", store)
    tea, rain, nothing, ratio = store.traces()
    roots = [named(trace, trace.info.tags["mlflow.traceName"])[0] for trace in store.traces()]
    assert [root.name for root in roots[:3]] == ["GET /answers/{topic}"] * 3
    assert roots[3].name == "GET /ratio/{whole}/{part}"
    found = [(status(root), outcome(root)) for root in roots]
    assert found == [("OK", "ok"), ("OK", "closed_early"), ("OK", "ok"), ("ERROR", "error")]
    codes = [root.get_attribute("http.response.status_code") for root in roots]
    assert codes == [200, 200, 404, 500]
    for trace, root in zip((tea, rain), roots, strict=False):
        inside = [span for span in trace.data.spans if span.span_id != root.span_id]
        assert {span.parent_id for span in inside} == {root.span_id}
        assert [len(named(trace, name)) for name in ("look up", "generate", "note")] == [1, 1, 1]
    assert outcome(named(tea, "generate")[0]) == "ok"
    # Starlette cancels it where it awaits, and drops it where it does not.
    assert outcome(named(rain, "generate")[0]) in ("cancelled", "closed_early")
    assert [span.name for span in nothing.data.spans if span.parent_id] == ["look up"]
    assert named(ratio, "divide")[0].get_attribute("error_type") == "ZeroDivisionError"
    for trace in store.traces():
        assert f"request {trace.info.client_request_id}" in printed
    assert "200 /health: '\"fine\"', request None" in printed


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_how_to_run_it(path: Path) -> None:
    program = "pytest" if path.name.startswith("test_") else "python"
    assert f"{program} examples/{path.name}" in path.read_text(encoding="utf-8")
