"""Who is open, opened where, by whom; and closing what was left open.

One OpenTelemetry span processor on MLflow's provider hears of every span, whichever API, thread
or task opens it. So each open span knows its open children, and an end looks at those only: it
costs the same in a trace of ten spans and of a hundred thousand.

There is no lock here. Finalizers, weakref callbacks, signal handlers and forked children get into
these functions at any line, and an interrupt leaves them at any line (issue 9, A1 and A2): each
step is one atomic operation on a dict, and whoever comes second mends what is half done.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from enum import Enum
from typing import Protocol

from spanguard._base.open_span import OpenSpan
from spanguard._base.site import opener
from spanguard._mlflow import memory
from spanguard._mlflow.ending import Ender
from spanguard._mlflow.shapes import MlflowSpan, RecordingSpan
from spanguard._mlflow.spans import is_recording_kind
from spanguard._process.ambient import StandIn
from spanguard._process.dropped import put_aside
from spanguard._process.strands import current_strand
from spanguard._record.encounters import Encounters

__all__ = [
    "ClosedBy",
    "Entry",
    "RemoteParent",
    "adopt",
    "claim",
    "claims",
    "entry_by_id",
    "entry_of",
    "hand_claim_over",
    "is_claimed",
    "is_ending_here",
    "leave_tree",
    "note_end",
    "open",
    "open_entries",
]


class ClosedBy(Enum):
    """Who closed a span that was opened through spanguard."""

    EXIT = "the exit of its block, or its manager"
    USER = "its user, before that"
    OWNER = "the block around a guarded client that it was opened by"
    ANCESTOR = "a span above it, or whoever else closes what is left open"
    FORK = "nobody: it is open in the parent process, which will end it"


class Handle(Protocol):
    """What the registry knows of who opened a span through spanguard (_lifecycle/handle.py)."""

    closed_by: ClosedBy | None

    def orphaned(self) -> None:
        """Take note that somebody else is ending the span in its opener's stead."""


class _Reference(weakref.ref["RecordingSpan"]):
    """A weak reference that says whose it was: a function for each span takes 200 bytes more."""

    __slots__ = ("span_id",)

    span_id: int


class Entry:
    """One open span of this process, and its open children."""

    __slots__ = (
        "_otel",
        "awaits",
        "children",
        "end_is_told",
        "ended",
        "ender",
        "handle",
        "is_instrumented",
        "live",
        "met",
        "on_end",
        "orphaned_by",
        "parent",
        "site",
        "span_id",
        "stand_in",
        "started",
        "strand",
    )

    def __init__(
        self, otel: RecordingSpan, span_id: int, parent: Entry | RemoteParent | None
    ) -> None:
        # Weak: a span that raw code abandons may go when MLflow's buffer lets it go.
        self._otel = _Reference(otel, _forget)
        self._otel.span_id = span_id
        self.span_id = span_id
        self.parent = parent
        self.children: dict[int, Entry] = {}
        # Six frames down is the tracer's own start_span, whoever called it.
        self.site, self.is_instrumented = opener(6)
        self.started = time.monotonic()
        self.strand = current_strand()
        self.ended = False
        # Whether its end has got as far as to its processors: see make_sure_of_end.
        self.end_is_told = False
        self.orphaned_by: str | None = None
        self.met: Encounters | None = None
        # Set by _lifecycle/handle.py for spans opened through spanguard:
        self.live: MlflowSpan | None = None
        self.ender: Ender | None = None
        self.handle: weakref.ref[Handle] | None = None
        self.stand_in: StandIn | None = None
        # What is to be done when it ends, by whatever API; and what it keeps alive until then.
        self.on_end: Callable[[], object] | None = None
        # Of a root whose block is over: what to do when its last descendant has ended.
        self.awaits: Callable[[], object] | None = None

    @property
    def otel(self) -> RecordingSpan | None:
        """The OpenTelemetry span, or None when nobody holds it any more."""
        return self._otel()

    @property
    def is_open(self) -> bool:
        """Whether it is neither ended, nor closed and only waiting for others."""
        return not self.ended and self.awaits is None

    def mlflow_span(self) -> MlflowSpan | None:
        """Return the live MLflow span; None if MLflow has dropped it."""
        if self.live is not None:
            return self.live
        otel = self.otel
        trace_id = memory.mlflow_trace_id(otel) if otel is not None else None
        return memory.live_span(trace_id, self.hex_id) if trace_id else None

    @property
    def hex_id(self) -> str:
        return f"{self.span_id:016x}"

    @property
    def label(self) -> str:
        """Name and id, for messages and attributes."""
        otel = self.otel
        return f"{otel.name if otel is not None else '?'} ({self.hex_id})"

    def report(self) -> OpenSpan:
        otel = self.otel
        trace_id = self.live.trace_id if self.live is not None else None
        if trace_id is None and otel is not None:
            trace_id = memory.mlflow_trace_id(otel)
        return OpenSpan(
            name=otel.name if otel is not None else "?",
            trace_id=trace_id or "",
            span_id=self.hex_id,
            opened_at=str(self.site),
            thread=self.strand.thread.name,
            age=time.monotonic() - self.started,
        )


class RemoteParent:
    """What a span of another process is here: the parent of what is opened under it."""

    __slots__ = ("awaits", "children", "ended", "label", "live", "met", "parent", "span_id")

    def __init__(self, span_id: int) -> None:
        self.span_id = span_id
        self.label = f"the end of its work under remote span {span_id:016x}"
        self.children: dict[int, Entry] = {}
        self.parent: None = None
        self.live: None = None
        self.met: Encounters | None = None
        self.awaits: None = None
        self.ended = False


open: dict[int, Entry] = {}

# Which thread is ending a span, by the span's id.
claims: dict[int, int] = {}


def _forget(gone: weakref.ref[RecordingSpan]) -> None:
    # In a weakref callback: atomic steps only. What this would have to end is put aside.
    span_id = getattr(gone, "span_id", 0)  # an interrupt may have come before it was set
    entry = open.pop(span_id, None)
    if entry is not None:
        entry.ended = True
        claims.pop(span_id, None)
        top = leave_tree(entry)
        if top is not None and top.awaits is not None and not top.children:
            put_aside(top.awaits)


def leave_tree(entry: Entry) -> Entry | RemoteParent | None:
    """Take a span out of the tree; what is open under it goes to its parent, which is returned.

    What is open under a root stays there: it is what the root's end waits for.
    """
    parent = entry.parent
    while parent is not None:
        parent.children.pop(entry.span_id, None)
        if entry.parent is parent:
            break
        parent = entry.parent  # another thread has just ended the former one
    if parent is not None:
        for child in list(entry.children.values()):
            if entry.children.pop(child.span_id, None) is not None:
                adopt(parent, child)
    return parent


def adopt(parent: Entry | RemoteParent, child: Entry) -> None:
    """Put a span under another one; where that ends in this very moment, under the one above."""
    while True:
        child.parent = parent
        parent.children[child.span_id] = child
        above = parent.parent
        if above is None or not parent.ended:
            break
        if parent.children.pop(child.span_id, None) is None:
            return  # the thread that ends it has seen to it
        parent = above
    if child.ended:
        parent.children.pop(child.span_id, None)


def note_end(entry: Entry) -> None:
    """Take a span that has ended off the registry, and out of what is ambient. Idempotent."""
    entry.ended = True
    claims.pop(entry.span_id, None)
    top = leave_tree(entry)
    if entry.stand_in is not None:
        entry.stand_in.fall_back()
    on_end, entry.on_end = entry.on_end, None
    open.pop(entry.span_id, None)
    if on_end is not None:
        on_end()
    if top is not None and top.awaits is not None and not top.children:
        top.awaits()


def entry_of(otel: object) -> Entry | None:
    """Return the entry of a span that is open in this process."""
    # A span that does not record (disabled, sampled out) may carry its parent's ids.
    if not is_recording_kind(otel):
        return None
    return open.get(otel.get_span_context().span_id)


def entry_by_id(span_id: str) -> Entry | None:
    """Return the entry of an open span by its MLflow span id."""
    try:
        return open.get(int(span_id, 16))
    except (TypeError, ValueError):
        return None


def open_entries() -> list[Entry]:
    """Return the entries of all spans open in this process, in the order they were opened."""
    return list(open.values())


def claim(entry: Entry) -> bool:
    """Win the right to end a span. One thread does; where it was interrupted, it may go on."""
    if entry.ended:
        return False
    here = threading.get_ident()
    if claims.setdefault(entry.span_id, here) != here:
        return False
    if entry.ended:  # by another thread, just before we claimed it
        claims.pop(entry.span_id, None)
        return False
    return True


def hand_claim_over(entry: Entry) -> None:
    """Let this thread end a span that another one has closed and left to it."""
    claims[entry.span_id] = threading.get_ident()


def is_claimed(entry: Entry) -> bool:
    """Tell whether somebody is ending a span."""
    return entry.span_id in claims


def is_ending_here(entry: Entry) -> bool:
    """Tell whether this very thread has claimed a span, and is in the middle of its end."""
    return not entry.ended and claims.get(entry.span_id) == threading.get_ident()
