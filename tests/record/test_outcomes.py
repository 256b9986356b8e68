"""The outcome table: each way out of a block, read back from the store."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import pickle
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import traced_span
from tests.store import Store, outcome, status

pytestmark = [pytest.mark.pythons, pytest.mark.versions]

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Own(BaseException):
    pass


class Frozen(Exception):
    """Refuses attributes, notes and being looked at."""

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)

    def add_note(self, note: str) -> None:
        raise TypeError("no notes")


WAYS_OUT: dict[str, tuple[BaseException, str, str, int]] = {
    # name: exception, status, outcome, events
    "Exception": (ValueError("bad"), "ERROR", "error", 1),
    "KeyboardInterrupt": (KeyboardInterrupt(), "ERROR", "interrupted", 1),
    "SystemExit 3": (SystemExit(3), "ERROR", "interrupted", 1),
    "SystemExit text": (SystemExit("fatal"), "ERROR", "interrupted", 1),
    "SystemExit 0": (SystemExit(0), "OK", "ok", 0),
    "SystemExit None": (SystemExit(), "OK", "ok", 0),
    "CancelledError": (asyncio.CancelledError(), "ERROR", "cancelled", 1),
    "GeneratorExit": (GeneratorExit(), "OK", "closed_early", 0),
    "own BaseException": (Own("x"), "ERROR", "error", 1),
    "ExceptionGroup": (ExceptionGroup("many", [ValueError("a")]), "ERROR", "error", 1),
    "BaseExceptionGroup": (
        BaseExceptionGroup("many", [KeyboardInterrupt()]),
        "ERROR",
        "error",
        1,
    ),
    "unprintable": (Unprintable(), "ERROR", "error", 1),
    "frozen": (Frozen("x"), "ERROR", "error", 1),
    "StopIteration": (StopIteration(1), "ERROR", "error", 1),
    "RecursionError": (RecursionError("deep"), "ERROR", "error", 1),
    "MemoryError": (MemoryError(), "ERROR", "error", 1),
}


@pytest.mark.parametrize("with_client", [False, True], ids=["direct", "client"])
@pytest.mark.parametrize("way", WAYS_OUT)
def test_each_way_out_of_two_nested_blocks(store: Store, way: str, with_client: bool) -> None:
    exception, expected_status, expected_outcome, events = WAYS_OUT[way]
    client = mlflow.MlflowClient() if with_client else None
    with pytest.raises(BaseException) as caught:
        with traced_span("outer", client=client):
            with traced_span("inner", client=client):
                raise exception
    assert caught.value is exception
    spans = store.spans()
    for name in ("outer", "inner"):
        assert status(spans[name]) == expected_status
        assert outcome(spans[name]) == expected_outcome
        assert len(spans[name].events) == events


@pytest.mark.parametrize("way", WAYS_OUT)
def test_each_way_out_of_an_async_block(store: Store, way: str) -> None:
    exception, expected_status, expected_outcome, _ = WAYS_OUT[way]

    async def main() -> None:
        async with traced_span("span"):
            raise exception

    coroutine = main()
    with pytest.raises(BaseException) as caught:
        coroutine.send(None)
    if not isinstance(exception, StopIteration):  # Python turns that one into a RuntimeError
        assert caught.value is exception
    assert status(store.spans()["span"]) == expected_status
    assert outcome(store.spans()["span"]) == expected_outcome


def test_what_an_exception_leaves_on_the_span(store: Store) -> None:
    with pytest.raises(KeyError), traced_span("span"):
        raise KeyError("missing")
    span = store.spans()["span"]
    assert span.get_attribute("error") == "'missing'"
    assert span.get_attribute("error_message") == "'missing'"
    assert span.get_attribute("error_type") == "KeyError"
    (event,) = span.events
    assert event.name == "exception"
    assert event.attributes["exception.type"] == "KeyError"
    assert event.attributes["exception.message"] == "'missing'"
    assert "test_what_an_exception_leaves_on_the_span" in event.attributes["exception.stacktrace"]
    assert "KeyError" in span.status.description


def test_an_exception_type_is_qualified_outside_builtins(store: Store) -> None:
    with pytest.raises(Own), traced_span("span"):
        raise Own
    assert store.spans()["span"].get_attribute("error_type") == "tests.record.test_outcomes.Own"


def test_an_unprintable_exception_is_still_recorded(store: Store) -> None:
    with pytest.raises(Unprintable), traced_span("span"):
        raise Unprintable
    message = store.spans()["span"].get_attribute("error")
    assert "Unprintable" in message
    assert "RuntimeError" in message


def test_an_exception_through_ten_spans_marks_each_with_one_stack_trace(store: Store) -> None:
    error = ValueError("deep")

    def nest(depth: int) -> None:
        with traced_span(f"level {depth}"):
            if depth == 9:
                raise error
            nest(depth + 1)

    with pytest.raises(ValueError) as caught:
        nest(0)
    assert caught.value is error
    spans = store.spans()
    assert len(spans) == 10
    for name, span in spans.items():
        assert status(span) == "ERROR"
        assert span.get_attribute("error") == "deep"
        (event,) = span.events
        assert ("exception.stacktrace" in event.attributes) == (name == "level 9")


class Refusing(ValueError):
    """Takes nothing: no attribute, no weak reference, no comparison."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    def __hash__(self) -> int:
        raise RuntimeError


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, Own, Frozen, Refusing, OSError])
def test_nothing_is_written_on_an_exception(store: Store, kind: type[BaseException]) -> None:
    """An exception that passed through spans has no attribute or note of ours."""
    error = kind("mine")
    with pytest.raises(kind) as caught, traced_span("outer"), traced_span("inner") as span:
        span.record_exception(error)
        raise error
    assert caught.value is error
    assert vars(error) == {}
    assert error.args == ("mine",)
    assert b"spanguard" not in pickle.dumps(error)


def stack_traces(trace: Any) -> dict[str, int]:
    """Return by span how many of its events have a stack trace."""
    return {
        span.name: sum("exception.stacktrace" in event.attributes for event in span.events)
        for span in trace.data.spans
    }


@pytest.mark.parametrize("kind", [ValueError, Own, Refusing])
def test_each_trace_that_an_exception_passes_has_its_stack_trace_once(
    store: Store, kind: type[BaseException]
) -> None:
    """The innermost span of each trace has the stack trace: nested, kept and pickled too."""
    error = kind("again")
    for name in ("first", "second"):
        with contextlib.suppress(kind), traced_span(name), traced_span(f"{name} inner"):
            raise error
    with contextlib.suppress(kind), traced_span("around"):
        with traced_span("other trace", new_trace=True), traced_span("its inner"):
            raise pickle.loads(pickle.dumps(error))
    found = [stack_traces(trace) for trace in store.traces()]
    assert sorted(map(sorted, map(dict.items, found))) == [
        [("around", 1)],
        [("first", 0), ("first inner", 1)],
        [("its inner", 1), ("other trace", 0)],
        [("second", 0), ("second inner", 1)],
    ]


@pytest.mark.parametrize("kind", [ValueError, Own, Refusing])
def test_an_exception_in_the_place_of_a_forgotten_one_has_its_own_stack_trace(
    store: Store, kind: type[BaseException]
) -> None:
    """An exception that gets the address of one that is gone is told apart from it."""
    addresses = set()
    for number in range(20):
        with contextlib.suppress(kind), traced_span(f"root {number}"):
            with contextlib.suppress(kind), traced_span(f"child {number}"):
                error = kind("one")
                addresses.add(id(error))
                raise error
            del error
            later = kind("another")
            addresses.add(id(later))
            try:
                raise later
            finally:
                del later
    assert len(addresses) < 40, "no address was ever used again"
    counts = [count for trace in store.traces() for count in stack_traces(trace).values()]
    assert counts == [1] * 40


def test_an_open_trace_keeps_no_frame_of_an_exception_alive(store: Store) -> None:
    """What an exception's frames hold goes when the user lets the exception go."""

    class Tensor:
        pass

    gone = []

    def fail(kind: type[BaseException]) -> None:
        tensor = Tensor()
        gone.append(weakref.ref(tensor))
        with traced_span(f"child {kind.__name__}"):
            raise kind("full")

    with traced_span("root"):
        for kind in (ValueError, Own, Refusing):
            with contextlib.suppress(kind):
                fail(kind)
        gc.collect()
        assert [tensor() for tensor in gone] == [None] * 3


def test_one_exception_in_many_threads_of_a_trace(store: Store) -> None:
    """Failures that pass a root at the same time each have their stack trace once."""
    errors = [ValueError(str(number)) for number in range(50)]

    def work(error: ValueError) -> None:
        with traced_span(f"outer {error}"), traced_span(f"inner {error}"):
            raise error

    with contextlib.suppress(ValueError), traced_span("root"):
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(spanguard.carry(work), error) for error in errors]
        for future in futures:
            assert isinstance(future.exception(), ValueError)
        raise errors[-1]
    counts = stack_traces(store.trace())
    assert {name for name, count in counts.items() if count} == {
        f"inner {number}" for number in range(50)
    }


def test_the_users_frames_are_the_traceback(store: Store) -> None:
    def fail() -> None:
        raise ValueError

    try:
        with traced_span("span"):
            fail()
    except ValueError as error:
        traceback, names = error.__traceback__, []
        while traceback is not None:
            names.append(traceback.tb_frame.f_code.co_name)
            traceback = traceback.tb_next
    assert names == ["test_the_users_frames_are_the_traceback", "fail"]


def test_an_exception_keeps_its_cause_and_context(store: Store) -> None:
    with pytest.raises(ValueError) as caught, traced_span("span"):
        try:
            raise KeyError("first")
        except KeyError as first:
            raise ValueError("second") from first
    assert isinstance(caught.value.__cause__, KeyError)
    stack = store.spans()["span"].events[0].attributes["exception.stacktrace"]
    assert "first" in stack
    assert "second" in stack


def test_a_caught_exception_is_not_an_error(store: Store) -> None:
    with traced_span("span"):
        try:
            raise ValueError
        except ValueError:
            pass
    assert status(store.spans()["span"]) == "OK"


@pytest.mark.parametrize("expected", [(ValueError, KeyError), ValueError, [ValueError]])
def test_an_expected_exception_is_ok_and_an_event(store: Store, expected: Any) -> None:
    with pytest.raises(ValueError), traced_span("outer"):
        with traced_span("inner", expected=expected):
            raise ValueError("not found")
    inner, outer = store.spans()["inner"], store.spans()["outer"]
    assert (status(inner), outcome(inner)) == ("OK", "expected")
    assert [event.name for event in inner.events] == ["expected_exception"]
    assert inner.get_attribute("error") is None
    assert inner.get_attribute("mlflow.logLevel") in (None, 20, 10)
    assert (status(outer), outcome(outer)) == ("ERROR", "error")


def test_expected_holds_for_any_exception(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt):
        with traced_span("span", expected=(KeyboardInterrupt,)):
            raise KeyboardInterrupt
    assert (status(store.spans()["span"]), outcome(store.spans()["span"])) == ("OK", "expected")


def test_a_huge_message_is_cut(store: Store) -> None:
    with pytest.raises(ValueError), traced_span("span"):
        raise ValueError("x" * 10_000_000)
    span = store.spans()["span"]
    for text in (
        span.get_attribute("error"),
        span.status.description,
        span.events[0].attributes["exception.message"],
        span.events[0].attributes["exception.stacktrace"],
    ):
        assert len(text) < spanguard.MAX_MESSAGE_CHARS + 200
    assert "characters cut" in span.get_attribute("error")


def test_surrogates_in_a_message_do_not_cost_the_trace(store: Store) -> None:
    with pytest.raises(ValueError), traced_span("span"):
        raise ValueError("lone \ud800 surrogate")
    assert "\\ud800" in store.spans()["span"].get_attribute("error")


def test_a_task_that_is_cancelled(store: Store) -> None:
    async def main() -> None:
        async def work() -> None:
            async with traced_span("outer"):
                with traced_span("inner"):
                    await asyncio.sleep(60)

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert [outcome(span) for span in store.spans().values()] == ["cancelled"] * 2


def test_a_generator_that_is_closed_around_a_block(store: Store) -> None:
    def numbers() -> Any:
        with traced_span("numbers"):
            yield from range(10)

    generator = numbers()
    next(generator)
    generator.close()
    span = store.spans()["numbers"]
    assert (status(span), outcome(span)) == ("OK", "closed_early")
    assert mlflow.get_current_active_span() is None


def test_the_status_that_fluent_siblings_get_is_unchanged(store: Store) -> None:
    with traced_span("root"):
        with pytest.raises(ValueError), mlflow.start_span("fluent bad"):
            raise ValueError
        with mlflow.start_span("fluent good"):
            pass
    spans = store.spans()
    assert [status(spans[n]) for n in ("root", "fluent bad", "fluent good")] == [
        "OK",
        "ERROR",
        "OK",
    ]
