"""What MLflow has in memory: live spans, by id, and the traces that they are of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import mlflow
from mlflow.entities import LiveSpan

from spanguard._mlflow import provider
from spanguard._mlflow.names import INPUTS_KEY, OUTPUTS_KEY, RUN_KEY
from spanguard._mlflow.optional import optional
from spanguard._mlflow.shapes import HasContext, TraceInMemory, TraceManager
from spanguard._mlflow.spans import attribute_names

__all__ = [
    "active_span",
    "add_to_trace",
    "all_open_spans",
    "experiment_and_run",
    "has_inputs",
    "has_outputs",
    "is_buffered",
    "is_in_memory",
    "knows_trace",
    "lasting_buffers",
    "live_span",
    "manager_in_force",
    "mlflow_trace_id",
    "open_spans_in",
    "root_span",
    "set_client_request_id",
    "set_previews",
    "trace_manager",
    "trace_of",
]


trace_manager: Any = optional("mlflow.tracing.trace_manager", "InMemoryTraceManager")


def traces_in_memory() -> Mapping[str, TraceInMemory] | None:
    """Return MLflow's traces by id; None where there are none, or nobody knows."""
    return getattr(getattr(trace_manager, "_instance", None), "_traces", None)


def manager_in_force() -> TraceManager:
    return cast("TraceManager", trace_manager.get_instance())


def live_span(trace_id: str, span_id: str) -> LiveSpan | None:
    """Return a span of a trace that is still in MLflow's buffer."""
    return manager_in_force().get_span_from_id(trace_id, span_id)


def root_span(trace_id: str) -> LiveSpan | None:
    """Return the root of a trace that is still in MLflow's buffer."""
    manager = manager_in_force()
    root_id = manager.get_root_span_id(trace_id)
    return manager.get_span_from_id(trace_id, root_id) if root_id else None


def is_buffered(trace_id: str) -> bool:
    """Tell whether MLflow still holds the trace; without that, its spans go nowhere."""
    # As `traces_in_memory`, written out: it is asked at each start.
    traces = getattr(getattr(trace_manager, "_instance", None), "_traces", None)
    return traces is None or trace_id in traces


def is_in_memory(otel: HasContext) -> bool:
    """Do what `is_buffered` does for a span of OpenTelemetry's, without decoding its trace id."""
    manager: Any = getattr(trace_manager, "_instance", None)
    if type(getattr(manager, "_traces", None)) in lasting_buffers:
        return trace_of(otel) is not None
    trace_id = mlflow_trace_id(otel)
    return trace_id is not None and is_buffered(trace_id)


def trace_of(otel: HasContext) -> TraceInMemory | None:
    """Return the trace of a span, if MLflow still holds it in a buffer of ours (keeping.py).

    A look-up there changes nothing, and takes no lock. None of a trace in another buffer.
    """
    manager: Any = getattr(trace_manager, "_instance", None)
    traces: Any = getattr(manager, "_traces", None)
    known: Any = getattr(manager, "_otel_id_to_mlflow_trace_id", None)
    if type(traces) not in lasting_buffers or type(known) is not dict:
        return None
    found: TraceInMemory | None = traces.get(known.get(otel.get_span_context().trace_id))
    return found


# The class of buffers of ours, which puts itself in here.
lasting_buffers: set[type] = set()


def open_spans_in(trace_id: str) -> list[LiveSpan]:
    """Return the spans of a trace that have not ended, in the order they started."""
    with manager_in_force().get_trace(trace_id) as trace:
        spans = list(trace.span_dict.values()) if trace else []
    return [span for span in spans if span.end_time_ns is None]


def all_open_spans() -> list[LiveSpan]:
    """Return every span in memory that has not ended, parents first; none before we listen."""
    if provider.watched is None:
        return []
    traces = traces_in_memory() or {}
    found = [span for trace in list(traces.values()) for span in list(trace.span_dict.values())]
    return [span for span in found if span.end_time_ns is None]


def mlflow_trace_id(otel: HasContext) -> str | None:
    """Return the MLflow trace id of an OpenTelemetry span."""
    otel_trace_id = otel.get_span_context().trace_id
    known = getattr(getattr(trace_manager, "_instance", None), "_otel_id_to_mlflow_trace_id", None)
    if type(known) is dict:
        found: str | None = known.get(otel_trace_id)
        return found
    return manager_in_force().get_mlflow_trace_id_from_otel_id(otel_trace_id)


def active_span() -> LiveSpan | None:
    """Return the span that MLflow's own API calls active."""
    return mlflow.get_current_active_span()


def add_to_trace(trace_id: str, tags: dict[str, str], metadata: dict[str, str]) -> None:
    """Add tags and metadata to a trace in memory; what it has already stays."""
    with manager_in_force().get_trace(trace_id) as trace:
        if trace is not None:
            trace.info.tags.update({k: v for k, v in tags.items() if k not in trace.info.tags})
            known = trace.info.trace_metadata
            known.update({k: v for k, v in metadata.items() if k not in known})


def set_client_request_id(trace_id: str | None, text: str) -> None:
    """Set the request id that a trace is known by to its client, in memory.

    As `mlflow.update_current_trace` does, which knows the active trace only.
    """
    with manager_in_force().get_trace(trace_id) as trace:
        if trace is not None:
            trace.info.client_request_id = text


def set_previews(trace_id: str | None, request: str | None, response: str | None) -> None:
    """Set what MLflow's list of traces shows of one in memory, unless it has been set before.

    As `mlflow.update_current_trace` does, which knows the active trace only. None leaves it to
    MLflow, which shows the root's inputs and outputs.
    """
    with manager_in_force().get_trace(trace_id) as trace:
        if trace is not None:
            info = trace.info
            info.request_preview = info.request_preview or request
            info.response_preview = info.response_preview or response


def has_inputs(span: object) -> bool:
    """Tell whether inputs are recorded on a span, without decoding them."""
    return INPUTS_KEY in attribute_names(span)


def has_outputs(span: object) -> bool:
    """Tell whether a span has outputs that are not None, without decoding them."""
    attributes = getattr(getattr(span, "_span", None), "_attributes", None)
    # OpenTelemetry's own look-up raises and catches where there is nothing: a microsecond.
    written = getattr(attributes, "_dict", attributes) or {}
    return bool(written.get(OUTPUTS_KEY, "null") != "null")


def experiment_and_run(trace_id: str) -> tuple[str | None, str | None]:
    """Return the experiment and the run that a trace in memory belongs to."""
    with manager_in_force().get_trace(trace_id) as trace:
        if trace is None:
            return None, None
        return trace.info.experiment_id, trace.info.trace_metadata.get(RUN_KEY)


def knows_trace(otel_trace_id: int) -> bool:
    """Tell whether MLflow holds a trace with this OpenTelemetry id: open, or not exported."""
    return manager_in_force().get_mlflow_trace_id_from_otel_id(otel_trace_id) is not None
