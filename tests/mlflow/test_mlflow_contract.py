"""What MLflow does without spanguard: the raw problem beside each promise, and the seams we use.

Nothing here goes through spanguard. A test that fails after an upgrade of MLflow says that MLflow
changed: the promise beside it, or the seam that `spanguard._mlflow` stands on, is to be looked at.
Measured on MLflow 3.10.1 and 3.17.2, the oldest and the newest we support, on SQLite.
"""

from __future__ import annotations

import asyncio
import builtins
import contextvars
import inspect
import json
import os
import random
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient, MlflowException
from mlflow.entities import LiveSpan, NoOpSpan, SpanEvent, SpanStatus, SpanStatusCode, Trace
from mlflow.environment_variables import (
    MLFLOW_TRACE_BUFFER_MAX_SIZE,
    MLFLOW_TRACE_BUFFER_TTL_SECONDS,
)
from mlflow.tracing import provider
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import TraceJSONEncoder
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from packaging.version import Version

from tests.store import Store, await_true, own_attributes, status

pytestmark = pytest.mark.versions

VERSION = Version(mlflow.__version__)
# Ended spans wait in a queue for a thread. Before: the thread that ends a span writes it.
BATCHING = Version("3.12") <= VERSION
# A root that ended waits for its open children. Before: it is written at once, without them.
DEFERRAL = Version("3.14") <= VERSION
# A span gets a log level when it ends: one attribute more, and exceptions raise it.
LOG_LEVELS = hasattr(LiveSpan, "set_log_level")
# For what differs between the two measured versions, at a version in between that we don't know.
NEWEST = BATCHING

BASE_EXCEPTIONS: list[type[BaseException]] = [
    KeyboardInterrupt,
    SystemExit,
    GeneratorExit,
    asyncio.CancelledError,
]
SURROGATE = "a\ud800b"


@pytest.fixture(autouse=True)
def _in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export when a test flushes, in one batch and one thread: so nothing is a matter of luck."""
    monkeypatch.setenv("MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS", "60000")
    monkeypatch.setenv("MLFLOW_ASYNC_TRACE_LOGGING_MAX_WORKERS", "1")


# -- helpers -----------------------------------------------------------------------------------


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no str")


def circular() -> object:
    value: dict[str, object] = {}
    value["self"] = value
    return value


def deep() -> object:
    value: list[object] = []
    for _ in range(100_000):
        value = [value]
    return value


HOSTILE: dict[str, Callable[[], object]] = {
    "raising repr": Unprintable,
    "circular": circular,
    "deep": deep,
    "more digits than str() allows": lambda: 10**5000,
}


def child_of(parent: Any, name: str = "child", **kwargs: Any) -> Any:
    return MlflowClient().start_span(name, parent.trace_id, parent.span_id, **kwargs)


def end(span: Any, **kwargs: Any) -> None:
    MlflowClient().end_span(span.trace_id, span.span_id, **kwargs)


def is_open(span: Any) -> bool:
    return span.end_time_ns is None


def name_of(trace: Trace) -> str | None:
    return trace.info.tags.get("mlflow.traceName")


def state_of(trace: Trace) -> str:
    return str(trace.info.state.value)


def names(traces: list[Trace]) -> list[str]:
    return sorted(span.name for trace in traces for span in trace.data.spans)


def by_root(store: Store) -> dict[str, Trace]:
    """Return the readable traces by the name of their root span."""
    found = {}
    for trace in store.what_is_left():
        (root,) = (span for span in trace.data.spans if span.parent_id is None)
        found[root.name] = trace
    return found


def left_at_exit(store: Store) -> list[Trace]:
    """Return the traces that are readable once MLflow shut down, as it does at a clean exit."""
    store.traces()
    mlflow.tracing.reset()
    return store.traces(flush=False)


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def stored_spans(path: Path) -> list[str]:
    """Return the names of the spans in the database, of readable traces or not."""
    return sorted(name for (name,) in rows(path, "select name from spans"))


def stored_traces(path: Path) -> list[tuple[str, str]]:
    """Return id and state of the traces in the database, readable or not."""
    return rows(path, "select request_id, status from trace_info")


def in_a_process(store: Store, script: str, **env: str) -> list[str]:
    """Run a script that ends by itself in a Python of its own; return the lines it printed."""
    prelude = "import mlflow\nclient = mlflow.MlflowClient()\n"
    if sys.version_info[:2] == (3, 12):
        # 3.12.1 starts no threads at exit: MLflow alone then stores nothing of the last seconds.
        prelude += (
            "client.end_trace(client.start_trace('first').trace_id)\n"
            "mlflow.flush_trace_async_logging()\nclient.delete_traces('0', max_timestamp_millis="
            "2**53)\n"
        )
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        env={**os.environ, "MLFLOW_TRACKING_URI": store.uri, **env},
        cwd=store.path.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# -- closing -----------------------------------------------------------------------------------


def test_one_child_left_open_loses_the_whole_trace_at_exit(store: Store) -> None:
    assert "they will be ended forcefully" in str(MlflowClient.end_trace.__doc__)
    (trace_id,) = in_a_process(
        store,
        """
        root = client.start_trace("root", tags={"env": "test"})
        done = client.start_span("done", root.trace_id, root.span_id)
        client.end_span(root.trace_id, done.span_id)
        client.start_span("left open", root.trace_id, root.span_id)
        client.end_trace(root.trace_id)
        print(root.trace_id)
        """,
    )
    assert stored_traces(store.path) == [(trace_id, "OK")]
    assert stored_spans(store.path) == ["done", "root"]
    assert store.traces() == []
    assert mlflow.get_trace(trace_id) is None
    # Only a list without the spans still shows it, as if all were well.
    (listed,) = mlflow.search_traces(include_spans=False, return_type="list")
    assert (name_of(listed), state_of(listed), listed.info.tags["env"]) == ("root", "OK", "test")


def test_ending_the_child_late_repairs_the_trace_only_where_the_root_waited(
    store: Store, client: MlflowClient
) -> None:
    root = client.start_trace("root", tags={"env": "test"})
    child = child_of(root)
    client.end_trace(root.trace_id)
    found = store.traces()
    # Where the root waits, its trace is visible meanwhile, but has no name and no tags.
    assert [name_of(trace) for trace in found] == ([None] if DEFERRAL else [])
    assert all("env" not in trace.info.tags for trace in found)
    end(child)
    if DEFERRAL:
        trace = store.trace()
        assert (name_of(trace), trace.info.tags["env"]) == ("root", "test")
        assert names([trace]) == ["child", "root"]
    else:
        assert is_open(child), "the trace left the memory with its root, so nothing was ended"
        assert store.traces() == []


def test_a_root_that_never_ends_is_stuck_in_progress_or_not_stored_at_all(store: Store) -> None:
    _, trace_id = in_a_process(
        store,
        """
        print(client.start_trace("alone").trace_id)
        root = client.start_trace("root", tags={"env": "test"})
        child = client.start_span("child", root.trace_id, root.span_id)
        client.end_span(root.trace_id, child.span_id)
        print(root.trace_id)
        """,
    )
    assert stored_traces(store.path) == [(trace_id, "IN_PROGRESS")]
    trace = store.trace()
    assert names([trace]) == ["child"]
    assert name_of(trace) is None
    assert "env" not in trace.info.tags


def test_a_span_started_after_the_end_breaks_the_finished_trace(
    store: Store, client: MlflowClient
) -> None:
    """As long as the export has not run, which by default takes up to five seconds."""
    root = client.start_trace("root")
    client.end_trace(root.trace_id)
    if BATCHING:
        assert isinstance(child_of(root), LiveSpan)
        assert left_at_exit(store) == []
        assert stored_spans(store.path) == ["root"]
    else:
        with pytest.raises(MlflowException, match="not found"):
            child_of(root)
        assert names(store.traces()) == ["root"]


def test_a_root_may_be_ended_as_a_span(store: Store, client: MlflowClient) -> None:
    root = client.start_trace("root")
    end(root)
    if BATCHING:
        client.end_trace(root.trace_id)  # not exported yet: silent
    trace = store.trace()
    assert (name_of(trace), state_of(trace)) == ("root", "OK")
    with pytest.raises(MlflowException, match="already finished"):
        client.end_trace(root.trace_id)


# -- status and exceptions ---------------------------------------------------------------------


def test_fluent_spans_record_an_interrupt_as_ok_and_without_an_event(store: Store) -> None:
    errors = [kind() for kind in BASE_EXCEPTIONS]
    group = getattr(builtins, "BaseExceptionGroup", None)  # Python 3.11
    if group is not None:
        errors.append(group("group", [KeyboardInterrupt()]))
    for error in errors:
        kind = type(error)

        def fail(error: BaseException = error) -> None:
            raise error

        with pytest.raises(kind):
            with mlflow.start_span(f"{kind.__name__} root"):
                with mlflow.start_span(f"{kind.__name__} child"):
                    fail()
        with pytest.raises(kind):
            mlflow.trace(fail, name=f"{kind.__name__} function")()
    spans = store.spans()
    assert len(spans) == 3 * len(errors)
    assert {status(span) for span in spans.values()} == {"OK"}
    assert not any(span.events for span in spans.values())


def test_the_documented_recipe_never_ends_the_span_of_an_interrupt(
    store: Store, client: MlflowClient
) -> None:
    left = []
    for kind in BASE_EXCEPTIONS:
        root = client.start_trace("root")
        span = child_of(root)
        with pytest.raises(kind):
            try:
                try:
                    raise kind
                except Exception as error:
                    end(span, status="ERROR", attributes={"error": str(error)})
                    raise
            finally:
                client.end_trace(root.trace_id)
        left.append(span)
    assert all(is_open(span) for span in left)
    assert left_at_exit(store) == []
    assert stored_spans(store.path) == ["root"] * len(BASE_EXCEPTIONS)


def test_record_exception_refuses_what_is_no_exception_but_an_event_takes_it(
    store: Store, client: MlflowClient
) -> None:
    root = client.start_trace("root")
    for kind in BASE_EXCEPTIONS:
        with pytest.raises(MlflowException, match="must be an Exception instance"):
            root.record_exception(kind())
        root.add_event(SpanEvent.from_exception(kind()))
    client.end_trace(root.trace_id)
    events = store.spans()["root"].events
    assert [event.attributes["exception.type"] for event in events] == [
        kind.__name__ for kind in BASE_EXCEPTIONS
    ]


def test_end_span_overwrites_the_recorded_error(store: Store, client: MlflowClient) -> None:
    root = client.start_trace("root")

    def failed(name: str) -> Any:
        span = child_of(root, name)
        span.record_exception(ValueError("boom"))
        assert (status(span), span.status.description) == ("ERROR", "ValueError: boom")
        return span

    end(failed("by default"))
    end(failed("ERROR"), status="ERROR")
    end(failed("None"), status=None)
    failed("LiveSpan.end").end()
    client.end_trace(root.trace_id)
    spans = store.spans()
    found = {name: (status(span), span.status.description) for name, span in spans.items()}
    assert found == {
        "root": ("OK", ""),
        "by default": ("OK", ""),
        "ERROR": ("ERROR", ""),
        "None": ("ERROR", "ValueError: boom"),
        "LiveSpan.end": ("ERROR", "ValueError: boom"),
    }
    assert state_of(store.trace()) == "OK"


def test_ok_is_final_for_opentelemetry(store: Store, client: MlflowClient) -> None:
    """Why spanguard writes `_status` itself where ERROR follows OK."""
    root = client.start_trace("root")
    root.set_status("OK")
    root.set_status(SpanStatus(SpanStatusCode.ERROR, "too late"))
    root.record_exception(ValueError("too late"))
    assert status(root) == "OK"
    client.end_trace(root.trace_id, status="ERROR")
    assert status(store.spans()["root"]) == "OK"

    other = client.start_trace("other")
    other.set_status("OK")
    other._span._status = otel.Status(otel.StatusCode.ERROR, "in time")
    other.end()
    assert status(store.spans()["other"]) == "ERROR"


def test_an_invalid_status_leaves_the_span_open_and_loses_the_trace(
    store: Store, client: MlflowClient
) -> None:
    for wrong in ("FAILED", "ok", 1):
        root = client.start_trace("root")
        child = child_of(root)
        end(child, status=wrong)
        assert is_open(child)
        with pytest.raises((MlflowException, AttributeError)):
            child.set_status(wrong)
        client.end_trace(root.trace_id)
    root = client.start_trace("root with it")
    client.end_trace(root.trace_id, status="FAILED")
    assert is_open(root)
    assert left_at_exit(store) == []
    assert stored_spans(store.path) == ["root"] * 3


def test_an_exception_that_cannot_be_printed_is_replaced(
    store: Store, client: MlflowClient
) -> None:
    with pytest.raises(RuntimeError, match="no str"):
        with mlflow.start_span("fluent"):
            raise UnprintableError
    root = client.start_trace("raw")
    with pytest.raises(RuntimeError, match="no str"):
        root.record_exception(UnprintableError())
    client.end_trace(root.trace_id)
    spans = store.spans()
    assert {name: status(span) for name, span in spans.items()} == {"fluent": "OK", "raw": "OK"}
    assert not any(span.events for span in spans.values())


def test_a_long_message_is_stored_whole_and_twice(store: Store, client: MlflowClient) -> None:
    root = client.start_trace("root")
    root.record_exception(ValueError("x" * 100_000))
    root.end()
    (event,) = store.spans()["root"].events
    assert event.attributes["exception.message"].count("x") == 100_000
    assert event.attributes["exception.stacktrace"].count("x") >= 100_000


@pytest.mark.skipif(not LOG_LEVELS, reason="spans have no log level in this MLflow")
def test_an_exception_event_raises_the_log_level_but_not_through_opentelemetry(
    store: Store, client: MlflowClient
) -> None:
    loud, quiet = client.start_trace("loud"), client.start_trace("quiet")
    event = SpanEvent.from_exception(ValueError("boom"))
    loud.add_event(event)
    quiet._span.add_event(event.name, event.attributes, event.timestamp)
    loud.end()
    quiet.end()
    spans = store.spans()
    levels = {name: span.get_attribute("mlflow.spanLogLevel") for name, span in spans.items()}
    assert levels["loud"] > levels["quiet"]
    assert {len(span.events) for span in spans.values()} == {1}


def test_more_than_128_events_push_out_the_oldest(store: Store, client: MlflowClient) -> None:
    root = client.start_trace("root")
    for number in range(130):
        root.add_event(SpanEvent(f"event {number}"))
    client.end_trace(root.trace_id)
    events = store.spans()["root"].events
    assert len(events) == 128
    assert events[0].name == "event 2"


# -- payloads ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_collection")  # some values reach the recursion limit
def test_outputs_that_cannot_be_written_keep_the_span_open(
    store: Store, client: MlflowClient
) -> None:
    for make in HOSTILE.values():
        root = client.start_trace("root")
        child = child_of(root)
        end(child, outputs={"value": make()})
        assert is_open(child)
        client.end_trace(root.trace_id)
    assert left_at_exit(store) == []
    assert stored_spans(store.path) == ["root"] * len(HOSTILE)


@pytest.mark.usefixtures("no_collection")  # some values reach the recursion limit
def test_inputs_that_cannot_be_written_give_a_noop_span_and_poison_the_trace(
    store: Store, client: MlflowClient
) -> None:
    for make in HOSTILE.values():
        assert isinstance(client.start_trace("root", inputs=make()), NoOpSpan)
        root = client.start_trace("root")
        child = child_of(root, inputs={"value": make()})
        assert isinstance(child, NoOpSpan)
        assert isinstance(child_of(child, "grandchild"), NoOpSpan)
        end(child)
        client.end_trace(root.trace_id)
        with InMemoryTraceManager.get_instance().get_trace(root.trace_id) as trace:
            # The no-op span hides a real one that nobody can end.
            hidden = [] if trace is None else [s.name for s in trace.span_dict.values()]
            assert hidden == (["root", "child"] if BATCHING else [])
    assert left_at_exit(store) == []
    assert stored_spans(store.path) == ["root"] * len(HOSTILE)


def test_the_trace_decorator_raises_over_arguments_and_the_function_never_runs(
    store: Store,
) -> None:
    ran = []

    @mlflow.trace
    def work(value: object) -> None:
        ran.append(value)

    with pytest.raises(RuntimeError, match="no repr"):
        work(Unprintable())
    assert ran == []
    assert status(store.spans()["work"]) == "ERROR"


def test_lone_surrogates_in_a_payload_lose_spans_or_the_trace(
    store: Store, client: MlflowClient
) -> None:
    in_child, in_root, innocent = (
        client.start_trace(name) for name in ("in child", "in root", "innocent")
    )
    end(child_of(in_child), outputs={"text": SURROGATE})
    for root in (in_child, innocent):
        client.end_trace(root.trace_id)
    client.end_trace(in_root.trace_id, outputs=SURROGATE)
    if BATCHING:
        # All that was exported in the same batch, the spans of innocent traces too. Those of a
        # trace that can be written at all go to files in place of the database.
        readable = by_root(store)
        assert list(readable) == ["innocent"]
        assert stored_spans(store.path) == []
    else:
        assert sorted(by_root(store)) == ["in child", "innocent"]
        assert stored_spans(store.path) == ["child", "in child", "innocent"]


def test_lone_surrogates_in_names_and_tags_lose_the_trace_or_its_tags(
    store: Store, client: MlflowClient
) -> None:
    root = client.start_trace("fine", tags={"env": "test", "text": SURROGATE})
    client.end_trace(root.trace_id)
    (trace,) = store.what_is_left()
    assert names([trace]) == ["fine"]
    assert name_of(trace) is None
    assert "env" not in trace.info.tags

    root = client.start_trace(SURROGATE)
    client.end_trace(root.trace_id)
    assert names(store.what_is_left()) == ["fine"]
    assert store.rows() == 1


def test_too_many_attributes_make_the_trace_unreadable(store: Store, client: MlflowClient) -> None:
    """OpenTelemetry keeps 128; MLflow needs its own, the oldest of which is the trace's id."""
    mlflows_own = ["mlflow.traceRequestId", "mlflow.spanType", "mlflow.spanInputs"]
    mlflows_own += ["mlflow.spanOutputs"] + ["mlflow.spanLogLevel"] * LOG_LEVELS
    fits = 128 - len(mlflows_own)
    assert fits == (123 if LOG_LEVELS else 124)

    def trace_with(count: int) -> str:
        attributes = {f"key {number}": number for number in range(count)}
        root = client.start_trace("root", inputs={"a": 1}, attributes=attributes)
        trace_id = str(root.trace_id)
        client.end_trace(trace_id, outputs={"b": 2})
        assert ("mlflow.traceRequestId" in root.attributes) is (count == fits)
        return trace_id

    trace_with(fits)
    assert len(own_attributes(store.spans()["root"])) == fits
    lost = trace_with(fits + 1)
    if NEWEST:  # the trace is listed, but reading its span fails
        found = {trace.info.trace_id: trace for trace in store.traces()}[lost]
        with pytest.raises(MlflowException, match="Failed to create a Span"):
            found.data.spans[0].attributes
    else:  # one such trace, and no trace of the experiment can be searched for
        with pytest.raises(MlflowException, match="Failed to create a Span"):
            store.traces()
        assert sorted(state for _, state in stored_traces(store.path)) == ["IN_PROGRESS", "OK"]


def test_a_reserved_attribute_overwrites_what_mlflow_needs(
    store: Store, client: MlflowClient
) -> None:
    root = client.start_trace(
        "payload", span_type="CHAIN", inputs={"a": 1}, attributes={"mlflow.spanType": "X"}
    )
    root.set_attribute("mlflow.spanInputs", "mine")
    client.end_trace(root.trace_id)
    span = store.spans()["payload"]
    assert (span.span_type, span.inputs) == ("X", "mine")


def test_a_reserved_trace_id_leaves_the_root_in_progress_for_ever(
    store: Store, client: MlflowClient
) -> None:
    wrong = {"mlflow.traceRequestId": "mine"}
    client.end_trace(client.start_trace("root", attributes=wrong).trace_id)
    trace = store.trace()
    assert (state_of(trace), names([trace])) == ("IN_PROGRESS", ["root"])

    parent = client.start_trace("parent")
    child = child_of(parent, attributes=wrong)
    client.end_span(parent.trace_id, child.span_id)
    client.end_trace(parent.trace_id)
    found = sorted((state_of(trace), names([trace])) for trace in store.traces())
    if NEWEST:  # no harm in a child
        assert found == [("IN_PROGRESS", ["root"]), ("OK", ["child", "parent"])]
    else:  # the child is stored as part of a trace that nobody started, and missing in its own
        assert found == [("IN_PROGRESS", ["child"]), ("IN_PROGRESS", ["root"])]
        assert ("mine", "IN_PROGRESS") in stored_traces(store.path)


def test_a_name_that_is_no_short_string_costs_the_name_the_tags_or_the_trace(
    store: Store, client: MlflowClient
) -> None:
    wrong = {"None": None, "7": 7, "long": "x" * 4097, "object": object()}
    for name in wrong.values():
        root = client.start_trace(name, tags={"env": "test"})
        client.end_trace(root.trace_id)
        store.what_is_left()  # each in a batch of its own
    found = {
        str(trace.data.spans[0].name)[:4]: (name_of(trace), trace.info.tags.get("env"))
        for trace in store.what_is_left()
    }
    lost = (None, None)
    assert found == {
        "None": (None, "test"),
        "7": lost if NEWEST else ("7", "test"),
        "xxxx": lost if NEWEST else ("x" * 4097, "test"),
    }
    assert store.rows() == 3


def test_tag_values_are_converted_by_sqlite(store: Store, client: MlflowClient) -> None:
    """Elsewhere they are not: a tracking server loses all tags of the trace."""
    root = client.start_trace("root", tags={"env": "test", "n": 7, "none": None})
    client.end_trace(root.trace_id)
    tags = store.trace().info.tags
    assert (tags["env"], tags["n"], tags["none"]) == ("test", "7", None)


def test_an_unknown_experiment_loses_the_trace(store: Store, client: MlflowClient) -> None:
    root = client.start_trace("root", experiment_id="999")
    assert isinstance(root, LiveSpan)
    client.end_trace(root.trace_id)
    assert store.rows() == 0
    with pytest.raises(MlflowException) as caught:
        client.get_experiment("999")
    assert caught.value.error_code == "RESOURCE_DOES_NOT_EXIST"


def test_times_are_not_checked(store: Store, client: MlflowClient) -> None:
    now = time.time_ns()
    root = client.start_trace("negative", start_time_ns=now)
    client.end_trace(root.trace_id, end_time_ns=now - 5_000_000_000)
    assert isinstance(client.start_trace("text", start_time_ns=str(now)), NoOpSpan)
    lost = client.start_trace("ends as text")
    client.end_trace(lost.trace_id, end_time_ns=str(now))
    assert lost.end_time_ns == str(now), "it has ended, but is never exported"
    (trace,) = store.what_is_left()
    assert (name_of(trace), trace.info.execution_duration) == ("negative", -5000)


def test_float_times_lose_precision(store: Store, client: MlflowClient) -> None:
    now = time.time_ns() // 2 * 2 + 1  # odd: no float has this value
    root = client.start_trace("float", start_time_ns=float(now))
    client.end_trace(root.trace_id, end_time_ns=float(now))
    start = store.spans()["float"].start_time_ns
    assert start != now
    assert abs(start - now) < 1000


def test_a_time_beyond_64_bits_keeps_spans_out_of_the_database(
    store: Store, client: MlflowClient
) -> None:
    root, innocent = client.start_trace("root"), client.start_trace("innocent")
    end(child_of(root), end_time_ns=2**63)
    client.end_trace(root.trace_id)
    client.end_trace(innocent.trace_id)
    if BATCHING:  # the whole batch: it goes to files, where no query finds a span
        assert sorted(by_root(store)) == ["innocent", "root"]
        assert stored_spans(store.path) == []
    else:
        assert sorted(by_root(store)) == ["innocent"]
        assert stored_spans(store.path) == ["innocent", "root"]


def test_payload_integers_beyond_64_bits_survive(store: Store, client: MlflowClient) -> None:
    big = 2**70
    root = client.start_trace("root", inputs=big, attributes={"plain": big, "deep": {"n": big}})
    root.add_event(SpanEvent("event", attributes={"n": big}))
    client.end_trace(root.trace_id)
    span = store.spans()["root"]
    assert span.inputs == big
    assert own_attributes(span) == {"plain": big, "deep": {"n": big}}
    assert span.events[0].attributes == {"n": big}


# -- order and ids -----------------------------------------------------------------------------


def test_ending_a_parent_before_its_child_is_silent(store: Store, client: MlflowClient) -> None:
    root = client.start_trace("root")
    parent = child_of(root, "parent")
    child = child_of(parent, "child")
    end(parent)
    late = child_of(parent, "under an ended span")
    end(late)
    end(child)
    client.end_trace(root.trace_id)
    spans = store.spans()
    assert {status(span) for span in spans.values()} == {"OK"}
    assert spans["child"].end_time_ns > spans["parent"].end_time_ns
    assert spans["under an ended span"].start_time_ns > spans["parent"].end_time_ns


def test_a_second_end_is_silent_and_drops_what_it_brings(
    store: Store, client: MlflowClient
) -> None:
    root = client.start_trace("root")
    child = child_of(root)
    end(child)
    ended_at = child.end_time_ns
    end(child, status="ERROR", outputs={"late": True})
    client.end_trace(root.trace_id)
    span = store.spans()["child"]
    assert (span.end_time_ns, status(span), span.outputs) == (ended_at, "OK", None)


def test_ending_an_unknown_span_is_silent_but_an_unknown_trace_raises(
    client: MlflowClient,
) -> None:
    root = client.start_trace("root")
    client.end_span(root.trace_id, "0123456789abcdef")
    client.end_span("tr-unknown", root.span_id)
    assert is_open(root)
    with pytest.raises(MlflowException, match="not found"):
        client.end_trace("tr-unknown")


def test_a_parent_that_is_none_unknown_or_foreign_raises_into_user_code(
    client: MlflowClient,
) -> None:
    root, foreign = client.start_trace("root"), client.start_trace("foreign")
    with pytest.raises(MlflowException, match="explicit parent_id"):
        client.start_span("child", root.trace_id, None)
    for parent_id in ("0123456789abcdef", foreign.span_id):
        with pytest.raises(MlflowException, match="not found"):
            client.start_span("child", root.trace_id, parent_id)


def test_the_same_random_seed_repeats_the_trace_id_and_the_second_trace_replaces_the_first(
    store: Store,
) -> None:
    ids = in_a_process(
        store,
        """
        import random
        for name in ("first", "second"):
            random.seed(1)
            root = client.start_trace(name)
            client.end_trace(root.trace_id)
            mlflow.flush_trace_async_logging()
            print(root.trace_id)
        """,
    )
    assert names(store.traces()) == ["second"]
    assert len(ids) == 2 and len(set(ids)) == 1


def test_seam_the_provider_and_its_tracers_share_one_generator_of_ids(
    client: MlflowClient,
) -> None:
    tracer = provider._get_tracer(provider.__name__)
    assert tracer.id_generator is provider.provider.get().id_generator
    assert isinstance(tracer.id_generator, RandomIdGenerator)
    assert not RandomIdGenerator.__dict__.get("__slots__")  # its class may be changed


def test_search_finds_tags_and_names_but_no_equal_attribute(
    store: Store, client: MlflowClient
) -> None:
    root = client.start_trace("findable", attributes={"key": "value"}, tags={"tag": "value"})
    client.end_trace(root.trace_id)
    assert len(store.traces()) == 1

    def hits(condition: str) -> int:
        return len(mlflow.search_traces(filter_string=condition, return_type="list"))

    assert hits("tags.tag = 'value'") == 1
    assert hits("name = 'findable'") == 1
    assert hits("span.attributes.key LIKE '%value%'") == 1
    assert hits("span.attributes.key = 'value'") == 0


# -- contexts ----------------------------------------------------------------------------------


def test_fluent_spans_under_a_client_span_are_traces_of_their_own(
    store: Store, client: MlflowClient
) -> None:
    root = client.start_trace("root")
    with mlflow.start_span("fluent"):
        pass
    mlflow.trace(lambda: None, name="decorated")()
    client.end_trace(root.trace_id)
    assert sorted(by_root(store)) == ["decorated", "fluent", "root"]


def test_start_trace_under_a_fluent_span_raises_into_user_code(client: MlflowClient) -> None:
    with mlflow.start_span("fluent"):
        with pytest.raises(MlflowException, match="Another trace is already set"):
            client.start_trace("inner")


def test_more_traces_than_the_buffer_holds_evict_the_oldest(store: Store) -> None:
    assert MLFLOW_TRACE_BUFFER_MAX_SIZE.default == 1000
    printed = in_a_process(
        store,
        """
        def attempt(call, *args):
            try:
                call(*args)
            except mlflow.MlflowException as error:
                print(error)

        evicted, *kept = [client.start_trace(f"root {n}") for n in range(3)]
        attempt(client.start_span, "child", evicted.trace_id, evicted.span_id)
        attempt(client.end_span, evicted.trace_id, evicted.span_id)
        assert evicted.end_time_ns is None
        attempt(client.end_trace, evicted.trace_id)
        for root in kept:
            client.end_trace(root.trace_id)
        """,
        MLFLOW_TRACE_BUFFER_MAX_SIZE="2",
    )
    from_start_span, from_end_trace = printed
    assert "Parent span" in from_start_span and "not found" in from_start_span
    assert "Trace" in from_end_trace and "not found" in from_end_trace
    assert sorted(by_root(store)) == ["root 1", "root 2"]
    assert store.rows() == 2


def test_a_trace_older_than_the_buffers_age_is_evicted(
    store: Store, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MLFLOW_TRACE_BUFFER_TTL_SECONDS.default == 3600
    monkeypatch.setenv("MLFLOW_TRACE_BUFFER_TTL_SECONDS", "1")
    InMemoryTraceManager.reset()
    root = client.start_trace("root")
    buffered = InMemoryTraceManager.get_instance()._traces
    assert root.trace_id in buffered
    await_true(lambda: root.trace_id not in buffered)
    with pytest.raises(MlflowException, match="not found"):
        child_of(root)
    end(root)
    assert is_open(root), "the client does not find it any more"
    root.end()
    assert not is_open(root)
    assert store.rows() == 0


def test_set_experiment_while_a_trace_is_open_loses_the_root(store: Store) -> None:
    in_a_process(
        store,
        """
        root = client.start_trace("root", tags={"env": "test"})
        child = client.start_span("child", root.trace_id, root.span_id)
        client.end_span(root.trace_id, child.span_id)
        mlflow.set_experiment("another")
        client.end_trace(root.trace_id)
        assert root.end_time_ns is not None
        """,
    )
    trace = store.trace()
    if BATCHING:
        assert (state_of(trace), name_of(trace)) == ("IN_PROGRESS", None)
        assert names([trace]) == ["child"]
    else:  # the replaced provider still writes
        assert (state_of(trace), name_of(trace)) == ("OK", "root")
        assert names([trace]) == ["child", "root"]


def test_disabling_tracing_while_a_trace_is_open_loses_it(
    store: Store, client: MlflowClient
) -> None:
    root = client.start_trace("root")
    mlflow.tracing.disable()
    try:
        assert isinstance(child_of(root), NoOpSpan)
        client.end_trace(root.trace_id)
        assert not is_open(root)
    finally:
        mlflow.tracing.enable()
    assert names(store.traces()) == ([] if BATCHING else ["root"])


def test_another_tracking_uri_tears_an_open_trace_apart(
    store: Store, client: MlflowClient, template: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.db"
    other.write_bytes(template.read_bytes())
    root = client.start_trace("root")
    end(child_of(root, "before"))
    mlflow.set_tracking_uri(f"sqlite:///{other}")
    end(child_of(root, "after"))
    client.end_trace(root.trace_id)
    assert names(store.traces()) == ["after"]
    assert stored_traces(other) == [(root.trace_id, "IN_PROGRESS")]
    assert stored_spans(store.path) == (["before"] if BATCHING else ["before", "root"])


def test_the_clients_own_tracking_uri_is_ignored(
    store: Store, template: Path, tmp_path: Path
) -> None:
    wanted = tmp_path / "wanted.db"
    wanted.write_bytes(template.read_bytes())
    client = MlflowClient(tracking_uri=f"sqlite:///{wanted}")
    root = client.start_trace("root")
    client.end_trace(root.trace_id)
    assert names(store.traces()) == ["root"]
    assert stored_traces(wanted) == []


# -- the seams that `spanguard._mlflow` stands on ----------------------------------------------


def test_seam_a_client_span_can_be_made_the_active_one(store: Store, client: MlflowClient) -> None:
    assert list(inspect.signature(provider.set_span_in_context).parameters) == ["span"]
    root = client.start_trace("root")
    token = provider.set_span_in_context(root)
    try:
        assert mlflow.get_current_active_span() is root
        assert otel.get_current_span(provider.get_current_context()) is root._span
        with mlflow.start_span("fluent"):
            mlflow.trace(lambda: None, name="decorated")()
    finally:
        provider.detach_span_from_context(token)
    assert mlflow.get_current_active_span() is None
    client.end_trace(root.trace_id)
    spans = store.spans()
    assert spans["fluent"].parent_id == root.span_id
    assert spans["decorated"].parent_id == spans["fluent"].span_id
    assert len(store.traces()) == 1


def test_seam_only_the_otel_span_is_read_when_a_span_is_made_active(client: MlflowClient) -> None:
    class Stand:
        def __init__(self, span: LiveSpan) -> None:
            self._span = span._span

    root = client.start_trace("root")
    token = provider.set_span_in_context(Stand(root))
    assert mlflow.get_current_active_span() is root
    provider.detach_span_from_context(token)


def test_seam_what_was_active_is_restored_by_attach_from_another_context(
    client: MlflowClient,
) -> None:
    """A token is bound to its context; the context's value is not."""
    runtime = provider.mlflow_runtime_context
    outer, inner = client.start_trace("outer"), client.start_trace("inner")
    before = runtime.get_current()
    provider.set_span_in_context(outer)
    previous = runtime.get_current()
    token = provider.set_span_in_context(inner)

    def elsewhere() -> Any:
        assert mlflow.get_current_active_span() is inner
        with pytest.raises(ValueError, match="different Context"):
            runtime.detach(token if not isinstance(token, tuple) else token[0])
        runtime.attach(previous)
        return mlflow.get_current_active_span()

    assert contextvars.copy_context().run(elsewhere) is outer
    assert mlflow.get_current_active_span() is inner
    runtime.attach(before)
    assert mlflow.get_current_active_span() is None


@pytest.mark.skipif(
    not hasattr(provider, "MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT"),
    reason="this MLflow never touches OpenTelemetry's own context",
)
def test_seam_the_active_span_reaches_opentelemetrys_context_only_on_request(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why spanguard restores two contexts where this is switched on."""
    root = client.start_trace("root")
    seen = []
    for wish in ("false", "true"):
        monkeypatch.setenv("MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT", wish)
        token = provider.set_span_in_context(root)
        seen.append(otel.get_current_span() is root._span)
        provider.detach_span_from_context(token)
        assert otel.get_current_span() is otel.INVALID_SPAN
    assert seen == [False, True]


def test_seam_hiding_the_active_span_lets_a_new_trace_start(
    store: Store, client: MlflowClient
) -> None:
    with mlflow.start_span("fluent"):
        token = provider.set_span_in_context(NoOpSpan())
        inner = client.start_trace("inner")
        provider.detach_span_from_context(token)
        client.end_trace(inner.trace_id)
    assert sorted(by_root(store)) == ["fluent", "inner"]


def test_seam_without_a_parent_a_span_nests_under_the_active_one(store: Store) -> None:
    with mlflow.start_span("active") as active:
        mlflow.start_span_no_context("nested").end()
    assert store.spans()["nested"].parent_id == active.span_id


def test_seam_start_span_no_context_takes_what_we_pass() -> None:
    wanted = {"name", "span_type", "parent_span", "start_time_ns"}
    wanted |= {"tags", "metadata", "experiment_id"}
    assert wanted <= set(inspect.signature(mlflow.start_span_no_context).parameters)


def test_seam_a_span_processor_hears_of_every_span_whichever_api_opens_it(
    client: MlflowClient,
) -> None:
    heard: list[tuple[str, str]] = []

    class Ears(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            heard.append(("start", span.name))
            trace_id = InMemoryTraceManager.get_instance().get_mlflow_trace_id_from_otel_id(
                span.get_span_context().trace_id
            )
            assert trace_id is not None, "MLflow's own processor comes first"

        def on_end(self, span: ReadableSpan) -> None:
            heard.append(("end", span.name))

    provider._get_tracer(__name__)  # initialises the provider
    current = provider.provider.get()
    assert isinstance(current, TracerProvider)
    ears = Ears()
    current.add_span_processor(ears)
    assert current._active_span_processor._span_processors[1:] == (ears,)

    root = client.start_trace("client")
    child = child_of(root)
    mlflow.trace(lambda: None, name="decorated")()
    with mlflow.start_span("fluent"):
        pass
    end(child)
    client.end_trace(root.trace_id)
    assert [name for what, name in heard if what == "start"] == [
        "client",
        "child",
        "decorated",
        "fluent",
    ]
    assert [name for what, name in heard if what == "end"] == [
        "decorated",
        "fluent",
        "child",
        "client",
    ]


def test_seam_a_replaced_provider_is_another_object(client: MlflowClient) -> None:
    client.start_trace("root")
    before = provider.provider.get()
    child_of(client.start_trace("other"))
    assert provider.provider.get() is before
    mlflow.tracing.disable()
    mlflow.tracing.enable()
    client.start_trace("after")
    assert provider.provider.get() is not before


def test_seam_a_hidden_provider_is_told_from_a_replaced_one(client: MlflowClient) -> None:
    client.start_trace("root")
    before = provider.provider.get()

    @provider.trace_disabled
    def meanwhile() -> tuple[Any, Any]:
        state = getattr(provider, "_trace_disabled_state", None)
        return provider.provider.get(), state and dict(state)

    hidden_behind, state = meanwhile()
    assert hidden_behind is not before
    client.start_trace("after")
    if NEWEST:
        assert (state["depth"], state["saved_provider"]) == (1, before)
        assert provider.provider.get() is before
    else:  # hiding is replacing
        assert state is None
        assert provider.provider.get() is not before


def test_seam_the_trace_manager_finds_live_spans_and_roots(client: MlflowClient) -> None:
    manager = InMemoryTraceManager.get_instance()
    root = client.start_trace("root")
    child = child_of(root)
    assert manager.get_span_from_id(root.trace_id, child.span_id) is child
    assert manager.get_root_span_id(root.trace_id) == root.span_id
    assert manager.get_root_span_id("tr-unknown") is None
    assert root.trace_id in manager._traces
    with manager.get_trace(root.trace_id) as trace:
        assert list(trace.span_dict.values()) == [root, child]
        trace.info.tags["late"] = "tag"
        trace.info.trace_metadata["late"] = "metadata"
    with manager.get_trace("tr-unknown") as unknown:
        assert unknown is None


def test_seam_tags_and_metadata_written_in_memory_are_stored(
    store: Store, client: MlflowClient
) -> None:
    root = client.start_trace("root")
    with InMemoryTraceManager.get_instance().get_trace(root.trace_id) as trace:
        trace.info.tags["late"] = "tag"
        trace.info.trace_metadata["late"] = "metadata"
    client.end_trace(root.trace_id)
    info = store.trace().info
    assert (info.tags["late"], info.trace_metadata["late"]) == ("tag", "metadata")


def test_seam_a_trace_id_can_be_chosen_through_the_tracers_generator(
    store: Store, client: MlflowClient
) -> None:
    chosen = int("ab" * 16, 16)

    class Chosen(IdGenerator):
        def generate_span_id(self) -> int:
            return random.getrandbits(64)

        def generate_trace_id(self) -> int:
            return chosen

        def is_trace_id_random(self) -> bool:
            return False

    tracer = provider._get_tracer(provider.__name__)
    assert provider._get_tracer(provider.__name__) is tracer, "the SDK caches tracers"
    tracer.id_generator, before = Chosen(), tracer.id_generator
    try:
        root = client.start_trace("root")
    finally:
        tracer.id_generator = before
    assert root.trace_id == "tr-" + "ab" * 16
    client.end_trace(root.trace_id)
    trace = store.trace()
    assert (trace.info.trace_id, state_of(trace)) == (root.trace_id, "OK")


def test_seam_the_span_under_a_live_span_shows_status_attributes_and_end(
    client: MlflowClient,
) -> None:
    root = client.start_trace("root", attributes={"key": "value"})
    inner = root._span
    assert isinstance(inner, otel.Span) and isinstance(inner, ReadableSpan)
    assert inner.get_span_context().is_valid
    assert inner._attributes["key"] == '"value"'
    assert len(inner._attributes) == 3
    assert inner._status.status_code is otel.StatusCode.UNSET
    assert inner.end_time is None
    root.end()
    assert inner.end_time == root.end_time_ns is not None


def test_seam_a_span_can_be_ended_past_mlflow_but_then_no_span_processor_of_the_user_runs(
    store: Store, client: MlflowClient
) -> None:
    """Why spanguard ends bare only where the full end failed: a mask for private data is one."""

    def mask(span: LiveSpan) -> None:
        span.set_outputs("masked")

    with mlflow.tracing.configure(span_processors=[mask]):
        root = client.start_trace("root")
        full, bare = child_of(root, "full"), child_of(root, "bare")
        for span in (full, bare):
            span.set_outputs("secret")
        full.end()
        bare._span.end()
        assert not is_open(bare)
        client.end_trace(root.trace_id)
    spans = store.spans()
    assert (spans["full"].outputs, spans["bare"].outputs) == ("masked", "secret")


def test_seam_noop_spans_come_from_disabled_or_sampled_out_tracing(
    store: Store, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow.tracing.disable()
    try:
        disabled = client.start_trace("disabled")
    finally:
        mlflow.tracing.enable()
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0")
    mlflow.tracing.reset()
    sampled_out = client.start_trace("sampled out")
    for span in (disabled, sampled_out):
        assert isinstance(span, NoOpSpan)
        assert isinstance(child_of(span), NoOpSpan)
        assert isinstance(mlflow.start_span_no_context("child", parent_span=span), NoOpSpan)
        client.end_trace(span.trace_id)
    assert store.rows() == 0
    # Only the newer keeps what was decided with the span, for its children to share.
    decision = sampled_out._span.get_span_context()
    assert (decision is not None and decision.is_valid) is NEWEST
    assert NoOpSpan()._span.get_span_context() is None


def test_seam_pending_exports_are_in_a_queue_that_can_be_joined(client: MlflowClient) -> None:
    root = client.start_trace("root")
    client.end_trace(root.trace_id)
    exporter = provider._get_trace_exporter()
    assert hasattr(exporter, "_async_queue") is BATCHING
    if BATCHING:
        assert provider.provider.get().force_flush()
        exporter._async_queue._queue.join()
    assert mlflow.get_trace(root.trace_id) is not None


def test_seam_the_payload_encoder_falls_back_to_text_and_attachments_are_known() -> None:
    assert issubclass(TraceJSONEncoder, json.JSONEncoder)
    assert TraceJSONEncoder().encode({"value": object}) == TraceJSONEncoder().encode(
        {"value": str(object)}
    )
    try:
        from mlflow.tracing.attachments import Attachment
    except ImportError:
        assert not NEWEST
    else:
        assert inspect.isclass(Attachment)
