"""A span's OpenTelemetry side: what it is, and whether it has ended."""

from __future__ import annotations

import time
from typing import Any, TypeGuard

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import Span as OtelSpan

from spanguard._mlflow.shapes import RecordingSpan

__all__ = [
    "attribute_names",
    "has_ended",
    "is_being_written",
    "is_recording_kind",
    "otel_span",
    "recording_span",
]


def otel_span(span: object) -> OtelSpan | None:
    """Return the OpenTelemetry span under an MLflow span; None for a double."""
    inner: OtelSpan | None = getattr(span, "_span", None)
    if isinstance(inner, ReadableSpan):  # the common case first: OtelSpan's check is an ABC's
        return inner
    return inner if isinstance(inner, OtelSpan) else None


def recording_span(span: object) -> RecordingSpan | None:
    """Return the recording OpenTelemetry span under an MLflow span, or None."""
    inner: RecordingSpan | None = getattr(span, "_span", None)
    return inner if isinstance(inner, ReadableSpan) else None


def attribute_names(span: object) -> list[str]:
    """Return the names of a span's attributes, without decoding the values."""
    return list(getattr(getattr(span, "_span", None), "attributes", None) or ())


def is_recording_kind(otel: object) -> TypeGuard[RecordingSpan]:
    """Tell a span that records from one that stands for a remote, disabled or dropped one."""
    return isinstance(otel, ReadableSpan)


def has_ended(otel: object) -> bool:
    """Tell whether an OpenTelemetry span has ended. Spans that never record have not."""
    return isinstance(otel, ReadableSpan) and otel.end_time is not None


# How often, and after how many seconds, a span that is being written is looked at again.
_LOOKS, _PAUSE_SECONDS = 20, 0.001


def is_being_written(otel: Any) -> bool:
    """Tell whether a span is being written and cannot be ended now, however long that waits.

    OpenTelemetry writes under a lock that is not re-entrant. Another thread is done in
    microseconds; this one is never, where a finalizer runs in the middle of its write.
    """
    try:
        locked = otel._lock.locked
        if not locked():
            return False
    except AttributeError:  # gone, or another kind of span
        return False
    for _ in range(_LOOKS):
        time.sleep(_PAUSE_SECONDS)
        if not locked():
            return False
    return True
