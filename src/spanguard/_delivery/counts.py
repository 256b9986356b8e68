"""What became of each trace, in numbers: every trace that ended is in exactly one of them."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from spanguard._mlflow import exporting

__all__ = ["Counts", "Delivery"]


@dataclass(frozen=True)
class Delivery:
    """What became of the traces that ended in this process: `recorded` is the sum of the others.

    Attributes:
        recorded: traces that ended.
        stored: those that are in the store, whole.
        pending: those that are on their way, in memory.
        spilled: those that are on their way, on disk.
        dropped: those given up because too much was waiting.
        refused: those that the store does not take.
        last_error: why something was not stored when it was tried last; None if nothing failed.
    """

    recorded: int = 0
    stored: int = 0
    pending: int = 0
    spilled: int = 0
    dropped: int = 0
    refused: int = 0
    last_error: str | None = None


class Counts:
    """The numbers of this process, and the sizes of what is pending. Never asked by a span.

    `changed` is notified when something has become of a trace: who waits for the store waits on it.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.stored = self.dropped = self.refused = self.spilled = 0
        self.pending: dict[str, int] = {}  # the sizes of traces in memory, by their id
        self.parts: dict[int, int] = {}  # the sizes of parts of traces, by the part's own id
        self.bytes = 0
        self.last_error: str | None = None

    def begin(self, trace_id: str, size: int) -> None:
        """Count a trace that has ended."""
        with self.changed:
            self.bytes += size - self.pending.get(trace_id, 0)
            self.pending[trace_id] = size

    def take(self, trace_ids: list[str]) -> None:
        """Count traces that the store has taken."""
        with self.changed:
            for trace_id in trace_ids:
                self.stored += self._is_over(trace_id)
                exporting.note_stored(trace_id)
            self.changed.notify_all()

    def drop(self, trace_id: str, reason: str) -> None:
        """Count a trace that was given up for want of room."""
        with self.changed:
            self.dropped += self._is_over(trace_id)
            exporting.note_refused(trace_id, reason)
            self.changed.notify_all()

    def refuse(self, trace_id: str, reason: str) -> None:
        """Count a trace that the store does not take."""
        with self.changed:
            self.refused += self._is_over(trace_id)
            self.last_error = reason
            exporting.note_refused(trace_id, reason)
            self.changed.notify_all()

    def spill(self, trace_id: str) -> None:
        """Count a trace that waits on disk from here on."""
        with self.changed:
            self.spilled += self._is_over(trace_id)
            self.changed.notify_all()

    def unspill(self, trace_id: str, size: int) -> None:
        """Count a trace that was read back from disk."""
        with self.changed:
            self.spilled -= 1
            self.begin(trace_id, size)

    def _is_over(self, trace_id: str) -> int:
        size = self.pending.pop(trace_id, None)
        self.bytes -= size or 0
        return int(size is not None)

    def begin_part(self, part: object, size: int) -> None:
        """Count the bytes of a part of a trace that goes on."""
        with self.changed:
            self.parts[id(part)] = size
            self.bytes += size

    def end_part(self, part: object) -> None:
        """Take note that a part is stored, or given up."""
        with self.changed:
            self.bytes -= self.parts.pop(id(part), 0)
            self.changed.notify_all()

    def refuse_part(self, trace_id: str, reason: str) -> None:
        """Take note that the store does not take a part of a trace that goes on."""
        self.last_error = reason
        exporting.note_refused(trace_id, reason)

    def report(self, not_looked_at: int) -> Delivery:
        """Return the numbers, with traces that have just ended and are in no count yet."""
        with self.changed:
            pending = len(self.pending) + not_looked_at
            done = self.stored + self.dropped + self.refused + self.spilled
            return Delivery(
                recorded=done + pending,
                stored=self.stored,
                pending=pending,
                spilled=self.spilled,
                dropped=self.dropped,
                refused=self.refused,
                last_error=self.last_error,
            )
