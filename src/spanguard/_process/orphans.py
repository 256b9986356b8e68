"""Closing what was left open: descendants first, and in their openers' stead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from spanguard._base.findings import contained
from spanguard._base.interrupts import all_held_back, forget_held_back, raise_held_back
from spanguard._base.open_span import OpenSpan
from spanguard._base.site import Site
from spanguard._mlflow import ending, memory
from spanguard._mlflow.spans import has_ended, is_being_written
from spanguard._process.dropped import put_aside
from spanguard._process.registry import (
    Entry,
    RemoteParent,
    adopt,
    claim,
    claims,
    entry_by_id,
    is_claimed,
    is_ending_here,
    leave_tree,
    note_end,
    open_entries,
)
from spanguard._process.strands import Strand, current_strand
from spanguard._record import writing
from spanguard._record.outcome import ERROR, ORPHANED, Outcome, classify

__all__ = [
    "close_below",
    "close_descendants",
    "close_orphan",
    "close_unheard",
    "descendants_of",
    "is_below",
    "make_sure_of_end",
    "note_failure",
    "outlives",
    "strands_of",
]


# How long the end of a span waits for another thread that is ending one of its children.
_CONCURRENT_END_SECONDS = 1.0

# How often an end looks for descendants that were opened while it closed others.
_MAX_ROUNDS = 1_000


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
        return close_below(entry, lambda _: True)
    strands = strands_of(entry)
    return close_below(entry, lambda below: not outlives(below, strands))


def close_below(
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
            leave_tree(orphan)
    return closed


def strands_of(entry: Entry | RemoteParent) -> list[Strand]:
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
    for span in reversed(memory.open_spans_in(trace_id)):
        if span.span_id == root.hex_id:
            continue
        entry = entry_by_id(span.span_id)
        if entry is not None:
            if not with_what_outlives and outlives(entry, strands_of(root)):
                if entry.parent is None:
                    adopt(root, entry)
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
    if is_being_written(entry.otel):  # by this very thread: waiting would be for ever
        put_aside(lambda: close_orphan(entry, orphaned_by, outcome, raised), entry.strand.thread)
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
        handle = entry.handle() if entry.handle is not None else None
        if handle is not None:
            handle.orphaned()
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
    if otel is not None and not has_ended(otel):
        with contained("ending a span that MLflow has dropped"):
            ending.end_bare(otel, None)
    if not entry.ended:
        if is_ending_here(entry):
            if otel is not None and not entry.end_is_told:
                with contained("telling of an end that was interrupted"):
                    entry.end_is_told = True
                    ending.tell_of_end(otel)
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
    if entry.ended or has_ended(entry.otel):
        return False
    claims[entry.span_id] = threading.get_ident()
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
