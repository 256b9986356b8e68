"""What is open in this process, and closing all of it."""

from __future__ import annotations

from spanguard._base.findings import contained, settle
from spanguard._base.open_span import OpenSpan
from spanguard._base.site import user_site
from spanguard._base.values import kind_name, number_of
from spanguard._mlflow import memory, spans
from spanguard._process import listening, orphans, registry
from spanguard._process.dropped import do_put_aside
from spanguard._record.outcome import OK, ORPHANED
from spanguard._record.status import parse_status
from spanguard.exceptions import InvalidSpanArgumentError

__all__ = ["close_all", "close_open_spans", "open_spans"]


def open_spans(older_than: float | None = None) -> list[OpenSpan]:
    """Return the spans that are open in this process, oldest first, whichever API opened them.

    Args:
        older_than: only spans open for longer than this many seconds.

    Spans opened before spanguard was first used in the process are not known to it.

    >>> import spanguard
    >>> spanguard.open_spans()
    []
    """
    do_put_aside(of_all=True)
    reports = [entry.report() for entry in registry.open_entries() if entry.is_open]
    if older_than is None:
        return reports
    seconds = number_of(older_than)
    if seconds is None:
        finding = InvalidSpanArgumentError(
            f"older_than of open_spans() is a {kind_name(older_than)} that is no number; all open "
            "spans were returned. Pass a number of seconds, or None."
        )
        settle([finding], strict=None, raised=None, site=user_site(2))
        return reports
    return [span for span in reports if span.age > seconds]


def close_open_spans(status: str = "ERROR") -> int:
    """End every span that is open in this process, last opened first; return how many.

    In every thread, task and trace, also spans of the raw client and the fluent API. With ERROR
    they get the outcome `orphaned`, with the line that opened them. Meant for the end of a
    worker or a test; a span whose block is left later is not ended again.

    >>> import spanguard
    >>> spanguard.close_open_spans()
    0
    """
    code, _, finding = parse_status(status)
    with contained("looking for spans that were not heard of"):
        _hear_of_all()
    closed = close_all("close_open_spans", is_error=code == "ERROR")
    if finding is not None:
        settle([finding], strict=None, raised=None, site=user_site(2))
    return closed


def close_all(
    orphaned_by: str, *, is_error: bool = True, raised: BaseException | None = None
) -> int:
    """End every open span, last opened first: children start after their parents."""
    do_put_aside(of_all=True)
    outcome = ORPHANED if is_error else OK
    closed = 0
    for entry in reversed(registry.open_entries()):
        if orphans.close_orphan(entry, orphaned_by, outcome, raised) is not None:
            closed += 1
    return closed


def _hear_of_all() -> None:
    """Take note of what was opened before we listened, or whose start was interrupted."""
    for span in memory.all_open_spans():
        if registry.entry_of(spans.otel_span(span)) is None:
            listening.hear_of(span.trace_id)
