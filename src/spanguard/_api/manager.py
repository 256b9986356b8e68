"""Push and pop, for apps where a span's start and its end are not in one block."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from mlflow.entities import LiveSpan
from typing_extensions import Unpack

from spanguard._api.frames import Frame, standing_frame
from spanguard._api.stack import Stack
from spanguard._base.blocks import Block
from spanguard._base.config import is_strict
from spanguard._base.findings import settle
from spanguard._base.site import user_site
from spanguard._base.values import attribute_of, text_of
from spanguard._lifecycle.arguments import SpanArguments
from spanguard._lifecycle.findings import left_open_finding
from spanguard._lifecycle.handle import SpanHandle
from spanguard._lifecycle.request import SpanRequest
from spanguard._process.ambient import pushed
from spanguard._record.status import parse_status
from spanguard.exceptions import EmptyTraceStackError, SpanguardError, UnknownSpanError

__all__ = ["TraceStateManager"]


class TraceStateManager(Stack):
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

    # -- looking

    @property
    def current_trace(self) -> LiveSpan | None:
        """The innermost open span of this manager in this scope, or None."""
        handle = self._innermost()
        return handle.proxy if handle is not None else None  # type: ignore[return-value]

    @property
    def depth(self) -> int:
        """How many spans of this manager are open in this scope."""
        with self._lock:
            return sum(1 for _, handle in self._stack() if handle.is_open)

    # -- pushing and popping

    def push_trace(self, name: str, **kwargs: Unpack[SpanArguments]) -> LiveSpan:
        """Open a span on top of the stack and make it ambient. Takes what `traced_span` takes.

        Without `trace_id`, `parent_id` or `new_trace=True` it nests: in scope "context" under
        the ambient span, in scope "process" under the top of the stack.

        Raises:
            InvalidSpanArgumentError, InvalidParentError: in strict mode, before anything opens.
        """
        return self._push(name, {**kwargs})[1].proxy  # type: ignore[return-value]

    def _push(self, name: str, kwargs: dict[str, Any]) -> tuple[Frame, SpanHandle]:
        kwargs.setdefault("client", self._client)
        if kwargs.get("strict") is None:
            kwargs["strict"] = self._strict
        request = SpanRequest((), name=name, **kwargs)
        if self._scope == "context":
            return self._push_on(request, None, standing_frame(pushed.get()))
        with self._lock:  # held while it opens: the next push goes under this one
            return self._push_on(request, self._innermost(), None)

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

    def _nothing_to_pop(self, span: object) -> list[SpanguardError]:
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

    # -- blocks

    def trace(self, name: str, **kwargs: Unpack[SpanArguments]) -> PushedBlock:
        """Push for the length of a with-block; the exception that leaves it decides the status.

        Takes what `push_trace` takes. Works with `async with` too.
        """
        return PushedBlock(self, name, {**kwargs})

    def _leave(self, frame: Frame, handle: SpanHandle, raised: BaseException | None) -> None:
        self._take(frame)
        findings = self._pop(frame, handle, raised=raised)
        if findings:
            settle(findings, strict=handle.strict, raised=raised, site=user_site(2))

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


class PushedBlock(Block[LiveSpan]):
    """The with-block of `TraceStateManager.trace`."""

    __slots__ = ("_kwargs", "_manager", "_name", "_pushed")

    def __init__(self, manager: TraceStateManager, name: str, kwargs: dict[str, object]) -> None:
        self._manager = manager
        self._name = name
        self._kwargs: dict[str, object] | None = kwargs
        self._pushed: tuple[Frame, SpanHandle] | None = None

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
