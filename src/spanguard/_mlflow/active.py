"""The active span: the one under which MLflow nests what is opened next."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

from mlflow.environment_variables import MLFLOW_USE_DEFAULT_TRACER_PROVIDER
from mlflow.tracing import provider as _provider_module
from opentelemetry import context as _otel_context_api
from opentelemetry import trace as _otel
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, NonRecordingSpan
from opentelemetry.trace import Span as OtelSpan

from spanguard._mlflow.optional import optional

__all__ = [
    "ActiveState",
    "Context",
    "activate",
    "active_state",
    "current_otel_span",
    "mode",
    "mode_has_changed",
    "no_active_span",
    "plain_spans",
    "span_in",
]


class _Runtime(Protocol):
    """One of OpenTelemetry's contexts."""

    def get_current(self) -> Context: ...
    def attach(self, context: Context) -> object: ...


class _Mode:
    """Which of OpenTelemetry's contexts MLflow uses: its own, or the process's.

    MLflow asks its environment variables at each step, a microsecond each; here the raw strings
    are compared when a trace starts, and read again only when they have changed.
    """

    __slots__ = ("_seen", "isolated", "propagates", "runtime")

    def __init__(self) -> None:
        self._seen: tuple[str | None, ...] = ()
        self.refresh()

    def refresh(self) -> bool:
        """Read the settings again if they have changed; tell whether they have."""
        seen = (os.environ.get(_ISOLATED_VARIABLE), os.environ.get(_PROPAGATE_VARIABLE))
        if seen == self._seen:
            return False
        self._seen = seen
        self.isolated = bool(cast("Any", MLFLOW_USE_DEFAULT_TRACER_PROVIDER).get())
        propagate = optional("mlflow.environment_variables", _PROPAGATE_VARIABLE)
        self.propagates = bool(self.isolated and propagate is not None and propagate.get())
        self.runtime: _Runtime = (
            getattr(_provider_module, "mlflow_runtime_context", _otel_context_api)
            if self.isolated
            else _otel_context_api
        )
        return True


_ISOLATED_VARIABLE = "MLFLOW_USE_DEFAULT_TRACER_PROVIDER"
_PROPAGATE_VARIABLE = "MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT"
_SPAN_KEY: Any = optional("opentelemetry.trace.propagation", "_SPAN_KEY")
mode = _Mode()


def mode_has_changed() -> bool:
    """Look at MLflow's settings again; tell whether what is active is to be looked up anew."""
    return mode.refresh()


# Classes of spans that can be told to be such by their type alone. OpenTelemetry asks an abstract
# class, at ten times the cost.
plain_spans: set[type] = set()


def current_otel_span() -> OtelSpan:
    """Return the OpenTelemetry span that MLflow sees as active here; INVALID_SPAN if none."""
    context = mode.runtime.get_current()
    found: Any = context.get(_SPAN_KEY)
    if type(found) in plain_spans:
        return found  # type: ignore[no-any-return]
    active = _otel.get_current_span(context)
    if type(active) is NonRecordingSpan and active.get_span_context() is None:
        return INVALID_SPAN  # what MLflow makes active where it could not start a span
    return active


def span_in(context: Context | None) -> OtelSpan:
    """Return the span that is active in a context; None stands for what is active here."""
    return current_otel_span() if context is None else _otel.get_current_span(context)


class ActiveState:
    """What is active here and now. An immutable value: it can be restored in any context."""

    __slots__ = ("_context", "_otel_context", "_runtime", "_set")

    def __init__(self) -> None:
        self._set: Context | None = None
        self._runtime = mode.runtime
        self._context = self._runtime.get_current()
        self._otel_context = _otel_context_api.get_current() if mode.propagates else None

    def restore(self) -> None:
        """Make active what was active when this was taken."""
        # attach() and never detach(token): a token is bound to the context it was made in.
        self._runtime.attach(self._context)
        if self._otel_context is not None:
            _otel_context_api.attach(self._otel_context)

    @property
    def span(self) -> OtelSpan:
        """The span that was active."""
        return _otel.get_current_span(self._context)

    def is_next(self) -> bool:
        """Tell whether what `replace` has set is what is active here and now."""
        return self._set is not None and self._runtime.get_current() is self._set

    def replace(self, span: OtelSpan) -> None:
        """Make a span active in the place of what was."""
        self._set = _otel.set_span_in_context(span, self._context)
        self._runtime.attach(self._set)
        if self._otel_context is not None:
            _otel_context_api.attach(_otel.set_span_in_context(span, self._otel_context))


def active_state() -> ActiveState:
    """Write down what is active here."""
    return ActiveState()


def activate(span: OtelSpan) -> ActiveState:
    """Make a span active and return what was active before."""
    before = ActiveState()
    before.replace(span)
    return before


@contextmanager
def no_active_span() -> Iterator[None]:
    """Hide the active span, so that a new trace can start inside another."""
    before = activate(INVALID_SPAN)
    try:
        yield
    finally:
        before.restore()
