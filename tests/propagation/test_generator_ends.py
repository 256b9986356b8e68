"""How a generator ends that nobody pulls to its end, and what is recorded of its items."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import spanguard
from spanguard import carry, current_span, traced, traced_span
from spanguard._process import outliving
from tests.propagation.test_generators import WRAPS
from tests.store import Store, outcome, own_attributes

pytestmark = pytest.mark.pythons

# -- an event loop that ends -------------------------------------------------------------------


async def ticks() -> AsyncIterator[int]:
    """Tick for ever; at the end clean up, with spans before and after an await."""
    try:
        with traced_span("inner"):
            for number in range(1_000_000):
                yield number
    finally:
        with traced_span("clean-up"):
            await asyncio.sleep(0)
            with traced_span("later"):
                pass


held: list[Any] = []


async def held_by_the_program(stream: Any) -> None:
    held.append(stream)
    assert await stream.__anext__() == 0


async def held_by_a_cycle(stream: Any) -> None:
    cycle: list[Any] = [stream]
    cycle.append(cycle)
    assert await stream.asend(None) == 0


async def held_by_a_task(stream: Any) -> None:
    async def consume() -> None:
        async for _ in stream:
            await asyncio.sleep(3600)

    held.append(asyncio.create_task(consume()))
    await asyncio.sleep(0.01)


async def held_by_a_failing_loop(stream: Any) -> None:
    held.append(stream)
    async for _ in stream:
        raise KeyError("of the consumer")


async def passed_from_task_to_task(stream: Any) -> None:
    held.append(stream)
    for _ in range(2):
        await asyncio.create_task(anext(stream))


def by_run(main: Any) -> None:
    asyncio.run(main)


def by_an_old_fashioned_loop(main: Any) -> None:
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(main)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("run", [by_run, by_an_old_fashioned_loop])
def test_an_event_loop_that_ends_closes_what_is_suspended(
    store: Store, run: Any, wrap: Callable[[Any], Any]
) -> None:
    """As it does with a plain generator: early, in the loop, its clean-up a part of it."""
    holders = (
        held_by_the_program,
        held_by_a_cycle,
        held_by_a_task,
        held_by_a_failing_loop,
        passed_from_task_to_task,
    )
    with traced_span("root") as root:
        for holder in holders:
            with traced_span(holder.__name__) as above:
                stream = wrap(ticks)()
                try:
                    run(holder(stream))
                except KeyError:
                    assert holder is held_by_a_failing_loop
                del stream
                gc.collect()
                assert current_span() is above
        assert current_span() is root
    held.clear()
    spans = store.trace().data.spans
    names = {span.span_id: span.name for span in spans}
    its_own = wrap is WRAPS["traced"] or wrap is WRAPS["traced and carried"]
    expected = {"ticks"} if its_own else {holder.__name__ for holder in holders}
    for name in ("inner", "clean-up", "later"):
        found = [span for span in spans if span.name == name]
        assert len(found) == len(holders)
        assert {outcome(span) for span in found} == {"closed_early" if name == "inner" else "ok"}
        parents = {names[span.parent_id] for span in found}
        assert parents == ({"clean-up"} if name == "later" else expected)
    outcomes = [outcome(span) for span in spans if span.name == "ticks"]
    assert outcomes == ([] if wrap is carry else ["closed_early"] * len(holders))


def test_a_generator_taken_from_loop_to_loop_is_closed_by_the_first(store: Store) -> None:
    """So does a plain one; the second loop finds it at its end."""
    plain, own = ticks(), traced(ticks)()
    results: list[list[Any]] = []
    for stream in (plain, own):
        asyncio.run(anext_of(stream))
        results.append([asyncio.run(rest_of(stream))])
    assert results[0] == results[1] == [["over"]]


async def anext_of(stream: Any) -> Any:
    return await stream.__anext__()


async def rest_of(stream: Any) -> list[Any]:
    try:
        return [await stream.__anext__()]
    except StopAsyncIteration:
        return ["over"]


def test_a_suspended_generator_is_not_over_with_the_task_that_pulled_it(store: Store) -> None:
    """Its root waits for it: the event loop closes it in a moment, or another task goes on."""

    async def main() -> None:
        with traced_span("root"):
            held.append(traced(ticks)())
            await asyncio.create_task(anext_of(held[0]))
        for waiting in list(outliving._waiting.values()):
            waiting.close_what_is_over(time.monotonic())
        assert await asyncio.create_task(anext_of(held[0])) == 1

    asyncio.run(main())
    held.clear()
    outcomes = {name: outcome(span) for name, span in store.spans().items()}
    assert outcomes == {
        "root": "ok",
        "ticks": "closed_early",
        "inner": "closed_early",
        "clean-up": "ok",
        "later": "ok",
    }


# -- items -------------------------------------------------------------------------------------


class Batch:
    """Something big."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"batch {self.number}"


def test_items_are_recorded_as_they_were_when_yielded(store: Store) -> None:
    """One object that is yielded again and again, changed, at any depth."""

    @traced
    def changed() -> Iterator[Any]:
        item: dict[str, Any] = {"n": 0, "deep": {"list": []}}
        for number in range(3):
            item["n"] = number
            item["deep"]["list"].append(number)
            yield item

    @traced
    async def changed_async() -> AsyncIterator[Any]:
        for item in changed.__wrapped__():
            yield item

    async def main() -> None:
        assert [id(item) async for item in changed_async()]

    list(changed())
    asyncio.run(main())
    expected = [{"n": n, "deep": {"list": list(range(n + 1))}} for n in range(3)]
    assert store.spans()["changed"].outputs == expected
    assert store.spans()["changed_async"].outputs == expected


@pytest.mark.parametrize("options", [{}, {"redact": lambda name, value: value}])
def test_no_item_is_kept_alive(store: Store, options: Any) -> None:
    @traced(**options)
    def batches() -> Iterator[Any]:
        for number in range(100):
            yield Batch(number)

    alive: list[weakref.ref[Any]] = []
    most = 0
    for batch in batches():
        alive.append(weakref.ref(batch))
        del batch
        most = max(most, sum(ref() is not None for ref in alive))
    assert most <= 1
    assert store.spans()["batches"].outputs == [f"batch {n}" for n in range(100)]


def test_a_generator_lets_go_of_its_arguments_as_a_plain_one_does(store: Store) -> None:
    @traced
    def numbers(batch: Any) -> Iterator[int]:
        del batch
        yield 1
        yield 2

    @traced
    async def work(batch: Any, alive: Any) -> bool:
        del batch
        await asyncio.sleep(0)
        gc.collect()
        return alive() is None

    batch = Batch(0)
    alive = weakref.ref(batch)
    stream = numbers(batch)
    next(stream)
    coroutine = work(batch, alive)
    del batch
    assert asyncio.run(coroutine)  # type: ignore[arg-type]
    stream.close()  # type: ignore[attr-defined]


def test_items_share_one_budget_of_characters(store: Store) -> None:
    @traced
    def texts(count: int) -> Iterator[Any]:
        for _ in range(count):
            yield {"text": "x" * 100}

    with spanguard.limits(value_chars=1_000):
        list(texts(500))
    (span,) = store.spans().values()
    assert len(str(span.outputs)) < 1_500
    assert own_attributes(span)["spanguard.item_count"] == 500
    *items, last = span.outputs
    assert items[0] == {"text": "x" * 100}
    assert last == f"[spanguard: {500 - len(items)} more items, 500 in all]"


def test_a_redactor_sees_each_item_as_it_is(store: Store) -> None:
    """Not a likeness of it: it may go by the type."""

    def redact(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [redact(name, item) for item in value]
        return "***" if isinstance(value, Batch) else value

    @traced(redact=redact)
    def mixed() -> Iterator[Any]:
        yield 1
        yield Batch(7)
        yield "plain"

    @traced(redact=lambda name, value: "***" if name == "return" else value)
    def hidden() -> Iterator[Any]:
        yield 1
        yield 2

    list(mixed())
    list(hidden())
    assert store.spans()["mixed"].outputs == [1, "***", "plain"]
    assert store.spans()["hidden"].outputs == ["***", "***"]
    assert b"batch 7" not in store.path.read_bytes()


def test_a_reducer_gets_the_items_themselves(store: Store) -> None:
    def reduce(items: list[Any]) -> Any:
        return sum(item.number for item in items)

    @traced(output_reducer=reduce, max_items=3)
    def batches() -> Iterator[Any]:
        for number in range(5):
            yield Batch(number)

    list(batches())
    (span,) = store.spans().values()
    assert span.outputs == 3
    assert own_attributes(span)["spanguard.item_count"] == 5


def test_an_item_whose_text_raises_is_still_given_to_the_consumer(store: Store) -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise SystemExit("in repr")

    @traced
    def numbers() -> Iterator[Any]:
        yield Hostile()
        yield 2

    assert [type(item).__name__ for item in numbers()] == ["Hostile", "int"]
    (span,) = store.spans().values()
    assert "its text raised SystemExit" in span.outputs[0]
    assert span.outputs[1] == 2
