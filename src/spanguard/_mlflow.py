"""The only module that knows MLflow beyond its public names.

Each private or half-public touch, why it is needed, and what happens where it is missing:

=============================================  ==================================================
touch                                          reason; without it
=============================================  ==================================================
`tracing.provider.get_context_api`-like pair   the ambient span must be MLflow's active span, and
`mlflow_runtime_context` / OTel `context`      be restored also from another context, which tokens
                                               cannot do; without: ImportError at import, a
                                               supported MLflow has it (3.10 to 3.17 read)
`tracing.provider.provider`, `_get_tracer`     to hear of every span whichever API opens it, one
                                               OpenTelemetry span processor is added to MLflow's
                                               provider; without: only our own spans are guarded
`tracing.provider._trace_disabled_state`       tells a hidden provider from a replaced one;
                                               without: a hidden one counts as replaced
`InMemoryTraceManager` and its `_traces`       the live span of an id, and whether a trace was
                                               evicted; without the latter: eviction goes unnoticed
`LiveSpan._span` and the OpenTelemetry span's  ending without MLflow's decorations when the full
`_status`, `_attributes`                       end failed; ERROR after OK; the number of attributes
`tracing.utils.TraceJSONEncoder`               to know beforehand what MLflow's own dump will do;
                                               without: `json` with `default=str`
`tracing.attachments.Attachment`               must not be rewritten; without (3.10): there are none
`exporter._async_queue._queue`                 to wait for what is pending without stopping MLflow's
                                               threads; without: MLflow's own, slower flush
`tracer.id_generator`                          a chosen trace id; without: the id is not chosen
=============================================  ==================================================
"""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import mlflow
from mlflow.entities import LiveSpan, NoOpSpan, SpanEvent, SpanStatus, SpanStatusCode
from mlflow.environment_variables import MLFLOW_USE_DEFAULT_TRACER_PROVIDER
from mlflow.tracing import provider as _provider_module
from mlflow.tracing.constant import TraceMetadataKey
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracking import MlflowClient
from opentelemetry import context as _otel_context_api
from opentelemetry import trace as _otel
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import INVALID_SPAN, Status, StatusCode
from opentelemetry.trace import Span as OtelSpan

if TYPE_CHECKING:
    from mlflow.entities import Span

__all__ = [
    "INVALID_SPAN",
    "LiveSpan",
    "MlflowClient",
    "NoOpSpan",
    "OtelSpan",
    "SpanEvent",
    "SpanProcessor",
    "SpanStatus",
    "SpanStatusCode",
]

SESSION_KEY = TraceMetadataKey.TRACE_SESSION
USER_KEY = TraceMetadataKey.TRACE_USER
RUN_KEY = TraceMetadataKey.SOURCE_RUN

# So many attributes fit on a span in any case, beside MLflow's own.
SAFE_ATTRIBUTES = 64

# Keys under MLflow's prefix that its documentation tells users to set by hand.
_ANNOTATION_KEYS = frozenset(
    {
        "mlflow.chat.tokenUsage",
        "mlflow.chat.tools",
        "mlflow.llm.cost",
        "mlflow.llm.model",
        "mlflow.llm.provider",
        "mlflow.message.format",
    }
)


def is_reserved(key: str) -> bool:
    """Tell whether an attribute key is MLflow's own and would break the span if overwritten."""
    return key.startswith("mlflow.") and key not in _ANNOTATION_KEYS


# -- the active span ---------------------------------------------------------------------------


def current_otel_span() -> OtelSpan:
    """Return the OpenTelemetry span that MLflow sees as active here; INVALID_SPAN if none."""
    return _otel.get_current_span(_provider_module.get_current_context())


class ActiveState:
    """What is active here and now. An immutable value: it can be restored in any context."""

    __slots__ = ("_context", "_otel_context", "_runtime")

    def __init__(self) -> None:
        isolated = cast(Any, MLFLOW_USE_DEFAULT_TRACER_PROVIDER).get()
        self._runtime: Any = (
            _provider_module.mlflow_runtime_context if isolated else _otel_context_api
        )
        self._context = self._runtime.get_current()
        self._otel_context = None
        if isolated and _propagates_to_otel():
            self._otel_context = _otel_context_api.get_current()

    def restore(self) -> None:
        """Make active what was active when this was taken."""
        # attach() and never detach(token): a token is bound to the context it was made in.
        self._runtime.attach(self._context)
        if self._otel_context is not None:
            _otel_context_api.attach(self._otel_context)


def active_state() -> ActiveState:
    """Take down what is active here."""
    return ActiveState()


def activate(span: OtelSpan) -> ActiveState:
    """Make a span active and return what was active before."""
    before = ActiveState()
    _provider_module.set_span_in_context(cast(Any, _HasSpan(span)))
    return before


class _HasSpan:
    """All that `set_span_in_context` reads of a span."""

    __slots__ = ("_span",)

    def __init__(self, span: OtelSpan) -> None:
        self._span = span


def _propagates_to_otel() -> bool:
    setting = getattr(_provider_module, "MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT", None)
    return bool(setting is not None and setting.get())


@contextmanager
def no_active_span() -> Iterator[None]:
    """Hide the active span, so that a new trace can start inside another."""
    before = activate(INVALID_SPAN)
    try:
        yield
    finally:
        before.restore()


# -- hearing of every span ---------------------------------------------------------------------

_watch_lock = threading.Lock()
_watched: Any = None


def watch(processor: SpanProcessor) -> bool:
    """Add our processor to MLflow's provider if it is not there yet. True when newly added.

    MLflow replaces its provider on `set_experiment`, `set_destination`, `enable`: so this is
    asked before each start, and costs one comparison.
    """
    global _watched
    if _watched is not None and _provider_module.provider.get() is _watched:
        return False
    with _watch_lock:
        _provider_module._get_tracer(__name__)  # initialises the provider on first use
        current = _provider_module.provider.get()
        if current is _watched or not isinstance(current, TracerProvider):
            return False
        active = current._active_span_processor
        if processor not in active._span_processors:
            current.add_span_processor(processor)
        _watched = current
        return True


def current_provider() -> object:
    """Return what now receives new spans, to notice later that it was replaced."""
    state = getattr(_provider_module, "_trace_disabled_state", None)
    if state and state.get("depth"):  # hidden for the length of a call of MLflow's, not replaced
        return state.get("saved_provider")
    return _provider_module.provider.get()


# -- starting ----------------------------------------------------------------------------------


def start_root(name: str, *, span_type: str, start_time_ns: int | None, **trace: Any) -> Span:
    """Start a new trace, or what MLflow makes of it: a NoOpSpan where it is off or fails."""
    return mlflow.start_span_no_context(
        name, span_type=span_type, start_time_ns=start_time_ns, **trace
    )


def start_child(
    parent: LiveSpan | None, name: str, *, span_type: str, start_time_ns: int | None
) -> Span:
    """Start a span under a parent, or under what is active here if the parent is None."""
    return mlflow.start_span_no_context(
        name, span_type=span_type, parent_span=parent, start_time_ns=start_time_ns
    )


def noop_span() -> Any:
    """Return a span that ignores."""
    return cast(Any, NoOpSpan)()


def is_noop(span: Any) -> bool:
    """Tell whether MLflow gave us a span that records nothing."""
    return span is None or isinstance(span, NoOpSpan)


def carries_decision(span: Any) -> bool:
    """Tell whether a no-op span stands for a sampling decision that its children must share."""
    inner = otel_span(span)
    context = inner.get_span_context() if inner is not None else None
    return context is not None and context.is_valid


def otel_span(span: Any) -> OtelSpan | None:
    """Return the OpenTelemetry span under an MLflow span; None for a double."""
    inner = getattr(span, "_span", None)
    return inner if isinstance(inner, OtelSpan) else None


# -- what MLflow has in memory -----------------------------------------------------------------


def _trace_manager() -> Any:
    return cast(Any, InMemoryTraceManager).get_instance()


def live_span(trace_id: str, span_id: str) -> LiveSpan | None:
    """Return a span of a trace that is still in MLflow's buffer."""
    return cast("LiveSpan | None", _trace_manager().get_span_from_id(trace_id, span_id))


def root_span(trace_id: str) -> LiveSpan | None:
    """Return the root of a trace that is still in MLflow's buffer."""
    manager = _trace_manager()
    root_id = manager.get_root_span_id(trace_id)
    return cast("LiveSpan", manager.get_span_from_id(trace_id, root_id)) if root_id else None


def is_buffered(trace_id: str) -> bool:
    """Tell whether MLflow still holds the trace; without that, its spans go nowhere."""
    traces = getattr(_trace_manager(), "_traces", None)
    return traces is None or trace_id in traces


def open_spans_in(trace_id: str) -> list[LiveSpan]:
    """Return the spans of a trace that have not ended, in the order they started."""
    with _trace_manager().get_trace(trace_id) as trace:
        spans = list(trace.span_dict.values()) if trace else []
    return [span for span in spans if span.end_time_ns is None]


def mlflow_trace_id(otel: OtelSpan) -> str | None:
    """Return the MLflow trace id of an OpenTelemetry span."""
    context = otel.get_span_context()
    found = _trace_manager().get_mlflow_trace_id_from_otel_id(context.trace_id)
    return cast("str | None", found)


def active_span() -> LiveSpan | None:
    """Return the span that MLflow's own API calls active."""
    return mlflow.get_current_active_span()


def tracking_uri() -> str:
    """Return the tracking URI in force."""
    return mlflow.get_tracking_uri()


def add_to_trace(trace_id: str, tags: dict[str, str], metadata: dict[str, str]) -> None:
    """Add tags and metadata to a trace in memory; what it has already stays."""
    with _trace_manager().get_trace(trace_id) as trace:
        if trace is not None:
            trace.info.tags.update({k: v for k, v in tags.items() if k not in trace.info.tags})
            known = trace.info.trace_metadata
            known.update({k: v for k, v in metadata.items() if k not in known})


# -- writing and ending ------------------------------------------------------------------------


def attribute_count(span: Any) -> int:
    """Return how many attributes a span holds, MLflow's own included; 0 for a double."""
    inner = getattr(span, "_span", None)
    attributes = getattr(inner, "_attributes", None)
    return len(attributes) if attributes is not None else 0


def attribute_names(span: Any) -> list[str]:
    """Return the names of a span's attributes, without decoding the values."""
    inner = getattr(span, "_span", None)
    return list(getattr(inner, "_attributes", None) or ())


def add_quiet_event(span: Any, event: Any) -> None:
    """Add an event without raising the span's log level, as MLflow would for an exception."""
    inner = otel_span(span)
    if inner is None:
        span.add_event(event)
    else:
        inner.add_event(event.name, event.attributes, event.timestamp)


def status_code(span: Any) -> str:
    """Return "OK", "ERROR" or "UNSET"."""
    status = span.status
    return str(status.status_code.value) if isinstance(status, SpanStatus) else "UNSET"


def description(span: Any) -> str:
    """Return the description of a span's status."""
    status = span.status
    return (status.description or "") if isinstance(status, SpanStatus) else ""


def set_error(span: Any, text: str) -> None:
    """Set ERROR, also over an OK: OpenTelemetry takes OK as final and ignores what follows."""
    span.set_status(SpanStatus(SpanStatusCode.ERROR, text))
    inner = otel_span(span)
    if isinstance(inner, ReadableSpan) and status_code(span) != "ERROR":
        cast(Any, inner)._status = Status(StatusCode.ERROR, text)


def make_event(name: str, attributes: dict[str, Any]) -> Any:
    """Return a span event that happened now."""
    return cast(Any, SpanEvent)(name=name, attributes=attributes)


def is_recording_kind(otel: Any) -> bool:
    """Tell a span that records from one that stands for a remote, disabled or dropped one."""
    return isinstance(otel, ReadableSpan)


def has_ended(otel: Any) -> bool:
    """Tell whether an OpenTelemetry span has ended. Spans that never record have not."""
    return isinstance(otel, ReadableSpan) and otel.end_time is not None


def end_live(span: LiveSpan, end_time_ns: int | None) -> None:
    """End with MLflow's decorations, configured span processors too (PII masks)."""
    span.end(end_time_ns=end_time_ns)


def end_bare(otel: Any, end_time_ns: int | None) -> None:
    """End the OpenTelemetry span itself, after MLflow's own end failed."""
    otel.end(end_time=end_time_ns)


# -- payloads ----------------------------------------------------------------------------------


class _PlainEncoder(json.JSONEncoder):
    def default(self, o: Any) -> Any:
        return str(o)


def _optional(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


_encoder = _optional("mlflow.tracing.utils", "TraceJSONEncoder") or _PlainEncoder
_attachment = _optional("mlflow.tracing.attachments", "Attachment")  # MLflow 3.10 has none


def payload_encoder() -> type[json.JSONEncoder]:
    """Return the encoder that MLflow serialises payloads with."""
    return cast("type[json.JSONEncoder]", _encoder)


def is_attachment(value: Any) -> bool:
    """Tell whether a value is an MLflow attachment, which MLflow stores in its own way."""
    return _attachment is not None and isinstance(value, _attachment)


# -- a chosen trace id -------------------------------------------------------------------------

_wanted_trace_id: ContextVar[int | None] = ContextVar("spanguard_wanted_trace_id", default=None)


class _ChosenIds(IdGenerator):
    """Gives out the wanted trace id where there is one, else what the wrapped generator gives."""

    def __init__(self, wrapped: IdGenerator) -> None:
        self._wrapped = wrapped

    def generate_span_id(self) -> int:
        return self._wrapped.generate_span_id()

    def generate_trace_id(self) -> int:
        return _wanted_trace_id.get() or self._wrapped.generate_trace_id()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def is_trace_id_random(self) -> bool:
        return _wanted_trace_id.get() is None and self._wrapped.is_trace_id_random()


@contextmanager
def trace_id_chosen(hex_id: str) -> Iterator[bool]:
    """Give the next root that starts in this context the given OpenTelemetry trace id.

    Yields False where the seam is missing and the id will not be taken.
    """
    # The SDK caches tracers, so the generator is changed on the tracer and not on the provider.
    tracer: Any = _provider_module._get_tracer(_provider_module.__name__)
    tracer = getattr(tracer, "_tracer", tracer)
    generator = getattr(tracer, "id_generator", None)
    if generator is not None and not isinstance(generator, _ChosenIds):
        tracer.id_generator = _ChosenIds(generator)
    token = _wanted_trace_id.set(int(hex_id, 16))
    try:
        yield generator is not None
    finally:
        _wanted_trace_id.reset(token)


# -- flushing ----------------------------------------------------------------------------------


def flush_everything() -> None:
    """Drain MLflow's queues into the store: milliseconds, but with a dead server minutes."""
    exporter = getattr(_provider_module, "_get_trace_exporter", lambda: None)()
    if exporter is not None and not hasattr(exporter, "_async_queue"):
        return  # it exports in the thread that ends the span (MLflow 3.10): nothing is pending
    tasks: Any = getattr(getattr(exporter, "_async_queue", None), "_queue", None)
    current = _provider_module.provider.get()
    if isinstance(current, TracerProvider) and hasattr(tasks, "join"):
        current.force_flush()
        tasks.join()
    else:
        # The public way stops and restarts MLflow's threads, which takes a second or two.
        mlflow.flush_trace_async_logging()


def experiment_exists(experiment_id: str) -> bool:
    """Ask the store whether an experiment exists. May block as long as MLflow's retries do."""
    try:
        return MlflowClient().get_experiment(experiment_id) is not None
    except mlflow.MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


Ender = Callable[[SpanStatus, "int | None"], None]
