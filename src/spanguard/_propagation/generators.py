"""Drive a generator step by step: its span is active while its body runs, and only then.

The objects here are proxies around the user's own generator, async generator or coroutine, so
that `isinstance`, `inspect` and `yield from` see what they would without tracing.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Protocol, cast

import wrapt

from spanguard._base.collector import is_collecting
from spanguard._base.findings import contained
from spanguard._lifecycle.handle import OpenedSpan
from spanguard._process.ambient import BodyContext
from spanguard._process.dropped import is_inside_tracing, put_aside
from spanguard._record.items import Items
from spanguard._record.outcome import ABANDONED, CLOSED_EARLY, Outcome

if TYPE_CHECKING:
    _ObjectProxy = wrapt.BaseObjectProxy[Any]
else:
    _ObjectProxy = wrapt.BaseObjectProxy

__all__ = [
    "Recorder",
    "TracedAsyncGenerator",
    "TracedCoroutine",
    "TracedGenerator",
    "TracedGeneratorCoroutine",
]


class Opened(Protocol):
    """What is open while a generator's body runs: its span, or an attached trace context."""

    def finish(self, raised: BaseException | None) -> None: ...

    def finish_as(self, outcome: Outcome) -> None: ...


class Recorder:
    """How a generator's span is opened, and what is recorded of its items."""

    __slots__ = ("_items", "_open", "_write")

    def __init__(
        self,
        open_: Callable[[], Opened],
        items: Items | None = None,
        write: Callable[[Any, Items], None] | None = None,
    ) -> None:
        self._open: Callable[[], Opened] | None = open_
        self._items = items
        self._write = write

    def open(self) -> Opened:
        """Open the span. It is let go of how: that holds the arguments of the call."""
        open_, self._open = self._open, None
        assert open_ is not None, "a span is opened once"
        return open_()

    def keep(self, item: Any) -> None:
        """Take of an item what is to be recorded."""
        if self._items is not None:
            with contained("recording an item of a generator"):
                self._items.take(item)

    def write(self, opened: Opened) -> None:
        items, self._items = self._items, None
        if items is not None and self._write is not None:
            with contained("recording the items of a generator"):
                self._write(opened, items)


# How long a step waits for another thread that is opening or ending the span of the generator.
_CONCURRENT_STEP_SECONDS = 1.0


class _Turn:
    """One call's claim on the generator: a `next`, `send`, `throw` or `close` from end to end."""

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread = threading.get_ident()


class _Drive:
    """The state of one traced generator, sync or async: its span, and its body's context."""

    __slots__ = ("__weakref__", "_turns", "body", "done", "iterated", "opened", "recorder")

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.body = BodyContext()
        self.opened: Opened | None = None
        self.iterated = False
        self.done = False
        self._turns: dict[str, _Turn] = {}

    def take(self, turn: _Turn, is_running: Callable[[], bool]) -> bool:
        """Take a turn; False where it is another call's: then nothing here is to be touched.

        Python lets one call at a time into a generator, and says so itself to all others. Only
        what we do before and after, which it does not know of, is waited for (issue 9, 23).
        """
        deadline: float | None = None
        # Atomic without a lock, and undone by `give_back` wherever an interrupt strikes.
        while (holder := self._turns.setdefault("now", turn)) is not turn:
            if holder.thread == turn.thread or is_running():
                return False
            now = time.monotonic()
            deadline = deadline or now + _CONCURRENT_STEP_SECONDS
            if now > deadline:
                return False
            time.sleep(0)
        return True

    def give_back(self, turn: _Turn) -> None:
        """End a turn; nothing, if it never was this call's."""
        if self._turns.get("now") is turn:
            del self._turns["now"]

    @property
    def has_begun(self) -> bool:
        return self.opened is not None or self.done

    @property
    def is_open(self) -> bool:
        return self.opened is not None and not self.done

    def begin(self) -> None:
        """Open the span at the first step, inside the body's context."""
        if self.opened is None and not self.done:
            self.opened = self.recorder.open()

    def finish(self, raised: BaseException | None, outcome: Outcome | None = None) -> None:
        """Close the span. Called inside the body's context."""
        opened = self.opened
        self.body.work.is_over = True
        if self.done or opened is None:
            self.done = True
            return
        self.done = True
        self.recorder.write(opened)
        if outcome is None:
            opened.finish(raised)
        else:
            opened.finish_as(outcome)

    def finish_unless(self, is_suspended: bool, raised: BaseException) -> None:
        """Close the span for what a step raised, unless the body did not raise it and goes on.

        It does where Python itself refused the call: `throw` of what is no exception.
        """
        if self.opened is None or not is_suspended:
            self.finish(raised)

    def dropped_as(self) -> Outcome:
        """Tell what it means that nobody holds the generator any more.

        A loop that was left by `break` drops it: closed early. One that was stepped by hand and
        forgotten is abandoned.
        """
        return CLOSED_EARLY if self.iterated else ABANDONED


class TracedGenerator(_ObjectProxy):
    """A generator whose steps run under its own span."""

    def __init__(self, generator: Generator[Any, Any, Any], recorder: Recorder) -> None:
        super().__init__(generator)
        self._self_drive = _Drive(recorder)

    def __iter__(self) -> TracedGenerator:
        self._self_drive.iterated = True
        return self

    def __next__(self) -> Any:
        return self._self_step(self.__wrapped__.__next__)

    def send(self, value: Any) -> Any:
        if value is not None and not self._self_drive.has_begun:
            return self.__wrapped__.send(value)  # refused, and not begun by that
        return self._self_step(self.__wrapped__.send, value)

    def throw(self, *exception: Any) -> Any:
        return self._self_step(self.__wrapped__.throw, *exception)

    def _self_step(self, step: Callable[..., Any], *args: Any) -> Any:
        drive, turn = self._self_drive, _Turn()
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
        drive, turn = self._self_drive, _Turn()
        try:
            if not drive.take(turn, self._self_is_running):
                self.__wrapped__.close()
                return
            if not drive.is_open:
                drive.done = True
                self.__wrapped__.close()
                return
            with drive.body:
                try:
                    self.__wrapped__.close()
                except BaseException as error:
                    drive.finish(error)
                    raise
                drive.finish(None, outcome)
        finally:
            drive.give_back(turn)

    def __del__(self) -> None:
        drive = getattr(self, "_self_drive", None)
        if drive is None or not drive.is_open or sys.is_finalizing():
            return
        if is_collecting() or is_inside_tracing():
            # The body's clean-up may open and end spans, which would wait for ever for what this
            # very thread holds (issue 9, A1).
            generator, outcome = self.__wrapped__, drive.dropped_as()
            put_aside(lambda: _close_dropped(generator, drive, outcome))
        else:  # here, as Python does it: `break` runs the body's clean-up before the next line
            self._self_close(drive.dropped_as())


def _close_dropped(generator: Any, drive: _Drive, outcome: Outcome) -> None:
    with drive.body:
        try:
            generator.close()
        except BaseException as error:
            drive.finish(error)
            raise
        drive.finish(None, outcome)


def _finish_dropped(drive: _Drive, outcome: Outcome) -> None:
    with drive.body:
        drive.finish(None, outcome)


class TracedAsyncGenerator(_ObjectProxy):
    """An async generator whose steps run under its own span."""

    def __init__(self, generator: Any, recorder: Recorder) -> None:
        super().__init__(generator)
        self._self_drive = _Drive(recorder)
        self._self_loop: asyncio.AbstractEventLoop | None = None
        self._self_finalizer: Callable[[Any], object] | None = None  # of trio, or another loop

    def __aiter__(self) -> TracedAsyncGenerator:
        self._self_drive.iterated = True
        return self

    def __anext__(self) -> Any:
        return self._self_step(self.__wrapped__.__anext__)

    def asend(self, value: Any) -> Any:
        if value is not None and not self._self_drive.has_begun:
            return self.__wrapped__.asend(value)
        return self._self_step(self.__wrapped__.asend, value)

    def athrow(self, *exception: Any) -> Any:
        return self._self_step(self.__wrapped__.athrow, *exception)

    async def _self_step(self, step: Callable[..., Any], *args: Any) -> Any:
        drive, turn = self._self_drive, _Turn()
        try:
            if not drive.take(turn, self._self_is_running) or drive.done:
                return await step(*args)
            if self._self_loop is None:
                self._self_loop = asyncio._get_running_loop()
            if not drive.has_begun:
                self._self_register()
            with drive.body:
                try:
                    drive.begin()
                    item = await step(*args)
                except StopAsyncIteration:
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
        return bool(getattr(self.__wrapped__, "ag_running", True))

    def _self_is_suspended(self) -> bool:
        return getattr(self.__wrapped__, "ag_frame", None) is not None

    def _self_register(self) -> None:
        """Let the event loop close this one at its end, not the one inside (issue 9, 24).

        Loops keep sets of the generators that they know. The one inside will register at its
        first step, and equals this: it is in the set already.
        """
        register, finalizer = sys.get_asyncgen_hooks()
        if self._self_loop is None:
            self._self_finalizer = finalizer
        if register is not None:
            with contained("registering an async generator with its event loop"):
                register(cast("AsyncGenerator[Any, Any]", self))

    async def aclose(self) -> None:
        drive, turn = self._self_drive, _Turn()
        try:
            if not drive.take(turn, self._self_is_running):
                await self.__wrapped__.aclose()
                return
            if not drive.is_open:
                drive.done = True
                await self.__wrapped__.aclose()
                return
            await _aclose(drive, self.__wrapped__, CLOSED_EARLY)
        finally:
            drive.give_back(turn)

    def _self_is_handed_over(self, outcome: Outcome) -> bool:
        """Let a loop that is not asyncio's close what was dropped, as it does with a plain one."""
        finalizer = self._self_finalizer
        if finalizer is None or self.__wrapped__.ag_frame is None:
            return False
        try:
            finalizer(_Dropped(self.__wrapped__, self._self_drive, outcome))
        except RuntimeError:  # the loop is over
            return False
        return True

    def __del__(self) -> None:
        drive = getattr(self, "_self_drive", None)
        if drive is None or not drive.is_open or sys.is_finalizing():
            return
        outcome = drive.dropped_as()
        loop = self._self_loop
        if loop is None and self._self_is_handed_over(outcome):
            return
        if loop is None or loop.is_closed() or self.__wrapped__.ag_frame is None:
            put_aside(lambda: _finish_dropped(drive, outcome))
            return
        # As asyncio does with a plain one: its clean-up may await, so it runs in the loop.
        generator = self.__wrapped__
        loop.call_soon_threadsafe(_close_in, loop, drive, generator, outcome)


class _Dropped(_ObjectProxy):
    """An async generator that nobody holds, to its loop: closing it ends its span."""

    def __init__(self, generator: Any, drive: _Drive, outcome: Outcome) -> None:
        super().__init__(generator)
        self._self_drive = drive
        self._self_outcome = outcome

    def aclose(self) -> Any:
        return _aclose(self._self_drive, self.__wrapped__, self._self_outcome)


def _close_in(
    loop: asyncio.AbstractEventLoop, drive: _Drive, generator: Any, outcome: Outcome
) -> None:
    task = loop.create_task(_aclose(drive, generator, outcome))

    def make_sure(done: Any) -> None:
        # The loop ended before the clean-up could: the span is closed all the same.
        with drive.body:
            drive.finish(None, outcome)

    task.add_done_callback(make_sure)


async def _aclose(drive: _Drive, generator: Any, outcome: Outcome) -> None:
    with drive.body:
        try:
            await generator.aclose()
        except BaseException as error:
            drive.finish(error)
            raise
        drive.finish(None, outcome)


class TracedCoroutine(_ObjectProxy):
    """A coroutine that runs under its own span, from its first step on."""

    def __init__(
        self,
        coroutine: Any,
        open_: Callable[[], OpenedSpan],
        write: Callable[[OpenedSpan, Any], None],
    ) -> None:
        super().__init__(coroutine)
        self._self_parts: tuple[Any, Any] | None = (open_, write)
        self._self_abandoned: list[bool] = []
        self._self_run: Generator[Any, Any, Any] | None = None

    def __await__(self) -> Any:
        # Not kept here: `await f()` drops this proxy and goes on with what it gets.
        return self._self_runner()

    def _self_runner(self) -> Generator[Any, Any, Any]:
        if self._self_parts is None:  # a coroutine runs once: let it say so itself
            return _steps_of(self.__wrapped__)
        (open_, write), self._self_parts = self._self_parts, None
        return _run(self.__wrapped__, open_, write, self._self_abandoned)

    def send(self, value: Any) -> Any:
        run = self._self_run
        if run is None:
            run = self._self_run = self._self_runner()
        return run.send(value)

    def __next__(self) -> Any:
        return self.send(None)

    def throw(self, *exception: Any) -> Any:
        if self._self_run is None:
            return self.__wrapped__.throw(*exception)
        return self._self_run.throw(*exception)

    def close(self) -> None:
        if self._self_run is None:
            self.__wrapped__.close()
        else:
            self._self_run.close()

    def __del__(self) -> None:
        run = getattr(self, "_self_run", None)
        if run is not None and run.gi_frame is not None and not sys.is_finalizing():
            self._self_abandoned.append(True)
            if is_collecting() or is_inside_tracing():
                put_aside(run.close)
            else:
                run.close()


class TracedGeneratorCoroutine(TracedCoroutine):
    """The same for a generator that is awaitable by `types.coroutine`."""

    def __iter__(self) -> TracedGeneratorCoroutine:
        return self


def _run(
    coroutine: Any,
    open_: Callable[[], OpenedSpan],
    write: Callable[[OpenedSpan, Any], None],
    abandoned: list[bool],
) -> Generator[Any, Any, Any]:
    opened = open_()
    del open_  # it holds the arguments of the call
    try:
        result = yield from _steps_of(coroutine)
        write(opened, result)
    except BaseException as error:
        if abandoned:
            opened.finish_as(ABANDONED)
        else:
            opened.finish(error)
        raise
    opened.finish(None)
    return result


def _steps_of(coroutine: Any) -> Generator[Any, Any, Any]:
    steps: Generator[Any, Any, Any]
    steps = coroutine if isinstance(coroutine, GeneratorType) else coroutine.__await__()
    return steps
