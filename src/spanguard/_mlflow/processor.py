"""MLflow's span processor and what is behind it: exporter, queue and batch."""

from __future__ import annotations

from typing import Any

from mlflow.tracing.processor.base_mlflow import BaseMlflowSpanProcessor

from spanguard._mlflow.provider import processors_of, provider_in_force

__all__ = [
    "batch_processor",
    "exporter_in_force",
    "pending_tasks",
    "processor_in_force",
    "sends_otlp",
]


def processor_in_force() -> Any:
    """Return MLflow's own processor of the current provider, else OTLP's, else None."""
    processors = processors_of(provider_in_force())  # none where tracing is off
    ours = [one for one in processors if isinstance(one, BaseMlflowSpanProcessor)]
    return next(iter(ours or filter(sends_otlp, processors)), None)


def exporter_in_force() -> Any:
    return getattr(processor_in_force(), "span_exporter", None)


def sends_otlp(processor: Any) -> bool:
    # Looked for by its name: to import it would cost everybody what a few use.
    return type(processor).__name__ == "OtelSpanProcessor"


def pending_tasks() -> Any:
    """Return the queue of MLflow's export tasks; None where there is none, or it is unknown."""
    tasks: Any = getattr(getattr(exporter_in_force(), "_async_queue", None), "_queue", None)
    return tasks if hasattr(tasks, "all_tasks_done") else None


def batch_processor() -> Any:
    """Return what holds ended spans for the exporter (MLflow 3.12 and later), or None."""
    return getattr(getattr(processor_in_force(), "_batch_delegate", None), "_batch_processor", None)
