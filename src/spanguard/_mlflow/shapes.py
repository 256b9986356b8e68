"""The shapes of what MLflow, OpenTelemetry and users hand us, as far as we use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from mlflow.entities import LiveSpan, SpanStatus, Trace, TraceInfo
from opentelemetry.trace import SpanContext, Status

__all__ = [
    "Client",
    "HasContext",
    "HasStatus",
    "MlflowSpan",
    "RecordingSpan",
    "TraceInMemory",
    "TraceManager",
]


class HasStatus(Protocol):
    """A span of MLflow's, of whatever kind."""

    @property
    def status(self) -> SpanStatus | None: ...


class MlflowSpan(HasStatus, Protocol):
    """A span of MLflow's that is live, or a user's double of one.

    One that records nothing says None of itself: ask `starting.is_noop` first.
    """

    @property
    def name(self) -> str: ...
    @property
    def trace_id(self) -> Any: ...  # str: pyright takes MLflow's cached property for none
    @property
    def span_id(self) -> str: ...
    @property
    def parent_id(self) -> str | None: ...
    @property
    def end_time_ns(self) -> int | None: ...

    def get_attribute(self, key: str) -> Any: ...
    def set_attribute(self, key: str, value: Any) -> object: ...
    def set_inputs(self, inputs: Any) -> object: ...
    def set_outputs(self, outputs: Any) -> object: ...
    def set_status(self, status: Any) -> object: ...
    def add_event(self, event: Any) -> object: ...
    def end(self, *, end_time_ns: int | None = ...) -> object: ...


class HasContext(Protocol):
    """A span of OpenTelemetry's, of whatever kind."""

    def get_span_context(self) -> SpanContext: ...


class RecordingSpan(HasContext, Protocol):
    """A span of OpenTelemetry's SDK, which records."""

    @property
    def name(self) -> str: ...
    @property
    def context(self) -> SpanContext: ...
    @property
    def parent(self) -> SpanContext | None: ...
    @property
    def start_time(self) -> int: ...
    @property
    def end_time(self) -> int | None: ...
    @property
    def status(self) -> Status: ...
    @property
    def attributes(self) -> Mapping[str, Any]: ...
    @property
    def events(self) -> Sequence[Event]: ...

    def set_status(self, status: Status) -> None: ...
    def end(self, end_time: int | None = ...) -> None: ...


class Event(Protocol):
    """What happened at one moment of a span."""

    @property
    def name(self) -> str: ...


class Client(Protocol):
    """An MLflow client, or a user's double of one, whose spans we start and end."""

    def end_trace(
        self,
        trace_id: str,
        *,
        outputs: Any = ...,
        attributes: dict[str, Any] | None = ...,
        status: SpanStatus,
        end_time_ns: int | None = ...,
    ) -> object: ...
    def end_span(
        self,
        trace_id: str,
        span_id: str,
        *,
        outputs: Any = ...,
        attributes: dict[str, Any] | None = ...,
        status: SpanStatus,
        end_time_ns: int | None = ...,
    ) -> object: ...


class TraceInMemory(Protocol):
    """A trace in MLflow's memory."""

    info: TraceInfo
    span_dict: dict[str, LiveSpan]
    is_remote_trace: bool


class FinishedTrace(Protocol):
    """A trace that is taken out of MLflow's memory."""

    trace: Trace


class TraceManager(Protocol):
    """What keeps MLflow's traces in memory."""

    def get_trace(self, trace_id: str | None) -> AbstractContextManager[TraceInMemory | None]: ...
    def get_span_from_id(self, trace_id: str, span_id: str) -> LiveSpan | None: ...
    def get_root_span_id(self, trace_id: str) -> str | None: ...
    def get_mlflow_trace_id_from_otel_id(self, otel_trace_id: int) -> str | None: ...
    def register_trace(
        self, otel_trace_id: int, trace_info: TraceInfo, is_remote_trace: bool = ...
    ) -> object: ...
    def pop_trace(self, otel_trace_id: int) -> FinishedTrace | None: ...
