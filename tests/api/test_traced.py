"""The decorator: what callers see is unchanged, what the store holds is the outcome table."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import gc
import inspect
import pickle
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import current_span, traced, traced_span
from tests.store import Store, outcome, own_attributes, status

# -- the matrix: kind of function x where it is defined x how it ends --------------------------

OUTCOMES = {
    "return": ("OK", "ok"),
    "Exception": ("ERROR", "error"),
    "CancelledError": ("ERROR", "cancelled"),
    "KeyboardInterrupt": ("ERROR", "interrupted"),
    "early close": ("OK", "closed_early"),
    "abandoned": ("ERROR", "abandoned"),
}
RAISES = {
    "Exception": ValueError,
    "CancelledError": asyncio.CancelledError,
    "KeyboardInterrupt": KeyboardInterrupt,
}


def body(end: str) -> str:
    if end in RAISES:
        raise RAISES[end](end)
    return "done"


def function(end: str) -> str:
    return body(end)


async def coroutine(end: str) -> str:
    await asyncio.sleep(0)
    if end in ("early close", "abandoned"):
        await Suspend()
    return body(end)


class Suspend:
    def __await__(self) -> Any:
        yield


def generator(end: str) -> Iterator[int]:
    yield 1
    yield 2
    body(end)


async def async_generator(end: str) -> AsyncIterator[int]:
    yield 1
    await asyncio.sleep(0)
    yield 2
    body(end)


KINDS: dict[str, Any] = {
    "function": function,
    "coroutine": coroutine,
    "generator": generator,
    "async generator": async_generator,
}


def place(kind: Any, where: str) -> Callable[[str], Any]:
    """Return the traced callable, from where it is defined."""
    if where == "function":
        return traced(name="span")(kind)
    if where == "callable object":

        class Callable_:
            def __call__(self, end: str) -> Any:
                return kind(end)

        instance = Callable_()
        type(instance).__call__ = with_self(kind)  # type: ignore[method-assign]
        return traced(name="span")(instance)
    if where == "partial":
        return traced(name="span")(functools.partial(kind))
    method = with_self(kind)

    class Owner:
        plain = traced(name="span")(method)
        above_class = traced(name="span")(classmethod(method))
        below_class = classmethod(traced(name="span")(method))
        above_static = traced(name="span")(staticmethod(kind))
        below_static = staticmethod(traced(name="span")(kind))

    owner: Any = {
        "method": Owner().plain,
        "method of the class": functools.partial(Owner.plain, Owner()),
        "above classmethod": Owner.above_class,
        "below classmethod": Owner.below_class,
        "classmethod of an object": Owner().above_class,
        "above staticmethod": Owner.above_static,
        "below staticmethod": Owner().below_static,
    }[where]
    return owner


def with_self(kind: Any) -> Any:
    """Return the same kind of function with a first parameter `self`."""
    if kind is function:

        def method(self: Any, end: str) -> Any:
            return body(end)

    elif kind is coroutine:

        async def method(self: Any, end: str) -> Any:
            return await coroutine(end)

    elif kind is generator:

        def method(self: Any, end: str) -> Any:
            yield 1
            yield 2
            body(end)

    else:

        async def method(self: Any, end: str) -> Any:
            yield 1
            await asyncio.sleep(0)
            yield 2
            body(end)

    return method


PLACES = [
    "function",
    "method",
    "method of the class",
    "above classmethod",
    "below classmethod",
    "classmethod of an object",
    "above staticmethod",
    "below staticmethod",
    "callable object",
    "partial",
]


def drive(kind: str, make: Callable[[], Any], end: str) -> Any:
    """Use a traced callable to the end in question; return what the caller sees."""
    if kind == "function":
        return make()
    if kind == "coroutine":
        if end in ("early close", "abandoned"):
            started = make()
            started.send(None)
            started.close() if end == "early close" else None
            del started
            gc.collect()
            return None
        return asyncio.run(awaited(make))
    if kind == "generator":
        if end == "early close":
            for _ in make():
                break
            return None
        if end == "abandoned":
            stepped = make()
            next(stepped)
            del stepped
            gc.collect()
            return None
        return list(make())
    return asyncio.run(drive_async(make, end))


async def awaited(make: Callable[[], Any]) -> Any:
    return await make()


async def drive_async(make: Callable[[], Any], end: str) -> Any:
    if end == "early close":
        stream = make()
        assert await stream.__anext__() == 1
        await stream.aclose()
        return None
    if end == "abandoned":
        stream = make()
        assert await stream.__anext__() == 1
        del stream
        gc.collect()
        for _ in range(5):
            await asyncio.sleep(0)
        return None
    return [item async for item in make()]


@pytest.mark.filterwarnings("ignore::spanguard.OrphanedSpanWarning")
@pytest.mark.parametrize("end", OUTCOMES)
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix(store: Store, kind: str, where: str, end: str) -> None:
    if kind == "function" and end in ("early close", "abandoned"):
        pytest.skip("a function cannot be left half-way")
    callable_ = place(KINDS[kind], where)

    def use() -> Any:
        return drive(kind, lambda: callable_(end), end)

    if end in RAISES:
        with pytest.raises(RAISES[end]):
            use()
    else:
        seen = use()
        if end == "return":
            assert seen == ("done" if kind in ("function", "coroutine") else [1, 2])
    (span,) = store.trace().data.spans
    assert (span.name, status(span), outcome(span)) == ("span", *OUTCOMES[end])
    assert span.inputs == {"end": end}
    if "generator" in kind:
        assert span.outputs == ([1] if end in ("early close", "abandoned") else [1, 2])
    elif end == "return":
        assert span.outputs == "done"
    assert current_span() is None
    assert spanguard.open_spans() == []


@pytest.mark.parametrize("where", ["function", "method", "above classmethod", "below staticmethod"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_kept(kind: str, where: str) -> None:
    callable_ = place(KINDS[kind], where)
    assert inspect.iscoroutinefunction(callable_) is (kind == "coroutine")
    assert inspect.isgeneratorfunction(callable_) is (kind == "generator")
    assert inspect.isasyncgenfunction(callable_) is (kind == "async generator")
    assert list(inspect.signature(callable_).parameters) == ["end"]


# -- the function stays the function -----------------------------------------------------------


@traced
def module_level(a: int, b: int = 2) -> int:
    """Add."""
    return a + b


class Owner:
    @traced
    def method(self, x: int) -> int:
        return x

    @property
    @traced
    def below(self) -> int:
        return 5

    @traced
    @property
    def above(self) -> int:
        return 6


def test_signature_name_and_documentation_are_kept() -> None:
    assert module_level.__name__ == "module_level"
    assert module_level.__doc__ == "Add."
    assert module_level.__wrapped__(1) == 3  # type: ignore[attr-defined]
    assert str(inspect.signature(module_level)) == "(a: 'int', b: 'int' = 2) -> 'int'"
    assert inspect.isfunction(module_level)
    assert module_level.__qualname__ == "module_level"


def test_pickling_by_name() -> None:
    assert pickle.loads(pickle.dumps(module_level)) is module_level
    assert copy.copy(module_level) is module_level
    assert copy.deepcopy(module_level) is module_level
    bound = pickle.loads(pickle.dumps(Owner().method))
    assert bound(3) == 3


def test_a_wrong_call_is_pythons_own_error(store: Store) -> None:
    for args, kwargs in (((), {}), ((1, 2, 3), {}), ((1,), {"c": 1})):
        with pytest.raises(TypeError) as ours:
            module_level(*args, **kwargs)
        with pytest.raises(TypeError) as pythons:
            module_level.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]
        assert str(ours.value) == str(pythons.value)


def test_properties(store: Store) -> None:
    assert (Owner().below, Owner().above) == (5, 6)
    assert sorted(store.spans()) == ["above", "below"]


def test_a_context_variable_set_inside_is_set_outside() -> None:
    variable: ContextVar[int] = ContextVar("variable", default=0)

    @traced
    def sets() -> None:
        variable.set(1)

    @traced
    async def sets_async() -> None:
        variable.set(2)

    @traced
    def steps() -> Iterator[int]:
        variable.set(3)
        yield 1

    sets()
    assert variable.get() == 1

    async def main() -> int:
        await sets_async()
        return variable.get()

    assert asyncio.run(main()) == 2
    next(steps())
    assert variable.get() == 3


def test_lambdas_builtins_and_nested_functions(store: Store) -> None:
    assert traced(lambda x: x + 1)(1) == 2
    assert traced(len)([1, 2]) == 2
    spans = store.spans()
    assert spans["<lambda>"].inputs == {"x": 1}
    assert spans["len"].outputs == 2


def test_recursion_nests(store: Store) -> None:
    @traced
    def down(n: int) -> int:
        return n if n == 0 else down(n - 1)

    down(3)
    spans = store.trace().data.spans
    assert len(spans) == 4
    assert [span.inputs["n"] for span in spans] == [3, 2, 1, 0]


def test_a_class_stays_a_class(store: Store) -> None:
    @traced
    @dataclasses.dataclass
    class Point:
        x: int

        def shift(self, by: int) -> int:
            return self.x + by

        @classmethod
        def origin(cls) -> Any:
            return cls(0)

        @staticmethod
        def helper(v: int) -> int:
            return v

        def _private(self) -> int:
            return 1

    class Sub(Point):
        def own(self) -> int:
            return self.shift(1)

    assert isinstance(Point, type)
    assert isinstance(Point.origin(), Point)
    assert dataclasses.asdict(Sub(3)) == {"x": 3}
    assert (Sub(1).own(), Point.helper(4), Point(1)._private()) == (2, 4, 1)
    assert sorted(store.spans()) == ["Point.helper", "Point.origin", "Point.shift"]
    assert store.spans()["Point.shift"].inputs == {"by": 1}


def test_it_nests_with_blocks_and_fluent_spans(store: Store) -> None:
    @traced
    def inner() -> None:
        with mlflow.start_span("fluent"):
            pass

    with traced_span("outer"):
        inner()
    spans = store.spans()
    assert spans["inner"].parent_id == spans["outer"].span_id
    assert spans["fluent"].parent_id == spans["inner"].span_id


# -- options -----------------------------------------------------------------------------------


def test_what_is_captured(store: Store) -> None:
    @traced
    def everything(a: int, /, b: int, *rest: int, c: int = 3, **words: Any) -> int:
        return a

    everything(1, 2, 7, 8, d=4)
    assert store.spans()["everything"].inputs == {
        "a": 1,
        "b": 2,
        "rest": [7, 8],
        "c": 3,
        "words": {"d": 4},
    }


def test_what_is_not_captured(store: Store) -> None:
    @traced(capture_inputs=False, capture_outputs=False)
    def nothing(a: int) -> int:
        return a

    @traced(capture_inputs=["a"])
    def some(a: int, b: int) -> int:
        return a

    nothing(1)
    some(1, 2)
    spans = store.spans()
    assert (spans["nothing"].inputs, spans["nothing"].outputs) == (None, None)
    assert spans["some"].inputs == {"a": 1}


def test_options_of_the_span(store: Store) -> None:
    @traced("named", span_type="TOOL", attributes={"k": 1}, tags={"t": 1}, expected=(KeyError,))
    def work() -> None:
        raise KeyError("expected")

    with pytest.raises(KeyError):
        work()
    trace = store.trace()
    (span,) = trace.data.spans
    assert (span.name, span.span_type, outcome(span)) == ("named", "TOOL", "expected")
    assert trace.info.tags["t"] == "1"
    with spanguard.strict(), traced_span("root"), pytest.raises(KeyError):
        work()  # tags of a function that runs as a child are no finding: they are for its traces


def test_a_decorator_swap_from_mlflow(store: Store) -> None:
    from mlflow.entities.trace_location import MlflowExperimentLocation

    other = mlflow.MlflowClient().create_experiment("other")

    @traced(
        name="f",
        span_type="LLM",
        attributes={"a": 1},
        output_reducer=sum,
        trace_destination=MlflowExperimentLocation(other),
    )
    def numbers() -> Iterator[int]:
        yield from (1, 2, 3)

    assert list(numbers()) == [1, 2, 3]
    assert traced(func=lambda: 4, name="g")() == 4
    trace = next(t for t in store.traces() if t.data.spans[0].name == "f")
    assert trace.info.experiment_id == other
    assert trace.data.spans[0].outputs == 6
    with pytest.warns(spanguard.SpanguardWarning, match="sampling_ratio_overide"):
        traced(sampling_ratio_overide=0.5)  # type: ignore[call-overload]


SECRET = "correct-horse-battery-staple"


def test_redaction(store: Store) -> None:
    def redact(name: str, value: Any) -> Any:
        return "***" if name in ("password", "return") else value

    @traced(redact=redact)
    def login(user: str, password: str) -> str:
        return password

    assert login("ada", SECRET) == SECRET
    span = store.spans()["login"]
    assert span.inputs == {"user": "ada", "password": "***"}
    assert span.outputs == "***"
    assert SECRET.encode() not in store.path.read_bytes()


def test_a_redactor_that_raises_leaks_nothing(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    def redact(name: str, value: Any) -> Any:
        raise ValueError(f"cannot redact {value}")

    @traced(redact=redact)
    def login(password: str) -> str:
        return password

    @traced(redact=redact)
    def stream(password: str) -> Iterator[str]:
        yield password

    assert login(SECRET) == SECRET
    assert list(stream(SECRET)) == [SECRET]
    assert "ValueError" in store.spans()["login"].inputs["password"]
    store_files = store.path.parent.glob(store.path.name + "*")
    assert all(SECRET.encode() not in path.read_bytes() for path in store_files)
    assert SECRET not in caplog.text


# -- generators --------------------------------------------------------------------------------


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


def test_an_output_reducer_that_raises(store: Store) -> None:
    def reducer(items: list[Any]) -> Any:
        raise ValueError(SECRET)

    @traced(output_reducer=reducer)
    def numbers() -> Iterator[int]:
        yield 1

    assert list(numbers()) == [1]
    assert store.spans()["numbers"].outputs == [1]


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


def test_a_coroutine_can_be_a_task_and_is_awaited_once(store: Store) -> None:
    @traced
    async def work(x: int) -> int:
        await asyncio.sleep(0)
        return x

    async def main() -> None:
        assert await asyncio.create_task(work(1)) == 1  # type: ignore[arg-type]
        assert await asyncio.wait_for(work(2), 5) == 2
        assert await asyncio.gather(work(3), work(4)) == [3, 4]
        once = work(5)
        assert await once == 5
        with pytest.raises(RuntimeError, match="already awaited"):
            await once

    asyncio.run(main())
    assert len(store.traces()) == 5


def test_tracing_off_leaves_every_kind_working() -> None:
    mlflow.tracing.disable()
    try:
        for kind, original in KINDS.items():
            seen = drive(kind, lambda f=original: traced(f)("return"), "return")
            assert seen == ("done" if kind in ("function", "coroutine") else [1, 2])
            if kind != "function":
                drive(kind, lambda f=original: traced(f)("early close"), "early close")
    finally:
        mlflow.tracing.enable()
