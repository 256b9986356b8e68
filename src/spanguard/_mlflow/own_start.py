"""The start of a trace as MLflow starts one, without its repeated look-up of the tracer.

What MLflow's own span processor does at a start stays as it is. Taken for a start that is known by
all that its code names, and asks for no more than a name and an experiment.
"""

from __future__ import annotations

import json
import logging
from typing import Any, cast

import mlflow
from mlflow.entities import LiveSpan, NoOpSpan
from opentelemetry.sdk.trace import ReadableSpan

from spanguard._mlflow import provider
from spanguard._mlflow.active import mode
from spanguard._mlflow.known_code import names_in
from spanguard._mlflow.memory import live_span, mlflow_trace_id, trace_of
from spanguard._mlflow.names import EXPERIMENT_KEY
from spanguard._mlflow.optional import optional_module

__all__ = ["start_plain_root"]


_USER_CONTEXT = "_USER_TRACE_CONTEXT get enabled NoOpSpan trace_id NO_OP_SPAN_TRACE_ID"
_BEGINNING = "provider start_detached_span"
_FOUND = (
    "get_otel_attribute SpanAttributeKey REQUEST_ID InMemoryTraceManager get_instance "
    "get_span_from_id encode_span_id context span_id set_span_type isinstance set_inputs "
    "set_attributes"
)
_TAGS = "exclude_immutable_tags get_trace info tags update trace_metadata"
_FAILED = "Exception _logger warning isEnabledFor logging DEBUG"
_STARTED = f"{_USER_CONTEXT} _span {_BEGINNING} is_recording {_FOUND}"

# What a known start names, in that order.
_STARTS = {
    f"trace_id NO_OP_SPAN_TRACE_ID NoOpSpan {_BEGINNING} _span {_FOUND} {_TAGS} {_FAILED}",  # 3.10
    f"{_STARTED} {_TAGS} {_FAILED}",  # 3.11 and 3.12
    f"{_STARTED} set_log_level {_TAGS} {_FAILED}",  # 3.13 and 3.14
    f"{_STARTED} set_log_level {_TAGS} {_FAILED} add_link MlflowException",  # 3.15 and 3.16
    f"{_STARTED} set_attribute DESCRIPTION set_log_level {_TAGS} {_FAILED} add_link "
    "MlflowException",  # 3.17
}
_DETACHED = (
    "_get_tracer __name__ trace set_span_in_context get_current_context json dumps "
    "SpanAttributeKey START_TIME_NS EXPERIMENT_ID start_span getattr _logger warning _span "
    "attributes pop"
)

_fluent: Any = optional_module("mlflow.tracing.fluent")
_provider: Any = optional_module("mlflow.tracing.provider")
_start = getattr(_fluent, "start_span_no_context", None)
_detached = getattr(_provider, "start_detached_span", None)
_is_known = (
    names_in(_fluent, "start_span_no_context") in _STARTS
    and names_in(_provider, "start_detached_span") == _DETACHED
)
_keeps_decision = "is_recording" in names_in(_fluent, "start_span_no_context")  # from 3.11 on


def start_plain_root(name: str, experiment_id: str | None) -> LiveSpan | NoOpSpan | None:
    """Start a new trace as `start_span_no_context(name, experiment_id=...)` does.

    The span's type is left for the caller to write. None, and nothing is started, where this way
    is not known to be the same: then the public one is to be taken.
    """
    tracer = provider.tracer
    if (
        tracer is None
        or not _is_known
        or mlflow.start_span_no_context is not _start
        or _provider.start_detached_span is not _detached
    ):
        return None
    attributes = {EXPERIMENT_KEY: json.dumps(experiment_id)} if experiment_id else {}
    try:
        otel = tracer.start_span(name, context=mode.runtime.get_current(), attributes=attributes)
        if not isinstance(otel, ReadableSpan):
            return _ignoring(otel)
        found = _live(otel)
    except Exception as error:  # noqa: BLE001
        found = None
        _log_failure(name, error)
    return found if found is not None else _ignoring(None)


def _live(otel: Any) -> LiveSpan | None:
    span_id = f"{otel.context.span_id:016x}"
    trace = trace_of(otel)
    if trace is not None:
        return trace.span_dict.get(span_id)
    trace_id = mlflow_trace_id(otel)
    return live_span(trace_id, span_id) if trace_id is not None else None


def _ignoring(otel: object) -> NoOpSpan:
    """Return what MLflow returns for a span that was sampled out, or that it could not start."""
    make = cast("Any", NoOpSpan)
    span: NoOpSpan = make(otel_span=otel) if _keeps_decision and otel is not None else make()
    return span


def _log_failure(name: str, error: Exception) -> None:
    _fluent._logger.warning(
        f"Failed to start span {name}: {error}. For full traceback, set logging level to debug.",
        exc_info=_fluent._logger.isEnabledFor(logging.DEBUG),
    )
