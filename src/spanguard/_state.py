"""Push and pop, for apps where a span's start and its end are not in one block."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal

from mlflow.entities import LiveSpan

from spanguard import _record, _registry
from spanguard._findings import settle
from spanguard._mlflow import otel_span
from spanguard._outcome import OK, ORPHANED
from spanguard._proxy import parse_status
from spanguard._registry import OpenSpan
from spanguard._site import Site, user_site
from spanguard._span import OpenedSpan, SpanRequest, open_span, orphans_finding
from spanguard.exceptions import (
    EmptyTraceStackError,
    SpanguardError,
    SpanOrderError,
    UnknownSpanError,
)

__all__ = ["TraceStateManager"]

Scope = Literal["context", "process"]


class _Frame:
    """One push, linked to the one below it: the immutable value that contexts copy."""

    __slots__ = ("_opened", "below", "pusher")

    def __init__(self, opened: OpenedSpan, below: _Frame | None) -> None:
        # Weak: contexts hold frames for as long as they like, and must not keep spans alive.
        self._opened = weakref.ref(opened)
        self.below = below
        self.pusher = _this_strand()

    @property
    def opened(self) -> OpenedSpan | None:
        return self._opened()

    @property
    def stands(self) -> bool:
        """Whether it is still to be popped. Ended by hand: yes. Closed as an orphan: no."""
        opened = self._opened()
        return opened is not None and opened.closed_by in (None, "user") and not _is_orphan(opened)


def _is_orphan(opened: OpenedSpan) -> bool:
    return opened.entry is not None and opened.entry.orphaned_by is not None


def _this_strand() -> object:
    """Return what tells this task from its parent, which shares its thread: task, else thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    # The id of a task alone could come back for a later one; with its creation it is told apart
    # as long as the frame's context lives, which the task holds.
    return threading.get_ident() if task is None else task


# The top of the stack in this context. One for all managers: a ContextVar lives for ever.
_top: ContextVar[_Frame | None] = ContextVar("spanguard_top", default=None)


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
        if scope not in ("context", "process"):
            raise ValueError(f'scope must be "context" or "process", not {scope!r}')
        self._client = client
        self._scope: Scope = scope
        self._strict = strict
        # What is pushed and not popped, in the order of the pushes, of all contexts.
        self._pushed: dict[int, _Frame] = {}
        self._opened: dict[int, OpenedSpan] = {}
        self._lock = threading.RLock()

    # -- looking

    @property
    def current_trace(self) -> LiveSpan | None:
        """The innermost open span of this manager in this scope, or None."""
        for frame in self._stack():
            opened = frame.opened
            if opened is not None and opened.is_open:
                return opened.proxy  # type: ignore[return-value]
        return None

    @property
    def depth(self) -> int:
        """How many spans of this manager are open in this scope."""
        return sum(1 for frame in self._stack() if frame.opened and frame.opened.is_open)

    def _stack(self) -> Iterator[_Frame]:
        """Yield what stands on the stack in this scope, innermost first."""
        if self._scope == "process":
            with self._lock:
                frames = list(self._pushed.values())
            yield from (frame for frame in reversed(frames) if frame.stands)
            return
        frame = _top.get()
        while frame is not None:
            if frame.stands and id(frame) in self._pushed:
                yield frame
            frame = frame.below

    # -- pushing and popping

    def push_trace(self, name: str, **kwargs: Any) -> LiveSpan:
        """Open a span on top of the stack and make it ambient. Takes what `traced_span` takes.

        Without `trace_id`, `parent_id` or `new_trace=True` it nests: in scope "context" under
        the ambient span, in scope "process" under the top of the stack.

        Raises:
            InvalidSpanArgumentError, InvalidParentError: in strict mode, before anything opens.
        """
        kwargs.setdefault("client", self._client)
        if kwargs.get("strict") is None:
            kwargs["strict"] = self._strict
        request = SpanRequest((), name=name, **kwargs)
        with self._lock:
            parent = self._process_top() if self._scope == "process" else None
            opened = open_span(request, parent=parent)
            frame = _Frame(opened, _standing(_top.get()))
            self._pushed[id(frame)] = frame
            self._opened[id(frame)] = opened
        if self._scope == "context":
            _top.set(frame)
        return opened.proxy  # type: ignore[return-value]

    def _process_top(self) -> OpenedSpan | None:
        for frame in self._stack():
            if frame.opened is not None and frame.opened.is_open:
                return frame.opened
        return None

    def pop_trace(
        self,
        span: Any = None,
        *,
        outputs: Any = None,
        attributes: dict[str, Any] | None = None,
        status: Any = None,
    ) -> LiveSpan | None:
        """Close the innermost span, or the given one, and return it.

        A span that is not on top: what is above it is closed first, as orphaned. A span may be
        popped by handle from another thread or task. Nothing to pop: None. A span that is not
        this manager's, or was popped before: nothing is done.

        Raises:
            EmptyTraceStackError, SpanOrderError, SpanAlreadyEndedError, UnknownSpanError,
            OrphanedSpanError, TraceLostError: in strict mode, after everything is closed.
        """
        findings: list[SpanguardError] = []
        popped = None
        with self._lock:
            frame = self._top_to_pop() if span is None else self._frame_of(span)
            if frame is None:
                findings += self._nothing_to_pop(span)
            else:
                popped = self._opened[id(frame)]
        if frame is not None and popped is not None:
            findings += self._pop(frame, popped, (outputs, attributes, status))
        if findings:
            strict = popped.strict if popped is not None else self._strict
            settle(findings, strict=strict, raised=None, site=user_site(2))
        return popped.proxy if popped is not None else None  # type: ignore[return-value]

    def _top_to_pop(self) -> _Frame | None:
        strand = _this_strand()
        for frame in self._stack():
            if self._scope == "process" or frame.pusher == strand:
                return frame
        return None

    def _frame_of(self, span: Any) -> _Frame | None:
        wanted = otel_span(span)
        for key, opened in self._opened.items():
            if opened.proxy is span or (wanted is not None and otel_span(opened.live) is wanted):
                return self._pushed[key]
        return None

    def _nothing_to_pop(self, span: Any) -> list[SpanguardError]:
        if span is None:
            # An empty stack is an answer (None), not a fault, unless strict mode asks.
            from spanguard._config import is_strict

            if not is_strict(self._strict):
                return []
            return [
                EmptyTraceStackError(
                    "pop_trace() was called on an empty stack. Push before you pop, and pop in "
                    "the thread or task that pushed, or by handle: pop_trace(span)."
                )
            ]
        name, span_id = getattr(span, "name", None), getattr(span, "span_id", None)
        return [
            UnknownSpanError(
                f"Span {name!r} ({span_id}) is not on this manager's stack: it was popped "
                "before, or never pushed here. Nothing was done. Pop each pushed span once.",
                span_name=name,
                span_id=span_id,
            )
        ]

    def _pop(
        self, frame: _Frame, popped: OpenedSpan, last: tuple[Any, Any, Any]
    ) -> list[SpanguardError]:
        findings: list[SpanguardError] = []
        was_open = popped.is_open
        above = self._above(frame) if was_open else []
        closed = self._close_above(above, popped)
        if was_open:
            findings += popped.write_last(*last)
        findings += popped.close()
        self._drop(frame)
        return _as_order_finding(popped, closed) + findings

    def _above(self, frame: _Frame) -> list[_Frame]:
        """Return what stands above a frame, innermost first: here, and below it in its trace."""
        above: list[_Frame] = []
        for other in self._stack():
            if other is frame:
                return above
            above.append(other)
        # Popped from elsewhere: what lies above it in its own context is not visible here, but
        # what was pushed under it is.
        return [
            other
            for other in reversed(list(self._pushed.values()))
            if other is not frame and other.stands and _is_linked_above(other, frame)
        ]

    def _close_above(self, above: list[_Frame], popped: OpenedSpan) -> list[tuple[OpenSpan, Site]]:
        closed: list[tuple[OpenSpan, Site]] = []
        label = popped.entry.label if popped.entry is not None else popped.name
        for frame in above:
            opened = frame.opened
            if opened is not None and opened.entry is not None and opened.is_open:
                closed += _registry.close_descendants(opened.entry)
                report = _registry.close_orphan(opened.entry, label)
                if report is not None:
                    closed.append((report, opened.entry.site))
                opened.closed_by = "ancestor"
                opened.deactivate()
            self._drop(frame)
        return closed

    def _drop(self, frame: _Frame) -> None:
        with self._lock:
            self._pushed.pop(id(frame), None)
            self._opened.pop(id(frame), None)
        if self._scope == "context":
            top = _top.get()
            standing = _standing(top)
            if standing is not top:
                _top.set(standing)

    # -- blocks

    @contextmanager
    def trace(self, name: str, **kwargs: Any) -> Iterator[LiveSpan]:
        """Push for the length of a with-block; the exception that leaves it decides the status."""
        span = self.push_trace(name, **kwargs)
        frame = self._frame_of(span)
        opened = frame.opened if frame is not None else None
        raised: BaseException | None = None
        try:
            yield span
        except BaseException as error:
            raised = error
            raise
        finally:
            if frame is not None and opened is not None:
                self._leave(frame, opened, raised)

    def _leave(self, frame: _Frame, opened: OpenedSpan, raised: BaseException | None) -> None:
        above = self._above(frame) if opened.is_open else []
        closed = self._close_above(above, opened) if raised is None else []
        findings = _as_order_finding(opened, closed) + opened.close(raised)
        self._drop(frame)
        settle(findings, strict=opened.strict, raised=raised, site=user_site(2))

    def close(self, status: Any = "ERROR") -> int:
        """Close everything that is open, innermost first, and return how many there were.

        In every thread and task. With ERROR they get the outcome `orphaned`, by `close`.
        """
        return len(self._unwind(None, status))

    def _unwind(self, raised: BaseException | None, status: Any) -> list[tuple[OpenSpan, Site]]:
        code, _, finding = parse_status(status)
        with self._lock:
            frames = list(reversed(self._pushed.values()))
        unwound: list[tuple[OpenSpan, Site]] = []
        for frame in frames:
            opened = frame.opened
            if opened is not None and opened.is_open:
                if opened.entry is not None:
                    unwound.append((opened.entry.report(), opened.entry.site))
                    if raised is None and code == "ERROR":
                        _record.orphan(
                            opened.live,
                            ORPHANED,
                            opened_at=str(opened.entry.site),
                            orphaned_by="close",
                        )
                opened.close(raised, outcome=None if raised is not None else OK)
            self._drop(frame)
        if finding is not None:
            settle([finding], strict=self._strict, raised=raised, site=user_site(3))
        return unwound

    def __enter__(self) -> TraceStateManager:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        last = next(reversed(self._opened.values()), None) if self._opened else None
        unwound = self._unwind(exc, "ERROR")
        if exc is None and last is not None and unwound:
            finding = orphans_finding(last, unwound)
            settle(finding, strict=self._strict, raised=None, site=user_site(2))


def _standing(frame: _Frame | None) -> _Frame | None:
    """Return the innermost frame that stands, so that dead frames do not pile up."""
    while frame is not None and not frame.stands:
        frame = frame.below
    return frame


def _is_linked_above(frame: _Frame, lower: _Frame) -> bool:
    below = frame.below
    while below is not None:
        if below is lower:
            return True
        below = below.below
    return False


def _as_order_finding(
    popped: OpenedSpan, closed: list[tuple[OpenSpan, Site]]
) -> list[SpanguardError]:
    found: list[SpanguardError] = list(orphans_finding(popped, closed, SpanOrderError))
    return found
