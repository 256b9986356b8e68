"""Whoever pulls a traced generator, and however it ends: its span is its own, and ends once."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest

import spanguard
from spanguard import carry, current_span, traced, traced_span
from tests.programs import assert_nothing_is_left, assert_whole, run_one, stored
from tests.store import Store, outcome

pytestmark = pytest.mark.pythons

WRAPS: dict[str, Callable[[Any], Any]] = {
    "traced": traced,
    "carried": carry,
    "traced and carried": lambda function: carry(traced(function)),
    "carried and traced": lambda function: traced(carry(function)),
}

# -- two at a time -----------------------------------------------------------------------------

# Three calls after one another, by one of two pullers each; in the middle of each, the other one
# tries a call as well.
CALLS = ("next", "send", "throw", "close")
PROGRAMS = [
    program
    for program in itertools.product(itertools.product((0, 1), CALLS), repeat=3)
    if program[0][0] == 0
]


def checked(work: Callable[[], Any]) -> Any:
    """Do it, return what comes of it, and see that what was ambient before is ambient after."""
    before = current_span()
    try:
        return work()
    except BaseException as error:
        return error
    finally:
        assert current_span() is before


async def checked_async(work: Callable[[], Any]) -> Any:
    """The same for what is awaited."""
    before = current_span()
    try:
        return await work()
    except BaseException as error:
        return error
    finally:
        assert current_span() is before


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, BaseException):
        return type(one) is type(other) and str(one) == str(other)
    return bool(one == other)


class Gate:
    """What a generator's body waits at, until the test lets it go on."""

    def __init__(self) -> None:
        self.is_shut = True
        self.reached = threading.Semaphore(0)
        self.opened = threading.Semaphore(0)

    def wait(self) -> None:
        if self.is_shut:
            self.reached.release()
            assert self.opened.acquire(timeout=30)


def echo(gate: Gate | None) -> Any:
    """Give back what is sent or thrown in; with a gate, from inside a span of the body's own."""
    received: Any = "begun"
    with traced_span("inner") if gate else nullcontext() as inner:
        try:
            while True:
                if gate:
                    gate.wait()
                    assert current_span() is inner
                try:
                    received = yield received
                except LookupError as error:
                    received = str(error)
        finally:
            if gate:
                assert current_span() is inner
                gate.wait()


def sync_call(stream: Any, call: str) -> Callable[[], Any]:
    return {
        "next": lambda: next(stream),
        "send": lambda: stream.send("sent"),
        "throw": lambda: stream.throw(LookupError("thrown")),
        "close": stream.close,
    }[call]


def plain_results(program: Any) -> list[Any]:
    """What the calls of a program give on a generator that is not traced."""
    stream = echo(None)
    return [checked(sync_call(stream, call)) for _, call in program]


class Puller:
    """A thread that pulls inside a span of its own."""

    def __init__(self, name: str, trace_id: str) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.block = traced_span(name, trace_id=trace_id)
        self.pool.submit(self.block.__enter__).result()

    def end(self) -> None:
        self.pool.submit(self.block.__exit__, None, None, None).result()
        self.pool.shutdown()

    def pull(self, stream: Any, call: str, gate: Gate, meanwhile: Callable[[], Any]) -> Any:
        """Make a call; do something else where the body is in the middle of it."""
        running = self.pool.submit(checked, sync_call(stream, call))
        while not running.done():
            if gate.reached.acquire(timeout=0.001):
                meanwhile()
                gate.opened.release()
        return running.result()


def assert_pulled_alone(spans: list[Any]) -> None:
    """Check that nothing failed but by what was thrown into a generator that had not begun."""
    assert {outcome(span) for span in spans} <= {"ok", "closed_early", "error"}
    errors = [span for span in spans if outcome(span) == "error"]
    assert {span.get_attribute("error_type") for span in errors} <= {"LookupError"}
    assert "inner" not in {span.name for span in errors}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_second_thread_that_pulls_touches_nothing(store: Store, wrap: Any) -> None:
    """It gets Python's own error; the first one's step, span and context are as if it had not."""
    refused: list[str] = []
    other_calls = itertools.cycle(CALLS)
    with run_one() as ended, traced_span("root") as root:
        pullers = [Puller(name, root.trace_id) for name in ("one", "two")]
        for program in PROGRAMS:
            expected = plain_results(program)
            gate = Gate()
            stream = wrap(echo)(gate)
            for (number, call), result in zip(program, expected, strict=True):
                other = pullers[1 - number].pool

                def be_refused(stream: Any = stream, other: Any = other) -> None:
                    work = sync_call(stream, next(other_calls))
                    refused.append(str(other.submit(checked, work).result()))

                assert alike(pullers[number].pull(stream, call, gate, be_refused), result), program
            gate.is_shut = False
            stream.close()
        for puller in pullers:
            puller.end()
    assert set(refused) == {"generator already executing"}
    assert len(refused) > 200
    (trace,) = stored([root.trace_id])
    assert_whole([trace], ended, opened=len(ended))
    assert_nothing_is_left()
    assert_pulled_alone(trace.data.spans)


async def async_echo(gate: AsyncGate | None) -> Any:
    received: Any = "begun"
    with traced_span("inner") if gate else nullcontext() as inner:
        try:
            while True:
                if gate:
                    await gate.wait()
                    assert current_span() is inner
                try:
                    received = yield received
                except LookupError as error:
                    received = str(error)
        finally:
            if gate:
                assert current_span() is inner
                await gate.wait()


class AsyncGate:
    """The same for tasks."""

    def __init__(self) -> None:
        self.is_shut = True
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def wait(self) -> None:
        if self.is_shut:
            self.reached.set()
            await self.opened.wait()
            self.opened.clear()


def async_call(stream: Any, call: str) -> Callable[[], Any]:
    return {
        "next": lambda: stream.__anext__(),
        "send": lambda: stream.asend("sent"),
        "throw": lambda: stream.athrow(LookupError("thrown")),
        "close": lambda: stream.aclose(),
    }[call]


class TaskPuller:
    """A task that pulls inside a span of its own."""

    def __init__(self, name: str, trace_id: str) -> None:
        self.calls: asyncio.Queue[Any] = asyncio.Queue()
        self.task = asyncio.create_task(self.run(name, trace_id))

    async def run(self, name: str, trace_id: str) -> None:
        with traced_span(name, trace_id=trace_id):
            while call := await self.calls.get():
                work, result = call
                result.set_result(await checked_async(work))

    def begin(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        result = asyncio.get_running_loop().create_future()
        self.calls.put_nowait((work, result))
        return result

    async def pull(self, stream: Any, call: str, gate: AsyncGate, meanwhile: Any) -> Any:
        """Make a call; do something else where the body is in the middle of it."""
        running = self.begin(async_call(stream, call))
        while not running.done():
            reached = asyncio.create_task(gate.reached.wait())
            await asyncio.wait([running, reached], return_when=asyncio.FIRST_COMPLETED)
            if gate.reached.is_set():
                gate.reached.clear()
                await meanwhile()
                gate.opened.set()
            reached.cancel()
        return await running


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_second_task_that_pulls_touches_nothing(store: Store, wrap: Any) -> None:
    """As for threads: the error is Python's, and nothing else comes of it."""
    refused: list[str] = []
    other_calls = itertools.cycle(CALLS)

    async def pull_all(root: Any) -> None:
        pullers = [TaskPuller(name, root.trace_id) for name in ("one", "two")]
        for program in PROGRAMS:
            plain = async_echo(None)
            gate = AsyncGate()
            stream = wrap(async_echo)(gate)
            for number, call in program:
                other = pullers[1 - number]

                async def be_refused(stream: Any = stream, other: Any = other) -> None:
                    refused.append(str(await other.begin(async_call(stream, next(other_calls)))))

                expected = await checked_async(async_call(plain, call))
                assert alike(await pullers[number].pull(stream, call, gate, be_refused), expected)
            gate.is_shut = False
            await stream.aclose()
            await plain.aclose()
        for puller in pullers:
            puller.calls.put_nowait(None)
            await puller.task

    with run_one() as ended, traced_span("root") as root:
        asyncio.run(pull_all(root))
    assert all(text.endswith("asynchronous generator is already running") for text in refused)
    assert len(refused) > 200
    (trace,) = stored([root.trace_id])
    assert_whole([trace], ended, opened=len(ended))
    assert_nothing_is_left()
    assert_pulled_alone(trace.data.spans)


def test_what_python_refuses_does_not_end_the_span(store: Store) -> None:
    """A value sent too early, or something thrown that cannot be: the generator goes on."""
    stream = traced(echo)(None)
    with pytest.raises(TypeError, match="just-started"):
        stream.send("too early")
    assert spanguard.open_spans() == []
    assert next(stream) == "begun"
    with pytest.raises(TypeError, match="exceptions must be"):
        stream.throw("no exception")
    assert stream.send("a") == "a"
    stream.close()
    assert outcome(store.spans()["echo"]) == "closed_early"
    assert store.spans()["echo"].outputs == ["begun", "a"]


def test_what_python_refuses_does_not_end_an_async_generators_span(store: Store) -> None:
    async def main() -> None:
        stream = traced(async_echo)(None)
        with pytest.raises(TypeError, match="just-started"):
            await stream.asend("too early")
        assert await stream.asend(None) == "begun"
        with pytest.raises(TypeError, match="exceptions must be"):
            await stream.athrow("no exception")
        assert await stream.asend("a") == "a"
        await stream.aclose()

    asyncio.run(main())
    assert outcome(store.spans()["async_echo"]) == "closed_early"
    assert store.spans()["async_echo"].outputs == ["begun", "a"]


def test_a_step_that_the_collector_closes_leaves_the_collectors_context_alone(
    store: Store,
) -> None:
    """A loop that is closed with a step under way: whoever runs when it is dropped is not it."""

    @traced
    async def ticks() -> Any:
        with traced_span("inner"):
            await asyncio.get_running_loop().create_future()
            yield 1

    async def pull() -> None:
        with traced_span("consumer"):
            await ticks().__anext__()

    loop = asyncio.new_event_loop()
    task = loop.create_task(pull())
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    with traced_span("meanwhile") as meanwhile, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        del task, loop
        gc.collect()
        assert current_span() is meanwhile
    assert len(store.spans()) == 4
