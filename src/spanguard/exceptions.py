"""The broken rules, by name: errors for strict mode, warnings for lenient mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from spanguard._base.open_span import OpenSpan
from spanguard._base.site import Site

__all__ = [
    "DuplicateTraceIdError",
    "DuplicateTraceIdWarning",
    "EmptyTraceStackError",
    "EmptyTraceStackWarning",
    "InvalidParentError",
    "InvalidParentWarning",
    "InvalidSpanArgumentError",
    "InvalidSpanArgumentWarning",
    "OrphanedSpanError",
    "OrphanedSpanWarning",
    "SpanAlreadyEndedError",
    "SpanAlreadyEndedWarning",
    "SpanOpenTooLongWarning",
    "SpanOrderError",
    "SpanOrderWarning",
    "SpanguardError",
    "SpanguardWarning",
    "TraceLostError",
    "TraceLostWarning",
    "UnknownSpanError",
    "UnknownSpanWarning",
]


class SpanguardWarning(UserWarning):
    """Base of every warning spanguard gives in lenient mode: once per function and line.

    A record of warnings (`warnings.catch_warnings(record=True)`, `pytest.warns`) starts afresh.
    """

    _told: object = None  # set by _base/findings.py: of what it is the one warning


class OrphanedSpanWarning(SpanguardWarning):
    """A span was still open when its ancestor ended; the text names the line that opened it."""


class SpanOrderWarning(OrphanedSpanWarning):
    """A span was popped while spans above it on the stack were still open."""


class SpanAlreadyEndedWarning(SpanguardWarning):
    """A span was ended, or written to, after it had ended."""


class UnknownSpanWarning(SpanguardWarning):
    """A span was ended that nobody here opened."""


class InvalidParentWarning(SpanguardWarning):
    """A parent had ended, belongs to another trace, or is unknown."""


class EmptyTraceStackWarning(SpanguardWarning):
    """There was nothing to pop."""


class DuplicateTraceIdWarning(SpanguardWarning):
    """A chosen trace id was already in use."""


class TraceLostWarning(SpanguardWarning):
    """MLflow dropped the trace: evicted from its buffer, or its destination changed."""


class InvalidSpanArgumentWarning(SpanguardWarning):
    """An argument was not usable as given, and was mended."""


class SpanOpenTooLongWarning(SpanguardWarning):
    """A span is open for longer than `watch()` allows. It stays open: there is no error to it."""


class SpanguardError(Exception):
    """Base of every error spanguard raises, and it raises in strict mode only.

    Attributes:
        span_name: the name of the span the rule was broken on, or None.
        span_id: its MLflow span id, or None.
        trace_id: its MLflow trace id, or None.
    """

    warning: ClassVar[type[SpanguardWarning]] = SpanguardWarning
    # The line to blame, where that is not the line that noticed.
    site: Site | None = None

    def __init__(
        self,
        message: str = "",
        *,
        span_name: str | None = None,
        span_id: str | None = None,
        trace_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.span_name = span_name
        self.span_id = span_id
        self.trace_id = trace_id

    def __reduce__(self) -> tuple[object, ...]:
        # A worker's error goes back to who waits for its work; the site is code, and stays.
        state = {name: value for name, value in self.__dict__.items() if name != "site"}
        return type(self), self.args, state


class OrphanedSpanError(SpanguardError):
    """Descendants were still open when a span ended. They are closed and recorded by now.

    Attributes:
        spans: what was left open, deepest first, as `OpenSpan` records.
    """

    warning: ClassVar[type[SpanguardWarning]] = OrphanedSpanWarning
    spans: Sequence[OpenSpan] = ()


class SpanOrderError(OrphanedSpanError):
    """A span was popped that was not on top; what was above it is closed by now."""

    warning = SpanOrderWarning


class SpanAlreadyEndedError(SpanguardError):
    """A span was ended a second time."""

    warning = SpanAlreadyEndedWarning


class UnknownSpanError(SpanguardError):
    """A span was ended that is not known here."""

    warning = UnknownSpanWarning


class InvalidParentError(SpanguardError):
    """A parent span had ended, belongs to another trace, or is unknown."""

    warning = InvalidParentWarning


class EmptyTraceStackError(SpanguardError):
    """`pop_trace` was called with nothing to pop."""

    warning = EmptyTraceStackWarning


class DuplicateTraceIdError(SpanguardError):
    """A chosen trace id is already in use."""

    warning = DuplicateTraceIdWarning


class TraceLostError(SpanguardError):
    """MLflow lost the trace: evicted from its buffer, or the destination changed meanwhile."""

    warning = TraceLostWarning


class InvalidSpanArgumentError(SpanguardError):
    """An argument is not usable. Raised before anything opens."""

    warning = InvalidSpanArgumentWarning
