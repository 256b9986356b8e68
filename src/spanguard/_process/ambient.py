"""The ambient span. One source of truth: the span that MLflow itself sees as active.

What we put there is a stand-in for the span. When the span ends, by whatever API, the stand-in
stands for what was active below it. A context that still holds it (a task that outlived its
request, a thread another one popped for) then falls back to the nearest open ancestor instead
of writing into a finished trace, which MLflow would make unreadable.
"""

from __future__ import annotations

import threading
import weakref
from contextvars import ContextVar
from typing import Any, cast

from spanguard import _mlflow
from spanguard._base.collector import is_collecting
from spanguard._base.settings import context_settings
from spanguard._base.tasks import is_over, may_run_a_task, running_task
from spanguard._mlflow import OtelSpan

__all__ = [
    "LOST_PARENT",
    "Ambient",
    "AmbientMark",
    "BodyContext",
    "Origin",
    "OverlappingAmbient",
    "StandIn",
    "Strand",
    "Work",
    "ambient_span",
    "current_strand",
    "origin_here",
    "other_span",
    "pushed",
]


# The attribute that names a parent which was asked for and could not be had.
LOST_PARENT = "spanguard.lost_parent"


class StandIn:
    """An OpenTelemetry span by delegation: to the span while it is open, to the one below after.

    Not one of wrapt's proxies, which would nest: a chain of ended stand-ins is resolved in a
    loop here, and shortened, however deep it was.
    """

    __slots__ = ("__weakref__", "_further", "_span", "below", "entry", "trace_id")

    def __init__(self, span: OtelSpan, below: Any) -> None:
        self._span: OtelSpan | None = span
        self._further: Any = below  # below, or any open span further down
        self.below: Any = below
        self.entry: Any = None  # of the registry, set by who opened the span
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

    def resolve(self) -> Any:
        """Return the span that this stands for."""
        found: Any = self
        while type(found) is StandIn:
            if found._span is not None:
                return found._span
            found = self._further = found._further
        return found

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore  # isinstance() answers for the span
        return type(self.resolve())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.resolve(), name)


class Ambient:
    """One span made active: entered at its start, left at its end, from any context."""

    __slots__ = ("_before", "stand_in")

    def __init__(self, span: OtelSpan, below: OtelSpan | None = None) -> None:
        self.stand_in = StandIn(span, ambient_span() if below is None else below)
        self._before: _mlflow.ActiveState | None = None

    def enter(self) -> None:
        """Make the span active here."""
        # Two steps, so that an interrupt between them finds what is to be restored.
        if is_collecting():
            return  # opened in a finalizer: no variable may be set here
        self._before = _mlflow.ActiveState()
        self._before.replace(cast(OtelSpan, self.stand_in))

    def leave(self) -> None:
        """Restore what was active before, if this span (or one above it) is active here.

        In a context that never saw the span, or has left it already, nothing changes.
        """
        before = self._before
        if before is None:
            return
        if before.is_next() or _holds(_mlflow.current_otel_span(), self.stand_in):
            before.restore()


class OverlappingAmbient(Ambient):
    """A span made active that may end before one that was made active after it.

    Then the later one stays active here, where leaving a block would take it away as well.
    """

    __slots__ = ()

    def leave(self) -> None:
        """Restore what was active before, unless a span above this one is open."""
        active: Any = _mlflow.current_otel_span()
        while type(active) is StandIn and active is not self.stand_in and active.has_fallen:
            active = active.below
        is_on_top = active is self.stand_in or _is_left_over(active, self.stand_in)
        if is_on_top and self._before is not None:
            self._before.restore()


def _holds(active: Any, wanted: StandIn) -> bool:
    """Tell whether `wanted` is active, or below what is active."""
    while type(active) is StandIn:
        if active is wanted:
            return True
        active = active.below
    return _is_left_over(active, wanted)


def _is_left_over(active: Any, wanted: StandIn) -> bool:
    """Tell whether an ended span of MLflow's fluent API hides the wanted one below it.

    Code that never closed it has left it active; it was an orphan under the wanted span if it is
    in the same trace.
    """
    if _mlflow.has_ended(active):
        context = active.get_span_context()
        return bool(context.trace_id == wanted.trace_id)
    return False


def ambient_span() -> OtelSpan:
    """Return the OpenTelemetry span active here, INVALID_SPAN if none; never an ended stand-in."""
    return _standing(_mlflow.current_otel_span())


def _standing(active: Any) -> OtelSpan:
    while type(active) is StandIn and active.has_fallen:
        active = active.below
    return cast(OtelSpan, active)


def other_span() -> OtelSpan:
    """Return what another API has made active here, below all that we have put there."""
    active: Any = _mlflow.current_otel_span()
    while type(active) is StandIn:
        active = active.below
    return cast(OtelSpan, active)


class AmbientMark:
    """What is ambient at one moment: to tell later whether it still is, and to return to it."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state = _mlflow.active_state()

    def change(self) -> OtelSpan | None:
        """Return what is ambient here and now, where that is not as it should be.

        It should be what it was; or, when that has ended meanwhile, anything that has not.
        """
        before, now = self._before(), ambient_span()
        if now is before or now.get_span_context() == before.get_span_context():
            return None
        return now if _mlflow.has_ended(now) or not _mlflow.has_ended(before) else None

    def restore(self) -> None:
        """Make ambient what was; nothing, if that has ended."""
        if _mlflow.has_ended(self._before()):
            _mlflow.activate(_mlflow.INVALID_SPAN)
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

    def follow(self, root: OtelSpan) -> None:
        """Link a root to the span, and say so in an attribute: not every MLflow has links."""
        self.has_followers = True
        _mlflow.write_plain(root, {LOST_PARENT: f"{self.trace_id}/{self.span_id}"})
        _mlflow.link(root, self.trace_id, self.span_id)


origin_here: ContextVar[Origin | None] = ContextVar("spanguard_origin", default=None)


class Work:
    """A stretch of code that has a strand of its own in the thread or task that runs it.

    A carried call, or the body of a generator, which may go on in another thread at its next
    step. It is over when the call has returned, though the pool's thread lives on.
    """

    __slots__ = ("is_over", "moves", "strand")

    def __init__(self, *, moves: bool = False) -> None:
        self.is_over = False
        self.moves = moves  # it may go on elsewhere, when what runs it now is over
        self.strand: Strand | None = None  # that runs it now

    def begin_step(self) -> Any:
        """Let what runs here from now on be this work's; return what was before."""
        before = _work.get()
        self.strand = Strand()
        _work.set(self)
        return before

    def end_step(self, before: Any, *, is_over: bool) -> None:
        """Let what runs here be what was before."""
        self.is_over = self.is_over or is_over
        if _work.get() is self:
            _work.set(before)


_work: ContextVar[Work | None] = ContextVar("spanguard_work", default=None)


_threads = threading.local()


def current_strand() -> Strand:
    """Return the strand of what runs here. A thread's own code has one and the same."""
    if not may_run_a_task() and _work.get() is None:
        try:
            return cast(Strand, _threads.strand)
        except AttributeError:
            strand = _threads.strand = Strand()
            return strand
    return Strand()


class Strand:
    """A thread or a task: what tells a task from its parent, which shares its thread."""

    __slots__ = ("_task", "thread", "work")

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        task = running_task()
        self._task = weakref.ref(task) if task is not None else None
        work = _work.get()
        # A thread or task that was started in the work has a copy of the context, and is another.
        is_here = work is not None and not work.is_over and work.strand == self
        self.work = work if is_here else None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Strand):
            return False
        if self._task is None or other._task is None:
            return self._task is other._task and self.thread is other.thread
        return self._task == other._task

    __hash__ = None  # type: ignore[assignment]

    def runs_with(self, other: Strand) -> bool:
        """Tell whether the two run one after the other, in the same work."""
        return self.work is other.work and (self.work is not None or self == other)

    @property
    def is_over(self) -> bool:
        """Whether nothing will run on it any more."""
        if self.work is not None and (self.work.is_over or self.work.moves):
            return self.work.is_over
        task = self._task() if self._task is not None else None
        if self._task is not None:
            return task is None or is_over(task)
        return not self.thread.is_alive()


# Whose body runs in this context.
_body_here: ContextVar[BodyContext | None] = ContextVar("spanguard_body", default=None)


class BodyContext:
    """What is ambient inside a generator's body, and how strict it is, kept between its steps.

    Entered for each step and left after it: the consumer never sees the body's spans, whichever
    task or thread takes the next step, and the body finds its own again. One step at a time. The
    body is a strand of its own: it runs on after a span that was open when it began.
    """

    __slots__ = (
        "_body",
        "_body_variables",
        "_consumer",
        "_consumer_variables",
        "work",
    )

    def __init__(self) -> None:
        self._body: _mlflow.ActiveState | None = None
        self._body_variables: tuple[Any, ...] = ()
        self.work = Work(moves=True)

    def __enter__(self) -> None:
        self._consumer = _mlflow.active_state()
        self._consumer_variables = _variables()
        self.work.begin_step()
        if self._body is not None:
            self._body.restore()
            _set_variables(*self._body_variables)
        _body_here.set(self)

    def __exit__(self, *exc_info: object) -> None:
        if _body_here.get() is not self:
            # The collector closes a step that was never finished, in whatever context it runs:
            # what is active there is not the step's to change.
            return
        self._body_variables = _variables()
        self._body = _mlflow.active_state()  # after what goes with it: see __enter__
        self._consumer.restore()
        _set_variables(*self._consumer_variables)


def _variables() -> tuple[Any, tuple[Any, ...], Work | None, BodyContext | None]:
    return pushed.get(), context_settings.get(), _work.get(), _body_here.get()


def _set_variables(
    innermost: Any, settings: tuple[Any, ...], work: Work | None, body: BodyContext | None
) -> None:
    pushed.set(innermost)
    context_settings.set(settings)
    _work.set(work)
    _body_here.set(body)
