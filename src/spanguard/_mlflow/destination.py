"""Where traces go: tracking URI and experiment."""

from __future__ import annotations

import os
from typing import Any, cast

import mlflow
from mlflow.tracking import MlflowClient
from mlflow.tracking import fluent as _fluent

from spanguard._mlflow.memory import manager_in_force, mlflow_trace_id, trace_of
from spanguard._mlflow.shapes import HasContext, TraceInMemory

__all__ = [
    "active_experiment_id",
    "adopt_destination",
    "find_experiment",
    "place_of",
    "tracking_uri",
]


_SQLITE = "sqlite:///"
_EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_ID"


def tracking_uri() -> str:
    """Return the tracking URI in force; a relative SQLite path made absolute, to travel."""
    uri = mlflow.get_tracking_uri()
    path = uri.removeprefix(_SQLITE)
    if path == uri or not path or path.startswith((":memory:", "file:")):
        return uri
    return _SQLITE + os.path.abspath(path)


def active_experiment_id() -> str | None:
    """Return the experiment that new traces go to, None for the default one. Asks no store."""
    found = getattr(_fluent, "_active_experiment_id", None)
    return found or os.environ.get(_EXPERIMENT_VARIABLE) or None


def experiment_of(trace_id: str) -> str | None:
    """Return the experiment of a trace that is still in MLflow's buffer."""
    with manager_in_force().get_trace(trace_id) as trace:
        return _experiment_in(trace)


def place_of(otel: HasContext) -> tuple[str | None, str | None]:
    """Return the trace of a span, by MLflow's id, and its experiment, as far as MLflow knows."""
    trace = trace_of(otel)
    if trace is not None:
        return trace.info.trace_id, _experiment_in(trace)
    trace_id = mlflow_trace_id(otel)
    return trace_id, experiment_of(trace_id) if trace_id else None


def _experiment_in(trace: TraceInMemory | None) -> str | None:
    location = trace.info.trace_location if trace is not None else None
    experiment = getattr(location, "mlflow_experiment", None)
    return experiment.experiment_id if experiment is not None else None


def adopt_destination(uri: str, experiment_id: str | None) -> None:
    """Send the traces of this process where those of another process go."""
    if tracking_uri() != uri:
        mlflow.set_tracking_uri(uri)
    if experiment_id is None or experiment_id == (active_experiment_id() or "0"):
        return
    if hasattr(_fluent, "_active_experiment_id"):
        # set_experiment() would ask the store, for minutes where it is down.
        cast("Any", _fluent)._active_experiment_id = experiment_id
    else:
        os.environ[_EXPERIMENT_VARIABLE] = experiment_id


def find_experiment(id_or_name: str) -> str | None:
    """Ask the store for the id of an experiment that traces can go to, None if there is none.

    An id comes before a name. May block as long as MLflow's retries do.
    """
    client = MlflowClient()
    found = None
    try:
        found = client.get_experiment(id_or_name)
    except mlflow.MlflowException as error:
        # A name is an invalid id to some stores, and an unknown one to others.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    if found is None:
        found = client.get_experiment_by_name(id_or_name)
    # A deleted one takes no traces.
    return found.experiment_id if found is not None and found.lifecycle_stage == "active" else None
