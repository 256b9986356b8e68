"""What MLflow loses over payloads, names, tags and times."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlflow
import pytest
from mlflow import MlflowClient, MlflowException
from mlflow.entities import LiveSpan, NoOpSpan, SpanEvent
from mlflow.tracing.trace_manager import InMemoryTraceManager
from packaging.version import Version

from tests.mlflow.contract.raw_client import (
    BATCHING,
    LOG_LEVELS,
    RETIRES,
    VERSION,
    by_root,
    child_of,
    end,
    is_open,
    left_at_exit,
    name_of,
    names,
    of_waiting_roots,
    state_of,
    stored_spans,
    stored_traces,
)
from tests.store import Store, own_attributes, status

pytestmark = pytest.mark.versions

SURROGATE = "a\ud800b"


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


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
    assert names(left_at_exit(store)) == of_waiting_roots(len(HOSTILE))
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
    assert names(left_at_exit(store)) == of_waiting_roots(len(HOSTILE))
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
    if RETIRES:  # the trace is listed, but reading its span fails
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
    if BATCHING:  # no harm in a child
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
    lost, refused = (None, None), Version("3.17") <= VERSION
    assert found == {
        "None": (None, "test"),
        "7": lost if refused else ("7", "test"),
        "xxxx": lost if refused else ("x" * 4097, "test"),
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
