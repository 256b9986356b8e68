"""A traced generator keeps Python's protocol, and its span whoever steps it."""

from __future__ import annotations

import asyncio
import gc
import threading
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import spanguard
from spanguard import current_span, traced, traced_span
from tests.store import Store, outcome, own_attributes, status


def test_a_consumer_sees_its_own_ambient_span(store: Store) -> None:
    @traced
    def numbers() -> Iterator[int]:
        for n in range(3):
            assert current_span().name == "numbers"  # type: ignore[union-attr]
            with traced_span(f"inner {n}") as inner:
                yield n
                assert current_span() is inner

    with traced_span("consumer") as consumer:
        for n in numbers():
            assert current_span() is consumer
            with traced_span(f"between {n}"):
                pass
        assert current_span() is consumer
    spans = store.spans()
    assert spans["numbers"].parent_id == spans["consumer"].span_id
    for n in range(3):
        assert spans[f"inner {n}"].parent_id == spans["numbers"].span_id
        assert spans[f"between {n}"].parent_id == spans["consumer"].span_id
        assert status(spans[f"inner {n}"]) == "OK"


def test_a_generator_moves_between_threads(store: Store) -> None:
    @traced
    def numbers() -> Iterator[int]:
        with traced_span("inner"):
            yield 1
            yield 2

    with traced_span("root"):
        stream = numbers()
        assert next(stream) == 1

    seen: list[Any] = []

    def elsewhere() -> None:
        with traced_span("there") as there:
            seen.append(next(stream))
            assert current_span() is there
            seen.extend(stream)
            assert current_span() is there

    with pytest.MonkeyPatch.context():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert seen == [2]
    assert current_span() is None


def test_async_generators_in_tasks(store: Store) -> None:
    @traced
    async def ticks(n: int) -> AsyncIterator[int]:
        for number in range(3):
            await asyncio.sleep(0.001)
            assert current_span().inputs == {"n": n}  # type: ignore[union-attr]
            yield number

    async def consume(n: int) -> None:
        with traced_span(f"consumer {n}") as consumer:
            async for _ in ticks(n):
                assert current_span() is consumer
                await asyncio.sleep(0.001)
                assert current_span() is consumer

    async def main() -> None:
        await asyncio.gather(*(consume(n) for n in range(10)))

    asyncio.run(main())
    traces = store.traces()
    assert [len(trace.data.spans) for trace in traces] == [2] * 10


def test_an_async_generator_stepped_by_different_tasks(store: Store) -> None:
    @traced
    async def ticks() -> AsyncIterator[int]:
        with traced_span("inner"):
            yield 1
            yield 2
            yield 3

    async def main() -> list[int]:
        stream = ticks()
        return [
            await asyncio.create_task(stream.__anext__()),  # type: ignore[arg-type]
            await asyncio.create_task(stream.asend(None)),  # type: ignore[attr-defined]
            *[item async for item in stream],
        ]

    assert asyncio.run(main()) == [1, 2, 3]
    spans = store.spans()
    assert spans["inner"].parent_id == spans["ticks"].span_id
    assert [status(span) for span in spans.values()] == ["OK", "OK"]


def test_the_generator_protocol_passes_through(store: Store) -> None:
    @traced
    def echo() -> Any:
        received = []
        try:
            while True:
                try:
                    received.append((yield len(received)))
                except ValueError as error:
                    received.append(error)
                if len(received) == 3:
                    return received
        finally:
            received.append("closed")

    error = ValueError("thrown")
    stream = echo()
    assert next(stream) == 0
    assert stream.send("a") == 1
    assert stream.throw(error) == 2
    with pytest.raises(StopIteration) as stopped:
        stream.send("b")
    assert stopped.value.value == ["a", error, "b", "closed"]

    def outer() -> Any:
        return (yield from echo())

    delegating = outer()
    next(delegating)
    delegating.send(1)
    delegating.send(2)
    with pytest.raises(StopIteration) as stopped:
        delegating.send(3)
    assert stopped.value.value == [1, 2, 3, "closed"]
    assert len(store.traces()) == 2


def test_the_async_generator_protocol_passes_through(store: Store) -> None:
    @traced
    async def echo() -> Any:
        value = None
        while True:
            try:
                value = yield value
            except ValueError as error:
                value = error

    async def main() -> None:
        stream = echo()
        assert await stream.asend(None) is None
        assert await stream.asend("a") == "a"
        error = ValueError()
        assert await stream.athrow(error) is error
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await stream.__anext__()

    asyncio.run(main())
    assert outcome(store.spans()["echo"]) == "closed_early"


def test_inner_generators_are_closed(store: Store) -> None:
    closed: list[str] = []

    @traced
    def inner() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append("inner")

    @traced
    def outer() -> Iterator[int]:
        yield from inner()

    for _ in outer():
        break
    assert closed == ["inner"]
    assert [outcome(span) for span in store.spans().values()] == ["closed_early"] * 2


def test_an_async_loop_that_breaks_closes_in_the_loop(store: Store) -> None:
    closed: list[str] = []

    @traced
    async def ticks() -> AsyncIterator[int]:
        try:
            with traced_span("inner"):
                yield 1
                yield 2
        finally:
            await asyncio.sleep(0)
            closed.append("ticks")

    async def main() -> None:
        async for _ in ticks():
            break
        for _ in range(10):
            await asyncio.sleep(0)

    asyncio.run(main())
    assert closed == ["ticks"]
    assert {name: outcome(span) for name, span in store.spans().items()} == {
        "ticks": "closed_early",
        "inner": "closed_early",
    }


def test_an_async_generator_dropped_as_its_loop_ends(store: Store) -> None:
    @traced
    async def ticks() -> AsyncIterator[int]:
        yield 1
        yield 2

    async def main() -> None:
        async for _ in ticks():
            break

    asyncio.run(main())
    gc.collect()
    assert outcome(store.spans()["ticks"]) == "closed_early"


def test_a_generator_never_iterated_has_no_span(store: Store) -> None:
    @traced
    def numbers() -> Iterator[int]:
        yield 1

    @traced
    async def ticks() -> AsyncIterator[int]:
        yield 1

    numbers()
    numbers().close()
    ticks()
    gc.collect()
    assert store.traces() == []


def test_a_generator_that_ignores_its_close(store: Store) -> None:
    @traced
    def stubborn() -> Iterator[int]:
        while True:
            try:
                yield 1
            except GeneratorExit:
                pass

    stream = stubborn()
    next(stream)
    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        stream.close()  # type: ignore[attr-defined]
    assert outcome(store.spans()["stubborn"]) == "error"


def test_many_items_do_not_grow_memory(store: Store) -> None:
    @traced(max_items=10)
    def numbers(count: int) -> Iterator[bytes]:
        for n in range(count):
            yield n.to_bytes(8, "big")

    for _ in numbers(1_000):
        pass
    tracemalloc.start()
    try:
        for _ in numbers(200_000):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000
    span = store.traces()[-1].data.spans[0]
    assert len(span.outputs) == 11
    assert span.outputs[-1] == "[spanguard: 199990 more items, 200000 in all]"
    assert own_attributes(span)["spanguard.item_count"] == 200_000


def test_a_pushed_span_in_a_generator_is_not_the_consumers(store: Store) -> None:
    manager = spanguard.TraceStateManager()

    @traced
    def numbers() -> Iterator[int]:
        manager.push_trace("pushed")
        yield 1
        manager.pop_trace()
        yield 2

    stream = numbers()
    next(stream)
    assert manager.current_trace is None
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert status(store.spans()["pushed"]) == "OK"


def test_a_task_that_is_cancelled_in_a_stream(store: Store) -> None:
    @traced
    async def ticks() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(60)
        yield 2

    async def main() -> None:
        async def consume() -> None:
            async for _ in ticks():
                pass

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert outcome(store.spans()["ticks"]) == "cancelled"
