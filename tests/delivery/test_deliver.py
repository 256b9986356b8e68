"""With `deliver()`, every trace arrives: of a burst, of any API, whatever happens meanwhile."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import traced_span
from spanguard._delivery import intake
from spanguard._mlflow import ids
from tests.delivery.test_rows import store_at
from tests.processes import run_script
from tests.store import Store

pytestmark = pytest.mark.versions


def two_spans(number: int = 0) -> None:
    with traced_span(f"root-{number}", inputs={"number": number}):
        with traced_span("child"):
            pass


@pytest.mark.usefixtures("delivering")
def test_a_burst_of_several_threads_arrives_whole(store: Store) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(two_spans, range(1_200)))
    traces = store.traces()
    assert len(traces) == 1_200
    assert all(len(trace.data.spans) == 2 for trace in traces)
    report = spanguard.delivery()
    assert (report.recorded, report.stored, report.pending) == (1_200, 1_200, 0)
    assert (report.spilled, report.dropped, report.refused) == (0, 0, 0)


@pytest.mark.usefixtures("delivering")
def test_spans_of_every_api_go_the_same_way(store: Store, client: mlflow.MlflowClient) -> None:
    root = client.start_trace("raw")
    child = client.start_span("child of raw", root.trace_id, root.span_id)
    client.end_span(root.trace_id, child.span_id)
    client.end_trace(root.trace_id)
    with mlflow.start_span("fluent"), mlflow.start_span("child of fluent"):
        pass
    two_spans()
    found = store.spans()
    assert found.keys() == {
        *("raw", "child of raw", "fluent", "child of fluent", "root-0", "child"),
    }
    assert spanguard.delivery().stored == 3


@pytest.mark.usefixtures("delivering")
def test_mlflows_own_flush_waits_for_it(store: Store) -> None:
    two_spans()
    mlflow.flush_trace_async_logging()
    assert spanguard.delivery().stored == 1
    assert len(store.traces(flush=False)) == 1


@pytest.mark.usefixtures("delivering")
def test_what_has_ended_of_a_trace_that_goes_on_is_stored_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "PART_SECONDS", 0.1)
    with traced_span("root"):
        with traced_span("first"):
            pass
        await_rows(store, ["first"])
        with traced_span("second"):
            pass
    assert store.spans().keys() == {"root", "first", "second"}
    assert spanguard.delivery().stored == 1


def await_rows(store: Store, names: list[str]) -> None:
    deadline = time.monotonic() + 30
    while names_in(store) != names:
        assert time.monotonic() < deadline, names_in(store)
        time.sleep(0.02)


def names_in(store: Store) -> list[str]:
    import sqlite3

    with sqlite3.connect(store.path) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM spans ORDER BY name")]


@pytest.mark.usefixtures("delivering")
def test_a_trace_that_another_thread_has_children_in_is_stored_whole(store: Store) -> None:
    with traced_span("root"):
        context = spanguard.capture()

        def work() -> None:
            with context.attach(), traced_span("elsewhere"):
                time.sleep(0.3)

        thread = threading.Thread(target=work)
        thread.start()
    thread.join()
    assert store.spans().keys() == {"root", "elsewhere"}


@pytest.mark.usefixtures("delivering")
def test_a_destination_that_changes_gets_what_was_meant_for_it(
    tmp_path: Path, template: Path, store: Store
) -> None:
    two_spans(1)
    other = store_at(tmp_path / "other", template)
    two_spans(2)
    mlflow.set_experiment("another")
    two_spans(3)
    assert {trace.info.tags["mlflow.traceName"] for trace in Store(other).traces()} == {
        "root-2",
        "root-3",
    }
    mlflow.set_tracking_uri(store.uri)
    assert [trace.info.tags["mlflow.traceName"] for trace in store.traces()] == ["root-1"]
    assert spanguard.delivery().stored == 3


@pytest.mark.usefixtures("delivering")
def test_going_back_to_mlflow_loses_nothing(store: Store) -> None:
    with traced_span("open"):
        with traced_span("ended"):
            pass
        two_spans(1)
        spanguard.deliver(None)
    two_spans(2)
    assert {span for trace in store.traces() for span in names_of(trace)} >= {
        *("open", "ended", "root-1", "root-2"),
    }
    assert len(store.traces()) == 2


def names_of(trace: Any) -> list[str]:
    return [span.name for span in trace.data.spans]


def test_what_had_ended_before_arrives_too(store: Store) -> None:
    two_spans(1)
    with traced_span("open"):
        with traced_span("ended"):
            pass
        spanguard.deliver(interval_seconds=0.05)
    assert {name for trace in store.traces() for name in names_of(trace)} == {
        *("root-1", "child", "open", "ended"),
    }


@pytest.mark.usefixtures("delivering")
def test_a_trace_whose_id_the_store_has_does_not_cost_the_others(
    store: Store, client: mlflow.MlflowClient
) -> None:
    for name in ("first", "second"):
        with ids.trace_id_chosen("5" * 32):
            client.end_trace(client.start_trace(name).trace_id)
        assert spanguard.flush(30)
    two_spans()
    assert spanguard.flush(30)
    assert len(store.traces()) == 2
    report = spanguard.delivery()
    assert (report.stored, report.refused) == (3, 0)


def run(script: str, store: Store, **environment: str) -> None:
    done = run_script(script, store, **environment)
    assert done.returncode == 0, done.stderr


def test_a_forked_child_delivers_its_own(store: Store) -> None:
    run(
        """
        import os, mlflow, spanguard
        from spanguard import traced_span
        spanguard.deliver()
        with traced_span("parent before"): pass
        child = os.fork()
        if not child:
            with traced_span("child"): pass
            assert spanguard.flush(30), spanguard.delivery()
            assert spanguard.delivery().stored == 1
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with traced_span("parent after"): pass
        """,
        store,
    )
    assert store.spans().keys() == {"parent before", "child", "parent after"}


def test_the_exit_stores_what_is_left(store: Store) -> None:
    run(
        """
        from spanguard import traced_span
        for number in range(500):
            with traced_span("root"), traced_span("child"): pass
        """,
        store,
        SPANGUARD_DELIVER="1",
    )
    traces = store.traces()
    assert len(traces) == 500
    assert all(len(trace.data.spans) == 2 for trace in traces)


def test_without_deliver_the_counts_are_what_mlflow_lets_us_see(store: Store) -> None:
    before = spanguard.delivery()
    two_spans()
    assert spanguard.flush(30)
    after = spanguard.delivery()
    assert after.stored == before.stored + 1
    assert after.pending == 0


@pytest.mark.usefixtures("delivering")
def test_a_trace_that_is_open_when_the_destination_changes_arrives_where_it_began(
    store: Store, tmp_path: Path, template: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """MLflow alone loses it, or its root (test_mlflow_contract.py)."""
    other = tmp_path / "other.db"
    shutil.copy(template, other)
    with traced_span("root"):
        with traced_span("before"):
            pass
        mlflow.set_tracking_uri(f"sqlite:///{other}")
        with traced_span("after"):
            pass
    assert spanguard.flush(30)
    assert Store(other).rows() == 0
    assert not [one for one in recwarn if "may be lost" in str(one.message)]
    mlflow.set_tracking_uri(store.uri)
    assert store.spans().keys() == {"root", "before", "after"}


def test_who_does_not_use_it_does_not_import_it(store: Store) -> None:
    run(
        """
        import sys, spanguard
        loaded = [name for name in ("sqlalchemy", "tenacity") if name in sys.modules]
        assert not loaded, loaded
        """,
        store,
    )
