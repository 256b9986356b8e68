"""MLflow's tracer provider: heard of every span, and followed when MLflow replaces it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

from mlflow.tracing import provider as _provider_module
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

from spanguard._mlflow.active import mode
from spanguard._mlflow.optional import optional

__all__ = [
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
watched: Any = None
listening: SpanProcessor | None = None  # ours, once it was added
tracer: Any = None  # of the watched provider


_last_seen: Any = None  # what MLflow gave last by its public name

# The public name, from MLflow 3.15 on, of what was private before.
_bridged_provider = optional("mlflow.tracing.provider", "get_bridged_tracer_provider")


def provider_in_force() -> Any:
    # The attribute where there is one: provider.get() asks the environment each time.
    wrapper: Any = getattr(_provider_module, "provider", None)
    if mode.isolated:
        current = getattr(wrapper, "_isolated_tracer_provider", None)
        if current is not None:
            return current
    return held_provider()


def held_provider() -> Any:
    """Return the provider that MLflow holds, without making one where there is none."""
    try:
        return cast("Any", _provider_module).provider.get()
    except AttributeError:
        # MLflow lacks it. Not the public way instead, which would wait for itself where MLflow is
        # making a provider at this moment.
        return _last_seen


def initialized_provider() -> Any:
    """Return MLflow's provider, which MLflow makes on first use."""
    global _last_seen
    if _bridged_provider is not None:
        _last_seen = _bridged_provider()
        return _last_seen
    _provider_module._get_tracer(__name__)
    return provider_in_force()


def add_to(processor: SpanProcessor, provider: Any) -> None:
    if isinstance(provider, TracerProvider) and processor not in processors_of(provider):
        provider.add_span_processor(processor)


follower: SpanProcessor | None = None
initialize: Callable[..., None] | None = None  # MLflow's own, once we stand in its place


def current_provider() -> object:
    """Return what now receives new spans, to notice later that it was replaced."""
    recording = recorder
    if recording is not None:  # hidden for the length of a recording, not replaced
        return recording.hidden_provider
    state = getattr(_provider_module, "_trace_disabled_state", None)
    if state and state.get("depth"):  # hidden for the length of a call of MLflow's, not replaced
        return state.get("saved_provider")
    return provider_in_force()


recorder: Any = None


def processors_of(provider: Any) -> tuple[Any, ...]:
    active = getattr(provider, "_active_span_processor", None)
    return tuple(getattr(active, "_span_processors", ()))
