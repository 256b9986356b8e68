"""`traced_span`: a span for a with-block."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, overload

from mlflow.entities import LiveSpan
from mlflow.tracking import MlflowClient
from typing_extensions import Unpack

from spanguard._base.blocks import Block
from spanguard._base.findings import contained
from spanguard._base.site import CalledFunction
from spanguard._lifecycle.arguments import RecipeArguments
from spanguard._lifecycle.handle import SpanHandle, handle_of
from spanguard._lifecycle.opening import open_handle
from spanguard._lifecycle.proxy import SpanProxy
from spanguard._lifecycle.request import SpanRequest
from spanguard._mlflow import memory, spans
from spanguard._process import registry
from spanguard._process.ambient import ambient_span

__all__ = ["current_span", "traced_span"]


class traced_span(Block[LiveSpan]):
    """Open a span for the length of a with-block; it always closes, in order, with a status.

    The span nests under the ambient span, whichever API opened that, and is itself the ambient
    span inside the block: fluent spans, `@mlflow.trace` and autologging nest under it. When the
    block is left, what it left open underneath is closed first, as ERROR and `orphaned`; then
    the span ends, as the exception that left the block says (see
    docs/outcomes.md). Exceptions of the block pass through unchanged. Works with `async with` too.

    Nothing here raises into your code, except in strict mode: then bad arguments raise
    `InvalidSpanArgumentError` or `InvalidParentError` before anything opens, and what was left
    open raises `OrphanedSpanError` after everything is closed. Otherwise these are warnings.
    A `traced_span` object is good for one block: entering it again raises `RuntimeError`.

    Args:
        name: the span's name; for a root also the trace's.
        trace_id: a live trace to open the span in; `request_id` is another name for it. Without
            `parent_id`: under the ambient span if that is in this trace, else under its root.
        parent_id: the span to open it under.
        client: an MLflow client whose `start_*` and `end_*` are to be called.
        span_type: one of `mlflow.entities.SpanType`, or a string of your own.
        inputs, attributes: payloads. What MLflow cannot take is replaced, not lost.
        tags, metadata, experiment_id, run_id, session_id, user: of a trace: on roots only.
        links: `mlflow.entities.Link` objects.
        start_time_ns: nanoseconds since 1970; now, if not given.
        otel_trace_id: 32 hexadecimal digits: start a new trace, also inside another, under the
            OpenTelemetry trace id that another system knows it by. An id in use (open in this
            process, on its way to the store, or in it) never merges two traces: strict mode
            raises `DuplicateTraceIdError` before anything opens, else the trace gets a fresh id,
            the chosen one as the tag `spanguard.otel_trace_id`, and a warning. The store is
            asked at each such start; if it has not answered in 2 seconds the id is taken.
        new_trace: start a new trace, also inside another.
        expected: exception classes that are no error here: status OK, outcome `expected`.
        strict: overrides `strict()` and the environment for this span.
        description, log_level: as MLflow shows them. An MLflow that has none ignores them.
        trace_destination: one of `mlflow.entities.trace_location`; its `experiment_id` counts.
        sampling_ratio_override: as of `@mlflow.trace`: what part of such traces is recorded, 0.0
            to 1.0, in place of MLFLOW_TRACE_SAMPLING_RATIO, where that is set. On roots only.

    The positional form of the documented recipe is taken as well:
    `traced_span(client, "name", request_id, parent_id, **kwargs)`.

    >>> import spanguard
    >>> with spanguard.traced_span("fetch", inputs={"id": 7}) as span:
    ...     span.set_outputs("found")
    """

    __slots__ = ("_handle", "_request")

    __signature__ = SpanRequest.signature()  # for help(): it takes what a request takes

    @overload
    def __init__(
        self,
        /,
        name: str,
        span_type: str = "UNKNOWN",
        attributes: dict[str, Any] | None = None,
        *,
        trace_id: str | None = None,
        request_id: str | None = None,
        parent_id: str | None = None,
        client: Any = None,
        inputs: Any = None,
        tags: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        experiment_id: str | None = None,
        run_id: str | None = None,
        session_id: str | None = None,
        user: str | None = None,
        links: Iterable[Any] | None = None,
        start_time_ns: int | None = None,
        otel_trace_id: str | None = None,
        new_trace: bool = False,
        expected: tuple[type[BaseException], ...] | type[BaseException] = (),
        strict: bool | None = None,
        description: str | None = None,
        log_level: Any = None,
        trace_destination: Any = None,
        sampling_ratio_override: float | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        client: MlflowClient,
        name: str,
        request_id: str | None = None,
        parent_id: str | None = None,
        /,
        **kwargs: Unpack[RecipeArguments],
    ) -> None: ...

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        self._request: SpanRequest | None = SpanRequest(args, **kwargs)
        self._handle: SpanHandle | None = None

    def _calling(self, function: object) -> traced_span:
        """Take note that the block is a call of a user's function, by a library perhaps."""
        if self._request is not None:
            self._request.function = CalledFunction(function)
        return self

    def __enter__(self) -> LiveSpan:
        request, self._request = self._request, None
        if request is None:
            raise RuntimeError(
                "This traced_span has been entered before. Make a new one for each block: "
                "with traced_span(...)."
            )
        try:
            self._handle = open_handle(request)
            return self._handle.proxy  # type: ignore[return-value]
        except BaseException as error:  # Ctrl-C in the last moment: the block is never entered
            handle, self._handle = self._handle, None
            if handle is not None:
                handle.close(error)
            raise

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.finish(exc)


def current_span() -> LiveSpan | None:
    """Return the ambient span, whichever API opened it, or None.

    It comes through the same proxy that `traced_span` yields: writing to it cannot raise.

    >>> import spanguard
    >>> spanguard.current_span() is None
    True
    """
    with contained("finding the current span"):
        active = ambient_span()
        entry = registry.entry_of(active)
        if entry is not None:
            handle = handle_of(entry)
            if handle is not None:
                return handle.proxy  # type: ignore[return-value]
            live = entry.mlflow_span()
            return SpanProxy(live) if live is not None else None  # type: ignore[return-value]
        if active.get_span_context().is_valid and not spans.has_ended(active):
            live = memory.active_span()
            return SpanProxy(live) if live is not None else None  # type: ignore[return-value]
    return None
