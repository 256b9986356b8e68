"""Recording for tests: every span is told of, and no store is asked."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, cast

from mlflow.entities import TraceInfo, TraceLocation, TraceState
from mlflow.tracing import provider as _provider_module
from mlflow.tracking import fluent as _fluent
from opentelemetry import trace as _otel
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import SpanContext

from spanguard._mlflow import provider
from spanguard._mlflow.active import mode
from spanguard._mlflow.destination import active_experiment_id
from spanguard._mlflow.ids import OwnIds, mlflow_trace_id_of
from spanguard._mlflow.memory import manager_in_force
from spanguard._mlflow.names import EXPERIMENT_KEY
from spanguard._mlflow.optional import optional_module
from spanguard._mlflow.provider import SpanListener, add_to, provider_in_force
from spanguard._mlflow.shapes import RecordingSpan
from spanguard._mlflow.watching import stand_in_for_initialize

__all__ = ["is_recording", "start_recording", "stop_recording"]


def is_recording() -> bool:
    """Tell whether a test records: then spans go to no store, and none is to be asked."""
    return provider.recorder is not None


def start_recording(listener: SpanListener) -> None:
    """Tell a listener of every span of this process from here on, and send none to the store."""
    with provider.watch_lock:
        stand_in_for_initialize()
        if provider.recorder is None:
            mode.refresh()
            provider.recorder = _Recording()
            provider.recorder.install()
        provider.recorder.listeners += (listener,)


def stop_recording(listener: SpanListener) -> None:
    """Undo one `start_recording`, in whatever order; the last one restores what was."""
    with provider.watch_lock:
        recording = provider.recorder
        if recording is None:
            return
        recording.listeners = tuple(other for other in recording.listeners if other is not listener)
        if not recording.listeners:
            recording.stop()
            provider.recorder = None


class _Recording(SpanProcessor):
    """Tells the listeners of spans; on a provider in the place of the one that has a store."""

    def __init__(self) -> None:
        self.listeners: tuple[SpanListener, ...] = ()
        self.hidden_provider = provider_in_force()
        self._begun: set[int] = set()
        self._settings = _Settings()

    def install(self) -> None:
        """Put a provider that records in the place of the current one, which is left running."""
        wrapper: Any = _provider_module.provider
        if mode.isolated:
            wrapper._isolated_tracer_provider = self.new_provider()
        else:
            cast("Any", _otel)._TRACER_PROVIDER = self.new_provider()
        wrapper.once._done = True
        if provider.follower is not None:
            add_to(provider.follower, wrapper.get())

    def new_provider(self) -> TracerProvider:
        """Return a provider that samples everything and needs no clean-up at exit."""
        provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource({}),
            shutdown_on_exit=False,
            id_generator=OwnIds(),
        )
        provider.add_span_processor(self._mlflows_processor())
        provider.add_span_processor(self)  # after it, which writes on the span and its trace
        return provider

    def _mlflows_processor(self) -> Any:
        # Here and not at the top: a version without it costs only those who test with it.
        from mlflow.tracing.processor.mlflow_v3 import MlflowV3SpanProcessor

        processor: Any = MlflowV3SpanProcessor(_Nowhere(), export_metrics=False)
        processor._start_trace = lambda root: self._start_trace(processor, root)
        return processor

    def _start_trace(self, processor: Any, root: RecordingSpan) -> TraceInfo:
        """Do what MLflow's own does, which asks the store for the experiment that is in force."""
        given = root.attributes.get(EXPERIMENT_KEY)
        experiment_id = json.loads(given) if given else active_experiment_id() or "0"
        info = TraceInfo(
            trace_id=mlflow_trace_id_of(root.context.trace_id),
            trace_location=TraceLocation.from_experiment_id(experiment_id),
            request_time=root.start_time // 1_000_000,
            state=TraceState.IN_PROGRESS,
            trace_metadata=processor._get_basic_trace_metadata(),
            tags=processor._get_basic_trace_tags(root),
        )
        self._begun.add(root.context.trace_id)
        manager_in_force().register_trace(root.context.trace_id, info)
        return info

    def on_start(self, span: Any, parent_context: Context | None = None) -> None:
        for listener in self.listeners:
            listener.started(span)

    def on_end(self, span: ReadableSpan) -> None:
        for listener in self.listeners:
            listener.ended(span)
        context: Any = span.context
        if context.trace_id not in self._begun:
            self._take_out(context)
        elif self._is_over(context.trace_id):
            self._finish(context.trace_id)

    def _take_out(self, context: SpanContext) -> None:
        # Its trace began outside and goes to its store, which knows nothing of this span.
        trace_id = manager_in_force().get_mlflow_trace_id_from_otel_id(context.trace_id)
        with manager_in_force().get_trace(trace_id) as trace:
            if trace is not None:
                trace.span_dict.pop(f"{context.span_id:016x}", None)

    def _is_over(self, otel_trace_id: int) -> bool:
        trace_id = manager_in_force().get_mlflow_trace_id_from_otel_id(otel_trace_id)
        with manager_in_force().get_trace(trace_id) as trace:
            spans = list(trace.span_dict.values()) if trace else []
        return bool(spans) and all(span.end_time_ns is not None for span in spans)

    def _finish(self, otel_trace_id: int) -> None:
        self._begun.discard(otel_trace_id)
        finished = manager_in_force().pop_trace(otel_trace_id)
        if finished is not None:
            for listener in self.listeners:
                listener.finished(finished.trace)

    def stop(self) -> None:
        """Put everything back as it was found."""
        self._settings.restore()

    def shutdown(self) -> None:
        pass

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True


class _Nowhere(SpanExporter):
    """Where the spans of a recording are exported to."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


class _Settings:
    """What decides on the way of a span, as it was found."""

    _VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID")

    def __init__(self) -> None:
        self._found = [
            (owner, name, getattr(owner, name))
            for owner, name in self._places()
            if hasattr(owner, name)
        ]
        self._environment = {name: os.environ.get(name) for name in self._VARIABLES}

    @staticmethod
    def _places() -> list[tuple[object, str]]:
        wrapper: object = _provider_module.provider
        return [
            (wrapper, "_isolated_tracer_provider"),
            (getattr(wrapper, "_isolated_tracer_provider_once", None), "_done"),
            (getattr(wrapper, "_global_provider_init_once", None), "_done"),
            (_otel, "_TRACER_PROVIDER"),
            (getattr(_provider_module, "_MLFLOW_TRACE_USER_DESTINATION", None), "_global_value"),
            (optional_module("mlflow.tracing.config"), "_MLFLOW_TRACING_CONFIG"),
            (optional_module("mlflow.tracking._tracking_service.utils"), "_tracking_uri"),
            (_fluent, "_active_experiment_id"),
        ]

    def restore(self) -> None:
        for owner, name, value in self._found:
            setattr(owner, name, value)
        for name, variable in self._environment.items():
            if variable is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = variable
