"""Take a trace elsewhere: to a thread, a task, a process, another machine, and back from headers.

What crosses is a handful of strings. Where the span they name is open in this process, work runs
under that span itself. Elsewhere it runs under a stand-in for it, and what it recorded is handed
to the store before the work's result goes back: a worker may be gone a moment later.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextvars import Token
from types import FunctionType, TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from spanguard import _exit, _mlflow, _registry
from spanguard._block import Block
from spanguard._config import is_strict, strict_as_before, strict_here
from spanguard._context import Ambient, Work, ambient_span
from spanguard._findings import contained, settle
from spanguard._generators import Recorder, TracedAsyncGenerator, TracedGenerator
from spanguard._opened import left_behind_finding
from spanguard._outcome import Outcome
from spanguard._pickling import cloudpickle_asking
from spanguard._registry import RemoteParent
from spanguard._site import user_site
from spanguard.exceptions import InvalidSpanArgumentError, TraceLostError

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

    def __repr__(self) -> str:
        return f"TraceContext(trace_id={self.trace_id!r}, traceparent={self.traceparent!r})"

    def attach(self) -> Attachment:
        """Run a with-block under the captured span, whatever thread or process this is.

        In a process that the span is not open in, the block's spans belong to its trace all the
        same, and traces go where they went there. At the block's end what was opened in it and
        left open is closed as an orphan, and the spans are handed to the store, which takes 5
        seconds at most. Works with `async with` too. If the trace is over in this very process,
        the block's spans start a trace of their own: a finished trace is not written to.

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


def _header(headers: Any) -> str | None:
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    for name, value in pairs or ():
        if _text(name).lower() == TRACEPARENT:
            return _text(value)
    return None


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


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
    """The with-block of `TraceContext.attach`. Good for one block."""

    __slots__ = (
        "_before",
        "_context",
        "_hand_over",
        "_has_destination",
        "_remote",
        "_strict",
        "_work",
        "_work_before",
    )

    def __init__(
        self, context: TraceContext, *, hand_over: Callable[[], object] | None = None
    ) -> None:
        self._context = context
        self._hand_over = hand_over or _hand_over
        self._has_destination = False
        self._strict: Token[bool | None] | None = None
        self._before: _mlflow.ActiveState | None = None
        self._remote: _RemoteWork | None = None
        self._work = Work()

    def __enter__(self) -> None:
        context = self._context
        self._work_before = self._work.begin_step()
        if context.strict is not None:
            self._strict = strict_here(context.strict)
        with contained("attaching a trace context"):
            if context._origin == _process_token:
                self._attach_here(context)
            else:
                self._attach_from_elsewhere(context)

    def _attach_here(self, context: TraceContext) -> None:
        active = context._local or _open_span(context)
        self._before = _mlflow.activate(active if active is not None else _mlflow.INVALID_SPAN)

    def _attach_from_elsewhere(self, context: TraceContext) -> None:
        here = _open_span(context) if context else None
        if here is not None:  # a service that calls itself
            self._before = _mlflow.activate(here)
            return
        if context.tracking_uri is not None:
            self._has_destination = _take_destination(context)
        if context.traceparent is not None and context.trace_id is not None:
            self._remote = _RemoteWork(context)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        remote, self._remote = self._remote, None
        before, self._before = self._before, None
        try:
            with contained("leaving an attached trace context"):
                if before is not None:
                    before.restore()
            if remote is not None:
                remote.finish(exc, self._hand_over)
            elif self._context._origin not in (None, _process_token):
                _hand_over()
        finally:
            # The work is over, though the pool's thread lives on.
            self._work.end_step(self._work_before, is_over=True)
            if self._has_destination:
                self._has_destination = False
                _leave_destination()
            token, self._strict = self._strict, None
            if token is not None:
                strict_as_before(token)


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


def _take_destination(context: TraceContext) -> bool:
    """Send traces where they go in the process that a context comes from, until it is left.

    Jobs for another store are waited for, 5 seconds at most. False, with a warning, where traces
    go on to another store: a change of the URI would lose every trace that is open here.
    """
    global _jobs
    uri = cast(str, context.tracking_uri)
    with _destination:
        if _may_wait():
            _destination.wait_for(
                lambda: not _jobs or _mlflow.tracking_uri() == uri, HAND_OVER_SECONDS
            )
        if _mlflow.tracking_uri() == uri or not (_jobs or _registry.open_entries()):
            _mlflow.adopt_destination(uri, context.experiment_id)
            _jobs += 1
            return True
    lost = TraceLostError(
        "A carried call comes from a process with another tracking URI, and spans of this "
        "process are open: its spans go to this process's own store. Give both processes the "
        "same tracking URI.",
        trace_id=context.trace_id,
    )
    settle([lost], strict=False, raised=None, site=user_site(2))
    return False


def _leave_destination() -> None:
    global _jobs
    with _destination:
        _jobs -= 1
        _destination.notify_all()


def _may_wait() -> bool:
    """Tell whether the jobs that would be waited for can go on meanwhile."""
    in_event_loop = asyncio._get_running_loop() is not None
    return not in_event_loop and not ambient_span().get_span_context().is_valid


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

    def finish(self, raised: BaseException | None, hand_over: Callable[[], object]) -> None:
        """Close what is left, hand over what was recorded, and stop standing for the span."""
        closed = []
        with contained("leaving the work for another process"):
            closed = _registry.close_descendants(self._parent)
            self._parent.ended = True
            self._ambient.stand_in.fall_back()
            self._ambient.leave()
        if self._recorded:
            with contained("handing over the spans of another process's trace"):
                hand_over()
            with contained("letting go of another process's trace"):
                _mlflow.release_remote_trace(self._otel_trace_id)
        findings = left_behind_finding(closed)
        if findings:
            settle(findings, strict=None, raised=raised, site=user_site(3))


def _hand_over() -> None:
    """Give the store what was recorded, in bounded time: the process may be gone right after."""
    with contained("handing over the spans of carried work"):
        _exit.hand_over(HAND_OVER_SECONDS)


# -- the callable that travels ---------------------------------------------------------------------


class Carried:
    """A function that runs under the span it was carried from. Pickles where the function does."""

    def __init__(self, function: Callable[..., Any], context: TraceContext) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._context = context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._context.attach():
            return self._function(*args, **kwargs)

    def __reduce__(self) -> Any:
        return type(self), (self._function, self._context)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore
        # A function where the function is one: Ray takes nothing else.
        is_function = isinstance(self._function, FunctionType) and not cloudpickle_asking()
        return FunctionType if is_function else type(self)

    def __getattr__(self, name: str) -> Any:
        # What inspect and frameworks look at: __code__, __defaults__, attributes of the user's.
        if name in ("_function", "_context"):  # before __init__, as in copying
            raise AttributeError(name)
        return getattr(self._function, name)

    def __repr__(self) -> str:
        return f"<carried {self._function!r}>"


class CarriedCoroutineFunction(Carried):
    """The same for coroutine functions: the span is ambient while the coroutine runs."""

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        async with self._context.attach():
            return await cast("Awaitable[Any]", self._function(*args, **kwargs))


class CarriedGeneratorFunction(Carried):
    """The same for generator functions: the span is ambient while the body runs, step by step."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = Recorder(lambda: _AttachedBody(self._context))
        return TracedGenerator(self._function(*args, **kwargs), recorder)


class CarriedAsyncGeneratorFunction(Carried):
    """The same for async generator functions."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = Recorder(lambda: _AttachedBody(self._context))
        return TracedAsyncGenerator(self._function(*args, **kwargs), recorder)


class _AttachedBody:
    """A generator's body under an attached context: what the drive opens in place of a span."""

    __slots__ = ("_attachment",)

    def __init__(self, context: TraceContext) -> None:
        self._attachment = context.attach()
        self._attachment.__enter__()

    def finish(self, raised: BaseException | None) -> None:
        self._attachment.__exit__(None if raised is None else type(raised), raised, None)

    def finish_as(self, outcome: Outcome) -> None:
        self.finish(None)


def carry(fn: Callable[P, R]) -> Callable[P, R]:
    """Return a callable that runs `fn` elsewhere under the span that is current now.

    One form for every engine: `pool.submit(carry(work), x)`, `dask_client.submit(carry(work),
    x)`, a thread's target, `run_in_executor`, `multiprocessing`, joblib. It pickles wherever
    `fn` does. Coroutine functions stay coroutine functions. The body of a generator runs under the
    span step by step, and what consumes it does not. What it takes along is strings: the span's
    ids, the tracking URI, the experiment, strictness; the worker needs no set-up.

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
