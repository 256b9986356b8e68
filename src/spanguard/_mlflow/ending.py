"""Status, and the end of a span."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from mlflow.entities import SpanStatus, SpanStatusCode
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import Status, StatusCode

from spanguard._mlflow.own_end import end_as_mlflow
from spanguard._mlflow.shapes import HasStatus, MlflowSpan, RecordingSpan
from spanguard._mlflow.spans import otel_span

__all__ = [
    "Ender",
    "OTEL_ERROR",
    "description",
    "end_bare",
    "end_live",
    "set_error",
    "status_code",
    "tell_of_end",
]


# To compare the code of an OpenTelemetry span's status with: as a function it costs 0.1 µs more.
OTEL_ERROR = StatusCode.ERROR


def status_code(span: HasStatus) -> str:
    """Return "OK", "ERROR" or "UNSET"."""
    status = span.status
    return str(status.status_code.value) if isinstance(status, SpanStatus) else "UNSET"


def description(span: HasStatus) -> str:
    """Return the description of a span's status."""
    status = span.status
    return (status.description or "") if isinstance(status, SpanStatus) else ""


def set_error(span: MlflowSpan, text: str) -> None:
    """Set ERROR, also over an OK: OpenTelemetry takes OK as final and ignores what follows."""
    span.set_status(SpanStatus(SpanStatusCode.ERROR, text))
    inner = otel_span(span)
    if isinstance(inner, ReadableSpan) and status_code(span) != "ERROR":
        cast("Any", inner)._status = Status(StatusCode.ERROR, text)


def end_live(span: MlflowSpan, end_time_ns: int | None) -> None:
    """End with MLflow's decorations, configured span processors too (PII masks)."""
    if not end_as_mlflow(span, end_time_ns):
        span.end(end_time_ns=end_time_ns)


def end_bare(otel: RecordingSpan, end_time_ns: int | None) -> None:
    """End the OpenTelemetry span itself, OK unless it is an ERROR: MLflow's own end failed."""
    if otel.status.status_code is StatusCode.UNSET:
        otel.set_status(Status(StatusCode.OK))
    otel.end(end_time=end_time_ns)


def tell_of_end(otel: Any) -> None:
    """Tell the processors of a span whose end was interrupted before it came to them."""
    otel._span_processor.on_end(otel._readable_span())


Ender = Callable[[SpanStatus, "int | None"], None]
