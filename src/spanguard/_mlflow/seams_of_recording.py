"""What recording is quick by: where it is missing, MLflow and OpenTelemetry do it themselves."""

from __future__ import annotations

from spanguard._mlflow.seam import PROVIDER, SDK, Seam, each

__all__ = ["QUICK_RECORDING"]


_BOUNDED = "opentelemetry.attributes:BoundedAttributes."
_SPAN = "mlflow.entities.span:"
_UTILS = "mlflow.tracing.utils:"
_HINT = "mlflow.agent.hint:"
_KEY = "Nothing: the key itself is known."
_ENDS = "MLflow's own end is called, which costs three times as much."
_WRITES = "OpenTelemetry writes payloads and attributes, which takes it twice as long."

QUICK_RECORDING = (
    *each(
        (
            "mlflow.entities:LiveSpan.end",
            f"{_SPAN}apply_span_processors",
            "mlflow.tracing.config:get_config",
            f"{_UTILS}set_span_cost_attribute",
            f"{_UTILS}calculate_span_cost",
        ),
        "own_end",
        _ENDS,
    ),
    *each(
        ("mlflow.tracing.fluent:start_span_no_context", f"{PROVIDER}start_detached_span"),
        "own_start",
        "A trace's start looks the tracer up anew, which costs a tenth of it.",
    ),
    Seam(f"{_SPAN}default_log_level_for_span_type", "own_end", _ENDS, since="3.13"),
    Seam(
        f"{_HINT}maybe_warn_local_tracking_for_databricks",
        "own_end",
        "A coding agent is not told that traces may go to the wrong store.",
        since="3.16",
    ),
    Seam(f"{_HINT}_is_agent_driving", "own_end", "An end costs a little more.", since="3.16"),
    *each(
        (
            f"{_BOUNDED}_lock",
            f"{_BOUNDED}maxlen",
            f"{_BOUNDED}max_value_len",
            f"{_BOUNDED}_set_items",
            f"{_BOUNDED}_setitem_locked",
            f"{SDK}Span._end_time",
        ),
        "own_write",
        _WRITES,
    ),
    Seam(
        "opentelemetry.trace.propagation:_SPAN_KEY", "active", "A start costs a microsecond more."
    ),
    Seam("mlflow.tracing.constant:SpanAttributeKey.CHAT_USAGE", "names", _KEY),
    Seam("mlflow.tracing.constant:SpanAttributeKey.LOG_LEVEL", "names", _KEY, since="3.13"),
)
