"""A trace that another process began."""

from __future__ import annotations

import threading
from typing import Any, cast

from mlflow.entities import TraceInfo, TraceLocation, TraceState
from opentelemetry import trace as _otel
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from spanguard._mlflow.memory import is_buffered, manager_in_force
from spanguard._mlflow.queue import hand_over

__all__ = [
    "hold_remote_trace",
    "release_remote_trace",
    "remote_holds",
    "remote_lock",
    "remote_span",
    "traceparent_of",
]


def traceparent_of(otel: OtelSpan) -> str:
    """Return the W3C traceparent of a span."""
    context = otel.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def remote_span(traceparent: str) -> OtelSpan | None:
    """Return a stand-in for the span that a W3C traceparent names; None if it is not one."""
    found = _otel.get_current_span(
        TraceContextTextMapPropagator().extract({"traceparent": traceparent})
    )
    return found if found.get_span_context().is_valid else None


remote_lock = threading.RLock()
remote_holds: dict[int, int] = {}


def hold_remote_trace(otel_trace_id: int, trace_id: str, experiment_id: str | None) -> None:
    """Let MLflow take spans of a trace whose root is in another process, until released.

    Several jobs of one trace may hold it at a time. MLflow's own
    `set_tracing_context_from_http_request_headers` drops the trace when the first of them ends,
    and the spans that still wait for their batch with it.
    """
    location = TraceLocation.from_experiment_id(experiment_id) if experiment_id else None
    with remote_lock:
        held = remote_holds.get(otel_trace_id, 0)
        remote_holds[otel_trace_id] = held + 1
        if held == 0:
            if is_buffered(trace_id):
                # It ended here a moment ago and waits for its batch: in its place MLflow would
                # find this one, and lose it.
                hand_over()
            info = TraceInfo(
                trace_id=trace_id,
                trace_location=cast("Any", location),
                request_time=cast("Any", None),
                state=TraceState.IN_PROGRESS,
            )
            manager_in_force().register_trace(otel_trace_id, info, is_remote_trace=True)


def release_remote_trace(otel_trace_id: int) -> None:
    """Undo one hold. Call `hand_over` before: what still waits for its batch is dropped."""
    with remote_lock:
        held = remote_holds.pop(otel_trace_id, 0) - 1
        if held > 0:
            remote_holds[otel_trace_id] = held
        else:
            manager_in_force().pop_trace(otel_trace_id)
