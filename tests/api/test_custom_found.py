"""Custom traces are found by their ids, in the store and from other processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import mlflow
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import spanguard
from spanguard import CustomTraceManager, current_span, trace_id_for, traced_span
from spanguard._base import findings
from spanguard._mlflow import store as _store
from spanguard.exceptions import DuplicateTraceIdWarning
from tests.lifecycle.asked_store import asking, locked, named
from tests.store import Store, await_true, outcome, status

# -- finding -----------------------------------------------------------------------------------


def test_a_trace_is_found_once_it_has_ended(store: Store) -> None:
    manager = CustomTraceManager()
    assert manager.find_trace("order") is None
    manager.start_custom_trace("ada", "x", custom_trace_id="order")
    assert manager.find_trace("order") is None, "it is open: the store does not have it"
    manager.end_custom_trace("order")
    found = manager.find_trace("order")  # without a flush
    assert found is not None
    assert found.info.trace_id == trace_id_for("order")
    assert (manager.find_trace("ord"), manager.find_trace("")) == (None, None)


def test_a_trace_that_another_tool_tagged_is_found(store: Store) -> None:
    experiment = mlflow.MlflowClient().create_experiment("another")
    with traced_span("raw", experiment_id=experiment, tags={"custom_trace_id": "order 7"}) as raw:
        pass
    with traced_span("similar", tags={"custom_trace_id": "order_7"}):
        pass
    assert spanguard.flush(60)
    found = CustomTraceManager().find_trace("order 7")
    assert found is not None
    assert found.info.trace_id == raw.trace_id


def test_a_store_that_fails_finds_nothing_and_says_so(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    findings.reraise_internal = False
    (store.path.parent / "broken.db").write_text("this is no database")
    mlflow.set_tracking_uri(f"sqlite:///{store.path.parent / 'broken.db'}")
    try:
        assert CustomTraceManager(strict=True).find_trace("order") is None
    finally:
        mlflow.set_tracking_uri(store.uri)
    assert "finding a trace by its custom id failed" in caplog.text


def test_a_store_that_does_not_answer_is_read_for_a_bounded_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CustomTraceManager()
    with manager.custom_trace("ada", "x", custom_trace_id="order"):
        pass
    assert spanguard.flush(60)
    monkeypatch.setattr(_store, "READ_SECONDS", 0.2)
    with locked(store):
        assert manager.find_trace("order") is None
    await_true(lambda: not asking())
    monkeypatch.setattr(_store, "READ_SECONDS", 30.0)
    assert manager.find_trace("order") is not None


HOSTILE_IDS = {
    "single quotes": "it's 'quoted'",
    "double quotes": 'say "hi"',
    "both quotes": "'\"`\"'",
    "an injection": "' OR tags.x = 'y",
    "backslashes": "a\\' \\\\ \\",
    "newlines": "line 1\nline 2\r\n\t",
    "a comment": "a -- b /* c */ # d",
    "a statement": "a; drop table trace_info;",
    "wildcards": "100%_[a-z]*?",
    "other scripts": "Zürich 日本語 🦉 עברית e\u0301",
    "surrogate": "a\udc80b\ud800",
    "nul": "a\x00b",
    "blanks": "  a  ",
    "51 characters": "x" * 51,
    "4001 characters": "y" * 4_001,
    "10000 characters": "z'\n" * 3_333 + "z",
}


def test_ids_of_any_kind_are_stored_and_found(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    # Each beside one that is nearly the same.
    ids = [custom_id + end for custom_id in HOSTILE_IDS.values() for end in ("", "'")]
    for custom_id in ids:
        manager.start_custom_trace("ada", "x", custom_trace_id=custom_id)
        assert manager.get_active_trace(custom_id) is not None
    for custom_id in ids:
        manager.end_custom_trace(custom_id)
    assert spanguard.flush(60)
    for custom_id in ids:
        assert_found(manager, custom_id)
    assert len(store.traces()) == len(ids)


def assert_found(manager: CustomTraceManager, custom_id: str) -> None:
    written = custom_id.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")
    found = manager.find_trace(custom_id)
    assert found is not None
    assert found.info.trace_id == trace_id_for(custom_id)
    assert found.data.spans[0].get_attribute("custom_trace_id") == written
    assert len(found.info.client_request_id) <= 50
    if len(written) <= 50:
        assert found.info.client_request_id == written
    else:
        assert found.info.client_request_id == trace_id_for(custom_id)
    label = found.info.tags["custom_trace_id"]
    assert label == found.info.tags["mlflow.traceName"]
    assert label == written if len(written) <= 4_000 else len(label) <= 4_000
    by_tag = _store.find_by_tag("custom_trace_id", label)
    assert by_tag is not None
    assert by_tag.info.trace_id == found.info.trace_id


@settings(
    max_examples=12,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(custom_ids=st.sets(st.text(st.characters(), min_size=1), min_size=1, max_size=5))
def test_any_texts_are_ids(store: Store, custom_ids: set[str]) -> None:
    manager = CustomTraceManager()
    started: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DuplicateTraceIdWarning)  # of an earlier example's ids
        for custom_id in custom_ids:
            with manager.custom_trace("ada", "x", custom_trace_id=custom_id) as span:
                started[span.get_attribute("custom_trace_id")] = span.trace_id
    assert len(started) == len(custom_ids)
    assert spanguard.flush(60)
    for custom_id, trace_id in started.items():
        assert trace_id == trace_id_for(custom_id)
        assert_found(manager, custom_id)
    assert (current_span(), dict(manager.active_traces)) == (None, {})


# -- other processes ---------------------------------------------------------------------------


def run(script: str, store: Store) -> str:
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": store.uri,
        "PYTHONPATH": str(Path(spanguard.__file__).parent.parent),
        "PYTHONIOENCODING": "utf-8",
    }
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_a_trace_of_another_process_is_found_and_its_id_in_use(store: Store) -> None:
    printed = run(
        """
        from spanguard import CustomTraceManager, traced_span

        manager = CustomTraceManager()
        with manager.custom_trace("ada", "checkout", custom_trace_id="it's order 42") as span:
            with traced_span("charge"):
                pass
        print(span.trace_id)
        """,
        store,
    )
    manager = CustomTraceManager()
    found = manager.find_trace("it's order 42")
    assert found is not None
    assert {span.name for span in found.data.spans} == {"it's order 42", "charge"}
    # By the derived id, with MLflow alone; by the tag; by the client's request id.
    assert trace_id_for("it's order 42") == printed.strip() == found.info.trace_id
    by_id = mlflow.get_trace(trace_id_for("it's order 42"))
    assert by_id.info.trace_id == found.info.trace_id
    for filter_string in (
        'tags.custom_trace_id = "it\'s order 42"',
        'client_request_id = "it\'s order 42"',
    ):
        (by_search,) = mlflow.MlflowClient().search_traces(
            locations=["0"], filter_string=filter_string
        )
        assert by_search.info.trace_id == found.info.trace_id
    # A second run under the same id is another trace, or refused.
    with pytest.raises(spanguard.DuplicateTraceIdError):
        CustomTraceManager(strict=True).start_custom_trace(
            "ada", "checkout", custom_trace_id="it's order 42"
        )
    with pytest.warns(DuplicateTraceIdWarning):
        with manager.custom_trace("ada", "checkout", custom_trace_id="it's order 42"):
            pass
    assert len(store.traces()) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_takes_no_id_of_its_parents(store: Store) -> None:
    run(
        """
        import os, warnings
        from spanguard import CustomTraceManager, flush
        from spanguard.exceptions import DuplicateTraceIdWarning

        warnings.simplefilter("ignore", DuplicateTraceIdWarning)
        manager = CustomTraceManager()
        manager.start_custom_trace("ada", "x", custom_trace_id="order")
        (ended, end), (stored, store) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.close(store)
            assert dict(manager.active_traces) == {}
            span = manager.start_custom_trace("ada", "x", custom_trace_id="order")
            manager.end_custom_trace(span.name)
            flush()
            os.write(end, b"x")
            os.read(stored, 1)
            assert manager.find_trace("order") is not None
            os._exit(0)
        os.close(end)
        os.read(ended, 1)
        manager.end_custom_trace("order")
        flush()
        os.write(store, b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """,
        store,
    )
    traces = named(store)
    assert len(traces) == 2
    assert "order" in traces
    assert all(len(trace.data.spans) == 1 for trace in traces.values())


def test_what_is_left_open_at_exit_is_found(store: Store) -> None:
    run(
        """
        from spanguard import CustomTraceManager

        manager = CustomTraceManager()
        manager.start_custom_trace("ada", "x", custom_trace_id="order", amount=3)
        """,
        store,
    )
    found = CustomTraceManager().find_trace("order")
    assert found is not None
    (root,) = found.data.spans
    assert (status(root), outcome(root)) == ("ERROR", "orphaned")
    assert root.get_attribute("spanguard.orphaned_by") == "exit"
    assert (root.get_attribute("amount"), found.info.tags["custom_trace_id"]) == (3, "order")
