"""A buffer of traces that keeps the open ones, however many and however old they are.

MLflow's own forgets the oldest of a thousand, and each after an hour, open or not: then the
trace is lost. Here those limits hold for what nobody is at work on, and a wider one for what is
open without spanguard having opened it, so that code which leaks traces cannot fill the memory.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from spanguard._base.findings import contained

__all__ = ["KeepingBuffer", "ROOM"]


T = TypeVar("T")
_Trace = TypeVar("_Trace", contravariant=True)

# How many times as many traces may be held as the buffer's size says, while each of them is open
# or waits for its export, and none of their open spans is spanguard's.
ROOM = 4

# How many traces of each queue one insertion looks at: more than it adds, so that it keeps up.
_LOOKS = 4


class Policy(Protocol[_Trace]):
    """What the buffer asks about a trace."""

    def guard_of(self, trace: _Trace) -> str | None:
        """Name an open span that spanguard opened, or None. Looks at all spans."""

    def is_guarded(self, trace: _Trace, guard: str | None) -> bool:
        """Tell at a glance whether this span, or the root, is one that spanguard holds open."""
        ...

    def is_busy(self, trace: _Trace) -> bool:
        """Tell whether the trace has open spans, or ones that still wait for their export."""
        ...

    def dropped(self, trace_id: str, trace: _Trace) -> None:
        """Take note that the trace is no longer in the buffer."""


class _Held:
    """Where a trace is, and since when."""

    __slots__ = ("guard", "queue", "since")

    def __init__(self, queue: OrderedDict[str, None], since: float) -> None:
        self.queue = queue
        self.since = since
        self.guard: str | None = None


class KeepingBuffer(dict[str, T], Generic[T]):
    """Traces by id. Room is made on insertion, in constant time; nothing goes by itself.

    Each trace is in one of three queues, all in the order of arrival: not looked at yet; found
    busy; found guarded, that is, spanguard holds an open span of it.

    Args:
        max_size: how many traces to hold that are not guarded.
        ttl: seconds after which one that is not busy may go.
        policy: what to ask about a trace.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        max_size: int,
        ttl: float,
        policy: Policy[T],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._max_size = max_size
        self._ttl = ttl
        self._policy = policy
        self._clock = clock
        self._unseen: OrderedDict[str, None] = OrderedDict()
        self._busy: OrderedDict[str, None] = OrderedDict()
        self._guarded: OrderedDict[str, None] = OrderedDict()
        self._held: dict[str, _Held] = {}

    def __setitem__(self, trace_id: str, trace: T) -> None:
        if trace_id not in self:
            with contained("making room in the buffer of traces"):
                self._make_room()
            self._held[trace_id] = _Held(self._unseen, self._clock())
            self._unseen[trace_id] = None
        super().__setitem__(trace_id, trace)

    def __delitem__(self, trace_id: str) -> None:
        super().__delitem__(trace_id)
        self._forget(trace_id)

    def pop(self, trace_id: str, *default: Any) -> Any:
        self._forget(trace_id)
        return super().pop(trace_id, *default)

    def clear(self) -> None:
        super().clear()
        for part in (self._held, self._unseen, self._busy, self._guarded):
            part.clear()

    def _forget(self, trace_id: str) -> None:
        held = self._held.pop(trace_id, None)
        if held is not None:
            held.queue.pop(trace_id, None)

    # -- making room

    @property
    def _loose(self) -> int:
        """How many traces are not known to be guarded."""
        return len(self) - len(self._guarded)

    def _make_room(self) -> None:
        now = self._clock()
        for trace_id in _front(self._guarded):
            held = self._held[trace_id]
            if self._policy.is_guarded(self[trace_id], held.guard):
                self._guarded.move_to_end(trace_id)
            else:
                self._move(trace_id, self._busy)
        for queue in (self._busy, self._unseen):  # the older ones first
            for trace_id in _front(queue):
                if not self._is_due(trace_id, now):
                    break  # those behind it came later
                self._decide(trace_id, self[trace_id])

    def _is_due(self, trace_id: str, now: float) -> bool:
        """Tell whether a trace has to go if nothing keeps it."""
        return self._loose >= self._max_size or now - self._held[trace_id].since >= self._ttl

    def _decide(self, trace_id: str, trace: T) -> None:
        if self._policy.is_busy(trace):
            if self._policy.is_guarded(trace, None):
                self._move(trace_id, self._guarded)
                return
            if self._loose < ROOM * self._max_size:
                if self._held[trace_id].queue is self._unseen:
                    self._move(trace_id, self._busy)
                return
            guard = self._policy.guard_of(trace)
            if guard is not None:
                self._held[trace_id].guard = guard
                self._move(trace_id, self._guarded)
                return
        del self[trace_id]
        self._policy.dropped(trace_id, trace)

    def _move(self, trace_id: str, queue: OrderedDict[str, None]) -> None:
        held = self._held[trace_id]
        del held.queue[trace_id]
        held.queue = queue
        queue[trace_id] = None


def _front(queue: OrderedDict[str, None]) -> list[str]:
    return list(islice(queue, _LOOKS))
