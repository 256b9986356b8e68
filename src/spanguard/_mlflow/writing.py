"""Writing on a span, past what MLflow's own setters may refuse."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

from mlflow.entities import SpanEvent
from opentelemetry.sdk.trace import Event

from spanguard._mlflow.memory import live_span, manager_in_force, mlflow_trace_id
from spanguard._mlflow.names import TRACE_NAME_KEY
from spanguard._mlflow.optional import optional
from spanguard._mlflow.shapes import MlflowSpan, RecordingSpan
from spanguard._mlflow.spans import otel_span

__all__ = [
    "add_last_event",
    "attribute_count",
    "has_event",
    "link",
    "make_event",
    "make_link",
    "rename",
]


def attribute_count(span: object) -> int:
    """Return how many attributes a span holds, MLflow's own included; 0 for a double."""
    inner = getattr(span, "_span", None)
    attributes = getattr(inner, "_attributes", None)
    return len(attributes) if attributes is not None else 0


def has_event(otel: RecordingSpan, name: str) -> bool:
    """Tell whether an OpenTelemetry span has an event of that name."""
    return any(event.name == name for event in otel.events)


def add_last_event(otel: RecordingSpan, name: str, attributes: dict[str, str]) -> None:
    """Add an event to a span that is ending: past `add_event`, and still before the store."""
    events = getattr(otel, "_events", None)
    if events is not None:
        events.append(Event(name, attributes, otel.end_time))


def rename(span: MlflowSpan, name: str) -> None:
    """Give an open span another name, and with a root its trace, unless that was renamed before.

    MLflow stores both as it finds them when they have ended.
    """
    before = span.name
    if name == before:
        return
    cast("Any", otel_span(span)).update_name(name)
    if span.parent_id is None:
        with manager_in_force().get_trace(span.trace_id) as trace:
            if trace is not None and trace.info.tags.get(TRACE_NAME_KEY) == before:
                trace.info.tags[TRACE_NAME_KEY] = name


def make_event(name: str, attributes: dict[str, Any], timestamp: int | None = None) -> SpanEvent:
    """Return a span event, that happened now if no time is given."""
    at = time.time_ns() if timestamp is None else timestamp  # MLflow 3.10 takes microseconds here
    return cast("Callable[..., SpanEvent]", SpanEvent)(
        name=name, attributes=attributes, timestamp=at
    )


def make_link(trace_id: str, span_id: str, attributes: dict[str, object] | None) -> object:
    """Return a link to a span; None where MLflow has none (3.10)."""
    return _link(trace_id, span_id, attributes) if _link is not None else None


_link_type = optional("mlflow.entities", "Link")  # MLflow 3.10 has none
_link = optional("mlflow.entities", "Link")  # MLflow 3.10 has none


def link(otel: RecordingSpan, trace_id: str, span_id: str) -> None:
    """Link a span that has just started to one of another trace, where MLflow has links."""
    own_id = mlflow_trace_id(otel)
    live = live_span(own_id, f"{otel.context.span_id:016x}") if own_id else None
    if live is not None and _link_type is not None:
        live.add_link(_link_type(trace_id, span_id))
