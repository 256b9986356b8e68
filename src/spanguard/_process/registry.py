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
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from spanguard import _mlflow
from spanguard._base.findings import (
    all_held_back,
    contained,
    forget_held_back,
    internal_error,
    raise_held_back,
    settle,
)
from spanguard._base.site import Site, opener
from spanguard._mlflow import OtelSpan, SpanProcessor
from spanguard._process.ambient import StandIn, Strand, current_strand, origin_here
from spanguard._process.dropped import forget_put_aside, put_aside
from spanguard._record import writing
from spanguard._record.encounters import Encounters
from spanguard._record.outcome import ERROR, ORPHANED, Outcome, classify
from spanguard.exceptions import OrphanedSpanError, TraceLostError

if TYPE_CHECKING:
    from spanguard._lifecycle.handle import OpenedSpan

__all__ = [
    "Entry",
    "OpenSpan",
    "RemoteParent",
    "close_descendants",
    "entry_of",
    "open_entries",
    "watch",
]

# How long the end of a span waits for another thread that is ending one of its children.
_CONCURRENT_END_SECONDS = 1.0

# How often an end looks for descendants that were opened while it closed others.
_MAX_ROUNDS = 1_000


@dataclass(frozen=True)
class OpenSpan:
    """A span that is open, or was when it was reported.

    Attributes:
        name: the span's name.
        trace_id: its MLflow trace id.
        span_id: its MLflow span id.
        opened_at: the line that opened it, as `file.py:123 in function`.
        thread: the name of the thread that opened it.
        age: seconds since it was opened.
    """

    name: str
    trace_id: str
    span_id: str
    opened_at: str
    thread: str
    age: float

    def __str__(self) -> str:
        return f"{self.name!r} (span {self.span_id}), opened at {self.opened_at}"


class Entry:
    """One open span of this process, and its open children."""

    __slots__ = (
        "_otel",
        "awaits",
        "children",
        "end_is_told",
        "ended",
        "ender",
        "is_instrumented",
        "live",
        "met",
        "on_end",
        "opened",
        "orphaned_by",
        "parent",
        "site",
        "span_id",
        "stand_in",
        "started",
        "strand",
    )

    def __init__(self, otel: Any, span_id: int, parent: Entry | RemoteParent | None) -> None:
        # Weak: a span that raw code abandons may go when MLflow's buffer lets it go.
        self._otel: weakref.ref[Any] = weakref.ref(otel, lambda _: _forget(span_id))
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
        self.live: Any = None
        self.ender: Callable[[Any, int | None], None] | None = None
        self.opened: weakref.ref[OpenedSpan] | None = None
        self.stand_in: StandIn | None = None
        # What is to be done when it ends, by whatever API; and what it keeps alive until then.
        self.on_end: Callable[[], object] | None = None
        # Of a root whose block is over: what to do when its last descendant has ended.
        self.awaits: Callable[[], object] | None = None

    @property
    def otel(self) -> Any:
        """The OpenTelemetry span, or None when nobody holds it any more."""
        return self._otel()

    @property
    def is_open(self) -> bool:
        """Whether it is neither ended, nor closed and only waiting for others."""
        return not self.ended and self.awaits is None

    def mlflow_span(self) -> Any:
        """Return the live MLflow span; None if MLflow has dropped it."""
        if self.live is not None:
            return self.live
        otel = self.otel
        trace_id = _mlflow.mlflow_trace_id(otel) if otel is not None else None
        return _mlflow.live_span(trace_id, self.hex_id) if trace_id else None

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
            trace_id = _mlflow.mlflow_trace_id(otel)
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


_open: dict[int, Entry] = {}

# Which thread is ending a span, by the span's id.
_claims: dict[int, int] = {}

# OpenTelemetry trace ids. Of the roots that ended last: more than MLflow's export queue (1000
# tasks) holds on their way to the store. And of what was open in the parent when it forked us.
_ended_traces: deque[int] = deque(maxlen=4_096)
_parents_traces: set[int] = set()


def _forget(span_id: int) -> None:
    # In a weakref callback: atomic steps only. What this would have to end is put aside.
    entry = _open.pop(span_id, None)
    if entry is not None:
        entry.ended = True
        _claims.pop(span_id, None)
        top = _leave_tree(entry)
        if top is not None and top.awaits is not None and not top.children:
            put_aside(top.awaits)


def _leave_tree(entry: Entry) -> Entry | RemoteParent | None:
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
                _adopt(parent, child)
    return parent


def _adopt(parent: Entry | RemoteParent, child: Entry) -> None:
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
    _claims.pop(entry.span_id, None)
    top = _leave_tree(entry)
    if entry.stand_in is not None:
        entry.stand_in.fall_back()
    on_end, entry.on_end = entry.on_end, None
    _open.pop(entry.span_id, None)
    if on_end is not None:
        on_end()
    if top is not None and top.awaits is not None and not top.children:
        top.awaits()


class _Watcher(SpanProcessor):
    """Hears of every start and end. Must not raise: it runs inside MLflow's own start and end."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        try:
            note_start(span, parent_context)
        except BaseException as error:
            # Ctrl-C, or a fault of ours: a span that we never heard of could never be closed.
            if span.context.span_id not in _open:
                with contained("noting a span's start"):
                    note_start(span, parent_context)
            if not isinstance(error, Exception):
                raise
            internal_error("noting a span's start", error)

    def _on_ending(self, span: Any) -> None:
        entry = _open.get(span.context.span_id)
        if entry is None:
            return
        is_error = span.status.status_code is _mlflow.OTEL_ERROR
        if is_error or span.parent is None:
            with contained("preparing the end of a span"):
                if is_error and entry.opened is not None:
                    # Of ours and ended by another API: what we end has been seen to.
                    writing.explain_end(span)
                if entry.children and span.parent is None:
                    _close_under_ending_root(entry)
        entry.end_is_told = True  # the last line: an interrupt before it is made good

    def on_end(self, span: Any) -> None:
        try:
            _note_end_of(span)
        except BaseException as error:
            with contained("noting a span's end"):
                _note_end_of(span)
            if not isinstance(error, Exception):
                raise
            internal_error("noting a span's end", error)

    def shutdown(self) -> None:
        pass

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True


def _note_end_of(span: Any) -> None:
    if span.parent is None:
        _ended_traces.append(span.context.trace_id)
        _mlflow.note_end_of_trace(span.context.trace_id)
    entry = _open.get(span.context.span_id)
    if entry is not None:
        note_end(entry)


def note_start(span: Any, parent_context: Any = None) -> None:
    """Take note of a span that is open from now on."""
    parent = span.parent
    parent_entry: Entry | RemoteParent | None = None
    if parent is not None:
        parent_entry = _open.get(parent.span_id) or _remote_parent(parent, parent_context)
    span_id = span.context.span_id
    entry = Entry(span, span_id, parent_entry)
    for sites in heard:
        sites[span_id] = entry.site
    _open[span_id] = entry
    if parent is None:
        origin = origin_here.get()
        if origin is not None:
            origin.follow(span)
    if parent_entry is not None:
        _adopt(parent_entry, entry)
    elif parent is None or parent.is_remote:
        _keep_open_traces(entry)
    else:  # its parent was opened before we listened, or has ended
        trace_id = _mlflow.mlflow_trace_id(span)
        if trace_id is not None:
            hear_of(trace_id)


def _remote_parent(parent: Any, parent_context: Any) -> RemoteParent | None:
    """Return what a span of another process is here, where a span is opened right under it."""
    active: Any = _mlflow.span_in(parent_context) if parent.is_remote else None
    entry = active.entry if type(active) is StandIn else None
    return entry if isinstance(entry, RemoteParent) else None


_watcher = _Watcher()

# Where each span was opened, by its id, for as long as a test listens (testing.py).
heard: list[dict[int, Site]] = []


class _Guard(_mlflow.TraceGuard):
    """Says which traces MLflow must keep in memory: those in which a span of ours is open."""

    def holds(self, span_id: str) -> bool:
        entry = entry_by_id(span_id)
        return entry is not None and entry.opened is not None and entry.opened() is not None

    def lost(self, span_id: str) -> None:
        entry = entry_by_id(span_id)
        if entry is None:
            return
        finding = TraceLostError(
            f"The trace of {entry.label}, opened at {entry.site}, is lost: too many others were "
            "started after it by the raw client or the fluent API, and never ended. End them, or "
            "raise MLFLOW_TRACE_BUFFER_MAX_SIZE before the first span."
        )
        with contained("warning of a lost trace"):
            settle([finding], strict=False, raised=None, site=entry.site)


_guard = _Guard()


def _keep_open_traces(root: Entry) -> None:
    why_not = _mlflow.keep_open_traces(_guard)
    if why_not is not None:
        finding = TraceLostError(
            f"{why_not}. Its trace would be lost. Leave MLFLOW_TRACE_TIMEOUT_SECONDS unset: then "
            "spanguard keeps what is open; or raise it and MLFLOW_TRACE_BUFFER_MAX_SIZE before "
            "the first span."
        )
        settle([finding], strict=False, raised=None, site=root.site)


def watch() -> bool:
    """Make sure that we hear of what is opened from here on. True when that is new."""
    if not _mlflow.watch(_watcher):
        return False
    # MLflow has stored what had ended before it replaced its provider.
    _ended_traces.clear()
    return True


_UNHEARD = Site(compile("", "<before spanguard listened>", "exec"), 0)


def hear_of(trace_id: str) -> None:
    """Take note of what is open in a trace that was started before we listened."""
    for span in _mlflow.open_spans_in(trace_id):  # parents first
        otel: Any = _mlflow.otel_span(span)
        entry = entry_of(otel)
        if entry is None:
            _note_late(otel)
        elif entry.parent is None and otel.parent is not None:
            parent = _open.get(otel.parent.span_id)
            if parent is not None:
                _adopt(parent, entry)


def _note_late(otel: Any) -> None:
    span_id = otel.get_span_context().span_id
    parent = _open.get(otel.parent.span_id) if otel.parent is not None else None
    entry = Entry(otel, span_id, parent)
    entry.site = _UNHEARD
    entry.started -= (time.time_ns() - otel.start_time) / 1e9
    _open[span_id] = entry
    if parent is not None:
        _adopt(parent, entry)


def follow() -> None:
    """Hear of every span from here on, also where no span of ours ever opens."""
    _mlflow.follow(_watcher)


def entry_of(otel: OtelSpan | None) -> Entry | None:
    """Return the entry of a span that is open in this process."""
    # A span that does not record (disabled, sampled out) may carry its parent's ids.
    if not _mlflow.is_recording_kind(otel):
        return None
    return _open.get(cast(OtelSpan, otel).get_span_context().span_id)


def entry_by_id(span_id: str) -> Entry | None:
    """Return the entry of an open span by its MLflow span id."""
    try:
        return _open.get(int(span_id, 16))
    except (TypeError, ValueError):
        return None


def is_open_trace(otel_trace_id: int) -> bool:
    """Tell whether a trace has open spans here, or had some in the parent of a forked process."""
    if otel_trace_id in _parents_traces:
        return True
    spans = (entry.otel for entry in open_entries())
    return any(span is not None and span.context.trace_id == otel_trace_id for span in spans)


def has_just_ended(otel_trace_id: int) -> bool:
    """Tell whether a trace of this process ended so lately that the store may not have it yet."""
    return otel_trace_id in _ended_traces.copy()


def open_entries() -> list[Entry]:
    """Return the entries of all spans open in this process, in the order they were opened."""
    return list(_open.values())


def forget_all() -> None:
    """In a forked child: forget the parent's spans, without ending one of them.

    A block of the parent's that the child leaves as well finds its span closed, by the fork.
    """
    forget_put_aside()
    for entry in list(_open.values()):
        entry.ended = True
        entry.children = {}
        entry.awaits = None
        if entry.otel is not None:
            _parents_traces.add(entry.otel.context.trace_id)
            _mlflow.let_go_of_span(entry.otel)
        opened = entry.opened() if entry.opened is not None else None
        if opened is not None:
            opened.closed_by = "fork"
        if entry.stand_in is not None:
            entry.stand_in.fall_back()
    _open.clear()
    _claims.clear()


def claim(entry: Entry) -> bool:
    """Win the right to end a span. One thread does; where it was interrupted, it may go on."""
    if entry.ended:
        return False
    here = threading.get_ident()
    if _claims.setdefault(entry.span_id, here) != here:
        return False
    if entry.ended:  # by another thread, just before we claimed it
        _claims.pop(entry.span_id, None)
        return False
    return True


def hand_claim_over(entry: Entry) -> None:
    """Let this thread end a span that another one has closed and left to it."""
    _claims[entry.span_id] = threading.get_ident()


def is_claimed(entry: Entry) -> bool:
    """Tell whether somebody is ending a span."""
    return entry.span_id in _claims


def is_ending_here(entry: Entry) -> bool:
    """Tell whether this very thread has claimed a span, and is in the middle of its end."""
    return not entry.ended and _claims.get(entry.span_id) == threading.get_ident()


# -- closing what was left open ----------------------------------------------------------------


def close_descendants(
    entry: Entry | RemoteParent, *, with_what_outlives: bool = True
) -> list[tuple[OpenSpan, Site]]:
    """End the open descendants, deepest first, as orphaned by this span; report them.

    Args:
        entry: the span above them.
        with_what_outlives: also those that run on, on a strand that is neither this span's nor
            the caller's, and those of instrumentation.
    """
    if with_what_outlives or not entry.children:
        return _close_below(entry, lambda _: True)
    strands = _strands_of(entry)
    return _close_below(entry, lambda below: not outlives(below, strands))


def _close_below(
    entry: Entry | RemoteParent, is_orphan: Callable[[Entry], bool]
) -> list[tuple[OpenSpan, Site]]:
    closed: list[tuple[OpenSpan, Site]] = []
    # Each round takes away all that it looked at; a second finds what was opened meanwhile.
    for _ in range(_MAX_ROUNDS):
        orphans = [below for below in descendants_of(entry) if is_orphan(below)]
        if not orphans:
            break
        label = entry.label
        for orphan in orphans:
            report = close_orphan(orphan, label)
            if report is not None:
                closed.append((report, orphan.site))
            # Normally gone by now. If its end failed, it must not be met again (issue 9, A0).
            _leave_tree(orphan)
    return closed


def _strands_of(entry: Entry | RemoteParent) -> list[Strand]:
    here = current_strand()
    return [here] if isinstance(entry, RemoteParent) else [entry.strand, here]


def descendants_of(entry: Entry | RemoteParent) -> list[Entry]:
    """Return what is open under a span, last opened first: children start after their parents."""
    found = list(entry.children.values())
    for looked_at in found:  # grows while it is walked
        found += looked_at.children.values()
    found.sort(key=_started, reverse=True)
    return found


def is_below(entry: Entry, above: Entry) -> bool:
    """Tell whether a span is a descendant of another one."""
    parent = entry.parent
    while parent is not None and parent is not above:
        parent = parent.parent
    return parent is above


def _started(entry: Entry) -> float:
    return entry.started


def outlives(entry: Entry, ended_by: list[Strand]) -> bool:
    """Tell whether an open span runs on after the end of a span above it on these strands."""
    if entry.strand.is_over:
        return False
    return entry.is_instrumented or not any(map(entry.strand.runs_with, ended_by))


def close_unheard(
    trace_id: str, root: Entry, *, with_what_outlives: bool = True
) -> list[tuple[OpenSpan, Site]]:
    """End what is open in a trace at its root's end and is not in the tree; report it.

    That is: opened before we listened.
    """
    closed: list[tuple[OpenSpan, Site]] = []
    for span in reversed(_mlflow.open_spans_in(trace_id)):
        if span.span_id == root.hex_id:
            continue
        entry = entry_by_id(span.span_id)
        if entry is not None:
            if not with_what_outlives and outlives(entry, _strands_of(root)):
                if entry.parent is None:
                    _adopt(root, entry)
                continue
            report = close_orphan(entry, root.label)
            if report is not None:
                closed.append((report, entry.site))
            continue
        with contained("closing an orphaned span"):
            writing.orphan(span, ORPHANED, opened_at="unknown", orphaned_by=root.label)
            writing.end(span, None)
            report = OpenSpan(span.name, trace_id, span.span_id, "an unknown line", "?", 0.0)
            closed.append((report, root.site))
    return closed


def _close_under_ending_root(root: Entry) -> None:
    """Close what is ours and open under a root that another API is ending at this moment.

    Where MLflow keeps the root back until its children have ended, what runs on may do so;
    where it does not, the trace would be unreadable for good.
    """
    waits, strands = _mlflow.defers_roots(), _strands_of(root)
    closed = _close_below(
        root, lambda e: e.opened is not None and not (waits and outlives(e, strands))
    )
    if closed:
        finding = _left_under(root, [report for report, _ in closed])
        settle([finding], strict=False, raised=None, site=closed[-1][1])


def _left_under(root: Entry, spans: list[OpenSpan]) -> OrphanedSpanError:
    finding = OrphanedSpanError(
        f"Root span {root.label} ended with {len(spans)} open below it: {spans[0]}. Closed as "
        "ERROR, orphaned. End each span where its work ends, or open it with traced_span.",
        span_id=root.hex_id,
        trace_id=spans[0].trace_id,
    )
    finding.spans = spans
    return finding


def close_orphan(
    entry: Entry,
    orphaned_by: str,
    outcome: Outcome = ORPHANED,
    raised: BaseException | None = None,
) -> OpenSpan | None:
    """End one span in its opener's stead. If somebody else is ending it: wait, return None.

    `raised` is the exception that made its opener leave it open, where that is known.
    """
    if entry.awaits is not None:  # closed already, and waiting for others that are over by now
        entry.awaits()
        return None
    if _mlflow.is_being_written(entry.otel):  # by this very thread: waiting would be for ever
        put_aside(lambda: close_orphan(entry, orphaned_by, outcome, raised))
        return None
    if not _take(entry):
        return None
    report = entry.report()
    if all_held_back:
        forget_held_back()
    try:
        if entry.children and entry.parent is None:  # a root ends last, or its trace is lost
            close_descendants(entry)
        entry.orphaned_by = orphaned_by
        opened = entry.opened() if entry.opened is not None else None
        if opened is not None:
            opened.orphaned()
        with contained("closing an orphaned span"):
            live = entry.mlflow_span()
            if live is not None:
                writing.orphan(live, outcome, opened_at=report.opened_at, orphaned_by=orphaned_by)
                if raised is not None:
                    writing.exception(live, raised, ERROR, entry)
                writing.end(live, entry.ender)
    finally:
        make_sure_of_end(entry)
    if all_held_back:
        raise_held_back()
    return report


def make_sure_of_end(entry: Entry) -> None:
    """Let a span be ended and off the registry, whatever became of its full end."""
    otel = entry.otel
    if otel is not None and not _mlflow.has_ended(otel):
        with contained("ending a span that MLflow has dropped"):
            _mlflow.end_bare(otel, None)
    if not entry.ended:
        if is_ending_here(entry):
            if otel is not None and not entry.end_is_told:
                with contained("telling of an end that was interrupted"):
                    entry.end_is_told = True
                    _mlflow.tell_of_end(otel)
        else:
            # Raw code in another thread is ending it in this very moment. Its ancestor must come
            # after it also in MLflow's queue, or MLflow loses the child and with it the trace.
            _await_end(entry)
        note_end(entry)  # or MLflow's own part of the end failed before it came to us


def _take(entry: Entry) -> bool:
    """Win the right to end a span, also from a thread that was interrupted in the middle of it."""
    if claim(entry):
        return True
    _await_end(entry)
    if entry.ended or _mlflow.has_ended(entry.otel):
        return False
    _claims[entry.span_id] = threading.get_ident()
    return True


def note_failure(thread: threading.Thread, raised: BaseException) -> None:
    """Record the exception that ended a thread on the spans that the thread left open."""
    outcome = classify(raised)
    if outcome.status != "ERROR":
        return
    for entry in reversed(open_entries()):
        if entry.strand.thread is thread and not is_claimed(entry):
            live = entry.mlflow_span()
            if live is not None:
                writing.exception(live, raised, outcome, entry)


def _await_end(entry: Entry) -> None:
    deadline = time.monotonic() + _CONCURRENT_END_SECONDS
    while not entry.ended and time.monotonic() < deadline:
        time.sleep(0.0005)
