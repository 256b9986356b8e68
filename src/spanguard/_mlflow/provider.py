"""MLflow's tracer provider: heard of every span, and followed when MLflow replaces it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol, cast

from mlflow.entities import Trace
from mlflow.tracing import provider as _provider_module
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.trace import Tracer
from opentelemetry.trace import TracerProvider as AnyProvider

from spanguard._mlflow.active import mode
from spanguard._mlflow.optional import optional
from spanguard._mlflow.shapes import RecordingSpan

__all__ = [
    "SpanListener",
    "add_to",
    "current_provider",
    "follower",
    "held_provider",
    "initialize",
    "initialized_provider",
    "listening",
    "processors_of",
    "provider_in_force",
    "recorder",
    "tracer",
    "watch_lock",
    "watched",
]


watch_lock = threading.RLock()  # re-entrant: a finalizer may open a span meanwhile
watched: TracerProvider | None = None
listening: SpanProcessor | None = None  # ours, once it was added
tracer: Tracer | None = None  # of the watched provider


_last_seen: AnyProvider | None = None  # what MLflow gave last by its public name

# The public name, from MLflow 3.15 on, of what was private before.
_bridged_provider = optional("mlflow.tracing.provider", "get_bridged_tracer_provider")


def provider_in_force() -> AnyProvider | None:
    # The attribute where there is one: provider.get() asks the environment each time.
    wrapper = getattr(_provider_module, "provider", None)
    if mode.isolated:
        current: AnyProvider | None = getattr(wrapper, "_isolated_tracer_provider", None)
        if current is not None:
            return current
    return held_provider()


def held_provider() -> AnyProvider | None:
    """Return the provider that MLflow holds, without making one where there is none."""
    try:
        return cast("AnyProvider | None", _provider_module.provider.get())
    except AttributeError:
        # MLflow lacks it. Not the public way instead, which would wait for itself where MLflow is
        # making a provider at this moment.
        return _last_seen


def initialized_provider() -> AnyProvider:
    """Return MLflow's provider, which MLflow makes on first use."""
    global _last_seen
    if _bridged_provider is not None:
        _last_seen = _bridged_provider()
        return cast("AnyProvider", _last_seen)
    _provider_module._get_tracer(__name__)
    return cast("AnyProvider", provider_in_force())


def add_to(processor: SpanProcessor, provider: object) -> None:
    if isinstance(provider, TracerProvider) and processor not in processors_of(provider):
        provider.add_span_processor(processor)


follower: SpanProcessor | None = None
initialize: Callable[..., None] | None = None  # MLflow's own, once we stand in its place


_disabled_state = optional("mlflow.tracing.provider", "_trace_disabled_state")


def current_provider() -> object:
    """Return what now receives new spans, to notice later that it was replaced."""
    recording = recorder
    if recording is not None:  # hidden for the length of a recording, not replaced
        return recording.hidden_provider
    # Hidden for the length of a call of MLflow's, not replaced:
    if _disabled_state and _disabled_state.get("depth"):
        return _disabled_state.get("saved_provider")
    return provider_in_force()


class SpanListener(Protocol):
    """What a recording tells of. Called in the thread that starts or ends a span."""

    def started(self, span: RecordingSpan) -> None: ...

    def ended(self, span: ReadableSpan) -> None: ...

    def finished(self, trace: Trace) -> None: ...


class Recorder(Protocol):
    """What records the spans of a test (test_recording.py)."""

    listeners: tuple[SpanListener, ...]
    hidden_provider: AnyProvider | None

    def install(self) -> None:
        """Put a provider that records in the place of the current one."""

    def stop(self) -> None:
        """Put everything back as it was found."""

    def new_provider(self) -> TracerProvider:
        """Return a provider that records, and sends to no store."""
        ...


recorder: Recorder | None = None


def processors_of(provider: object) -> tuple[SpanProcessor, ...]:
    active = getattr(provider, "_active_span_processor", None)
    return tuple(getattr(active, "_span_processors", ()))
