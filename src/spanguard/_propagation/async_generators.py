"""Async generators whose run is a span."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, cast

from spanguard._base.findings import contained
from spanguard._base.proxies import ObjectProxy
from spanguard._process.dropped import put_aside
from spanguard._propagation.drive import Drive, Recorder, Turn
from spanguard._propagation.generators import finish_dropped
from spanguard._record.outcome import CLOSED_EARLY, Outcome

__all__ = ["TracedAsyncGenerator"]


class TracedAsyncGenerator(ObjectProxy):
    """An async generator whose steps run under its own span."""

    def __init__(self, generator: AsyncGenerator[Any, Any], recorder: Recorder) -> None:
        super().__init__(generator)
        self._self_drive = Drive(recorder)
        self._self_loop: asyncio.AbstractEventLoop | None = None
        self._self_finalizer: Callable[[Any], object] | None = None  # of trio, or another loop

    def __aiter__(self) -> TracedAsyncGenerator:
        self._self_drive.iterated = True
        return self

    def __anext__(self) -> Any:
        return self._self_step(self.__wrapped__.__anext__)

    def asend(self, value: object) -> Any:
        if value is not None and not self._self_drive.has_begun:
            return self.__wrapped__.asend(value)
        return self._self_step(self.__wrapped__.asend, value)

    def athrow(self, *exception: Any) -> Any:
        return self._self_step(self.__wrapped__.athrow, *exception)

    async def _self_step(self, step: Callable[..., Any], *args: Any) -> Any:
        drive, turn = self._self_drive, Turn()
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
        drive, turn = self._self_drive, Turn()
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
            put_aside(lambda: finish_dropped(drive, outcome))
            return
        # As asyncio does with a plain one: its clean-up may await, so it runs in the loop.
        generator = self.__wrapped__
        loop.call_soon_threadsafe(_close_in, loop, drive, generator, outcome)


class _Dropped(ObjectProxy):
    """An async generator that nobody holds, to its loop: closing it ends its span."""

    def __init__(self, generator: AsyncGenerator[Any, Any], drive: Drive, outcome: Outcome) -> None:
        super().__init__(generator)
        self._self_drive = drive
        self._self_outcome = outcome

    def aclose(self) -> Awaitable[None]:
        return _aclose(self._self_drive, self.__wrapped__, self._self_outcome)


def _close_in(
    loop: asyncio.AbstractEventLoop,
    drive: Drive,
    generator: AsyncGenerator[Any, Any],
    outcome: Outcome,
) -> None:
    task = loop.create_task(_aclose(drive, generator, outcome))

    def make_sure(done: object) -> None:
        # The loop ended before the clean-up could: the span is closed all the same.
        with drive.body:
            drive.finish(None, outcome)

    task.add_done_callback(make_sure)


async def _aclose(drive: Drive, generator: AsyncGenerator[Any, Any], outcome: Outcome) -> None:
    with drive.body:
        try:
            await generator.aclose()
        except BaseException as error:
            drive.finish(error)
            raise
        drive.finish(None, outcome)
