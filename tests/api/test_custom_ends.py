"""Custom traces start and end, in any order and place, each once."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import CustomTraceManager, TraceStateManager, current_span, trace_id_for, traced_span
from spanguard._process.ambient import StandIn
from spanguard.exceptions import DuplicateTraceIdWarning, UnknownSpanWarning
from tests.lifecycle.asked_store import in_thread, named
from tests.store import Store, outcome, status


@pytest.fixture
def client(request: pytest.FixtureRequest) -> mlflow.MlflowClient | None:
    return mlflow.MlflowClient() if getattr(request, "param", None) else None


def test_a_started_trace_is_ambient_until_it_ends(store: Store) -> None:
    manager = CustomTraceManager()
    with traced_span("outside") as outside:
        order = manager.start_custom_trace("ada", "checkout", custom_trace_id="order")
        assert current_span() is order
        with traced_span("ours"), mlflow.start_span("fluent"):
            pass
        manager.end_custom_trace("order", attributes={"k": 1}, status="error")
        assert current_span() is outside
    traces = named(store)
    by_name = {span.name: span for span in traces["order"].data.spans}
    assert by_name["ours"].parent_id == order.span_id
    assert by_name["fluent"].parent_id == by_name["ours"].span_id
    assert (status(by_name["order"]), by_name["order"].get_attribute("k")) == ("ERROR", 1)
    assert len(traces["outside"].data.spans) == 1


def test_traces_may_overlap(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    first = manager.start_custom_trace("ada", "x", custom_trace_id="first")
    second = manager.start_custom_trace("bob", "x", custom_trace_id="second")
    assert list(manager.active_traces) == ["first", "second"]
    manager.end_custom_trace("first")
    assert current_span() is second
    with traced_span("under second") as child:
        assert child.parent_id == second.span_id
    third = manager.start_custom_trace("cy", "x", custom_trace_id="third")
    manager.end_custom_trace("third")
    assert current_span() is second
    manager.end_custom_trace("second")
    assert current_span() is None
    assert mlflow.get_current_active_span() is None
    assert {status(span) for span in store.spans().values()} == {"OK"}
    assert first.trace_id != second.trace_id != third.trace_id


def test_an_end_in_a_block_leaves_the_block_active(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    manager.start_custom_trace("ada", "x", custom_trace_id="order")
    with traced_span("block", new_trace=True) as block:
        manager.end_custom_trace("order")
        assert current_span() is block
    assert current_span() is None
    assert {status(span) for span in store.spans().values()} == {"OK"}


def test_traces_that_always_overlap_leave_nothing_behind(store: Store) -> None:
    """As a server does that is never without a request: the context must not grow."""
    manager = CustomTraceManager()
    held = ["0", "1", "2"]
    for custom_id in held:
        manager.start_custom_trace("ada", "x", custom_trace_id=custom_id)
    for number in range(3, 40):
        manager.start_custom_trace("ada", "x", custom_trace_id=str(number))
        manager.end_custom_trace(held.pop(0))
        held.append(str(number))
    gc.collect()
    assert sum(type(one) is StandIn for one in gc.get_objects()) < 12
    for custom_id in held:
        manager.end_custom_trace(custom_id)
    assert manager._traces == {}
    assert current_span() is None
    assert len(store.traces()) == 40


@pytest.mark.parametrize("where", ["thread", "task", "context"])
def test_ending_elsewhere_poisons_no_context(store: Store, where: str) -> None:
    manager = CustomTraceManager(strict=True)

    def end() -> None:
        assert manager.get_active_trace("order") is not None
        manager.end_custom_trace("order", outputs=where)
        assert current_span() is None

    async def main() -> None:
        manager.start_custom_trace("ada", "x", custom_trace_id="order")

        async def callback() -> None:
            end()

        await asyncio.create_task(callback())
        check()

    def check() -> None:
        assert current_span() is None
        with mlflow.start_span("later") as later:
            assert later.parent_id is None
        with traced_span("next") as following:
            assert following.parent_id is None

    if where == "task":
        asyncio.run(main())
    else:
        manager.start_custom_trace("ada", "x", custom_trace_id="order")
        if where == "thread":
            in_thread(end)
        else:
            contextvars.copy_context().run(end)
        check()
    traces = named(store)
    assert traces["order"].data.spans[0].outputs == where
    assert {name: len(trace.data.spans) for name, trace in traces.items()} == {
        "order": 1,
        "later": 1,
        "next": 1,
    }


def test_tasks_have_ambient_traces_of_their_own(store: Store) -> None:
    manager = CustomTraceManager(strict=True)

    async def serve(number: int) -> None:
        span = manager.start_custom_trace("ada", "x", custom_trace_id=f"order {number}")
        await asyncio.sleep(0.001)
        with traced_span("step") as step:
            assert step.parent_id == span.span_id
        manager.end_custom_trace(f"order {number}")
        assert current_span() is None

    async def main() -> None:
        await asyncio.gather(*(serve(number) for number in range(10)))

    asyncio.run(main())
    assert [len(trace.data.spans) for trace in store.traces()] == [2] * 10


ENDINGS: dict[str, Callable[[CustomTraceManager, Any], Any]] = {
    "end_custom_trace": lambda manager, span: manager.end_custom_trace("order"),
    "span.end": lambda manager, span: span.end(),
    "raw client": lambda manager, span: mlflow.MlflowClient().end_trace(span.trace_id),
    "MLflow's own span": lambda manager, span: span.__wrapped__.end(),
    "close_open_spans": lambda manager, span: spanguard.close_open_spans(),
    "in a thread": lambda manager, span: in_thread(span.end),
}


@pytest.mark.parametrize("how", ENDINGS)
def test_a_trace_that_ended_is_not_active_however_it_ended(store: Store, how: str) -> None:
    manager = CustomTraceManager()
    span = manager.start_custom_trace("ada", "x", custom_trace_id="order")
    assert dict(manager.active_traces) == {"order": span}
    assert manager.get_active_trace("order") is span
    ENDINGS[how](manager, span)
    assert dict(manager.active_traces) == {}
    assert manager.get_active_trace("order") is None
    assert current_span() is None
    with pytest.warns(UnknownSpanWarning, match="has ended, or was not started here"):
        manager.end_custom_trace("order")
    with traced_span("next") as following:
        assert following.parent_id is None
    assert named(store)["order"].info.tags["custom_trace_id"] == "order"


def test_ending_an_unknown_id(store: Store) -> None:
    manager = CustomTraceManager()
    other = CustomTraceManager(strict=True)
    manager.start_custom_trace("ada", "x", custom_trace_id="order")
    with pytest.warns(UnknownSpanWarning, match="'nope'"):
        manager.end_custom_trace("nope")
    with pytest.raises(spanguard.UnknownSpanError) as caught:
        other.end_custom_trace("order")
    assert (caught.value.span_name, caught.value.trace_id) == ("order", trace_id_for("order"))
    assert list(manager.active_traces) == ["order"]
    manager.end_custom_trace("order")


def test_the_users_exception_wins_over_an_unknown_id() -> None:
    manager = CustomTraceManager(strict=True)
    error = ValueError("users")
    with pytest.raises(ValueError) as caught:
        try:
            raise error
        finally:
            manager.end_custom_trace("nope")
    assert caught.value is error


def test_two_threads_end_a_trace_once(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    manager.start_custom_trace("ada", "x", custom_trace_id="order")
    barrier = threading.Barrier(4)

    def end(number: int) -> bool:
        barrier.wait()
        try:
            manager.end_custom_trace("order", outputs=number)
        except spanguard.UnknownSpanError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        ended = list(pool.map(end, range(4)))
    assert ended.count(True) == 1
    assert store.trace().data.spans[0].outputs == ended.index(True)
    current_span()


def test_what_is_open_below_is_closed_first(store: Store, client: Any) -> None:
    manager = CustomTraceManager(strict=True)
    span = manager.start_custom_trace("ada", "x", custom_trace_id="order")
    pushed = TraceStateManager()
    pushed.push_trace("pushed")
    mlflow.MlflowClient().start_span("raw", span.trace_id, span.span_id)
    with pytest.raises(spanguard.OrphanedSpanError) as caught:
        manager.end_custom_trace("order")
    assert {orphan.name for orphan in caught.value.spans} == {"pushed", "raw"}
    assert current_span() is None
    assert pushed.depth == 0
    spans = store.spans()
    assert [outcome(spans[name]) for name in ("order", "pushed", "raw")] == [
        "ok",
        "orphaned",
        "orphaned",
    ]


def test_a_status_that_is_none_of_mlflows(store: Store) -> None:
    manager = CustomTraceManager()
    manager.start_custom_trace("ada", "x", custom_trace_id="order")
    with pytest.warns(spanguard.SpanguardWarning, match="not one of OK"):
        manager.end_custom_trace("order", status="FAILED")
    assert status(store.spans()["order"]) == "ERROR"


def test_the_block_takes_its_status_from_the_exception(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    error = ValueError("bad")
    with pytest.raises(ValueError) as caught:
        with manager.custom_trace("ada", "x", custom_trace_id="order") as span:
            assert current_span() is span is manager.active_traces["order"]
            raise error
    assert caught.value is error
    assert (dict(manager.active_traces), current_span()) == ({}, None)
    assert manager._traces == {}, "nor does it keep the payload of the one that ended last"
    root = store.spans()["order"]
    assert (status(root), outcome(root)) == ("ERROR", "error")
    assert root.get_attribute("error_type") == "ValueError"


def test_the_block_works_async_and_once(store: Store) -> None:
    manager = CustomTraceManager()

    async def main() -> None:
        async with manager.custom_trace("ada", "x", custom_trace_id="order"):
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            async with manager.custom_trace("ada", "x", custom_trace_id="cancelled"):
                raise asyncio.CancelledError

    asyncio.run(main())
    block = manager.custom_trace("ada", "x", custom_trace_id="twice")
    with block:
        pass
    with pytest.raises(RuntimeError, match="new one"), block:
        pass
    spans = store.spans()
    assert [outcome(spans[name]) for name in ("order", "cancelled")] == ["ok", "cancelled"]


def test_a_block_whose_trace_is_ended_inside_it(store: Store) -> None:
    manager = CustomTraceManager()
    with pytest.warns(spanguard.SpanguardWarning, match="already ended"):
        with manager.custom_trace("ada", "x", custom_trace_id="order"):
            manager.end_custom_trace("order", outputs="early")
            assert current_span() is None
    assert store.spans()["order"].outputs == "early"


def test_a_trace_left_open_in_a_block_stays_open(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    with manager.custom_trace("ada", "x", custom_trace_id="block"):
        left = manager.start_custom_trace("ada", "x", custom_trace_id="left")
    assert current_span() is None, "the block leaves the context as it was found"
    assert dict(manager.active_traces) == {"left": left}
    manager.end_custom_trace("left")
    assert {status(span) for span in store.spans().values()} == {"OK"}


def test_a_manager_does_not_keep_what_another_api_has_ended(store: Store) -> None:
    manager = CustomTraceManager()
    for number in range(5):
        manager.start_custom_trace("ada", "x", custom_trace_id=str(number)).end()
        assert len(manager._traces) == 1


def test_a_trace_that_is_dropped_with_its_manager_is_abandoned(store: Store) -> None:
    manager: CustomTraceManager | None = CustomTraceManager()
    assert manager is not None
    manager.start_custom_trace("ada", "x", custom_trace_id="order")
    with pytest.warns(spanguard.OrphanedSpanWarning, match="'order'.*garbage-collected"):
        manager = None
        gc.collect()
        assert spanguard.open_spans() == []
    assert outcome(store.spans()["order"]) == "abandoned"


def test_active_traces_cannot_be_written() -> None:
    manager = CustomTraceManager()
    with pytest.raises(TypeError):
        manager.active_traces["x"] = None  # type: ignore[index]


def test_custom_traces_where_tracing_is_off(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    mlflow.tracing.disable()
    try:
        span = manager.start_custom_trace("ada", "x", custom_trace_id="order")
        assert list(manager.active_traces) == ["order"]
        with pytest.raises(spanguard.DuplicateTraceIdError):
            manager.start_custom_trace("ada", "x", custom_trace_id="order")
        manager.end_custom_trace("order")
        span = manager.start_custom_trace("ada", "x", custom_trace_id="order")
        span.end()
        with manager.custom_trace("ada", "x", custom_trace_id="order"):
            pass
    finally:
        mlflow.tracing.enable()
    assert store.traces() == []


def test_a_span_that_spanguard_would_refuse_takes_no_id_with_it(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    with pytest.raises(spanguard.InvalidSpanArgumentError):
        manager.start_custom_trace(
            "ada", "x", custom_trace_id="order", **{"mlflow.spanInputs": "evil"}
        )
    assert spanguard.open_spans() == []
    with manager.custom_trace("ada", "x", custom_trace_id="order"):
        pass
    assert store.trace().info.trace_id == trace_id_for("order")


def test_a_warning_that_is_an_error_leaves_nothing_open(store: Store) -> None:
    manager = CustomTraceManager()
    with manager.custom_trace("ada", "x", custom_trace_id="order"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", DuplicateTraceIdWarning)
            with pytest.raises(DuplicateTraceIdWarning):
                manager.start_custom_trace("ada", "x", custom_trace_id="order")
        assert list(manager.active_traces) == ["order"]
        assert [span.name for span in spanguard.open_spans()] == ["order"]
    assert len(store.traces()) == 2
