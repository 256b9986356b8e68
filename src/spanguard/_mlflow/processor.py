"""MLflow's span processor and what is behind it: exporter, queue and batch."""

from __future__ import annotations

from queue import Queue
from typing import Any

import mlflow
from opentelemetry.sdk.trace import TracerProvider

from spanguard._mlflow.optional import optional
from spanguard._mlflow.provider import initialized_provider, processors_of, provider_in_force

__all__ = [
    "batch_processor",
    "exporter_in_force",
    "goes_on_writing",
    "is_of_mlflow",
    "pending_tasks",
    "processor_in_force",
    "sends_otlp",
]


def processor_in_force() -> object:
    """Return MLflow's own processor of the current provider, else OTLP's, else None."""
    processors = processors_of(provider_in_force())  # none where tracing is off
    ours = [one for one in processors if is_of_mlflow(one)]
    return next(iter(ours or filter(sends_otlp, processors)), None)


_base_processor = optional("mlflow.tracing.processor.base_mlflow", "BaseMlflowSpanProcessor")


def is_of_mlflow(processor: object) -> bool:
    """Tell MLflow's own processor, which has an exporter to MLflow's store, from others."""
    return _base_processor is not None and isinstance(processor, _base_processor)


def exporter_in_force() -> object:
    return getattr(processor_in_force(), "span_exporter", None)


_retires_providers = optional("mlflow.tracing.processor.base_mlflow", "retire_batch_processor")


def goes_on_writing(replaced: object) -> bool:
    """Tell whether a provider that MLflow has replaced still writes where traces go now.

    From MLflow 3.15 on it is shut down, and whatever ends on it is lost.
    """
    if _retires_providers is not None:
        return False
    if not isinstance(initialized_provider(), TracerProvider):  # tracing is off
        return False
    exporters = (getattr(one, "span_exporter", None) for one in processors_of(replaced))
    uris = [getattr(getattr(one, "_client", None), "tracking_uri", None) for one in exporters]
    return mlflow.get_tracking_uri() in uris


def sends_otlp(processor: object) -> bool:
    # Looked for by its name: to import it would cost everybody what a few use.
    return type(processor).__name__ == "OtelSpanProcessor"


def pending_tasks() -> Queue[object] | None:
    """Return the queue of MLflow's export tasks; None where there is none, or it is unknown."""
    tasks: Any = getattr(getattr(exporter_in_force(), "_async_queue", None), "_queue", None)
    return tasks if hasattr(tasks, "all_tasks_done") else None


def batch_processor() -> Any:
    """Return what holds ended spans for the exporter (MLflow 3.12 and later), or None."""
    return getattr(getattr(processor_in_force(), "_batch_delegate", None), "_batch_processor", None)
