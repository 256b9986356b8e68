"""The examples run as a user runs them, in a process of their own; the store shows the result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.entities import Span, Trace

import spanguard
from tests.store import Store, outcome, status

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, store: Store) -> str:
    """Run an example against the test's store and return what it printed."""
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": store.uri,
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
    tested = {"quickstart.py", "long_lived_app.py", "migrate_from_raw_client.py"}
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


def test_migrate_from_raw_client(store: Store) -> None:
    printed = run("migrate_from_raw_client.py", store)
    assert "before: 0 readable traces" in printed
    assert "after: 1 readable trace" in printed
    trace = store.trace()
    assert trace.info.tags["label"].startswith("after-")
    (slow,) = named(trace, "fetch slow")
    assert (status(slow), outcome(slow)) == ("ERROR", "cancelled")
    for page in ("index", "news"):
        (fetched,) = named(trace, f"fetch {page}")
        assert (status(fetched), fetched.outputs) == ("OK", f"<h1>{page}</h1>")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_how_to_run_it(path: Path) -> None:
    assert f"python examples/{path.name}" in path.read_text(encoding="utf-8")
