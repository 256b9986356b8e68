"""Tasks of asyncio and of trio: which one runs here, and waiting without blocking the others.

trio is asked only where it is imported already, and never imported from here (issue 9, 40).
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from collections.abc import Callable
from typing import Any

from spanguard._base.values import attribute_of

__all__ = ["Aside", "in_event_loop", "is_cancellation", "is_over", "running_task"]


def running_task() -> object:
    """Return the task that runs here, None where it is a thread's own code."""
    # Not current_task() alone: without a loop it raises, ten times as slow.
    loop = asyncio._get_running_loop()
    task = asyncio.current_task(loop) if loop is not None else None
    # trio may be the guest of a loop of asyncio's, which then runs no task.
    return _trio_task() if task is None and "trio" in sys.modules else task


def _trio_task() -> object:
    lowlevel: Any = getattr(sys.modules.get("trio"), "lowlevel", None)
    # Asked first, as current_task() raises outside of trio. An older trio, and one that is being
    # imported in this moment, cannot be asked.
    in_task = getattr(lowlevel, "in_trio_task", None)
    return lowlevel.current_task() if in_task is not None and in_task() else None


def is_over(task: Any) -> bool:
    """Tell whether a task has ended."""
    done = getattr(task, "done", None)
    return bool(done()) if done is not None else getattr(task.coro, "cr_frame", None) is None


def in_event_loop() -> bool:
    """Tell whether other tasks wait while this code runs."""
    return asyncio._get_running_loop() is not None or running_task() is not None


def is_cancellation(raised: BaseException) -> bool:
    """Tell whether an exception says that a task was cancelled, and nothing else."""
    if isinstance(raised, asyncio.CancelledError):
        return True
    cancelled = getattr(sys.modules.get("trio"), "Cancelled", None)
    if cancelled is not None and isinstance(raised, cancelled):
        return True
    if isinstance(raised, Exception):
        return False
    # trio's nurseries raise groups. By shape: Python 3.10 has none of its own.
    group = attribute_of(raised, "exceptions")
    return type(group) is tuple and bool(group) and all(map(is_cancellation, group))


class Aside:
    """Something that waits, begun in a thread of its own: `await aside.done()` ends with it.

    A task that is cancelled while it awaits leaves it to the thread. Where no event loop is
    known it is waited for as it is.
    """

    __slots__ = ("_finished", "_on_finish", "_thread")

    def __init__(self, work: Callable[[], object]) -> None:
        self._finished = threading.Event()
        self._on_finish: Callable[[], object] | None = None
        run = contextvars.copy_context().run
        self._thread = threading.Thread(
            target=run, args=(self._run, work), name="spanguard-aside", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError:  # Python 3.12.1 starts no threads any more at exit
            self._run(work)

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        finally:
            self._finished.set()
            on_finish, self._on_finish = self._on_finish, None
            if on_finish is not None:
                on_finish()

    async def done(self) -> None:
        """Wait for the end."""
        loop = asyncio._get_running_loop()
        if loop is not None and asyncio.current_task(loop) is not None:
            await self._await_in_asyncio(loop)
        elif _trio_task() is not None:
            await self._await_in_trio(sys.modules["trio"])
        else:
            self._finished.wait()

    async def _await_in_asyncio(self, loop: asyncio.AbstractEventLoop) -> None:
        future: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        self._wake_by(lambda: loop.call_soon_threadsafe(wake))
        await future

    async def _await_in_trio(self, trio: Any) -> None:
        event = trio.Event()
        token = trio.lowlevel.current_trio_token()
        self._wake_by(lambda: token.run_sync_soon(event.set))
        await event.wait()

    def _wake_by(self, wake: Callable[[], object]) -> None:
        def on_finish() -> None:
            try:
                wake()
            except RuntimeError:  # the loop was closed meanwhile; trio's error is one, too
                pass

        self._on_finish = on_finish
        # It may have finished before it could know whom to wake; then both may wake, or one.
        if self._finished.is_set():
            on_finish()
