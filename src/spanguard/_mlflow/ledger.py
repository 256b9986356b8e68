"""What became of each trace on its way to the store. Knows no MLflow: numbers and reasons."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

__all__ = ["Ledger", "Loss"]


# Of traces that nobody asks for by flush(), so many are remembered; older ones are forgotten.
_MAX_REMEMBERED = 20_000


@dataclass(frozen=True)
class Loss:
    """Traces that are not in the store, and why."""

    traces: int
    reason: str

    def __bool__(self) -> bool:
        return self.traces > 0


class Ledger:
    """Notes of each trace that it ended, and that it was taken or refused.

    Every step is one operation on a dict, which threads may do at a time without a lock.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, None] = {}
        self._refused: dict[Hashable, str] = {}
        self._told: set[Hashable] = set()
        self._whole: set[Hashable] = set()
        self._taken = itertools.count()
        self._taken_when_lost: int | None = None  # what the count was when a loss was told of
        self._last_taken = 0
        self.stored = self.dropped = self.refused_count = 0  # as far as MLflow lets us see
        self.last_error: str | None = None

    def ended(self, trace: Hashable) -> None:
        """Note that a trace is on its way."""
        if trace in self._told:
            self._told.discard(trace)
            return
        self._waiting[trace] = None
        if len(self._waiting) > _MAX_REMEMBERED:
            self._waiting.pop(next(iter(self._waiting)), None)

    def taken(self, trace: Hashable, *, whole: bool = False) -> None:
        """Note that the store has a trace; the `whole` of it, whatever part was refused."""
        # Where MLflow stores in the thread that ends a span, it comes before the end is noted.
        self._waiting.pop(trace, None)
        self.stored += trace not in self._refused
        if whole:
            _remember(self._whole, trace)
            self._refused.pop(trace, None)
        self._last_taken = next(self._taken)

    def refused(self, trace: Hashable, reason: str, *, for_room: bool = False) -> None:
        """Note that a trace, or a part of it, did not get into the store: `for_room` in a queue."""
        self._waiting.pop(trace, None)
        self.last_error = reason
        if trace not in self._refused and trace not in self._whole:
            self.dropped += for_room
            self.refused_count += not for_room
        if trace not in self._whole and len(self._refused) < _MAX_REMEMBERED:
            self._refused.setdefault(trace, reason)

    def forget(self, trace: Hashable) -> None:
        """Drop a trace that is not on its way after all."""
        self._waiting.pop(trace, None)

    def told(self, trace: Hashable) -> None:
        """Note that the user was told, before its end, that a trace will not arrive."""
        _remember(self._told, trace)

    def on_their_way(self) -> list[Hashable]:
        """Return the traces that have ended and of which nothing is known yet."""
        return list(self._waiting)

    @property
    def pending(self) -> int:
        """Return how many traces have ended of which nothing is known yet."""
        return len(self._waiting)

    def still(self, traces: Iterable[Hashable]) -> int:
        """Return how many of these traces are still on their way."""
        return sum(trace in self._waiting for trace in traces)

    def settle(self, traces: Iterable[Hashable], unknown: str) -> Loss:
        """Return what is lost, each once: what was refused, and what is gone of these traces.

        Call it when nothing is on its way any more. `unknown` is the reason for what got lost
        without one.
        """
        reasons = [self._refused.pop(trace, unknown) for trace in list(self._refused)]
        for trace in traces:
            if trace in self._waiting:
                del self._waiting[trace]
                reasons.append(unknown)
        if not reasons:
            return Loss(0, "")
        self._taken_when_lost = self._last_taken
        (reason, _), *others = Counter(reasons).most_common()
        more = f"; and {len(others)} other reasons" if others else ""
        return Loss(len(reasons), reason + more)

    def has_recovered(self) -> bool:
        """Tell whether a trace was taken since a loss was told of, or there was none."""
        return self._taken_when_lost is None or self._last_taken > self._taken_when_lost


def _remember(traces: set[Hashable], trace: Hashable) -> None:
    if len(traces) >= _MAX_REMEMBERED:
        traces.clear()
    traces.add(trace)
