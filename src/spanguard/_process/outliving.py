"""Roots whose block is over, and that wait for what runs on under them.

A task, a pooled job or a stream may go on after the span it was begun under. MLflow exports a
trace when its root ends, and what ends later makes it unreadable. So the root's status and end
time are taken when its block is left, and it ends when the last of its descendants has: at most
`limits(outlive_seconds=...)` later. What is open then is an orphan.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from spanguard._base.config import current_limits
from spanguard._base.findings import contained, settle
from spanguard._base.open_span import OpenSpan
from spanguard._base.site import Site
from spanguard._process import orphans, registry
from spanguard._process.registry import Entry
from spanguard.exceptions import OrphanedSpanError

__all__ = ["await_descendants", "forget_waiting", "wait_for_descendants", "what_is_waited_for"]


# How often the keeper looks whether strands are over, and how long it stays without work.
_LOOK_SECONDS = 0.2
_IDLE_SECONDS = 5.0


class _Waiting:
    """A root that waits, and how it ends. By whichever thread, once."""

    __slots__ = ("_end", "_is_looking", "due", "entry")

    def __init__(self, entry: Entry, end: Callable[[], object]) -> None:
        self.entry = entry
        self._end = end
        self._is_looking = False
        self.due = time.monotonic() + current_limits().outlive_seconds

    def end(self) -> None:
        if self._is_looking:  # who looks ends it, when what was found has been told
            return
        if _waiting.pop(self.entry.span_id, None) is None:
            return
        try:
            # The claim of the block is handed on to who ends the root now.
            registry.hand_claim_over(self.entry)
            with contained("ending a root that has waited for its descendants"):
                self._end()
        finally:
            orphans.make_sure_of_end(self.entry)
            self.entry.awaits = None

    def close_what_is_over(self, now: float) -> None:
        """Close descendants whose strand is over, or all when the time is up; tell of them."""
        everything = now >= self.due
        self._is_looking = True
        try:
            closed = [
                found
                for child in orphans.descendants_of(self.entry)
                if everything or child.strand.is_over
                for found in self._close(child)
            ]
            if closed:
                finding = _orphans(self.entry, closed)
                settle([finding], strict=False, raised=None, site=closed[-1][1])
        finally:
            self._is_looking = False
            if everything or not self.entry.children:
                self.end()

    def _close(self, child: Entry) -> list[tuple[OpenSpan, Site]]:
        report = orphans.close_orphan(child, self.entry.label)
        return [] if report is None else [(report, child.site)]


_waiting: dict[int, _Waiting] = {}


def wait_for_descendants(root: Entry, end: Callable[[], object]) -> None:
    """End a closed root, by `end`, when nothing is open under it any more."""
    waiting = _waiting[root.span_id] = _Waiting(root, end)
    root.awaits = waiting.end
    if not root.children:  # the last one has ended in this very moment
        waiting.end()
        return
    with contained("waiting for what outlives a root"):
        _keeper.see_to_it()


def await_descendants(seconds: float) -> bool:
    """Wait until no root waits any more, at most so long; tell whether none does."""
    deadline = time.monotonic() + max(seconds, 0.0)
    while _waiting:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.005)
    return True


def what_is_waited_for() -> str | None:
    """Say what roots wait for, and until when; None if none waits any more."""
    waiting = [one for one in list(_waiting.values()) if one.entry.children]
    if not waiting:
        return None
    report = orphans.descendants_of(waiting[0].entry)[-1].report()
    return (
        f"{len(waiting)} closed roots wait for spans that run on under them: {report}. Their "
        "traces are stored when those have ended: call flush() again, with more time."
    )


def _orphans(root: Entry, closed: list[tuple[OpenSpan, Site]]) -> OrphanedSpanError:
    spans = [report for report, _ in closed]
    finding = OrphanedSpanError(
        f"{len(spans)} spans ran on after root {root.label} had been closed, and were not ended: "
        f"{spans[0]}. Closed as ERROR, orphaned. End each span where its work ends; "
        "limits(outlive_seconds=...) sets how long a root waits.",
        span_id=root.hex_id,
        trace_id=spans[0].trace_id,
    )
    finding.spans = spans
    return finding


class _Keeper:
    """A daemon thread that closes what is due, while there is something to wait for."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def see_to_it(self) -> None:
        thread = self._thread
        if thread is None or not thread.is_alive():
            thread = threading.Thread(target=self._run, name="spanguard-outliving", daemon=True)
            self._thread = thread
            thread.start()

    def _run(self) -> None:
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < _IDLE_SECONDS:
            time.sleep(_LOOK_SECONDS)
            now = time.monotonic()
            for waiting in list(_waiting.values()):
                idle_since = now
                with contained("closing what has outlived its root"):
                    waiting.close_what_is_over(now)
        self._thread = None
        if _waiting:  # one came in this very moment
            self.see_to_it()


_keeper = _Keeper()


def forget_waiting() -> None:
    """In a forked child: the roots of the parent are the parent's to end."""
    global _keeper
    _waiting.clear()
    _keeper = _Keeper()
