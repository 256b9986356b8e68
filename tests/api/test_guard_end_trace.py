"""Which span an `end_trace` means, and what a `start_trace` that joins is told."""

from __future__ import annotations

import gc
import pickle
import threading
import warnings
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

import spanguard
from spanguard import TraceStateManager, guard, traced_span
from spanguard.exceptions import (
    InvalidSpanArgumentWarning,
    OrphanedSpanWarning,
    SpanAlreadyEndedWarning,
    UnknownSpanWarning,
)
from tests.api.raw_code import copy_of
from tests.store import Store, outcome, own_attributes, status

# -- which span an end_trace means -------------------------------------------------------------


def test_end_trace_ends_the_child_that_its_start_trace_opened(
    store: Store, either: MlflowClient
) -> None:
    """Not the last one that joined: callbacks of concurrent jobs end in any order."""
    with traced_span("request"):
        one, two = either.start_trace("one"), either.start_trace("two")
        assert one.trace_id == two.trace_id
        either.end_trace(one.trace_id, outputs=1)
        assert (one.end_time_ns is None, two.end_time_ns is None) == (False, True)
        either.end_trace(two.trace_id, outputs=2)
    spans = store.spans()
    assert [spans[name].outputs for name in ("one", "two")] == [1, 2]


def test_a_copy_of_the_id_means_the_innermost(store: Store, either: MlflowClient) -> None:
    with traced_span("request"):
        one, two = either.start_trace("one"), either.start_trace("two")
        for span in (two, one):
            either.end_trace(pickle.loads(pickle.dumps(one.trace_id)), outputs=span.name)
            assert span.end_time_ns is not None
    spans = store.spans()
    assert [spans[name].outputs for name in ("one", "two")] == ["one", "two"]


def test_a_copy_of_the_id_means_the_innermost_of_this_thread(
    store: Store, guarded: MlflowClient
) -> None:
    with traced_span("request") as request:
        mine: Any = guarded.start_trace("mine")
        opened, ended = threading.Event(), threading.Event()

        def other() -> None:
            with traced_span("worker", trace_id=request.trace_id):
                theirs = guarded.start_trace("theirs")
                opened.set()
                assert ended.wait(60)
                guarded.end_trace(copy_of(theirs.trace_id), outputs="theirs")

        thread = threading.Thread(target=other)
        thread.start()
        assert opened.wait(60)
        guarded.end_trace(copy_of(mine.trace_id), outputs="mine")
        ended.set()
        thread.join()
    spans = store.spans()
    assert [spans[name].outputs for name in ("mine", "theirs")] == ["mine", "theirs"]


def test_the_id_of_a_child_span_leads_to_its_start_trace(
    store: Store, guarded: MlflowClient
) -> None:
    with traced_span("request"):
        one = guarded.start_trace("one")
        child = guarded.start_span("child", one.trace_id, one.span_id)
        two = guarded.start_trace("two")
        guarded.end_span(child.trace_id, child.span_id)
        guarded.end_trace(child.request_id)
        assert (one.end_time_ns is None, two.end_time_ns is None) == (False, True)
        guarded.end_trace(two.trace_id)


def test_ending_twice_does_not_end_what_is_around(store: Store, either: MlflowClient) -> None:
    """`except` and `finally` both end the trace: at the top it is harmless, and nested too."""

    def job(name: str, work: Any) -> None:
        root = either.start_trace(name)
        try:
            work()
        except ValueError:
            either.end_trace(root.trace_id, status="ERROR")
        finally:
            either.end_trace(root.trace_id)

    def fail() -> None:
        raise ValueError

    def outer() -> None:
        job("inner", fail)
        assert [span.name for span in spanguard.open_spans()] == ["request", "outer"]

    with pytest.warns(SpanAlreadyEndedWarning, match="'inner'"):
        with traced_span("request"):
            job("outer", outer)
    spans = store.spans()
    assert [status(spans[name]) for name in ("request", "outer", "inner")] == ["OK", "OK", "ERROR"]


def test_a_leaked_inner_trace_does_not_keep_the_outer_open(store: Store) -> None:
    client = guard(ambient=True)
    root = client.start_trace("root")
    client.start_trace("leaked")
    with pytest.warns(OrphanedSpanWarning, match="leaked"):
        client.end_trace(root.trace_id)
    assert outcome(store.spans()["leaked"]) == "orphaned"


@pytest.mark.parametrize("kind", ["fluent", "ours", "manager"])
def test_the_root_of_a_block_is_not_ended_by_end_trace(
    store: Store, either: MlflowClient, kind: str
) -> None:
    if kind == "fluent":
        block: Any = mlflow.start_span("root")
    else:
        block = traced_span("root") if kind == "ours" else TraceStateManager().trace("root")
    with block as root:
        with pytest.warns(UnknownSpanWarning, match="block or a manager"):
            either.end_trace(root.trace_id)
        assert root.end_time_ns is None
    assert status(store.spans()["root"]) == "OK"


def test_a_raw_clients_trace_is_ended_with_the_same_care(
    store: Store, either: MlflowClient, client: MlflowClient
) -> None:
    """Half of the code is still raw."""
    root = client.start_trace("root")
    span = client.start_span("span", root.trace_id, root.span_id)
    client.start_span("leaked", root.trace_id, span.span_id)
    with pytest.warns(OrphanedSpanWarning):
        either.end_span(root.trace_id, span.span_id, outputs=1)
    either.end_trace(root.trace_id, outputs=2, status="ERROR")
    with pytest.warns(SpanAlreadyEndedWarning):
        either.end_trace(root.trace_id)
    spans = store.spans()
    assert [spans[name].outputs for name in ("span", "root")] == [1, 2]
    assert (outcome(spans["leaked"]), status(spans["root"])) == ("orphaned", "ERROR")


def test_a_raw_trace_from_before_spanguard_listened(
    store: Store, either: MlflowClient, client: MlflowClient
) -> None:
    mlflow.tracing.reset()  # a provider that nobody listens to yet
    root = client.start_trace("root")
    child = client.start_span("child", root.trace_id, root.span_id)
    client.start_span("leaked", root.trace_id, root.span_id)
    either.start_span("ours", root.trace_id, child.span_id)
    with pytest.warns(OrphanedSpanWarning, match=r"'child'.*'ours'"):
        either.end_span(root.trace_id, child.span_id)
    with pytest.warns(OrphanedSpanWarning, match=r"'root'.*'leaked'"):
        either.end_trace(root.trace_id)
    spans = store.spans()
    assert {name: outcome(span) for name, span in spans.items()} == {
        "root": "ok",
        "child": "ok",
        "leaked": "orphaned",
        "ours": "orphaned",
    }
    assert "before spanguard listened" in spans["leaked"].get_attribute("spanguard.opened_at")


def test_a_block_ended_by_its_span_id(store: Store, either: MlflowClient) -> None:
    """Raw code may name any span; the block then finds it ended."""
    with pytest.warns(SpanAlreadyEndedWarning):
        with traced_span("root"), traced_span("block") as block:
            either.end_span(block.trace_id, block.span_id, outputs=1)
    assert store.spans()["block"].outputs == 1


def test_a_client_for_each_call(store: Store) -> None:
    """Raw code makes clients as it goes: what is open outlives them."""
    root = guard().start_trace("root")
    span_id = guard().start_span("span", root.trace_id, root.span_id).span_id
    gc.collect()
    guard().end_span(root.trace_id, span_id, outputs=1)
    guard().end_trace(root.trace_id, outputs=2)
    spans = store.spans()
    assert [(outcome(s), s.outputs) for s in spans.values()] == [("ok", 2), ("ok", 1)]


def test_spans_outlive_what_raw_code_keeps_of_them(store: Store, guarded: MlflowClient) -> None:
    trace_id = guarded.start_trace("root").trace_id
    gc.collect()
    assert [span.name for span in spanguard.open_spans()] == ["root"]
    guarded.end_trace(trace_id)
    assert outcome(store.spans()["root"]) == "ok"


# -- trace arguments of a start_trace that joins -----------------------------------------------


def test_an_experiment_of_its_own_cannot_be_joined(store: Store, either: Any) -> None:
    other = MlflowClient().create_experiment("other")
    with traced_span("root"):
        with pytest.warns(InvalidSpanArgumentWarning, match=r"experiment_id.*new_trace=True"):
            joined = either.start_trace("joined", experiment_id=other)
        either.end_trace(joined.trace_id)
        root = either.start_trace("own", experiment_id=other, new_trace=True)
        either.end_trace(root.trace_id)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same = either.start_trace("same", experiment_id="0", tags={"a": 1})
            either.end_trace(same.trace_id)
    experiments = {t.data.spans[0].name: t.info.experiment_id for t in store.traces()}
    assert experiments == {"root": "0", "own": other}


def test_a_run_of_its_own_cannot_be_joined(store: Store, either: Any) -> None:
    with traced_span("root", run_id="1" * 32):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            either.end_trace(either.start_trace("same", run_id="1" * 32).trace_id)
        with pytest.warns(InvalidSpanArgumentWarning, match="run_id"):
            either.end_trace(either.start_trace("other", run_id="2" * 32).trace_id)
    assert store.trace().info.trace_metadata["mlflow.sourceRun"] == "1" * 32


def test_a_trace_keeps_its_experiment_run_and_tags(store: Store, either: MlflowClient) -> None:
    other = MlflowClient().create_experiment("other")
    start_time_ns = 1_700_000_000_000_000_000
    root = either.start_trace(
        "root", "CHAIN", {"q": 1}, {"k": "v"}, {"tag": "t"}, other, start_time_ns, "1" * 32
    )
    span = either.start_span(
        "span", root.trace_id, root.span_id, "TOOL", [1], {"a": 1}, start_time_ns + 1
    )
    either.end_span(root.trace_id, span.span_id, [2], {"b": 2}, "OK", start_time_ns + 2)
    either.end_trace(root.trace_id, {"a": 2}, {"c": 3}, "ERROR", start_time_ns + 3)
    trace = store.trace()
    assert trace.info.experiment_id == other
    assert trace.info.tags["tag"] == "t"
    assert trace.info.trace_metadata["mlflow.sourceRun"] == "1" * 32
    stored = {s.name: s for s in trace.data.spans}
    found = stored["root"]
    assert (found.span_type, found.inputs, found.outputs) == ("CHAIN", {"q": 1}, {"a": 2})
    assert (found.start_time_ns, found.end_time_ns) == (start_time_ns, start_time_ns + 3)
    assert own_attributes(found) == {"k": "v", "c": 3}
    assert status(found) == "ERROR"
    found = stored["span"]
    assert (found.span_type, found.inputs, found.outputs) == ("TOOL", [1], [2])
    assert (found.start_time_ns, found.end_time_ns) == (start_time_ns + 1, start_time_ns + 2)
    assert own_attributes(found) == {"a": 1, "b": 2}


def test_bad_times_are_mended(store: Store, either: Any) -> None:
    with pytest.warns(InvalidSpanArgumentWarning, match="start_time_ns"):
        root = either.start_trace("root", start_time_ns="yesterday")
    with pytest.warns(InvalidSpanArgumentWarning, match="end_time_ns"):
        either.end_trace(root.trace_id, end_time_ns="now")
    span = store.spans()["root"]
    assert 0 <= span.end_time_ns - span.start_time_ns < 60e9


def test_many_attributes_at_both_ends(store: Store, either: MlflowClient) -> None:
    root = either.start_trace("root", attributes={f"start {n}": n for n in range(90)})
    either.end_trace(root.trace_id, attributes={f"end {n}": n for n in range(90)})
    attributes = own_attributes(store.trace().data.spans[0])
    folded = attributes.pop("spanguard.more_attributes")
    assert len(attributes) + len(folded) == 180
    assert {**attributes, **folded}["end 89"] == 89


def test_an_attribute_of_mlflows_own_at_the_end(store: Store, either: MlflowClient) -> None:
    root = either.start_trace("root")
    with pytest.warns(InvalidSpanArgumentWarning, match=r"mlflow\.traceRequestId"):
        either.end_trace(root.trace_id, attributes={"mlflow.traceRequestId": "x"})
    assert own_attributes(store.trace().data.spans[0]) == {"user.mlflow.traceRequestId": "x"}
