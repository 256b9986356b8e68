"""Hearing of every span: of the provider that MLflow has, and of each that it makes."""

from __future__ import annotations

from typing import Any, cast

from mlflow.tracing import provider as _provider_module
from opentelemetry import trace as _otel
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

from spanguard._base.findings import contained
from spanguard._mlflow import provider, takeover
from spanguard._mlflow.active import mode
from spanguard._mlflow.exporting import close_ledger, note_deliveries, noting_failure
from spanguard._mlflow.ids import give_own_ids
from spanguard._mlflow.optional import optional_module
from spanguard._mlflow.provider import (
    add_to,
    held_provider,
    initialized_provider,
    provider_in_force,
)
from spanguard._mlflow.queue import widen_export_queues
from spanguard._mlflow.seam_check import look_once
from spanguard._mlflow.starting import let_children_follow

__all__ = ["follow", "stand_in_for_initialize", "add_processor"]


def add_processor(processor: SpanProcessor) -> bool:
    """Add our processor to MLflow's provider if it is not there yet. True when newly added.

    MLflow replaces its provider on `set_experiment`, `set_destination`, `enable`: so this is
    asked before each start, and costs one comparison.
    """
    if provider.watched is not None and provider_in_force() is provider.watched:
        return False
    with provider.watch_lock:
        try:
            current = initialized_provider()
        finally:
            look_once()  # now: MLflow imports its exporter for the first span only
        if not isinstance(current, TracerProvider):
            provider.tracer = provider.watched = None  # tracing is off
            return False
        if current is provider.watched:
            return False
        _import_beforehand()
        provider.listening = processor
        give_own_ids(current)
        let_children_follow(current)
        with contained("listening to MLflow's exporter"):
            note_deliveries()
        add_to(processor, current)
        provider.tracer = current.get_tracer(_provider_module.__name__)
        with contained("widening MLflow's queues"):
            widen_export_queues()
        with contained("taking over the delivery of traces"):
            takeover.follow()
        provider.watched = current
        return True


def _import_beforehand() -> None:
    """Import what MLflow imports in the middle of spans: a fork meanwhile would have to wait."""
    for module in ("mlflow.pyfunc", "mlflow.utils.providers"):
        optional_module(module)


def follow(processor: SpanProcessor) -> None:
    """Add our processor to MLflow's provider, and to each that MLflow will put in its place.

    `watch` asks before each span of ours; this hears of the first raw span too. It is for test
    runs, and lasts as long as the process. It does not make MLflow start its provider.
    """
    with provider.watch_lock:
        stand_in_for_initialize()
        provider.follower = processor
    add_to(processor, held_provider())


def stand_in_for_initialize() -> None:
    if provider.initialize is None and hasattr(_provider_module, "_initialize_tracer_provider"):
        provider.initialize = _provider_module._initialize_tracer_provider
        cast("Any", _provider_module)._initialize_tracer_provider = _initialize_and_follow


def _initialize_and_follow(disabled: bool = False) -> None:
    """Do what MLflow does for a new provider, or make one that records; then add what is ours."""
    recording = provider.recorder
    if recording is not None and not disabled:
        _provider_module.provider.set(recording.new_provider())
    elif provider.initialize is not None:
        with noting_failure(object()):
            provider.initialize(disabled=disabled)
        note_deliveries()
        with contained("taking over the delivery of traces"):
            takeover.follow()
        if disabled:
            close_ledger()
    give_own_ids(held_provider())
    if provider.follower is not None:
        add_to(provider.follower, held_provider())


def _give_own_ids_from_the_first_span_on() -> None:
    """Give own ids to the provider that MLflow has, and to each that it makes from here on.

    At import: a root may be somebody else's, and then it is there before we listen.
    """
    stand_in_for_initialize()
    # Not by provider.get(): that could make OpenTelemetry set up one that nobody needs.
    wrapper = getattr(_provider_module, "provider", None)
    give_own_ids(getattr(wrapper, "_isolated_tracer_provider", None))
    if not mode.isolated:
        give_own_ids(getattr(_otel, "_TRACER_PROVIDER", None))


_give_own_ids_from_the_first_span_on()
