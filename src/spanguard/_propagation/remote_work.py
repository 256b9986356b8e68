"""Work on a trace of another process, or on one that is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

from opentelemetry.trace import INVALID_SPAN
from opentelemetry.trace import Span as OtelSpan

from spanguard._base.findings import contained, settle
from spanguard._base.site import Site
from spanguard._lifecycle.findings import left_behind_finding
from spanguard._mlflow.active import activate
from spanguard._mlflow.remote import hold_remote_trace, release_remote_trace, remote_span
from spanguard._process import exit as _exit
from spanguard._process import orphans
from spanguard._process.ambient import Ambient, Origin, origin_here
from spanguard._process.registry import RemoteParent
from spanguard.exceptions import InvalidParentError, SpanguardError, TraceLostError

__all__ = [
    "Captured",
    "HAND_OVER_SECONDS",
    "LateWork",
    "RemoteWork",
    "hand_over_spans",
    "lost_in_a_file_store",
]


HAND_OVER_SECONDS = 5.0
"""How long work in another process waits for the store to take its spans, at its end."""


class Captured(Protocol):
    """What is read here of a trace context (context.py)."""

    @property
    def trace_id(self) -> str | None: ...
    @property
    def traceparent(self) -> str | None: ...
    @property
    def tracking_uri(self) -> str | None: ...
    @property
    def experiment_id(self) -> str | None: ...
    @property
    def strict(self) -> bool | None: ...

    @property
    def _origin(self) -> str | None: ...
    @property
    def _local(self) -> OtelSpan | None: ...
    @property
    def _is_recorded(self) -> bool: ...
    @property
    def _otel_trace_id(self) -> int: ...
    @property
    def _span(self) -> OtelSpan | None: ...


class RemoteWork:
    """Work under a span that is open in another process."""

    __slots__ = ("_ambient", "_otel_trace_id", "_parent", "_recorded")

    def __init__(self, context: Captured) -> None:
        span = cast("OtelSpan", remote_span(cast("str", context.traceparent)))
        span_context = span.get_span_context()
        self._otel_trace_id: int = span_context.trace_id
        # What was sampled out there is not recorded here: MLflow needs to know nothing of it.
        self._recorded = bool(span_context.trace_flags.sampled)
        if self._recorded:
            _exit.listen()
            hold_remote_trace(
                self._otel_trace_id, cast("str", context.trace_id), context.experiment_id
            )
        self._parent = RemoteParent(span_context.span_id)
        self._ambient = Ambient(span)
        self._ambient.stand_in.entry = self._parent
        self._ambient.enter()

    def leave(self) -> list[SpanguardError]:
        """Close what is left, and stop standing for the span; return what was found."""
        closed = orphans.close_descendants(self._parent)
        self._parent.ended = True
        self._ambient.stand_in.fall_back()
        self._ambient.leave()
        return left_behind_finding(closed)

    def deliver(self, hand_over: Callable[[], object]) -> None:
        """Hand over what was recorded, and let go of the trace."""
        if self._recorded:
            with contained("handing over the spans of another process's trace"):
                hand_over()
            with contained("letting go of another process's trace"):
                release_remote_trace(self._otel_trace_id)


def lost_in_a_file_store() -> TraceLostError:
    return TraceLostError(
        "The spans of work that was carried to this process are lost: a file store takes a trace "
        "as a whole, from the process that began it. Use a database, as in "
        "mlflow.set_tracking_uri('sqlite:///mlflow.db'), or a server in front of one."
    )


class LateWork:
    """Work that begins after the trace it was carried from has ended: in a trace of its own."""

    __slots__ = ("_before", "_origin", "_origin_before", "_site")

    def __init__(self, context: Captured, site: Site) -> None:
        self._site = site
        traceparent = cast("str", context.traceparent)
        self._origin = Origin(cast("str", context.trace_id), traceparent.split("-")[2])
        self._before = activate(INVALID_SPAN)
        self._origin_before = origin_here.get()
        origin_here.set(self._origin)

    def leave(self) -> list[SpanguardError]:
        """Be where one was before; return what is to be told, if spans were recorded."""
        self._before.restore()
        if origin_here.get() is self._origin:
            origin_here.set(self._origin_before)
        if self._origin.has_followers:
            with contained("telling of work that began after its trace had ended"):
                self._tell()
        return []

    def _tell(self) -> None:
        origin = self._origin
        late = InvalidParentError(
            f"Work that was carried from span {origin.span_id} began after its trace "
            f"{origin.trace_id} had ended; it is a trace of its own, with a link to that span. "
            "End the trace after the work that it starts, if it is to be one.",
            span_id=origin.span_id,
            trace_id=origin.trace_id,
        )
        # Never an error: the work cannot know, and the trace is readable.
        settle([late], strict=False, raised=None, site=self._site)


def hand_over_spans() -> None:
    """Give the store what was recorded, in bounded time: the process may be gone right after."""
    with contained("handing over the spans of carried work"):
        _exit.hand_over(HAND_OVER_SECONDS)
