"""A guarded client as a block, its spans as ambient ones, and one given to blocks."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import SpanStatusCode

import spanguard
from spanguard import TraceStateManager, current_span, guard, traced_span
from spanguard._base import findings
from spanguard._mlflow.active import current_otel_span
from spanguard.exceptions import (
    InvalidSpanArgumentWarning,
    OrphanedSpanWarning,
)
from tests.api.raw_code import EACH_ONCE, ELSEWHERE, Recording
from tests.store import Store, outcome

# -- as a block --------------------------------------------------------------------------------


def test_a_block_closes_what_is_left_as_orphans(store: Store) -> None:
    with pytest.warns(OrphanedSpanWarning, match=r"guard\(\) ended with 3 open"):
        with guard() as client:
            root = client.start_trace("root")
            done = client.start_span("done", root.trace_id, root.span_id)
            client.end_span(root.trace_id, done.span_id)
            client.start_span("child", root.trace_id, root.span_id)
            client.start_trace("other")
    spans = store.spans()
    assert {name: outcome(span) for name, span in spans.items()} == {
        "root": "orphaned",
        "done": "ok",
        "child": "orphaned",
        "other": "orphaned",
    }
    assert spans["other"].get_attribute("spanguard.orphaned_by") == "the end of guard()'s block"
    assert len(store.traces()) == 2


def test_a_block_marks_what_is_left_with_its_exception(store: Store) -> None:
    error = ValueError("bad")
    with warnings.catch_warnings(), pytest.raises(ValueError) as caught:
        warnings.simplefilter("error")
        with guard(strict=True) as client:
            root = client.start_trace("root")
            client.start_span("child", root.trace_id, root.span_id)
            raise error
    assert caught.value is error
    spans = store.spans()
    assert [outcome(span) for span in spans.values()] == ["error", "error"]
    assert spans["root"].get_attribute("error_type") == "ValueError"


def test_a_block_in_strict_mode_raises_afterwards(store: Store) -> None:
    with pytest.raises(spanguard.OrphanedSpanError) as caught:
        with guard(strict=True) as client:
            client.start_trace("root")
    assert [span.name for span in caught.value.spans] == ["root"]
    assert outcome(store.spans()["root"]) == "orphaned"


def test_a_block_with_nothing_left_says_nothing(store: Store) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with guard() as client:
            client.end_trace(client.start_trace("root").trace_id)
    assert store.trace().info.state.value == "OK"


def test_an_async_block(store: Store) -> None:
    async def main() -> None:
        async with guard() as client:
            client.start_trace("root")
            await asyncio.sleep(0)
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert outcome(store.spans()["root"]) == "cancelled"


def test_overlapping_blocks_of_one_client_close_nothing_of_each_other(store: Store) -> None:
    client = guard()
    with client:
        root = client.start_trace("root")
        with client:
            pass
        assert root.end_time_ns is None
        client.end_trace(root.trace_id)
    assert outcome(store.spans()["root"]) == "ok"


def test_a_block_does_not_close_what_another_client_opened(store: Store) -> None:
    client = guard()
    root = client.start_trace("root")
    with guard(client) as inner:
        child = inner.start_span("child", root.trace_id, root.span_id)
        inner.end_span(root.trace_id, child.span_id)
    assert root.end_time_ns is None
    client.end_trace(root.trace_id)
    assert len(store.trace().data.spans) == 2


# -- ambient -----------------------------------------------------------------------------------


def test_guarded_spans_are_not_ambient(store: Store, either: MlflowClient) -> None:
    root = either.start_trace("root")
    assert current_span() is None
    with mlflow.start_span("fluent"):
        pass
    other = either.start_trace("other")
    either.end_trace(root.trace_id)
    either.end_trace(other.trace_id)
    assert len(store.traces()) == 3


@pytest.mark.parametrize("given", [True, False], ids=["given", "made late"])
def test_ambient_spans_are_what_others_nest_under(store: Store, given: bool) -> None:
    client = guard(MlflowClient() if given else None, ambient=True)
    found = current_otel_span()
    root = client.start_trace("root")
    assert current_span() is root
    step = client.start_span("step", root.trace_id, root.span_id)
    with mlflow.start_span("fluent"), traced_span("block"):
        inner = client.start_trace("inner")
        client.end_trace(inner.trace_id)
    client.end_span(root.trace_id, step.span_id)
    assert current_span() is root
    client.end_trace(root.trace_id)
    assert current_otel_span() is found, "the context was not left as it was found"
    assert mlflow.get_current_active_span() is None
    spans = store.spans()
    for outer, inside in [("root", "step"), ("step", "fluent"), ("fluent", "block")]:
        assert spans[inside].parent_id == spans[outer].span_id
    assert spans["inner"].parent_id == spans["block"].span_id


def test_ambient_spans_end_in_any_order_and_by_any_api(store: Store, client: MlflowClient) -> None:
    guarded = guard(ambient=True)
    one = guarded.start_trace("one")
    two = guarded.start_trace("two", new_trace=True)
    guarded.end_trace(one.trace_id)
    assert current_span() is two
    with traced_span("three", new_trace=True) as three:
        guarded.end_trace(two.trace_id)
        assert current_span() is three
    assert current_span() is None
    four = guarded.start_trace("four")
    client.end_trace(four.trace_id)
    assert current_span() is None
    five: Any = guarded.start_trace("five")
    five.end()
    assert mlflow.get_current_active_span() is None
    assert len(store.traces()) == 5


def test_an_ambient_span_ended_in_another_thread(store: Store) -> None:
    client = guard(ambient=True)
    root = client.start_trace("root")
    thread = threading.Thread(target=client.end_trace, args=(root.trace_id,))
    thread.start()
    thread.join()
    assert current_span() is None
    with traced_span("next") as following:
        assert following.parent_id is None


# -- a guarded client given to a block or a manager --------------------------------------------


@pytest.mark.parametrize("ambient", [False, True])
def test_a_block_of_a_guarded_client_starts_and_ends_once(store: Store, ambient: bool) -> None:
    client = Recording()
    guarded = guard(client, ambient=ambient)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with traced_span("root", client=guarded, tags={"a": "b"}):
            with pytest.raises(ZeroDivisionError), traced_span(guarded, "child", None, None):
                1 / 0
        assert current_span() is None
        with mlflow.start_span("fluent"):
            pass
        with traced_span("other", client=guarded, new_trace=True) as other:
            assert other.parent_id is None
    assert client.names == [*EACH_ONCE, "start_trace", "end_trace"]
    assert client.calls[2][1]["status"].status_code == SpanStatusCode.ERROR
    spans = store.spans()
    assert spans["child"].parent_id == spans["root"].span_id
    assert spans["fluent"].parent_id is None
    assert [outcome(spans[n]) for n in ("root", "child", "other")] == ["ok", "error", "ok"]
    assert not guarded._self_home.open
    assert spanguard.open_spans() == []


@pytest.mark.parametrize("scope", ["context", "process"])
def test_a_manager_of_a_guarded_client(store: Store, scope: Any) -> None:
    client = Recording()
    manager = TraceStateManager(guard(client), scope=scope, strict=True)
    a = manager.push_trace("a")
    b = manager.push_trace("b", inputs=1)
    assert manager.pop_trace(outputs=2) is b
    assert manager.pop_trace() is a
    assert client.names == EACH_ONCE
    manager.push_trace("c")
    manager.push_trace("d")
    assert manager.close() == 2
    spans = store.spans()
    assert (spans["b"].inputs, spans["b"].outputs) == (1, 2)
    assert [outcome(spans[name]) for name in "abcd"] == ["ok", "ok", "orphaned", "orphaned"]


def test_a_traced_function_of_a_guarded_client(store: Store) -> None:
    client = Recording()

    @spanguard.traced(client=guard(client))
    def double(x: int) -> int:
        return 2 * x

    assert double(2) == 4
    assert client.names == ["start_trace", "end_trace"]
    assert store.spans()["double"].outputs == 4


def test_a_wrapper_around_a_guarded_client(store: Store) -> None:
    """A user's own class that calls a guarded client sees both ends, and so does the client."""

    class Wrapper:
        def __init__(self, client: Any) -> None:
            self.client = client
            self.calls: list[str] = []

        def __getattr__(self, name: str) -> Any:
            self.calls.append(name)
            return getattr(self.client, name)

    client = Recording()
    wrapper = Wrapper(guard(client, strict=True))
    with traced_span("root", client=wrapper, strict=True):
        with traced_span("child", client=wrapper, strict=True) as child:
            child.set_outputs(1)
    assert wrapper.calls == EACH_ONCE
    assert client.names == EACH_ONCE
    assert store.spans()["child"].outputs == 1


def test_a_guards_strict_error_passes_through_a_block(store: Store) -> None:
    findings.reraise_internal = False  # as outside of tests: nothing failed
    client = guard(MlflowClient(tracking_uri=ELSEWHERE), strict=True)
    with pytest.raises(spanguard.InvalidSpanArgumentError, match="global tracking URI"):
        with traced_span("root", client=client):
            pytest.fail("the block must not run")
    assert spanguard.open_spans() == []


def test_a_guards_warning_made_an_error_passes_through_a_block(store: Store) -> None:
    findings.reraise_internal = False  # as outside of tests: nothing failed
    client = guard(MlflowClient(tracking_uri=ELSEWHERE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InvalidSpanArgumentWarning):
            with traced_span("root", client=client):
                pytest.fail("the block must not run")
    assert spanguard.open_spans() == []


def test_the_end_of_a_guards_block_takes_what_a_manager_pushed(store: Store) -> None:
    manager = TraceStateManager(guard())
    with pytest.warns(OrphanedSpanWarning):
        with manager._client:
            manager.push_trace("a")
    assert (manager.depth, len(manager._pushed)) == (0, 0)
    assert outcome(store.spans()["a"]) == "orphaned"


def test_a_dropped_block_of_a_guarded_client_is_abandoned(store: Store) -> None:
    def use() -> None:
        traced_span("dropped", client=guard()).__enter__()

    with pytest.warns(OrphanedSpanWarning, match="garbage-collected"):
        use()
        gc.collect()
        assert spanguard.open_spans() == []
    assert outcome(store.spans()["dropped"]) == "abandoned"
