"""MLflow's export queue: wide enough, handed over, waited for."""

from __future__ import annotations

import atexit
import os
import time
from collections import deque
from concurrent.futures import thread as _futures_thread
from queue import Queue
from typing import Any

import mlflow
from opentelemetry.sdk.trace import TracerProvider

from spanguard._mlflow import takeover
from spanguard._mlflow.buffer import ROOM
from spanguard._mlflow.processor import (
    batch_processor,
    exporter_in_force,
    is_of_mlflow,
    pending_tasks,
    processor_in_force,
)
from spanguard._mlflow.provider import provider_in_force
from spanguard._mlflow.seam_check import flush_is_blind, is_missing

__all__ = [
    "await_stored",
    "defers_roots",
    "do_not_join_workers",
    "exports_in_place",
    "flush_everything",
    "hand_over",
    "hand_over_everything",
    "let_go_at_exit",
    "start_export_threads",
    "widen_export_queues",
]


def defers_roots() -> bool:
    """Tell whether MLflow exports a root whose children are open only when they have ended."""
    return hasattr(exporter_in_force(), "_deferred_root_spans")


def widen_export_queues() -> None:
    """Let as many traces end at once as may be open at once without spanguard's holding them.

    MLflow's queues drop what does not fit: the end of 1,500 traces in a row loses half of them.
    """
    tasks = pending_tasks()
    if tasks is not None and os.environ.get(_TASKS_VARIABLE) is None and tasks.maxsize > 0:
        # One task for each trace, and one for each batch of spans.
        size = batch_size() or 1
        each = 1 + -(-_SPANS_OF_TRACE // size)
        tasks.maxsize = max(tasks.maxsize, ROOM * _MLFLOW_TASKS * each)
    batch = batch_processor()
    waiting = getattr(batch, "_queue", None)
    if not isinstance(waiting, deque) or not hasattr(batch, "_max_queue_size"):
        return
    room = ROOM * _MLFLOW_TASKS * _SPANS_OF_TRACE
    if waiting.maxlen is not None and waiting.maxlen < room:
        batch._queue = deque(maxlen=room)
        batch._max_queue_size = room
        while waiting:  # mostly nothing: the provider is new; the oldest is rightmost
            batch._queue.append(waiting.popleft())


_TASKS_VARIABLE = "MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE"
_MLFLOW_TASKS = 1000  # what MLflow's own queue holds
_SPANS_OF_TRACE = 10  # so many a trace may have, when thousands end at once


def batch_size() -> int | None:
    """Return how many spans MLflow exports at a time; None where it does so one by one."""
    size = getattr(batch_processor(), "_max_export_batch_size", None)
    return size if isinstance(size, int) and size > 0 else None


def exports_in_place() -> bool:
    """Tell whether spans are stored by the thread that ends them (MLflow 3.10): none wait."""
    processor = processor_in_force()
    if is_missing(_QUEUE_OF_EXPORTER) or not is_of_mlflow(processor):
        return False
    return not hasattr(exporter_in_force(), "_async_queue")


_QUEUE_OF_EXPORTER = "mlflow.tracing.export.mlflow_v3:MlflowV3SpanExporter._async_queue"


def hand_over() -> None:
    """Put what has ended into MLflow's export queue, where no later change can lose it.

    Where there is no such queue (OTLP): send it, which takes as long as the endpoint does.
    """
    takeover.hand_over()
    current = provider_in_force()
    if isinstance(current, TracerProvider):
        current.force_flush()
        batcher: Any = getattr(
            exporter_in_force(), "_span_batcher", None
        )  # Databricks' one queue more
        if hasattr(batcher, "flush"):
            batcher.flush()


def hand_over_everything() -> None:
    """Hand over, and empty what queues there are that cannot be waited for. It may take long."""
    if exports_in_place():
        return
    hand_over()
    is_there = hasattr(exporter_in_force(), "_async_queue") or flush_is_blind()
    if is_there and not takeover.is_taken_over() and pending_tasks() is None:
        # The public way stops and restarts MLflow's threads, which takes a second or two.
        mlflow.flush_trace_async_logging()


def await_stored(seconds: float) -> bool:
    """Wait until MLflow's export queue is empty, at most so long; tell whether it is.

    True where there is no queue, or none that is known: MLflow's own exit hook then waits for it.
    """
    deadline = time.monotonic() + seconds
    for queue in (pending_tasks(), *takeover.left_behind):
        if queue is not None and not _is_done(queue, deadline - time.monotonic()):
            return False
    takeover.left_behind.clear()
    return takeover.await_stored(deadline - time.monotonic())


def _is_done(tasks: Queue[object], seconds: float) -> bool:
    with tasks.all_tasks_done:
        return bool(
            tasks.all_tasks_done.wait_for(lambda: not tasks.unfinished_tasks, max(seconds, 0.0))
        )


def flush_everything() -> None:
    """Drain MLflow's queues into the store: milliseconds, but with a dead server minutes."""
    hand_over_everything()
    tasks = pending_tasks()
    if tasks is not None:
        tasks.join()


# -- the end of the process --------------------------------------------------------------------


def start_export_threads() -> None:
    """Start MLflow's export threads now. Python 3.12.1 starts none at exit, and they would be late.

    Without them, what ended in the last seconds is lost there (test_exit.py).
    """
    activate = getattr(getattr(exporter_in_force(), "_async_queue", None), "activate", None)
    if activate is not None:
        activate()


def do_not_join_workers() -> None:
    """Keep the interpreter's exit from waiting for MLflow's export threads, which are daemons.

    `concurrent.futures` joins every pool's threads before any atexit hook runs, and one that
    retries against a dead server takes minutes. They go on exporting meanwhile.
    """
    joined: Any = getattr(_futures_thread, "_threads_queues", None)
    executor = getattr(
        getattr(exporter_in_force(), "_async_queue", None), "_worker_threadpool", None
    )
    for thread in list(getattr(executor, "_threads", ())):
        if joined is not None and thread.daemon:
            joined.pop(thread, None)


def let_go_at_exit() -> None:
    """Give up what is not stored: take back the exit hooks in which MLflow would wait for it."""
    queue = getattr(exporter_in_force(), "_async_queue", None)
    handlers = (
        getattr(queue, "_at_exit_callback", None),
        getattr(provider_in_force(), "_atexit_handler", None),
    )
    for handler in handlers:
        if handler is not None:
            atexit.unregister(handler)
