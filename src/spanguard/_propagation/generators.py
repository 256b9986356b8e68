"""Drive a generator step by step: its span is active while its body runs, and only then.

The objects here are proxies around the user's own generator, async generator or coroutine, so
that `isinstance`, `inspect` and `yield from` see what they would without tracing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from types import GeneratorType
from typing import Any

from spanguard._base.proxies import ObjectProxy
from spanguard._lifecycle.handle import SpanHandle
from spanguard._process.dropped import is_inside_tracing, put_aside
from spanguard._propagation.drive import Drive, Recorder, Turn
from spanguard._record.outcome import ABANDONED, CLOSED_EARLY, Outcome

__all__ = ["Opens", "TracedGenerator", "Writes", "finish_dropped", "run_steps", "steps_of"]


Opens = Callable[[], SpanHandle]
"""Opens the span of a call."""

Writes = Callable[[SpanHandle, object], None]
"""Records on it what the call gives back."""


class TracedGenerator(ObjectProxy):
    """A generator whose steps run under its own span."""

    def __init__(self, generator: Generator[Any, Any, Any], recorder: Recorder) -> None:
        super().__init__(generator)
        self._self_drive = Drive(recorder)

    def __iter__(self) -> TracedGenerator:
        self._self_drive.iterated = True
        return self

    def __next__(self) -> Any:
        return self._self_step(self.__wrapped__.__next__)

    def send(self, value: object) -> Any:
        if value is not None and not self._self_drive.has_begun:
            return self.__wrapped__.send(value)  # refused, and not begun by that
        return self._self_step(self.__wrapped__.send, value)

    def throw(self, *exception: Any) -> Any:
        return self._self_step(self.__wrapped__.throw, *exception)

    def _self_step(self, step: Callable[..., Any], *args: Any) -> Any:
        drive, turn = self._self_drive, Turn()
        try:
            if not drive.take(turn, self._self_is_running) or drive.done:
                return step(*args)
            with drive.body:
                try:
                    drive.begin()
                    item = step(*args)
                except StopIteration:
                    drive.finish(None)
                    raise
                except BaseException as error:
                    drive.finish_unless(self._self_is_suspended(), error)
                    raise
            drive.recorder.keep(item)
            return item
        finally:
            drive.give_back(turn)

    def _self_is_running(self) -> bool:
        return bool(getattr(self.__wrapped__, "gi_running", True))

    def _self_is_suspended(self) -> bool:
        return getattr(self.__wrapped__, "gi_frame", None) is not None

    def close(self) -> None:
        self._self_close(CLOSED_EARLY)

    def _self_close(self, outcome: Outcome) -> None:
        drive, turn = self._self_drive, Turn()
        try:
            if not drive.take(turn, self._self_is_running):
                self.__wrapped__.close()
                return
            if not drive.is_open:
                drive.done = True
                self.__wrapped__.close()
                return
            _close(drive, self.__wrapped__, outcome)
        finally:
            drive.give_back(turn)

    def __del__(self) -> None:
        drive = getattr(self, "_self_drive", None)
        if drive is None or not drive.is_open or sys.is_finalizing():
            return
        if is_inside_tracing():
            # The body's clean-up may open and end spans, which would wait for ever for what this
            # very thread holds (issue 9, A1).
            generator, outcome = self.__wrapped__, drive.dropped_as()
            put_aside(lambda: _close(drive, generator, outcome))
        else:  # here, as Python does it: `break` runs the body's clean-up before the next line
            self._self_close(drive.dropped_as())


def _close(drive: Drive, generator: Generator[Any, Any, Any], outcome: Outcome) -> None:
    with drive.body:
        try:
            generator.close()
        except BaseException as error:
            drive.finish(error)
            raise
        drive.finish(None, outcome)


def finish_dropped(drive: Drive, outcome: Outcome) -> None:
    with drive.body:
        drive.finish(None, outcome)


def run_steps(
    coroutine: object,
    open_: Opens,
    write: Writes,
    abandoned: list[bool],
) -> Generator[Any, Any, Any]:
    handle = open_()
    del open_  # it holds the arguments of the call
    try:
        result = yield from steps_of(coroutine)
        write(handle, result)
    except BaseException as error:
        if abandoned:
            handle.finish_as(ABANDONED)
        else:
            handle.finish(error)
        raise
    handle.finish(None)
    return result


def steps_of(coroutine: Any) -> Generator[Any, Any, Any]:
    steps: Generator[Any, Any, Any]
    steps = coroutine if isinstance(coroutine, GeneratorType) else coroutine.__await__()
    return steps
