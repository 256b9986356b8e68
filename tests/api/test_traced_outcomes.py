"""The outcome table of the decorator: for each kind of function, wherever it is defined."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import current_span, traced
from tests.store import Store, outcome, status

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
