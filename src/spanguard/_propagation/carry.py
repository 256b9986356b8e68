"""Take a trace elsewhere: to a thread, a task, a process, another machine, and back from headers.

What crosses is a handful of strings. Where the span they name is open in this process, work runs
under that span itself. Elsewhere it runs under a stand-in for it, and what it recorded is handed
to the store before the work's result goes back: a worker may be gone a moment later.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import CodeType, FunctionType, MethodType, TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from spanguard import _mlflow
from spanguard._base.blocks import Block
from spanguard._base.config import StrictSetting, is_strict
from spanguard._base.findings import contained, settle
from spanguard._base.site import Site, user_site
from spanguard._base.tasks import Aside, in_event_loop
from spanguard._base.values import is_mapping, is_the_users, items_of, text_of
from spanguard._lifecycle.handle import left_behind_finding
from spanguard._mlflow import store
from spanguard._process import exit as _exit
from spanguard._process import registry as _registry
from spanguard._process.ambient import Ambient, Origin, Work, ambient_span, origin_here
from spanguard._process.dropped import is_put_aside
from spanguard._process.registry import RemoteParent
from spanguard._propagation.generators import Recorder, TracedAsyncGenerator, TracedGenerator
from spanguard._propagation.pickling import ray_asking
from spanguard._record.outcome import Outcome
from spanguard.exceptions import (
    InvalidParentError,
    InvalidSpanArgumentError,
    SpanguardError,
    TraceLostError,
)

__all__ = ["Attachment", "TraceContext", "capture", "carry"]

P = ParamSpec("P")
R = TypeVar("R")

HAND_OVER_SECONDS = 5.0
"""How long work in another process waits for the store to take its spans, at its end."""

TRACEPARENT = "traceparent"


# -- whether a context comes from this very process ------------------------------------------------

_process_token = uuid.uuid4().hex  # a pid may be the same in the next container


def _renew_in_child() -> None:
    global _destination, _jobs, _process_token
    _process_token = uuid.uuid4().hex
    _destination, _jobs = threading.Condition(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_in_child)


# -- the value that travels ------------------------------------------------------------------------


class TraceContext:
    """A place in a trace, and where traces go: small, immutable, picklable, nothing but strings.

    Falsy where there is no span to nest under. Attaching it then changes nothing but what the
    other fields say.

    Attributes:
        trace_id: the MLflow trace id of the span to nest under, or None.
        traceparent: that span by W3C's `traceparent` header, or None.
        tracking_uri: where the traces of the process it was captured in go, or None.
        experiment_id: the experiment, or None for the default one.
        strict: whether strict mode was on, or None if that is not known.

    >>> import pickle, spanguard
    >>> with spanguard.traced_span("job") as job:
    ...     context = pickle.loads(pickle.dumps(spanguard.capture()))
    >>> context.trace_id == job.trace_id
    True
    """

    __slots__ = (
        "_local",
        "_origin",
        "experiment_id",
        "strict",
        "trace_id",
        "traceparent",
        "tracking_uri",
    )

    trace_id: str | None
    traceparent: str | None
    tracking_uri: str | None
    experiment_id: str | None
    strict: bool | None
    _origin: str | None
    _local: Any

    def __init__(
        self,
        trace_id: str | None = None,
        traceparent: str | None = None,
        tracking_uri: str | None = None,
        experiment_id: str | None = None,
        strict: bool | None = None,
        _origin: str | None = None,
        _local: Any = None,
    ) -> None:
        fields = (trace_id, traceparent, tracking_uri, experiment_id, strict, _origin, _local)
        for name, value in zip(_FIELDS, fields, strict=True):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"TraceContext is immutable; {name} was not set.")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"TraceContext is immutable; {name} was not deleted.")

    def __reduce__(self) -> Any:
        # Without the span itself: what crosses is strings.
        return TraceContext, self._strings()

    def _strings(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in _FIELDS[:-1])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TraceContext):
            return NotImplemented
        return self._strings() == other._strings()

    def __hash__(self) -> int:
        return hash(self._strings())

    def __bool__(self) -> bool:
        return self.traceparent is not None

    @property
    def _span(self) -> Any:
        """OpenTelemetry's stand-in for the span; None where there is none."""
        return None if self.traceparent is None else _mlflow.remote_span(self.traceparent)

    @property
    def _otel_trace_id(self) -> int:
        return int(self.traceparent.split("-")[1], 16) if self.traceparent is not None else 0

    @property
    def _is_recorded(self) -> bool:
        """Whether the span is one that MLflow records: it was not sampled out."""
        if self.traceparent is None or self.trace_id is None:
            return False
        return bool(int(self.traceparent.split("-")[3], 16) & 1)

    def __repr__(self) -> str:
        return f"TraceContext(trace_id={self.trace_id!r}, traceparent={self.traceparent!r})"

    def attach(self) -> Attachment:
        """Run a with-block under the captured span, whatever thread or process this is.

        In a process that the span is not open in, the block's spans belong to its trace all the
        same, and traces go where they went there. At the block's end what was opened in it and
        left open is closed as an orphan, and the spans are handed to the store, which takes 5
        seconds at most. With `async with` other tasks run on meanwhile. Good for one block:
        entering it again raises `RuntimeError`.

        Work that begins after its trace has ended is a trace of its own, here and in other
        processes, which ask the store: its root has a link to the span it comes from, and the
        attribute `spanguard.lost_parent`; a warning tells it once. A context that was read from
        headers continues its trace whatever has become of that.

        >>> import threading, spanguard
        >>> with spanguard.traced_span("job") as job:
        ...     context = spanguard.capture()
        ...     def work():
        ...         with context.attach(), spanguard.traced_span("step") as step:
        ...             print(step.parent_id == job.span_id)
        ...     thread = threading.Thread(target=work)
        ...     thread.start()
        ...     thread.join()
        True
        """
        return Attachment(self)

    def to_headers(self) -> dict[str, str]:
        """Return the HTTP headers that continue the trace in another service.

        By W3C Trace Context: `traceparent`. Empty where there is no span to nest under.

        >>> import spanguard
        >>> with spanguard.traced_span("call"):
        ...     list(spanguard.capture().to_headers())
        ['traceparent']
        """
        return {TRACEPARENT: self.traceparent} if self.traceparent is not None else {}

    @classmethod
    def from_headers(cls, headers: Mapping[Any, Any] | Iterable[tuple[Any, Any]]) -> TraceContext:
        """Read W3C Trace Context from the headers of a request, names in any case.

        Never raises. Without the header, or with junk in it, the context is empty (falsy), and
        attaching it starts no foreign trace; junk warns once per calling line.

        >>> import spanguard
        >>> header = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        >>> spanguard.TraceContext.from_headers({"Traceparent": header}).trace_id
        'tr-0af7651916cd43dd8448eb211c80319c'
        """
        with contained("reading trace headers"):
            given = _header(headers)
            if given is None:
                return cls()
            span = _mlflow.remote_span(given)
            if span is not None:
                otel_id = span.get_span_context().trace_id
                return cls(_mlflow.mlflow_trace_id_of(otel_id), _mlflow.traceparent_of(span))
            junk = InvalidSpanArgumentError(
                "The header 'traceparent' is not of the form that W3C Trace Context asks for; it "
                "was ignored. Check what sends the request."
            )
            # Never an error: what a stranger sends must not raise in a service.
            settle([junk], strict=False, raised=None, site=user_site(2))
        return cls()


_FIELDS = (
    "trace_id",
    "traceparent",
    "tracking_uri",
    "experiment_id",
    "strict",
    "_origin",
    "_local",
)


_MAX_HEADERS = 10_000


def _header(headers: Any) -> str | None:
    """Return the header, if that is what it is looked for in: a mapping, or pairs."""
    try:
        pairs = headers.items() if is_mapping(headers) else headers
        for name, value in items_of(pairs, _MAX_HEADERS):
            if _text(name).lower() == TRACEPARENT:
                return _text(value)
    except BaseException as error:
        if is_the_users(error):
            raise
    return None


def _text(value: Any) -> str:
    return value.decode("latin-1") if type(value) is bytes else text_of(value) or ""


def capture() -> TraceContext:
    """Take down the ambient span, the destination of traces and strictness, to use elsewhere.

    The value pickles, and holds nothing but strings. Never raises; without an ambient span it is
    empty (falsy) and still takes along where traces go.

    >>> import spanguard
    >>> bool(spanguard.capture())
    False
    """
    with contained("capturing the trace context"):
        active = ambient_span()
        uri = _mlflow.tracking_uri()
        experiment_id = _mlflow.active_experiment_id()
        if not active.get_span_context().is_valid:
            return TraceContext(None, None, uri, experiment_id, is_strict(), _process_token)
        trace_id = _mlflow.mlflow_trace_id(active)
        return TraceContext(
            trace_id,
            _mlflow.traceparent_of(active),
            uri,
            (_mlflow.experiment_of(trace_id) if trace_id else None) or experiment_id,
            is_strict(),
            _process_token,
            active,
        )
    return TraceContext()


# -- being elsewhere -------------------------------------------------------------------------------


class Attachment(Block[None]):
    """The with-block of `TraceContext.attach`. Good for one block.

    `async with` waits for the store in a thread, and blocks no other task.

    Args:
        context: where to be.
        hand_over: how to hand over what was recorded; by default the store is waited for.
        about: the function that the block runs, if it is one: warnings name it.
    """

    __slots__ = (
        "_about",
        "_before",
        "_context",
        "_hand_over",
        "_has_destination",
        "_is_entered",
        "_late",
        "_remote",
        "_strict",
        "_waits",
        "_work",
        "_work_before",
    )

    def __init__(
        self,
        context: TraceContext,
        *,
        hand_over: Callable[[], object] | None = None,
        about: Callable[..., Any] | None = None,
    ) -> None:
        self._context = context
        self._hand_over = hand_over or _hand_over
        self._waits = hand_over is None
        self._about = about
        self._is_entered = False
        self._has_destination = False
        self._strict: StrictSetting | None = None
        self._before: _mlflow.ActiveState | None = None
        self._remote: _RemoteWork | None = None
        self._work = Work()
        self._late: _LateWork | None = None

    def __del__(self) -> None:
        work = getattr(self, "_work", None)
        if work is not None:
            work.is_over = True  # entered and dropped: what it left open is nobody's any more

    def __enter__(self) -> None:
        self._begin()
        arrival = _Arrival(self._context)
        if arrival.takes_time:
            asks = self._waits and not in_event_loop()
            arrival.run(may_wait=_may_wait(), asks=asks)
        else:
            arrival.run()
        self._attach(arrival)

    async def __aenter__(self) -> None:
        self._begin()
        arrival = _Arrival(self._context)
        if not arrival.takes_time:
            arrival.run()
        else:
            may_wait = not ambient_span().get_span_context().is_valid
            try:
                await Aside(lambda: arrival.run(may_wait=may_wait, asks=self._waits)).done()
            except BaseException:
                arrival.give_up()
                raise
        self._attach(arrival)

    def _begin(self) -> None:
        if self._is_entered:
            raise RuntimeError(
                "This attachment has been entered before. Make a new one for each block: "
                "with context.attach()."
            )
        self._is_entered = True

    def _attach(self, arrival: _Arrival) -> None:
        context = self._context
        self._has_destination = arrival.has_destination
        if arrival.finding is not None:
            settle([arrival.finding], strict=False, raised=None, site=self._site())
        self._work_before = self._work.begin_step()
        if context.strict is not None:
            self._strict = StrictSetting(context.strict)
            self._strict.__enter__()
        with contained("attaching a trace context"):
            if arrival.is_late:
                self._late = _LateWork(context, self._site())
            elif arrival.here is not None:
                self._before = _mlflow.activate(arrival.here)
            elif context.traceparent is not None and context.trace_id is not None:
                self._remote = _RemoteWork(context)

    def _site(self) -> Site:
        site = None if self._about is None else _site_of(self._about)
        return site or user_site(3)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        strand = self._work.strand
        thread = strand.thread if strand is not None else None
        if is_put_aside(lambda: self.__exit__(exc_type, exc, None), thread):
            return
        findings = self.leave()
        try:
            if self.has_more_to_do:
                self.deliver()
        finally:
            self.tell(findings, exc)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        findings = self.leave()
        try:
            if self.has_more_to_do:
                await Aside(self.deliver).done()
        finally:
            self.tell(findings, exc)

    def leave(self) -> list[SpanguardError]:
        """Stop being elsewhere, close what was left open; return what was found wrong."""
        before, self._before = self._before, None
        findings: list[SpanguardError] = []
        with contained("leaving an attached trace context"):
            if before is not None:
                before.restore()
            if self._late is not None:
                findings += self._late.leave()
            if self._remote is not None:
                findings += self._remote.leave()
        if self._is_entered:
            # The work is over, though the pool's thread lives on.
            self._work.end_step(self._work_before, is_over=True)
        return findings

    @property
    def has_more_to_do(self) -> bool:
        """Whether there is something to deliver, which may wait for the store."""
        return self._remote is not None or self._has_destination or self._is_for_elsewhere

    @property
    def _is_for_elsewhere(self) -> bool:
        return self._is_entered and self._context._origin not in (None, _process_token)

    def deliver(self) -> None:
        """Hand over what was recorded for elsewhere, in any thread."""
        remote, self._remote = self._remote, None
        try:
            if remote is not None:
                remote.deliver(self._hand_over)
                if _mlflow.takes_whole_traces_only:
                    # Never an error: nothing is wrong with the work.
                    lost = [_lost_in_a_file_store()]
                    settle(lost, strict=False, raised=None, site=self._site())
            elif self._is_for_elsewhere:
                _hand_over()
        finally:
            if self._has_destination:
                self._has_destination = False
                _leave_destination()

    def tell(self, findings: list[SpanguardError], raised: BaseException | None) -> None:
        """Raise or warn of what was found, by the strictness that was attached."""
        strict = is_strict()
        if self._strict is not None:
            self._strict.__exit__(None, None, None)
            self._strict = None
        if findings:
            settle(findings, strict=strict, raised=raised, site=user_site(2))


class _Arrival:
    """What is to be found out before work begins: it may have to wait, for others or the store."""

    __slots__ = (
        "_context",
        "_is_done",
        "_is_given_up",
        "_lock",
        "finding",
        "has_destination",
        "here",
        "is_late",
    )

    def __init__(self, context: TraceContext) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._is_done = self._is_given_up = False
        self.has_destination = False
        self.finding: TraceLostError | None = None
        self.here: Any = None  # what is to be active
        self.is_late = False  # the trace is over

    @property
    def takes_time(self) -> bool:
        """Whether it may have to wait."""
        return self._context._origin not in (None, _process_token)

    def run(self, *, may_wait: bool = False, asks: bool = False) -> None:
        """Find out; `asks`: also of the store, whether a trace of another process is over."""
        with contained("finding the place of carried work"):
            if self._context._origin == _process_token:
                self._find_here()
            else:
                self._find_from_elsewhere(may_wait, asks)
        with self._lock:
            self._is_done = True
            if self._is_given_up:
                self._undo()

    def give_up(self) -> None:
        """Take back what was found, now or as soon as it is."""
        with self._lock:
            self._is_given_up = True
            if self._is_done:
                self._undo()

    def _undo(self) -> None:
        if self.has_destination:
            self.has_destination = False
            _leave_destination()

    def _find_here(self) -> None:
        context = self._context
        self.here = _standing_span(context) or _open_span(context)
        if self.here is None:
            self.is_late = context._is_recorded
            # Without a span there, none here either; of what was sampled out, nothing.
            self.here = context._local or context._span or _mlflow.INVALID_SPAN

    def _find_from_elsewhere(self, may_wait: bool, asks: bool) -> None:
        context = self._context
        self.here = _open_span(context)  # of a service that calls itself
        if self.here is not None:
            return
        if context.tracking_uri is not None:
            self.finding = _take_destination(context, may_wait)
            self.has_destination = self.finding is None
        # What headers name is continued, as W3C has it: another service is still at work.
        if context._is_recorded and context._origin is not None:
            self.is_late = _is_over(context, asks)


def _is_over(context: TraceContext, asks: bool) -> bool:
    """Tell whether the trace of another process is over, as far as that is known here."""
    if _registry.has_just_ended(context._otel_trace_id):
        return True
    if not asks:
        return False
    _exit.listen()  # MLflow opens the store with its first span, which may take longer
    trace_id = cast(str, context.trace_id)
    looking = "looking up the trace that work was carried from"
    return bool(store.ask(looking, lambda: _mlflow.has_ended_in_store(trace_id)))


def _standing_span(context: TraceContext) -> Any:
    """Return the captured span itself, or what stands for it, while it is open in its trace."""
    active = context._local
    if active is None or _mlflow.has_ended(active):
        return None
    span_context = active.get_span_context()
    return active if span_context.trace_id == context._otel_trace_id else None


def _open_span(context: TraceContext) -> Any:
    """Return what is open here of the span that a context names: itself, or its trace's root."""
    if context.traceparent is None or context.trace_id is None:
        return None
    entry = _registry.entry_by_id(context.traceparent.split("-")[2])
    if entry is not None and entry.otel is not None:
        in_trace = _mlflow.mlflow_trace_id(entry.otel) == context.trace_id
        if in_trace:
            return entry.stand_in or entry.otel
    root = _mlflow.root_span(context.trace_id)
    if root is None or root.end_time_ns is not None:
        return None
    return _mlflow.otel_span(root)


# MLflow has one tracking URI for all threads, and names a new one before it has let go of the old
# provider: jobs from processes with different ones take turns.
_destination = threading.Condition()
_jobs = 0  # that count on the URI as it is


def _take_destination(context: TraceContext, may_wait: bool) -> TraceLostError | None:
    """Send traces where they go in the process that a context comes from, until it is left.

    Jobs for another store are waited for, where that may be, 5 seconds at most. A finding, where
    traces go on to another store: a change of the URI would lose every trace that is open here.
    """
    global _jobs
    uri = cast(str, context.tracking_uri)
    with _destination:
        if may_wait:
            _destination.wait_for(
                lambda: not _jobs or _mlflow.tracking_uri() == uri, HAND_OVER_SECONDS
            )
        if _mlflow.tracking_uri() == uri or not (_jobs or _registry.open_entries()):
            _mlflow.adopt_destination(uri, context.experiment_id)
            _jobs += 1
            return None
    return TraceLostError(
        "A carried call comes from a process with another tracking URI, and spans of this "
        "process are open: its spans go to this process's own store. Give both processes the "
        "same tracking URI.",
        trace_id=context.trace_id,
    )


def _leave_destination() -> None:
    global _jobs
    with _destination:
        _jobs -= 1
        _destination.notify_all()


def _may_wait() -> bool:
    """Tell whether the jobs that would be waited for can go on meanwhile."""
    return not in_event_loop() and not ambient_span().get_span_context().is_valid


class _RemoteWork:
    """Work under a span that is open in another process."""

    __slots__ = ("_ambient", "_otel_trace_id", "_parent", "_recorded")

    def __init__(self, context: TraceContext) -> None:
        span = cast(Any, _mlflow.remote_span(cast(str, context.traceparent)))
        span_context = span.get_span_context()
        self._otel_trace_id: int = span_context.trace_id
        # What was sampled out there is not recorded here: MLflow needs to know nothing of it.
        self._recorded = bool(span_context.trace_flags.sampled)
        if self._recorded:
            _exit.listen()
            _mlflow.hold_remote_trace(
                self._otel_trace_id, cast(str, context.trace_id), context.experiment_id
            )
        self._parent = RemoteParent(span_context.span_id)
        self._ambient = Ambient(span)
        self._ambient.stand_in.entry = self._parent
        self._ambient.enter()

    def leave(self) -> list[SpanguardError]:
        """Close what is left, and stop standing for the span; return what was found."""
        closed = _registry.close_descendants(self._parent)
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
                _mlflow.release_remote_trace(self._otel_trace_id)


def _lost_in_a_file_store() -> TraceLostError:
    return TraceLostError(
        "The spans of work that was carried to this process are lost: a file store takes a trace "
        "as a whole, from the process that began it. Use a database, as in "
        "mlflow.set_tracking_uri('sqlite:///mlflow.db'), or a server in front of one."
    )


class _LateWork:
    """Work that begins after the trace it was carried from has ended: in a trace of its own."""

    __slots__ = ("_before", "_origin", "_origin_before", "_site")

    def __init__(self, context: TraceContext, site: Site) -> None:
        self._site = site
        traceparent = cast(str, context.traceparent)
        self._origin = Origin(cast(str, context.trace_id), traceparent.split("-")[2])
        self._before = _mlflow.activate(_mlflow.INVALID_SPAN)
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


def _hand_over() -> None:
    """Give the store what was recorded, in bounded time: the process may be gone right after."""
    with contained("handing over the spans of carried work"):
        _exit.hand_over(HAND_OVER_SECONDS)


# -- the callable that travels ---------------------------------------------------------------------


class Carried:
    """A function that runs under the span it was carried from. Pickles where the function does.

    It has the function's looks, but no name that it could be found by: what is found is the
    function (issue 9, 37).
    """

    def __init__(self, function: Callable[..., Any], context: TraceContext) -> None:
        if isinstance(function, Carried):
            # weakref.WeakMethod makes a method again by its type, of a function and an object.
            carried: Any = function
            function, context = MethodType(carried._function, context), carried._context
        functools.update_wrapper(self, function, updated=())
        self.__qualname__ = f"carry.<locals>.{getattr(function, '__qualname__', '?')}"
        self._function = function
        self._context = context

    def _attachment(self) -> Attachment:
        return Attachment(self._context, about=self._function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._attachment():
            return self._function(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _carried, (self._function, self._context)

    def __copy__(self) -> Carried:
        return self._over(copy.copy(self._function))

    def __deepcopy__(self, memo: dict[int, Any]) -> Carried:
        return self._over(copy.deepcopy(self._function, memo))

    def _over(self, function: Any) -> Carried:
        return self if function is self._function else type(self)(function, self._context)

    @property
    def __func__(self) -> Any:
        """Of a bound method: its function, carried. It is kept: WeakMethod has a weak reference."""
        try:
            return vars(self)["_carried_function"]
        except KeyError:
            function: Any = self._function
            self._carried_function = type(self)(function.__func__, self._context)
            return self._carried_function

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore
        # Ray takes functions only. Of others that ask, RQ would keep a function's name.
        is_function = isinstance(self._function, FunctionType) and ray_asking()
        return FunctionType if is_function else type(self)

    def __getattr__(self, name: str) -> Any:
        # What inspect and frameworks look at: __code__, __defaults__, attributes of the user's.
        if name in ("_function", "_context"):  # before __init__, as in copying
            raise AttributeError(name)
        found = getattr(self._function, name)
        if not name.startswith("_"):
            with contained("looking at an attribute of a carried function"):
                self._look_at(name, found)
        return found

    def _look_at(self, name: str, found: Any) -> None:
        """Tell once of a method that would run the function without what is carried.

        `carry(task).delay(x)` of Celery sends the task's name.
        """
        runs = inspect.ismethod(found) and found.__self__ is self._function
        if not (runs or (name in _SENDERS and callable(found))):
            return
        bare = InvalidSpanArgumentError(
            f"{name}() of carry({_name_of(self._function)}) is the function's own: what it runs is "
            "not under the span that was carried. Pass capture().to_headers() as an argument, "
            "and run the work in TraceContext.from_headers(headers).attach()."
        )
        # Never an error: to look at an attribute is no harm.
        settle([bare], strict=False, raised=None, site=user_site(3))

    def __repr__(self) -> str:
        return f"<carried {self._function!r}>"


_SENDERS = frozenset({"apply_async", "delay", "enqueue", "remote", "send"})
"""What engines put on functions, to send them by name."""


def _name_of(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _carried(function: Callable[..., Any], context: TraceContext) -> Carried:
    return _kind_of(function)(function, context)


class CarriedCoroutineFunction(Carried):
    """The same for coroutine functions: the span is ambient while the coroutine runs."""

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        async with self._attachment():
            return await cast("Awaitable[Any]", self._function(*args, **kwargs))


class CarriedGeneratorFunction(Carried):
    """The same for generator functions: the span is ambient while the body runs, step by step."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = Recorder(lambda: _AttachedBody(self._attachment()))
        return TracedGenerator(self._function(*args, **kwargs), recorder)


class CarriedAsyncGeneratorFunction(Carried):
    """The same for async generator functions."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        body = _AttachedAsyncBody(self._attachment())
        return _CarriedAsyncGenerator(self._function(*args, **kwargs), body)


class _AttachedBody:
    """A generator's body under an attached context: what the drive opens in place of a span."""

    __slots__ = ("_attachment",)

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        attachment.__enter__()

    def finish(self, raised: BaseException | None) -> None:
        self._attachment.__exit__(None if raised is None else type(raised), raised, None)

    def finish_as(self, outcome: Outcome) -> None:
        self.finish(None)


class _AttachedAsyncBody:
    """The same for an async generator, which must not wait for the store where it ends."""

    __slots__ = ("_attachment", "_delivery")

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._delivery: Aside | None = None

    def open(self) -> _AttachedAsyncBody:
        self._attachment.__enter__()
        return self

    def finish(self, raised: BaseException | None) -> None:
        findings = self._attachment.leave()
        if self._attachment.has_more_to_do:
            self._delivery = Aside(self._attachment.deliver)
        self._attachment.tell(findings, raised)

    def finish_as(self, outcome: Outcome) -> None:
        self.finish(None)

    async def delivered(self) -> None:
        """Wait for the store, where the body has ended."""
        delivery, self._delivery = self._delivery, None
        if delivery is not None:
            await delivery.done()


class _CarriedAsyncGenerator(TracedAsyncGenerator):
    """An async generator that waits for the store, at its end, as its last step does."""

    def __init__(self, generator: Any, body: _AttachedAsyncBody) -> None:
        super().__init__(generator, Recorder(body.open))
        self._self_body = body

    async def _self_step(self, step: Callable[..., Any], *args: Any) -> Any:
        try:
            return await super()._self_step(step, *args)
        finally:
            await self._self_body.delivered()

    async def aclose(self) -> None:
        try:
            await super().aclose()
        finally:
            await self._self_body.delivered()


def _site_of(function: Any) -> Site | None:
    """Return the `def` line of a function, as there may be no frame of the user's to name."""
    while isinstance(function, functools.partial):
        function = function.func
    for candidate in (inspect.unwrap(function), inspect.unwrap(type(function).__call__)):
        code = getattr(candidate, "__code__", None)
        if isinstance(code, CodeType):
            return Site(code, code.co_firstlineno)
    return None


def carry(fn: Callable[P, R]) -> Callable[P, R]:
    """Return a callable that runs `fn` elsewhere under the span that is current now.

    One form for every engine: `pool.submit(carry(work), x)`, `dask_client.submit(carry(work),
    x)`, a thread's target, `run_in_executor`, `multiprocessing`, joblib. It pickles wherever
    `fn` does. Coroutine functions stay coroutine functions. The body of a generator runs under the
    span step by step, and what consumes it does not. What it takes along is strings: the span's
    ids, the tracking URI, the experiment, strictness; the worker needs no set-up.

    Engines that store a function by its name (Celery's tasks, APScheduler's persistent stores)
    would run it without what is carried, so what this returns has no name to be found by, and
    `carry(task).delay(x)` warns. Pass them `capture().to_headers()` as an argument, and run the
    work in `TraceContext.from_headers(headers).attach()`.

    It opens no span itself: spans that `fn` opens, by whichever API, nest under the captured
    one. In another process they are in the store before `fn`'s result goes back, which waits for
    the store 5 seconds at most. What `fn` leaves open there is closed as an orphan, with a
    warning, or in strict mode `OrphanedSpanError`. Results and exceptions pass through unchanged.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> import spanguard
    >>> @spanguard.traced
    ... def work(x):
    ...     return 2 * x
    >>> with spanguard.traced_span("job"), ThreadPoolExecutor() as pool:
    ...     list(pool.map(spanguard.carry(work), [1, 2]))
    [2, 4]

    Raises:
        TypeError: `fn` is not callable.
    """
    if not callable(fn):
        raise TypeError(f"carry() takes a callable, not a {type(fn).__name__}.")
    return cast("Callable[P, R]", _kind_of(fn)(fn, capture()))


def _kind_of(fn: Any) -> type[Carried]:
    function = inspect.unwrap(fn) if not isinstance(fn, functools.partial) else fn
    for is_kind, kind in _KINDS:
        if is_kind(function) or is_kind(inspect.getattr_static(type(function), "__call__", None)):
            return kind
    return Carried


_KINDS: tuple[tuple[Callable[[Any], bool], type[Carried]], ...] = (
    (inspect.iscoroutinefunction, CarriedCoroutineFunction),
    (inspect.isgeneratorfunction, CarriedGeneratorFunction),
    (inspect.isasyncgenfunction, CarriedAsyncGeneratorFunction),
)

# As Python names what cannot be found by name. Engines that store a callable object by its class's
# name refuse these, and by a function's name they would run it without what is carried.
_all_kinds: list[type[Carried]] = [Carried, *(kind for _, kind in _KINDS)]
for _kind in _all_kinds:
    _kind.__qualname__ = f"carry.<locals>.{_kind.__name__}"
