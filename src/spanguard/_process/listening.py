"""Hearing of every span that starts or ends, whichever API, thread or task does it."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from opentelemetry.sdk.trace import SpanProcessor

from spanguard._base.findings import contained, internal_error, settle
from spanguard._base.open_span import OpenSpan
from spanguard._base.site import Site
from spanguard._mlflow import ending, exporting, fork, keeping, memory, queue, watching
from spanguard._mlflow.active import Context, span_in
from spanguard._mlflow.shapes import RecordingSpan
from spanguard._mlflow.spans import otel_span
from spanguard._process.ambient import StandIn, origin_here
from spanguard._process.dropped import forget_put_aside
from spanguard._process.orphans import close_below, outlives, strands_of
from spanguard._process.registry import (
    ClosedBy,
    Entry,
    RemoteParent,
    adopt,
    claims,
    entry_by_id,
    entry_of,
    note_end,
    open,
    open_entries,
)
from spanguard._record import writing
from spanguard.exceptions import OrphanedSpanError, TraceLostError

__all__ = ["follow", "forget_all", "has_just_ended", "hear_of", "heard", "is_open_trace", "listen"]


# OpenTelemetry trace ids. Of the roots that ended last: more than MLflow's export queue (1000
# tasks) holds on their way to the store. And of what was open in the parent when it forked us.
_ended_traces: deque[int] = deque(maxlen=4_096)
_parents_traces: set[int] = set()


class _Watcher(SpanProcessor):
    """Hears of every start and end. Must not raise: it runs inside MLflow's own start and end."""

    def on_start(self, span: Any, parent_context: Context | None = None) -> None:
        try:
            note_start(span, parent_context)
        except BaseException as error:
            # Ctrl-C, or a fault of ours: a span that we never heard of could never be closed.
            if span.context.span_id not in open:
                with contained("noting a span's start"):
                    note_start(span, parent_context)
            if not isinstance(error, Exception):
                raise
            internal_error("noting a span's start", error)

    def _on_ending(self, span: Any) -> None:
        entry = open.get(span.context.span_id)
        if entry is None:
            return
        is_error = span.status.status_code is ending.OTEL_ERROR
        if is_error or span.parent is None:
            with contained("preparing the end of a span"):
                if is_error and entry.handle is not None:
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


def _note_end_of(span: RecordingSpan) -> None:
    if span.parent is None:
        _ended_traces.append(span.context.trace_id)
        exporting.note_end_of_trace(span.context.trace_id)
    entry = open.get(span.context.span_id)
    if entry is not None:
        note_end(entry)


def note_start(span: RecordingSpan, parent_context: Context | None = None) -> None:
    """Take note of a span that is open from now on."""
    parent = span.parent
    parent_entry: Entry | RemoteParent | None = None
    if parent is not None:
        parent_entry = open.get(parent.span_id)
        if parent_entry is None and parent.is_remote:
            parent_entry = _remote_parent(parent_context)
    span_id = span.context.span_id
    entry = Entry(span, span_id, parent_entry)
    for sites in heard:
        sites[span_id] = entry.site
    open[span_id] = entry
    if parent_entry is not None:
        adopt(parent_entry, entry)
    else:
        _note_start_of_top(span, entry)


def _note_start_of_top(span: RecordingSpan, entry: Entry) -> None:
    """Take note of a root, or of a span whose parent we do not know."""
    parent = span.parent
    if parent is None:
        origin = origin_here.get()
        if origin is not None:
            origin.follow(span)
    if parent is None or parent.is_remote:
        _keep_open_traces(entry)
    else:  # its parent was opened before we listened, or has ended
        trace_id = memory.mlflow_trace_id(span)
        if trace_id is not None:
            hear_of(trace_id)


def _remote_parent(parent_context: Context | None) -> RemoteParent | None:
    """Return what a span of another process is here, where a span is opened right under it."""
    active: object = span_in(parent_context)
    entry = active.entry if type(active) is StandIn else None
    return entry if isinstance(entry, RemoteParent) else None


watcher = _Watcher()

# Where each span was opened, by its id, for as long as a test listens (testing.py).
heard: list[dict[int, Site]] = []


class _Guard(keeping.TraceGuard):
    """Says which traces MLflow must keep in memory: those in which a span of ours is open."""

    def holds(self, span_id: str) -> bool:
        entry = entry_by_id(span_id)
        return entry is not None and entry.handle is not None and entry.handle() is not None

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
    why_not = keeping.keep_open_traces(_guard)
    if why_not is not None:
        finding = TraceLostError(
            f"{why_not}. Its trace would be lost. Leave MLFLOW_TRACE_TIMEOUT_SECONDS unset: then "
            "spanguard keeps what is open; or raise it and MLFLOW_TRACE_BUFFER_MAX_SIZE before "
            "the first span."
        )
        settle([finding], strict=False, raised=None, site=root.site)


def listen() -> bool:
    """Make sure that we hear of what is opened from here on. True when that is new."""
    if not watching.add_processor(watcher):
        return False
    # MLflow has stored what had ended before it replaced its provider.
    _ended_traces.clear()
    return True


_UNHEARD = Site(compile("", "<before spanguard listened>", "exec"), 0)


def hear_of(trace_id: str) -> None:
    """Take note of what is open in a trace that was started before we listened."""
    for span in memory.open_spans_in(trace_id):  # parents first
        otel: Any = otel_span(span)
        entry = entry_of(otel)
        if entry is None:
            _note_late(otel)
        elif entry.parent is None and otel.parent is not None:
            parent = open.get(otel.parent.span_id)
            if parent is not None:
                adopt(parent, entry)


def _note_late(otel: RecordingSpan) -> None:
    span_id = otel.get_span_context().span_id
    parent = open.get(otel.parent.span_id) if otel.parent is not None else None
    entry = Entry(otel, span_id, parent)
    entry.site = _UNHEARD
    entry.started -= (time.time_ns() - otel.start_time) / 1e9
    open[span_id] = entry
    if parent is not None:
        adopt(parent, entry)


def follow() -> None:
    """Hear of every span from here on, also where no span of ours ever opens."""
    watching.follow(watcher)


def is_open_trace(otel_trace_id: int) -> bool:
    """Tell whether a trace has open spans here, or had some in the parent of a forked process."""
    if otel_trace_id in _parents_traces:
        return True
    spans = (entry.otel for entry in open_entries())
    return any(span is not None and span.context.trace_id == otel_trace_id for span in spans)


def has_just_ended(otel_trace_id: int) -> bool:
    """Tell whether a trace of this process ended so lately that the store may not have it yet."""
    return otel_trace_id in _ended_traces.copy()


def forget_all() -> None:
    """In a forked child: forget the parent's spans, without ending one of them.

    A block of the parent's that the child leaves as well finds its span closed, by the fork.
    """
    forget_put_aside()
    for entry in list(open.values()):
        entry.ended = True
        entry.children = {}
        entry.awaits = None
        if entry.otel is not None:
            _parents_traces.add(entry.otel.context.trace_id)
            fork.let_go_of_span(entry.otel)
        handle = entry.handle() if entry.handle is not None else None
        if handle is not None:
            handle.closed_by = ClosedBy.FORK
        if entry.stand_in is not None:
            entry.stand_in.fall_back()
    open.clear()
    claims.clear()


def _close_under_ending_root(root: Entry) -> None:
    """Close what is ours and open under a root that another API is ending at this moment.

    Where MLflow keeps the root back until its children have ended, what runs on may do so;
    where it does not, the trace would be unreadable for good.
    """
    waits, strands = queue.defers_roots(), strands_of(root)
    closed = close_below(
        root, lambda e: e.handle is not None and not (waits and outlives(e, strands))
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
