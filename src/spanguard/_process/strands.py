"""Strands: what tells a thread or a task, or work that has a strand of its own, from another."""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from contextvars import ContextVar

from spanguard._base.tasks import is_over, running_task

__all__ = ["Strand", "Work", "current_strand", "work_here"]


class Work:
    """A stretch of code that has a strand of its own in the thread or task that runs it.

    A carried call, or the body of a generator, which may go on in another thread at its next
    step. It is over when the call has returned, though the pool's thread lives on.
    """

    __slots__ = ("is_over", "moves", "strand")

    def __init__(self, *, moves: bool = False) -> None:
        self.is_over = False
        self.moves = moves  # it may go on elsewhere, when what runs it now is over
        self.strand: Strand | None = None  # that runs it now

    def begin_step(self) -> Work | None:
        """Let what runs here from now on be this work's; return what was before."""
        before = work_here.get()
        self.strand = Strand()
        work_here.set(self)
        return before

    def end_step(self, before: Work | None, *, is_over: bool) -> None:
        """Let what runs here be what was before."""
        self.is_over = self.is_over or is_over
        if work_here.get() is self:
            work_here.set(before)


work_here: ContextVar[Work | None] = ContextVar("spanguard_work", default=None)


_threads = threading.local()
_running_loop = asyncio._get_running_loop


def current_strand() -> Strand:
    """Return the strand of what runs here. A thread's own code has one and the same."""
    # Whether a task may run here, at a glance: it is asked at each start of a span, of any API.
    if _running_loop() is None and "trio" not in sys.modules and work_here.get() is None:
        try:
            found: Strand = _threads.strand
            return found
        except AttributeError:
            strand = _threads.strand = Strand()
            return strand
    return Strand()


class Strand:
    """A thread or a task: what tells a task from its parent, which shares its thread."""

    __slots__ = ("_task", "thread", "work")

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        task = running_task()
        self._task = weakref.ref(task) if task is not None else None
        work = work_here.get()
        # A thread or task that was started in the work has a copy of the context, and is another.
        is_here = work is not None and not work.is_over and work.strand == self
        self.work = work if is_here else None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Strand):
            return False
        if self._task is None or other._task is None:
            return self._task is other._task and self.thread is other.thread
        return self._task == other._task

    __hash__ = None  # type: ignore[assignment]

    def runs_with(self, other: Strand) -> bool:
        """Tell whether the two run one after the other, in the same work."""
        return self.work is other.work and (self.work is not None or self == other)

    @property
    def is_over(self) -> bool:
        """Whether nothing will run on it any more."""
        if self.work is not None and (self.work.is_over or self.work.moves):
            return self.work.is_over
        task = self._task() if self._task is not None else None
        if self._task is not None:
            return task is None or is_over(task)
        return not self.thread.is_alive()
