"""Keeping what is open in MLflow's memory, whatever its own limits are."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, TypeVar

from mlflow.entities import LiveSpan

from spanguard._mlflow.buffer import KeepingBuffer
from spanguard._mlflow.memory import lasting_buffers, trace_manager
from spanguard._mlflow.remote import remote_holds
from spanguard._mlflow.seam_check import is_missing
from spanguard._mlflow.shapes import TraceInMemory
from spanguard._mlflow.spans import otel_span

__all__ = ["TraceGuard", "keep_open_traces"]


T = TypeVar("T")

EXPORT_SECONDS = 60.0
"""How long the spans of an ended trace may wait for their export and are not given up."""


class TraceGuard:
    """What `keep_open_traces` asks, and tells, who knows the open spans."""

    def holds(self, span_id: str) -> bool:
        """Tell whether a span is open and somebody is there to end it."""
        raise NotImplementedError

    def lost(self, span_id: str) -> None:
        """Take note that an open root goes out of memory and will not arrive."""
        raise NotImplementedError


class _TracePolicy:
    """What `KeepingBuffer` asks about a trace of MLflow's. Called with the manager locked."""

    def __init__(self, manager: object, guard: TraceGuard) -> None:
        self._manager = manager
        self._guard = guard

    def guard_of(self, trace: TraceInMemory) -> str | None:
        return next(filter(self._guard.holds, reversed(trace.span_dict)), None)

    def is_guarded(self, trace: TraceInMemory, guard: str | None) -> bool:
        if guard is not None and self._guard.holds(guard):
            return True
        root = next(iter(trace.span_dict), None)
        return root is not None and self._guard.holds(root)

    def is_busy(self, trace: TraceInMemory) -> bool:
        spans = trace.span_dict.values()
        just_now = time.time_ns() - int(EXPORT_SECONDS * 1e9)

        def keeps(span: LiveSpan) -> bool:
            end = span.end_time_ns
            return end is None or end > just_now

        # The root first, then the youngest: of an open trace no more than two are looked at.
        if any(map(keeps, _first(spans))) or any(map(keeps, reversed(spans))):
            return True
        return bool(trace.is_remote_trace) and self._is_held_remotely(trace.info.trace_id)

    def _is_held_remotely(self, trace_id: str) -> bool:
        known = self._ids()
        return any(known.get(otel_id) == trace_id for otel_id in list(remote_holds))

    def _ids(self) -> dict[int, str]:
        return getattr(self._manager, "_otel_id_to_mlflow_trace_id", {})

    def dropped(self, trace_id: str, trace: TraceInMemory) -> None:
        for root in _first(trace.span_dict.values()):
            otel = otel_span(root)
            if otel is not None:  # MLflow itself would keep this for ever
                self._ids().pop(otel.get_span_context().trace_id, None)
            if root.end_time_ns is None:
                self._guard.lost(root.span_id)


def _first(values: Iterable[T]) -> list[T]:
    return list(islice(values, 1))


_SEAMS_OF_THE_BUFFER = (
    "cachetools:TTLCache.ttl",
    "cachetools:TTLCache.maxsize",
    "mlflow.tracing.trace_manager:InMemoryTraceManager._lock",
)

lasting_buffers.add(KeepingBuffer)

_left_alone: Callable[[], object] = lambda: None  # noqa: E731  # the buffer that was not replaced


def keep_open_traces(guard: TraceGuard) -> str | None:
    """See to it that MLflow forgets no trace that is open, whatever their number and age.

    MLflow replaces its buffer on a reset, and when a timeout is set: so this is asked at each
    root, and costs one comparison. Where the buffer cannot be replaced: why, once for each.
    """
    global _left_alone
    manager: Any = getattr(trace_manager, "_instance", None)
    buffer: Any = getattr(manager, "_traces", None)
    if type(buffer) is KeepingBuffer or buffer is None or buffer is _left_alone():
        return None
    max_size, ttl = getattr(buffer, "maxsize", None), getattr(buffer, "ttl", None)
    if max_size is None or ttl is None or not hasattr(manager, "_lock"):
        _left_alone = weakref.ref(buffer)
        timeout = getattr(buffer, "timeout", None)
        if timeout is not None:
            return (
                f"MLFLOW_TRACE_TIMEOUT_SECONDS is set to {timeout}: MLflow drops a trace that is "
                f"open for longer, and the oldest when more than {max_size} are open"
            )
        if any(map(is_missing, _SEAMS_OF_THE_BUFFER)):
            return None  # that is told
        return "This MLflow keeps open traces in a way unknown here, and may drop old ones"
    with manager._lock:
        kept: KeepingBuffer[TraceInMemory] = KeepingBuffer(
            max_size, ttl, _TracePolicy(manager, guard)
        )
        for trace_id in list(buffer):
            kept[trace_id] = buffer[trace_id]
        manager._traces = kept
    return None
