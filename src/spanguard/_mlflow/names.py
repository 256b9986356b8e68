"""Names of MLflow's own: attribute and metadata keys, and how much room there is."""

from __future__ import annotations

from typing import Any, cast

from mlflow.entities import NoOpSpan
from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey, TraceTagKey

__all__ = [
    "AGGREGATED_KEYS",
    "ATTACHMENT_KEYS",
    "CHAT_USAGE_KEY",
    "EXPERIMENT_KEY",
    "INPUTS_KEY",
    "LOG_LEVEL_KEY",
    "MAX_CLIENT_REQUEST_ID_CHARS",
    "MAX_LINKS",
    "NOOP_TRACE_ID",
    "OUTPUTS_KEY",
    "RUN_KEY",
    "SAFE_ATTRIBUTES",
    "SESSION_KEY",
    "SPAN_TYPE_KEY",
    "TAG_PREFIX",
    "TEXT_KEYS",
    "TRACE_NAME_KEY",
    "USER_KEY",
    "is_reserved",
]


TAG_PREFIX = getattr(SpanAttributeKey, "TRACE_TAG_PREFIX", "mlflow.traceTag.")
SESSION_KEY = getattr(TraceMetadataKey, "TRACE_SESSION", "mlflow.trace.session")
USER_KEY = getattr(TraceMetadataKey, "TRACE_USER", "mlflow.trace.user")
RUN_KEY = getattr(TraceMetadataKey, "SOURCE_RUN", "mlflow.sourceRun")
INPUTS_KEY = getattr(SpanAttributeKey, "INPUTS", "mlflow.spanInputs")
OUTPUTS_KEY = getattr(SpanAttributeKey, "OUTPUTS", "mlflow.spanOutputs")
SPAN_TYPE_KEY = getattr(SpanAttributeKey, "SPAN_TYPE", "mlflow.spanType")
LOG_LEVEL_KEY = getattr(SpanAttributeKey, "LOG_LEVEL", "mlflow.spanLogLevel")
CHAT_USAGE_KEY = getattr(SpanAttributeKey, "CHAT_USAGE", "mlflow.chat.tokenUsage")
EXPERIMENT_KEY = getattr(SpanAttributeKey, "EXPERIMENT_ID", "mlflow.experimentId")
TRACE_NAME_KEY = getattr(TraceTagKey, "TRACE_NAME", "mlflow.traceName")

# What a span says its trace is when it records nothing.
NOOP_TRACE_ID = str(cast("Any", NoOpSpan)().trace_id)

# So many attributes fit on a span in any case, beside MLflow's own.
SAFE_ATTRIBUTES = 64

# Keys under MLflow's prefix that its documentation tells users to set by hand.
_ANNOTATION_KEYS = frozenset(
    {
        "mlflow.chat.tokenUsage",
        "mlflow.chat.tools",
        "mlflow.llm.cost",
        "mlflow.llm.model",
        "mlflow.llm.provider",
        "mlflow.message.format",
    }
)


# Of these, what the processor and the store read: texts, and numbers that they sum up.
TEXT_KEYS = frozenset({"mlflow.llm.model", "mlflow.llm.provider"})
AGGREGATED_KEYS = TEXT_KEYS | {"mlflow.chat.tokenUsage", "mlflow.llm.cost"}


def is_reserved(key: str) -> bool:
    """Tell whether an attribute key is MLflow's own and would break the span if overwritten."""
    return key.startswith("mlflow.") and key not in _ANNOTATION_KEYS


# The column is so wide, and a database that counts would refuse the whole trace.
MAX_CLIENT_REQUEST_ID_CHARS = 50


# What MLflow would look for in inputs and outputs to store it as an attachment. Only payloads
# that can hold none of it are written here; the rest goes MLflow's way.
ATTACHMENT_KEYS = frozenset({"b64_json", "audio", "image", "inline_data", "input_audio", "result"})


# OpenTelemetry keeps so many on a span.
MAX_LINKS = 128
