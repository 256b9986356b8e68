"""Push and pop: in order, out of order, across threads and tasks, and left open."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import threading
import weakref
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import TraceStateManager, current_span, traced_span
from tests.api.scopes import BOTH_SCOPES, in_thread
from tests.store import Store, outcome, own_attributes, status

pytestmark = pytest.mark.versions


@BOTH_SCOPES
def test_push_and_pop_nest(store: Store, scope: Any) -> None:
    manager = TraceStateManager(scope=scope)
    assert (manager.current_trace, manager.depth) == (None, 0)
    a = manager.push_trace("a", inputs=1)
    assert manager.current_trace is a
    b = manager.push_trace("b")
    assert (manager.current_trace, manager.depth) == (b, 2)
    with mlflow.start_span("fluent"):
        pass
    assert manager.pop_trace(outputs="done", attributes={"k": 1}) is b
    assert manager.pop_trace(status="error") is a
    assert (manager.current_trace, manager.depth) == (None, 0)
    spans = store.spans()
    assert spans["b"].parent_id == a.span_id
    assert spans["fluent"].parent_id == b.span_id
    assert (spans["b"].outputs, own_attributes(spans["b"])) == ("done", {"k": 1})
    assert [status(spans[name]) for name in "ab"] == ["ERROR", "OK"]
    assert mlflow.get_current_active_span() is None


@BOTH_SCOPES
def test_popping_nothing(scope: Any) -> None:
    manager = TraceStateManager(scope=scope)
    assert manager.pop_trace() is None
    with pytest.raises(spanguard.EmptyTraceStackError, match="Push before you pop"):
        TraceStateManager(scope=scope, strict=True).pop_trace()


@BOTH_SCOPES
def test_popping_a_span_that_is_not_on_top(store: Store, scope: Any) -> None:
    manager = TraceStateManager(scope=scope)
    a = manager.push_trace("a")
    manager.push_trace("b")
    manager.push_trace("c")
    with pytest.warns(spanguard.SpanguardWarning, match="2 open below"):
        assert manager.pop_trace(a) is a
    assert manager.depth == 0
    spans = store.spans()
    assert [outcome(spans[name]) for name in "abc"] == ["ok", "orphaned", "orphaned"]
    assert spans["c"].end_time_ns <= spans["b"].end_time_ns <= spans["a"].end_time_ns
    assert mlflow.get_current_active_span() is None


@BOTH_SCOPES
def test_popping_out_of_order_raises_in_strict_mode_afterwards(store: Store, scope: Any) -> None:
    manager = TraceStateManager(scope=scope, strict=True)
    a = manager.push_trace("a")
    manager.push_trace("b")
    with pytest.raises(spanguard.SpanOrderError) as caught:
        manager.pop_trace(a, outputs=1)
    assert [span.name for span in caught.value.spans] == ["b"]
    assert caught.value.span_id == a.span_id
    spans = store.spans()
    assert spans["a"].outputs == 1
    assert outcome(spans["b"]) == "orphaned"


@BOTH_SCOPES
@pytest.mark.filterwarnings("error::spanguard.SpanguardWarning")
def test_roots_are_independent_whatever_order_they_are_popped_in(store: Store, scope: Any) -> None:
    manager = TraceStateManager(scope=scope, strict=True)
    a = manager.push_trace("a")
    b = manager.push_trace("b", new_trace=True)
    c = manager.push_trace("c", new_trace=True)
    assert manager.pop_trace(a) is a
    assert manager.current_trace is c
    assert current_span() is c
    assert manager.pop_trace(b, outputs=2) is b
    assert manager.pop_trace() is c
    assert current_span() is None
    spans = store.spans()
    assert {name: outcome(span) for name, span in spans.items()} == dict.fromkeys("abc", "ok")
    assert spans["b"].outputs == 2
    assert len(store.traces()) == 3


@BOTH_SCOPES
@pytest.mark.filterwarnings("error::spanguard.SpanguardWarning")
@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_siblings_are_independent_whatever_order_they_are_popped_in(
    store: Store, scope: Any, order: str
) -> None:
    manager = TraceStateManager(scope=scope, strict=True)
    root = manager.push_trace("root")
    spans = {
        name: manager.push_trace(name, trace_id=root.trace_id, parent_id=root.span_id)
        for name in "abc"
    }
    for name in order:
        assert manager.pop_trace(spans[name], outputs=name) is spans[name]
    assert manager.pop_trace() is root
    assert current_span() is None
    stored = store.spans()
    assert {span.parent_id for name, span in stored.items() if name != "root"} == {root.span_id}
    assert {(outcome(span), span.outputs) for span in stored.values()} == {
        ("ok", "a"),
        ("ok", "b"),
        ("ok", "c"),
        ("ok", None),
    }


@BOTH_SCOPES
def test_popping_twice_or_a_stranger_does_nothing(store: Store, scope: Any) -> None:
    manager = TraceStateManager(scope=scope)
    a = manager.push_trace("a")
    b = manager.push_trace("b")
    manager.pop_trace(b)
    with pytest.warns(spanguard.SpanguardWarning, match="popped before"):
        assert manager.pop_trace(b) is None
    other = TraceStateManager(scope=scope)
    with pytest.warns(spanguard.SpanguardWarning):
        assert other.pop_trace(a) is None
    with pytest.raises(spanguard.UnknownSpanError) as caught:
        TraceStateManager(scope=scope, strict=True).pop_trace(a)
    assert caught.value.span_id == a.span_id
    assert manager.current_trace is a
    manager.pop_trace()
    assert [status(span) for span in store.spans().values()] == ["OK", "OK"]


@BOTH_SCOPES
def test_popping_by_handle_from_another_thread(store: Store, scope: Any) -> None:
    manager = TraceStateManager(scope=scope)
    a = manager.push_trace("a")
    assert in_thread(lambda: manager.pop_trace(a, outputs="there")) is a
    assert manager.depth == 0
    # This thread holds what it was given when it pushed; it stands for nothing now.
    assert current_span() is None
    with mlflow.start_span("later"):
        pass
    spans = store.spans()
    assert spans["a"].outputs == "there"
    assert spans["later"].parent_id is None


def test_popping_by_handle_from_another_task(store: Store) -> None:
    manager = TraceStateManager()

    async def main() -> None:
        a = manager.push_trace("a")

        async def pop() -> None:
            assert manager.pop_trace(a) is a

        await asyncio.create_task(pop())
        assert manager.depth == 0
        assert current_span() is None

    asyncio.run(main())
    assert status(store.spans()["a"]) == "OK"


def test_popping_by_handle_from_elsewhere_closes_what_is_above(store: Store) -> None:
    manager = TraceStateManager(strict=True)
    a = manager.push_trace("a")
    manager.push_trace("b")
    with pytest.raises(spanguard.SpanOrderError):
        in_thread(lambda: manager.pop_trace(a))
    assert manager.depth == 0
    assert outcome(store.spans()["b"]) == "orphaned"


def test_popping_mlflows_own_span_object(store: Store) -> None:
    manager = TraceStateManager()
    a = manager.push_trace("a")
    assert manager.pop_trace(mlflow.get_current_active_span()) is a


def test_contexts_have_stacks_of_their_own(store: Store) -> None:
    manager = TraceStateManager()
    a = manager.push_trace("a")

    def elsewhere() -> None:
        assert (manager.current_trace, manager.depth) == (None, 0)
        b = manager.push_trace("b")
        assert manager.current_trace is b
        assert manager.pop_trace() is b
        assert manager.pop_trace() is None

    in_thread(elsewhere)
    assert manager.current_trace is a
    manager.pop_trace()
    assert len(store.traces()) == 2


def test_a_child_task_nests_and_pops_only_what_it_pushed(store: Store) -> None:
    manager = TraceStateManager()

    async def child(number: int) -> None:
        assert manager.current_trace is not None
        assert manager.current_trace.name == "parent"
        assert manager.pop_trace() is None, "that is the parent's"
        span = manager.push_trace(f"child {number}")
        await asyncio.sleep(0.001)
        assert manager.current_trace is span
        assert manager.pop_trace() is span
        assert manager.pop_trace() is None

    async def main() -> None:
        parent = manager.push_trace("parent")
        await asyncio.gather(*(child(number) for number in range(20)))
        assert manager.current_trace is parent
        assert manager.pop_trace() is parent

    asyncio.run(main())
    spans = store.spans()
    assert len(spans) == 21
    assert all(
        span.parent_id == spans["parent"].span_id
        for name, span in spans.items()
        if name != "parent"
    )


def test_the_process_scope_is_one_stack_for_all(store: Store) -> None:
    manager = TraceStateManager(scope="process")
    a = manager.push_trace("a")
    b = in_thread(lambda: manager.push_trace("b"))
    assert (manager.current_trace, manager.depth) == (b, 2)
    assert manager.pop_trace() is b
    assert in_thread(manager.pop_trace) is a
    assert store.spans()["b"].parent_id == a.span_id


def test_the_process_scope_across_callbacks(store: Store) -> None:
    manager = TraceStateManager(scope="process")
    contexts = [contextvars.Context() for _ in range(4)]
    contexts[0].run(manager.push_trace, "job")
    contexts[1].run(manager.push_trace, "step")
    contexts[2].run(manager.pop_trace)
    contexts[3].run(manager.pop_trace)
    spans = store.spans()
    assert spans["step"].parent_id == spans["job"].span_id
    assert [status(span) for span in spans.values()] == ["OK", "OK"]


def test_managers_and_blocks_share_one_ambient_stack(store: Store) -> None:
    one, two = TraceStateManager(), TraceStateManager()
    with traced_span("block"):
        a = one.push_trace("a")
        b = two.push_trace("b")
        with traced_span("inner"):
            pass
        assert one.current_trace is a
        assert two.pop_trace() is b
        assert one.pop_trace() is a
    spans = store.spans()
    chain = ["block", "a", "b", "inner"]
    for outer, inner in itertools.pairwise(chain):
        assert spans[inner].parent_id == spans[outer].span_id


def test_a_block_closes_what_was_pushed_in_it(store: Store) -> None:
    manager = TraceStateManager()
    outside = manager.push_trace("outside")
    with pytest.warns(spanguard.OrphanedSpanWarning):
        with traced_span("block"):
            manager.push_trace("leaked")
    assert manager.current_trace is outside
    assert manager.pop_trace() is outside
    assert len(manager._pushed) == 0
    assert outcome(store.spans()["leaked"]) == "orphaned"


def test_a_pop_in_a_block_closes_the_block(store: Store) -> None:
    manager = TraceStateManager()
    manager.push_trace("pushed")
    with pytest.warns(spanguard.OrphanedSpanWarning):
        with traced_span("block"):
            manager.pop_trace()
            assert current_span() is None
    assert mlflow.get_current_active_span() is None
    assert outcome(store.spans()["block"]) == "orphaned"


def test_a_span_ended_by_hand_is_still_popped(store: Store) -> None:
    manager = TraceStateManager()
    a = manager.push_trace("a")
    b = manager.push_trace("b")
    b.end()
    assert (manager.current_trace, manager.depth) == (a, 1)
    with pytest.warns(spanguard.SpanguardWarning, match="already ended"):
        assert manager.pop_trace() is b
    assert manager.pop_trace() is a
    assert [status(span) for span in store.spans().values()] == ["OK", "OK"]


def test_a_span_ended_by_the_raw_client_is_still_popped(
    store: Store, client: mlflow.MlflowClient
) -> None:
    manager = TraceStateManager(strict=True)
    a = manager.push_trace("a")
    b = manager.push_trace("b")
    client.end_span(b.trace_id, b.span_id)
    with pytest.raises(spanguard.SpanAlreadyEndedError) as caught:
        manager.pop_trace()
    assert caught.value.span_id == b.span_id
    assert manager.pop_trace() is a


def test_a_leak_under_a_pushed_span(store: Store, client: mlflow.MlflowClient) -> None:
    manager = TraceStateManager(strict=True)
    a = manager.push_trace("a")
    client.start_span("leaked", a.trace_id, a.span_id)
    with pytest.raises(spanguard.OrphanedSpanError) as caught:
        manager.pop_trace()
    assert not isinstance(caught.value, spanguard.SpanOrderError)
    assert outcome(store.spans()["leaked"]) == "orphaned"


@pytest.mark.parametrize("bogus", ["FAILED", 3])
def test_popping_with_an_invalid_status(store: Store, bogus: Any) -> None:
    manager = TraceStateManager()
    manager.push_trace("a")
    with pytest.warns(spanguard.SpanguardWarning, match="not one of OK"):
        manager.pop_trace(status=bogus)
    assert status(store.spans()["a"]) == "ERROR"


def test_popping_as_ok_does_not_undo_an_error(store: Store) -> None:
    manager = TraceStateManager()
    manager.push_trace("a").record_exception(ValueError())
    manager.pop_trace(status="OK")
    assert status(store.spans()["a"]) == "ERROR"


# -- nothing is kept ---------------------------------------------------------------------------


@BOTH_SCOPES
def test_nothing_outlives_its_span(scope: Any) -> None:
    from spanguard._process import registry

    manager = TraceStateManager(scope=scope)
    spans = weakref.WeakSet[Any]()
    for _ in range(50):
        span = manager.push_trace("a")
        spans.add(span.__wrapped__)
        manager.push_trace("b")
        manager.pop_trace()
        manager.pop_trace()
    del span
    assert spanguard.flush(30)
    gc.collect()
    assert len(manager._pushed) == 0
    assert len(registry.open) == 0
    assert len(spans) <= 1, "the last one may still be in a local of MLflow's exporter"


def test_a_dropped_manager_closes_what_it_held_as_abandoned(store: Store) -> None:
    def use() -> None:
        manager = TraceStateManager()
        manager.push_trace("dropped")

    with pytest.warns(spanguard.OrphanedSpanWarning, match="garbage-collected"):
        use()
        gc.collect()
        assert spanguard.open_spans() == []
    assert outcome(store.spans()["dropped"]) == "abandoned"
    assert current_span() is None


def test_one_manager_from_many_threads(store: Store) -> None:
    manager = TraceStateManager()
    root = manager.push_trace("root")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(5):
                outer = manager.push_trace(f"{number}.{turn}", trace_id=root.trace_id)
                inner = manager.push_trace(f"{number}.{turn} inner")
                assert manager.pop_trace() is inner
                assert manager.pop_trace() is outer
                assert manager.pop_trace() is None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert manager.pop_trace() is root
    spans = store.spans()
    assert len(spans) == 161
    assert all(span.parent_id == root.span_id for n, span in spans.items() if n[-1].isdigit())
