"""The ambient span. One source of truth: the span that MLflow itself sees as active.

What we put there is a stand-in for the span. When the span ends, by whatever API, the stand-in
stands for what was active below it. A context that still holds it (a task that outlived its
request, a thread another one popped for) then falls back to the nearest open ancestor instead
of writing into a finished trace, which MLflow would make unreadable.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Protocol, cast

from opentelemetry.trace import INVALID_SPAN
from opentelemetry.trace import Span as OtelSpan

from spanguard._base.collector import is_collecting
from spanguard._mlflow import spans, writing
from spanguard._mlflow.active import (
    ActiveState,
    activate,
    active_state,
    current_otel_span,
    plain_spans,
)
from spanguard._mlflow.own_write import write_plain
from spanguard._mlflow.shapes import MlflowSpan, RecordingSpan

__all__ = [
    "Active",
    "Ambient",
    "AmbientMark",
    "LOST_PARENT",
    "Origin",
    "OverlappingAmbient",
    "StandIn",
    "ambient_span",
    "origin_here",
    "other_span",
    "pushed",
]


# The attribute that names a parent which was asked for and could not be had.
LOST_PARENT = "spanguard.lost_parent"


class Standing(Protocol):
    """What the registry knows of the span that a stand-in stands for (registry.py)."""

    ended: bool

    @property
    def live(self) -> MlflowSpan | None: ...


class StandIn:
    """An OpenTelemetry span by delegation: to the span while it is open, to the one below after.

    Not one of wrapt's proxies, which would nest: a chain of ended stand-ins is resolved in a
    loop here, and shortened, however deep it was.
    """

    __slots__ = ("__weakref__", "_further", "_span", "below", "entry", "trace_id")

    def __init__(self, span: OtelSpan, below: Active) -> None:
        self._span: OtelSpan | None = span
        self._further: Active = below  # below, or any open span further down
        self.below: Active = below
        self.entry: Standing | None = None  # of the registry, set by who opened the span
        self.trace_id = span.get_span_context().trace_id

    def fall_back(self) -> None:
        """Stand for what is below, and let go of the span and its payload."""
        self._span = None
        self.entry = None
        # Let go of the ended ones below, too: where spans overlap instead of nesting, the first
        # to start is the first to end, and a chain of them would grow for ever.
        below = self.below
        while type(below) is StandIn and below.has_fallen:
            below = below.below
        self.below = self._further = below

    @property
    def has_fallen(self) -> bool:
        return self._span is None

    def resolve(self) -> OtelSpan:
        """Return the span that this stands for."""
        found: Active = self
        while type(found) is StandIn:
            if found._span is not None:
                return found._span
            found = self._further = found._further
        return cast("OtelSpan", found)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # pyright: ignore  # isinstance() answers for the span
        return type(self.resolve())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.resolve(), name)


plain_spans.add(StandIn)  # one is never active for what is no span

# What may be active: MLflow knows no difference.
Active = OtelSpan | StandIn


class Ambient:
    """One span made active: entered at its start, left at its end, from any context."""

    __slots__ = ("_before", "stand_in")

    def __init__(self, span: OtelSpan, below: Active | None = None) -> None:
        self.stand_in = StandIn(span, ambient_span() if below is None else below)
        self._before: ActiveState | None = None

    def enter(self) -> None:
        """Make the span active here."""
        # Two steps, so that an interrupt between them finds what is to be restored.
        if is_collecting():
            return  # opened in a finalizer: no variable may be set here
        self._before = ActiveState()
        stand_in: Any = self.stand_in
        self._before.replace(stand_in)

    def leave(self) -> None:
        """Restore what was active before, if this span (or one above it) is active here.

        In a context that never saw the span, or has left it already, nothing changes.
        """
        before = self._before
        if before is None:
            return
        if before.is_next() or _holds(current_otel_span(), self.stand_in):
            before.restore()


class OverlappingAmbient(Ambient):
    """A span made active that may end before one that was made active after it.

    Then the later one stays active here, where leaving a block would take it away as well.
    """

    __slots__ = ()

    def leave(self) -> None:
        """Restore what was active before, unless a span above this one is open."""
        active: Active = current_otel_span()
        while type(active) is StandIn and active is not self.stand_in and active.has_fallen:
            active = active.below
        is_on_top = active is self.stand_in or _is_left_over(active, self.stand_in)
        if is_on_top and self._before is not None:
            self._before.restore()


def _holds(active: Active, wanted: StandIn) -> bool:
    """Tell whether `wanted` is active, or below what is active."""
    while type(active) is StandIn:
        if active is wanted:
            return True
        active = active.below
    return _is_left_over(active, wanted)


def _is_left_over(active: Active, wanted: StandIn) -> bool:
    """Tell whether an ended span of MLflow's fluent API hides the wanted one below it.

    Code that never closed it has left it active; it was an orphan under the wanted span if it is
    in the same trace.
    """
    if spans.has_ended(active):
        context = active.get_span_context()
        return bool(context.trace_id == wanted.trace_id)
    return False


def ambient_span() -> OtelSpan:
    """Return the OpenTelemetry span active here, INVALID_SPAN if none; never an ended stand-in."""
    return _standing(current_otel_span())


def _standing(active: Active) -> OtelSpan:
    while type(active) is StandIn and active.has_fallen:
        active = active.below
    return active  # type: ignore[return-value]


def other_span() -> OtelSpan:
    """Return what another API has made active here, below all that we have put there."""
    active: Active = current_otel_span()
    while type(active) is StandIn:
        active = active.below
    return cast("OtelSpan", active)


class AmbientMark:
    """What is ambient at one moment: to tell later whether it still is, and to return to it."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state = active_state()

    def change(self) -> OtelSpan | None:
        """Return what is ambient here and now, where that is not as it should be.

        It should be what it was; or, when that has ended meanwhile, anything that has not.
        """
        before, now = self._before(), ambient_span()
        if now is before or now.get_span_context() == before.get_span_context():
            return None
        return now if spans.has_ended(now) or not spans.has_ended(before) else None

    def restore(self) -> None:
        """Make ambient what was; nothing, if that has ended."""
        if spans.has_ended(self._before()):
            activate(INVALID_SPAN)
        else:
            self._state.restore()

    def _before(self) -> OtelSpan:
        return _standing(self._state.span)


# The innermost push of all managers in this context (see _api/manager.py). It is here because a
# generator's body has its own, like its ambient span.
pushed: ContextVar[Any] = ContextVar("spanguard_pushed", default=None)


class Origin:
    """The span that work was carried from, whose trace is over: its traces are linked to it."""

    __slots__ = ("has_followers", "span_id", "trace_id")

    def __init__(self, trace_id: str, span_id: str) -> None:
        self.trace_id = trace_id
        self.span_id = span_id
        self.has_followers = False

    def follow(self, root: RecordingSpan) -> None:
        """Link a root to the span, and say so in an attribute: not every MLflow has links."""
        self.has_followers = True
        write_plain(root, {LOST_PARENT: f"{self.trace_id}/{self.span_id}"})
        writing.link(root, self.trace_id, self.span_id)


origin_here: ContextVar[Origin | None] = ContextVar("spanguard_origin", default=None)
