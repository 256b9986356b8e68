"""Whether a trace is in the store."""

from __future__ import annotations

from typing import cast

import mlflow
from mlflow.entities import TraceInfo, TraceState

from spanguard._mlflow.optional import optional

__all__ = ["has_ended_in_store", "trace_exists"]


def trace_exists(trace_id: str) -> bool:
    """Ask the store for a trace, readable or not. May block as long as MLflow's retries do."""
    return _stored_info(trace_id) is not None


def has_ended_in_store(trace_id: str) -> bool:
    """Ask the store whether a trace has its root, ended. May block as `trace_exists` does."""
    info = _stored_info(trace_id)
    return info is not None and info.state in (TraceState.OK, TraceState.ERROR)


_client = optional("mlflow.tracing.client", "TracingClient")


def _stored_info(trace_id: str) -> TraceInfo | None:
    try:
        # Not the public get_trace(): its None may as well mean that the store does not answer,
        # or that the trace is there and cannot be read.
        return cast("TraceInfo", _client().store.get_trace_info(trace_id))
    except mlflow.MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            return None
        raise
