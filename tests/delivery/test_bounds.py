"""Stores that are down, slow or refuse: nothing waits for them, and all is counted."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
import pytest

import spanguard
from spanguard import traced_span
from spanguard._delivery import deliver, retries, writer
from tests.delivery.test_deliver import names_of, two_spans
from tests.servers import answering, hung
from tests.store import Store


@contextmanager
def locked(store: Store) -> Iterator[None]:
    """Keep everybody else from writing to a store."""
    connection = sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


@pytest.mark.usefixtures("delivering")
def test_a_store_that_is_locked_for_a_while_loses_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spanguard._mlflow import sql_delivery

    monkeypatch.setattr(sql_delivery, "_PRAGMAS", ("foreign_keys = ON", "busy_timeout = 100"))
    two_spans(0)
    assert spanguard.flush(30)
    with locked(store):
        for number in range(1, 20):
            two_spans(number)
        assert not spanguard.delivery().stored > 1
        with pytest.warns(spanguard.SpanguardWarning, match="has not taken all"):
            assert not spanguard.flush(1)
        assert "locked" in str(spanguard.delivery().last_error)
    assert len(store.traces()) == 20
    assert spanguard.delivery().stored == 20


def test_what_is_too_much_is_dropped_and_counted(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with hung() as uri:
        mlflow.set_tracking_uri(uri)
        spanguard.deliver(interval_seconds=0.05, max_pending_bytes=100_000, batch_traces=2)
        for number in range(40):
            two_spans(number)
        # It looks now and then, and drops one after the other: so till it is within its bounds.
        await_true(lambda: spanguard.delivery().pending * 9_000 < 120_000)
        assert spanguard.delivery().dropped > 20
        report = spanguard.delivery()
        assert report.recorded == 40
        assert report.stored == report.refused == report.spilled == 0
        assert report.pending * 9_000 < 120_000
        told = [record for record in caplog.records if "was dropped" in record.message]
        assert len(told) == 1


def await_true(condition: object, seconds: float = 30) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, spanguard.delivery()
        time.sleep(0.02)


@pytest.mark.parametrize("status", [401, 403, 400])
def test_a_server_that_refuses_is_not_asked_again(status: int, store: Store) -> None:
    with answering(status) as uri:
        mlflow.set_tracking_uri(uri)
        spanguard.deliver(interval_seconds=0.05)
        two_spans()
        with pytest.warns(spanguard.SpanguardWarning, match="not in the store"):
            assert not spanguard.flush(30)
        report = spanguard.delivery()
        assert (report.refused, report.pending) == (1, 0)
        assert report.last_error


def test_a_trace_that_the_store_refuses_does_not_cost_the_others(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    spanguard.deliver(interval_seconds=0.5)
    client = mlflow.MlflowClient()
    for number in range(10):
        two_spans(number)
    poison = client.start_trace("poison")
    client.end_trace(poison.trace_id)
    # A lone surrogate, past all that would clean it: SQLite takes no such text.
    from mlflow.tracing.trace_manager import InMemoryTraceManager

    with InMemoryTraceManager.get_instance().get_trace(poison.trace_id) as trace:
        assert trace is not None
        trace.info.tags["odd"] = "\ud800"
    for number in range(10, 20):
        two_spans(number)
    with pytest.warns(spanguard.SpanguardWarning, match="1 traces are not in the store"):
        assert not spanguard.flush(60)
    assert {names_of(trace)[0] for trace in store._readable()} == {f"root-{n}" for n in range(20)}
    report = spanguard.delivery()
    assert (report.stored, report.refused, report.pending) == (20, 1, 0)


def test_another_destination_does_not_wait_for_one_that_is_down(store: Store) -> None:
    spanguard.deliver(interval_seconds=0.05)
    with hung() as uri:
        mlflow.set_tracking_uri(uri)
        two_spans(1)
        await_true(lambda: spanguard.delivery().pending == 1)
        mlflow.set_tracking_uri(store.uri)
        two_spans(2)
        await_true(lambda: spanguard.delivery().stored == 1)


def test_where_it_cannot_work_it_says_so_once_and_mlflow_delivers(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/files")
    with pytest.warns(spanguard.SpanguardWarning, match="leaves the delivery to MLflow") as told:
        spanguard.deliver()
        two_spans(1)
        two_spans(2)
    assert sum("leaves the delivery" in str(one.message) for one in told) == 1
    assert spanguard.flush(60)
    assert len(mlflow.search_traces(locations=["0"], return_type="list")) == 2


@pytest.mark.parametrize(
    "given",
    [
        {"max_pending_bytes": 0},
        {"max_pending_bytes": "much"},
        {"batch_traces": 1.5},
        {"interval_seconds": -1},
        {"interval_seconds": float("nan")},
        {"durable": True},
    ],
)
def test_arguments_that_make_no_sense_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        spanguard.deliver(**given)  # type: ignore[call-overload]


def test_a_writer_that_has_nothing_to_do_ends_its_thread(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_IDLE_SECONDS", 0.1)
    spanguard.deliver(interval_seconds=0.05)
    two_spans(1)
    assert spanguard.flush(30)
    assert deliver._intake is not None
    (thread,) = (one._thread for one in deliver._intake.writers)
    await_true(lambda: thread is None or not thread.is_alive())
    with traced_span("again"):
        pass
    assert len(store.traces()) == 2


def test_asking_again_draws_nothing_of_what_the_user_draws() -> None:
    hurry, asked = threading.Event(), []
    hurry.set()

    def fail() -> None:
        asked.append(1)
        raise ConnectionError

    before = random.getstate()
    with pytest.raises(ConnectionError):
        retries.retrying(hurry, lambda: len(asked) > 3)(fail)
    assert len(asked) > 3
    assert random.getstate() == before
