"""Push and pop, for apps where a span's start and its end are not in one block."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mlflow.entities import LiveSpan

from spanguard._base.blocks import Block
from spanguard._base.config import MAX_MESSAGE_CHARS, is_strict
from spanguard._base.findings import settle
from spanguard._base.site import Site, user_site
from spanguard._base.values import attribute_of, is_a, is_the_users, kind_name, text_of
from spanguard._lifecycle.handle import OpenedSpan, left_open_finding, orphans_finding
from spanguard._lifecycle.opening import open_span
from spanguard._lifecycle.proxy import parse_status
from spanguard._lifecycle.request import SpanRequest
from spanguard._mlflow import otel_span
from spanguard._process import registry as _registry
from spanguard._process.ambient import OverlappingAmbient, Strand, pushed
from spanguard._process.dropped import is_put_aside
from spanguard._process.registry import OpenSpan
from spanguard._record.payload import clean_text, safe_repr
from spanguard.exceptions import (
    EmptyTraceStackError,
    InvalidSpanArgumentError,
    SpanguardError,
    SpanOrderError,
    UnknownSpanError,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from spanguard._lifecycle.arguments import SpanArguments

__all__ = ["TraceStateManager"]

Scope = Literal["context", "process"]


class _Frame:
    """One push, linked to the one below it: the immutable value that contexts copy."""

    __slots__ = ("_opened", "above", "below", "order", "pusher")

    def __init__(self, opened: OpenedSpan, below: _Frame | None) -> None:
        self.order = next(_orders)
        self.above: dict[_Frame, None] = {}  # pushed on it and not popped, in all contexts
        # Weak: contexts hold frames for as long as they like, and must not keep spans alive.
        self._opened = weakref.ref(opened)
        self.below = below
        self.pusher = Strand()

    @property
    def stands(self) -> bool:
        """Whether it is still to be popped. Ended by hand: yes. Closed as an orphan: no."""
        opened = self._opened()
        return opened is not None and opened.closed_by in (None, "user")


_orders = itertools.count()
_managers: weakref.WeakSet[TraceStateManager] = weakref.WeakSet()


def _empty_in_child() -> None:
    """Empty the stacks in a forked child: what is on them is open in the parent."""
    pushed.set(None)
    for manager in list(_managers):
        manager._lock = threading.RLock()  # another thread of the parent may have held it
        manager._pushed = {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_empty_in_child)


class TraceStateManager:
    """A stack of spans for code that starts and ends them in different places.

    With scope "context" each thread and task has a stack of its own; a task that was started
    inside a push nests under it and can pop only what it pushed itself. With scope "process" all
    threads and tasks share one stack. Pushed spans are ambient: other spans nest under them.

    Whatever order they are popped in, spans close descendants first, once, with a status. In
    strict mode popping an empty stack raises `EmptyTraceStackError`, popping a span that is not
    on top `SpanOrderError`, both after everything is closed; otherwise popping nothing returns
    None and the rest warns once per line. As a with-block, the manager closes at the block's end
    what is left: with the block's exception if there is one, else as orphans.

    Args:
        client: an MLflow client whose `start_*` and `end_*` are to be called.
        scope: "context" or "process".
        strict: overrides `strict()` and the environment for this manager's spans.

    Raises:
        ValueError: an unknown scope.

    >>> import spanguard
    >>> manager = spanguard.TraceStateManager()
    >>> span = manager.push_trace("job")
    >>> manager.depth
    1
    >>> manager.pop_trace(outputs="done") is span
    True
    """

    def __init__(
        self, client: Any = None, *, scope: Scope = "context", strict: bool | None = None
    ) -> None:
        if text_of(scope) not in ("context", "process"):
            shown = clean_text(safe_repr(scope), 100)
            raise ValueError(f'scope must be "context" or "process", not {shown}')
        self._client = client
        self._scope: Scope = scope
        self._strict = strict
        # What is pushed and not popped, in the order of the pushes, of all contexts.
        self._pushed: dict[_Frame, OpenedSpan] = {}
        self._lock = threading.RLock()
        _managers.add(self)

    # -- looking

    @property
    def current_trace(self) -> LiveSpan | None:
        """The innermost open span of this manager in this scope, or None."""
        opened = self._innermost()
        return opened.proxy if opened is not None else None  # type: ignore[return-value]

    @property
    def depth(self) -> int:
        """How many spans of this manager are open in this scope."""
        with self._lock:
            return sum(1 for _, opened in self._stack() if opened.is_open)

    def _innermost(self) -> OpenedSpan | None:
        with self._lock:
            return next((opened for _, opened in self._stack() if opened.is_open), None)

    def _stack(self) -> Iterator[tuple[_Frame, OpenedSpan]]:
        """Yield what stands on the stack in this scope, innermost first. Call it locked."""
        if self._scope == "process":
            for frame, opened in reversed(self._pushed.items()):
                if frame.stands:
                    yield frame, opened
            return
        below = pushed.get()
        while below is not None:
            found = self._pushed.get(below)
            if found is not None and below.stands:
                yield below, found
            below = below.below

    # -- pushing and popping

    def push_trace(self, name: str, **kwargs: Unpack[SpanArguments]) -> LiveSpan:
        """Open a span on top of the stack and make it ambient. Takes what `traced_span` takes.

        Without `trace_id`, `parent_id` or `new_trace=True` it nests: in scope "context" under
        the ambient span, in scope "process" under the top of the stack.

        Raises:
            InvalidSpanArgumentError, InvalidParentError: in strict mode, before anything opens.
        """
        return self._push(name, {**kwargs})[1].proxy  # type: ignore[return-value]

    def _push(self, name: str, kwargs: dict[str, Any]) -> tuple[_Frame, OpenedSpan]:
        kwargs.setdefault("client", self._client)
        if kwargs.get("strict") is None:
            kwargs["strict"] = self._strict
        request = SpanRequest((), name=name, **kwargs)
        if self._scope == "context":
            return self._push_on(request, None, _standing(pushed.get()))
        with self._lock:  # held while it opens: the next push goes under this one
            return self._push_on(request, self._innermost(), None)

    def _push_on(
        self, request: SpanRequest, parent: OpenedSpan | None, below: _Frame | None
    ) -> tuple[_Frame, OpenedSpan]:
        opened: OpenedSpan | None = None
        try:
            # Overlapping: roots and siblings may be popped in any order.
            opened = open_span(request, activate=False, parent=parent)
            opened.activate(kind=OverlappingAmbient)
            frame = _Frame(opened, below)
            self._put(frame, opened)
            if self._scope == "context":
                pushed.set(frame)
            return frame, opened
        except BaseException as error:  # Ctrl-C: nobody has a handle to pop it by
            if opened is not None:
                opened.close(error)
            raise

    def _put(self, frame: _Frame, opened: OpenedSpan) -> None:
        # What an ancestor closes is never popped: it must not stay here for ever.
        opened.on_orphaned = lambda: self._take(frame)
        with self._lock:
            self._pushed[frame] = opened
            if frame.below is not None:
                frame.below.above[frame] = None

    def _take(self, frame: _Frame) -> OpenedSpan | None:
        """Take a frame off the stack. Exactly one caller gets its span, in whatever thread."""
        with self._lock:
            if frame.below is not None:
                frame.below.above.pop(frame, None)
            return self._pushed.pop(frame, None)

    def pop_trace(
        self,
        span: Any = None,
        *,
        outputs: Any = None,
        attributes: dict[str, Any] | None = None,
        status: Any = None,
        error: BaseException | None = None,
    ) -> LiveSpan | None:
        """Close the innermost span, or the given one, and return it.

        With `error` it ends as if that exception had left its block: with the status, outcome
        and event that fit it. So a callback like `on_error(exc)` can say why the work failed. A
        span that is not on top: what is above it is closed first, as orphaned. A span may be
        popped by handle from another thread or task. Nothing to pop: None. A span that is not
        this manager's, or was popped before: nothing is done.

        Raises:
            EmptyTraceStackError, SpanOrderError, SpanAlreadyEndedError, UnknownSpanError,
            OrphanedSpanError, TraceLostError: in strict mode, after everything is closed.
        """
        frame = self._top_to_pop() if span is None else self._frame_of(span)
        popped = self._take(frame) if frame is not None else None
        if frame is None or popped is None:
            findings, strict = self._nothing_to_pop(span), self._strict
        else:
            findings, strict = (
                self._pop(frame, popped, (outputs, attributes, status), error),
                popped.strict,
            )
        if findings:
            settle(findings, strict=strict, raised=None, site=user_site(2))
        return popped.proxy if popped is not None else None  # type: ignore[return-value]

    def _top_to_pop(self) -> _Frame | None:
        strand = Strand()
        with self._lock:
            for frame, _ in self._stack():
                if self._scope == "process" or frame.pusher == strand:
                    return frame
        return None

    def _frame_of(self, span: Any) -> _Frame | None:
        wanted = _otel_span_of(span)
        with self._lock:
            for frame, opened in reversed(self._pushed.items()):
                same = wanted is not None and otel_span(opened.live) is wanted
                if same or opened.proxy is span:
                    return frame
        return None

    def _nothing_to_pop(self, span: Any) -> list[SpanguardError]:
        if span is None:
            # An empty stack is an answer (None), not a fault, unless strict mode asks.
            error = EmptyTraceStackError(
                "pop_trace() was called on an empty stack. Push before you pop, and pop in the "
                "thread or task that pushed, or by handle: pop_trace(span)."
            )
            return [error] if is_strict(self._strict) else []
        name, span_id = text_of(attribute_of(span, "name")), text_of(attribute_of(span, "span_id"))
        return [
            UnknownSpanError(
                f"Span {name!r} ({span_id}) is not on this manager's stack: it was popped "
                "before, or never pushed here. Nothing was done. Pop each pushed span once.",
                span_name=name,
                span_id=span_id,
            )
        ]

    def _pop(
        self,
        frame: _Frame,
        popped: OpenedSpan,
        last: tuple[Any, Any, Any] = (None, None, None),
        raised: BaseException | None = None,
    ) -> list[SpanguardError]:
        """Close a frame that is off the stack, and what stands above it first."""
        if is_put_aside(lambda: self._pop(frame, popped, last, raised), frame.pusher.thread):
            return []
        findings: list[SpanguardError] = []
        if raised is not None and not is_a(raised, BaseException):
            raised, finding = _as_exception(raised, popped.name)
            findings.append(finding)
        if popped.is_open:
            closed = self._close_above(frame, popped)
            findings += orphans_finding(popped, closed, SpanOrderError)
            findings += popped.write_last(*last)
        findings += popped.close(raised)
        if self._scope == "context":
            top = pushed.get()
            standing = _standing(top)
            if standing is not top:
                pushed.set(standing)
        return findings

    def _close_above(self, frame: _Frame, popped: OpenedSpan) -> list[tuple[OpenSpan, Site]]:
        """Close what is above a frame and below its span in the trace; the rest is independent."""
        closed: list[tuple[OpenSpan, Site]] = []
        label = popped.entry.label if popped.entry is not None else popped.name
        for opened in self._above(frame):
            if self._goes_with(popped, opened):
                closed += opened.close_as_orphan(label)
        return closed

    def _goes_with(self, popped: OpenedSpan, above: OpenedSpan) -> bool:
        """Tell whether a span has to be closed because one below it on the stack is popped."""
        if popped.entry is None or above.entry is None:  # a user's doubles
            return True
        if not _registry.is_below(above.entry, popped.entry):
            return False
        # One stack for all threads and tasks is one strand.
        return self._scope == "process" or not _registry.outlives(
            above.entry, [popped.entry.strand, Strand()]
        )

    def _above(self, frame: _Frame) -> list[OpenedSpan]:
        """Return the open spans above a frame, innermost first, in whatever context they are."""
        above: list[OpenedSpan] = []
        with self._lock:
            if self._scope == "process":
                for later, opened in reversed(self._pushed.items()):
                    if later.order < frame.order:
                        break
                    above.append(opened)
            else:
                frames = list(frame.above)
                while frames:
                    higher = frames.pop()
                    frames += higher.above
                    if higher in self._pushed:
                        above.insert(0, self._pushed[higher])
        return [opened for opened in above if opened.is_open]

    # -- blocks

    def trace(self, name: str, **kwargs: Unpack[SpanArguments]) -> PushedBlock:
        """Push for the length of a with-block; the exception that leaves it decides the status.

        Takes what `push_trace` takes. Works with `async with` too.
        """
        return PushedBlock(self, name, {**kwargs})

    def _leave(self, frame: _Frame, opened: OpenedSpan, raised: BaseException | None) -> None:
        self._take(frame)
        findings = self._pop(frame, opened, raised=raised)
        if findings:
            settle(findings, strict=opened.strict, raised=raised, site=user_site(2))

    def close(self, status: Any = "ERROR") -> int:
        """Close everything that is open, innermost first, and return how many there were.

        In every thread and task. With ERROR they get the outcome `orphaned`, by `close`. What
        others have left open below them is closed first, and told of.

        Raises:
            OrphanedSpanError, TraceLostError: in strict mode, after everything is closed.
        """
        code, _, finding = parse_status(status)
        unwound = self._unwind(None, is_error=code == "ERROR")
        findings = [*unwound.findings, *([] if finding is None else [finding])]
        if findings:
            settle(findings, strict=self._strict, raised=None, site=user_site(2))
        return len(unwound.spans)

    def _unwind(self, raised: BaseException | None, *, is_error: bool = True) -> _Unwound:
        """Close all that is pushed, last push first; return what was open, and what was found."""
        unwound = _Unwound([], [], [])
        last = next(reversed(self._pushed.copy()), None)
        thread = last.pusher.thread if last is not None else None
        if is_put_aside(lambda: self._unwind(raised, is_error=is_error), thread):
            return unwound
        while True:
            with self._lock:
                frame = next(reversed(self._pushed), None)
                opened = self._take(frame) if frame is not None else None
            if opened is None:
                break
            if not opened.is_open:
                continue
            unwound.spans.append(opened)
            entry = opened.entry
            if entry is not None:
                unwound.reports.append((entry.report(), entry.site))
            if raised is None and is_error and entry is not None:
                below = _registry.close_descendants(entry)
                unwound.findings.extend(orphans_finding(opened, below))
                _registry.close_orphan(entry, "close")
            else:
                unwound.findings.extend(opened.close(raised))
        if self._scope == "context":
            pushed.set(_standing(pushed.get()))
        return unwound

    def __enter__(self) -> TraceStateManager:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        unwound = self._unwind(exc)
        findings = list(unwound.findings)
        if exc is None and unwound.reports:
            found = f"The block of a TraceStateManager ended with {len(unwound.reports)} not popped"
            findings += left_open_finding(unwound.spans[-1], unwound.reports, found)
        if findings:
            settle(findings, strict=self._strict, raised=exc, site=user_site(2))


class _Unwound(NamedTuple):
    """What a manager had open when it was closed, and what was wrong below that."""

    spans: list[OpenedSpan]
    reports: list[tuple[OpenSpan, Site]]
    findings: list[SpanguardError]


class PushedBlock(Block[LiveSpan]):
    """The with-block of `TraceStateManager.trace`."""

    __slots__ = ("_kwargs", "_manager", "_name", "_pushed")

    def __init__(self, manager: TraceStateManager, name: str, kwargs: dict[str, Any]) -> None:
        self._manager = manager
        self._name = name
        self._kwargs: dict[str, Any] | None = kwargs
        self._pushed: tuple[_Frame, OpenedSpan] | None = None

    def __enter__(self) -> LiveSpan:
        kwargs, self._kwargs = self._kwargs, None
        if kwargs is None:
            raise RuntimeError(
                "This block has been entered before. Make a new one for each: manager.trace(...)."
            )
        self._pushed = self._manager._push(self._name, kwargs)
        return self._pushed[1].proxy  # type: ignore[return-value]

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pushed, self._pushed = self._pushed, None
        if pushed is not None:
            self._manager._leave(*pushed, exc)


def _otel_span_of(handle: Any) -> Any:
    """Return the OpenTelemetry span under a handle, which may be anything at all."""
    try:
        return otel_span(handle)
    except BaseException as error:
        if is_the_users(error):
            raise
        return None


def _as_exception(given: Any, span_name: str) -> tuple[Exception, InvalidSpanArgumentError]:
    return Exception(clean_text(given, MAX_MESSAGE_CHARS)), InvalidSpanArgumentError(
        f"error of span {span_name!r} is a {kind_name(given)}, no exception; its text was recorded "
        "as one. Pass the exception.",
        span_name=span_name,
    )


def _standing(frame: _Frame | None) -> _Frame | None:
    """Return the innermost frame that stands, so that dead frames do not pile up."""
    while frame is not None and not frame.stands:
        frame = frame.below
    return frame
