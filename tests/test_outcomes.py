"""The outcome table: each way out of a block, read back from the store."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import traced_span
from tests.store import Store, outcome, status

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
    assert store.spans()["span"].get_attribute("error_type") == "tests.test_outcomes.Own"


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
    assert [event.name for event in inner.events] == ["exception"]
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
