"""Spans that start, and those that record nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlflow
from mlflow.entities import LiveSpan, NoOpSpan
from opentelemetry import trace as _otel
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, SamplingResult
from opentelemetry.trace import NonRecordingSpan, SpanContext

from spanguard._mlflow import provider
from spanguard._mlflow.active import mode
from spanguard._mlflow.memory import trace_of
from spanguard._mlflow.optional import optional
from spanguard._mlflow.own_start import start_plain_root
from spanguard._mlflow.shapes import MlflowSpan
from spanguard._mlflow.spans import otel_span

__all__ = [
    "carries_decision",
    "is_log_level",
    "is_noop",
    "let_children_follow",
    "noop_span",
    "records_nothing",
    "sampled_at",
    "sampled_out",
    "start_child",
    "start_plain_child",
    "start_root",
]


def start_root(name: str, *, span_type: str, start_time_ns: int | None, **trace: Any) -> MlflowSpan:
    """Start a new trace, or what MLflow makes of it: a NoOpSpan where it is off or fails."""
    if start_time_ns is None and not (_is_off_here() or trace.get("tags") or trace["metadata"]):
        span = start_plain_root(name, trace.get("experiment_id"))
        if span is not None:
            return cast("MlflowSpan", span)
    return mlflow.start_span_no_context(
        name, span_type=span_type, start_time_ns=start_time_ns, **trace
    )


def start_child(parent: Any, name: str, *, span_type: str, start_time_ns: int | None) -> MlflowSpan:
    """Start a span under a parent: a NoOpSpan where tracing is off, or where it fails."""
    return mlflow.start_span_no_context(
        name, span_type=span_type, parent_span=parent, start_time_ns=start_time_ns
    )


def start_plain_child(parent: Any, name: str) -> LiveSpan | None:
    """Start a span as `start_span_no_context` does, without its repeated look-up of the tracer.

    The look-up is a tenth of what a span costs. The span's type is left for the caller to write.
    None where this way is not known to be the same: then the public one is to be taken.
    """
    tracer = provider.tracer
    if tracer is None or _is_off_here() or is_noop(parent):
        return None
    under: Any = parent._span
    trace = trace_of(under)
    if trace is None:
        return None
    context = _otel.set_span_in_context(under, mode.runtime.get_current())
    otel = tracer.start_span(name, context=context, attributes={})
    if not isinstance(otel, ReadableSpan):
        return None
    return trace.span_dict.get(f"{cast('Any', otel).context.span_id:016x}")


def _is_off_here() -> bool:
    """Tell whether `mlflow.tracing.context(enabled=False)` is in force."""
    settings = _user_context.get() if _user_context is not None else None
    return settings is not None and settings.enabled is False


def records_nothing() -> bool:
    """Tell whether a span that is started here and now would be one that ignores."""
    return provider.tracer is None or _is_off_here()


def noop_span() -> MlflowSpan:
    """Return a span that ignores."""
    return cast("Callable[[], MlflowSpan]", NoOpSpan)()


def is_noop(span: object) -> bool:
    """Tell whether MLflow gave us a span that records nothing."""
    return span is None or isinstance(span, NoOpSpan)


def carries_decision(span: object) -> bool:
    """Tell whether a no-op span stands for a sampling decision that its children must share."""
    inner = otel_span(span)
    context = inner.get_span_context() if inner is not None else None
    return context is not None and context.is_valid


_user_context = optional("mlflow.tracing.context", "_USER_TRACE_CONTEXT")  # 3.10 has none


_sampling_override = optional("mlflow.tracing.sampling", "_SAMPLING_RATIO_OVERRIDE")
_sampler = optional("mlflow.tracing.sampling", "_MlflowSampler")
_log_levels = optional("mlflow.entities", "SpanLogLevel")  # 3.10 has none


@contextmanager
def sampled_at(ratio: float) -> Iterator[None]:
    """Sample the traces that start in a block at a ratio, as `sampling_ratio_override=` does."""
    if _sampling_override is None:
        yield
        return
    token = _sampling_override.set(ratio)
    try:
        yield
    finally:
        _sampling_override.reset(token)


class _FollowingRoot(ParentBased):
    """Decides as `ParentBased` does, in one look where the parent is recorded in this process."""

    def should_sample(
        self, parent_context: Any, trace_id: int, name: str, *args: Any, **kwargs: Any
    ) -> SamplingResult:
        parent = _otel.get_current_span(parent_context).get_span_context()
        if parent.is_valid and not parent.is_remote and parent.trace_flags.sampled:
            attributes = args[1] if len(args) > 1 else kwargs.get("attributes")
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes, parent.trace_state)
        return super().should_sample(parent_context, trace_id, name, *args, **kwargs)


def let_children_follow(provider: TracerProvider) -> None:
    """Let the spans of a trace share its root's sampling; 3.10 samples each of them."""
    if _sampler is not None and isinstance(provider.sampler, _sampler):
        provider.sampler = _FollowingRoot(provider.sampler)


def sampled_out(span: MlflowSpan) -> MlflowSpan:
    """Return a span that ignores, and whose children do, in place of one that was sampled out."""
    if carries_decision(span):
        return span
    context = SpanContext(
        int.from_bytes(os.urandom(16), "big"), int.from_bytes(os.urandom(8), "big"), False
    )
    decided = noop_span()
    cast("Any", decided)._span = NonRecordingSpan(context)
    return decided


def is_log_level(level: object) -> bool:
    """Tell whether MLflow takes a log level. One that has none takes them all, and ignores them."""
    if _log_levels is None:
        return True
    if not issubclass(type(level), (str, _log_levels)):
        return False
    try:
        _log_levels.from_value(level)
    except Exception:  # noqa: BLE001
        return False
    return True
