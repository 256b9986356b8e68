"""What is told of a span that was not ended as it should have been."""

from __future__ import annotations

from typing import Protocol

from spanguard._base.open_span import OpenSpan
from spanguard._base.site import Site
from spanguard._mlflow.shapes import MlflowSpan
from spanguard.exceptions import OrphanedSpanError, SpanAlreadyEndedError, SpanguardError

__all__ = [
    "abandoned",
    "already_ended_finding",
    "left_behind_finding",
    "left_open_finding",
    "orphans_finding",
]


def abandoned(span: OpenSpan) -> OrphanedSpanError:
    finding = OrphanedSpanError(
        f"Span {span.name!r} ({span.span_id}), opened at {span.opened_at}, was garbage-collected "
        "while open and was closed as abandoned. Use it as a with-block, or keep and close it.",
        span_name=span.name,
        span_id=span.span_id,
        trace_id=span.trace_id,
    )
    finding.spans = [span]
    return finding


def already_ended_finding(
    name: str, span_id: str, trace_id: str, orphaned_by: str | None
) -> SpanAlreadyEndedError:
    """Make a finding of a span that is ended a second time."""
    how = "" if orphaned_by is None else f", closed as an orphan of {orphaned_by}"
    return SpanAlreadyEndedError(
        f"Span {name!r} ({span_id}) had already ended{how}; ending it again did nothing. "
        "End each span once.",
        span_name=name,
        span_id=span_id,
        trace_id=trace_id,
    )


class Ended(Protocol):
    """What is told of a span that has just been ended (handle.py)."""

    @property
    def name(self) -> str: ...
    @property
    def live(self) -> MlflowSpan: ...


def orphans_finding(
    handle: Ended,
    closed: list[tuple[OpenSpan, Site]],
    kind: type[OrphanedSpanError] = OrphanedSpanError,
) -> list[SpanguardError]:
    """Make one finding of the descendants that a span found open at its end."""
    found = f"Span {handle.name!r} ({handle.live.span_id}) ended with {len(closed)} open below it"
    return _orphans(handle, closed, kind, found)


def left_open_finding(
    outermost: Ended, closed: list[tuple[OpenSpan, Site]], found: str
) -> list[SpanguardError]:
    """Make one finding of what a block found open at its end; `found` says which block it was."""
    return _orphans(outermost, closed, OrphanedSpanError, found)


def left_behind_finding(closed: list[tuple[OpenSpan, Site]]) -> list[SpanguardError]:
    """Make one finding of what work for another process left open."""
    found = f"Work carried from another process ended with {len(closed)} open"
    outermost = closed[-1][0] if closed else None
    return _orphans(outermost, closed, OrphanedSpanError, found)


def _orphans(
    about: Ended | OpenSpan | None,
    closed: list[tuple[OpenSpan, Site]],
    kind: type[OrphanedSpanError],
    found: str,
) -> list[SpanguardError]:
    if not closed or about is None:
        return []
    identity = about if isinstance(about, OpenSpan) else about.live
    spans = [span for span, _ in closed]
    listed = "; ".join(str(span) for span in spans[:5])
    more = f"; and {len(spans) - 5} more" if len(spans) > 5 else ""
    finding = kind(
        f"{found}: {listed}{more}. Closed as ERROR, orphaned. End each span where its work ends, "
        "or open it with traced_span.",
        span_name=about.name,
        span_id=identity.span_id,
        trace_id=identity.trace_id,
    )
    finding.spans = spans
    # The warning points at the line that leaked, not at the one that noticed.
    finding.site = closed[-1][1]
    return [finding]
