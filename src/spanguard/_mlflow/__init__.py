"""The only module that knows MLflow beyond its public names.

Each private or half-public touch, why it is needed, and what happens where it is missing:

=============================================  ==================================================
touch                                          reason; without it
=============================================  ==================================================
`tracing.provider.get_context_api`-like pair   the ambient span must be MLflow's active span, and
`mlflow_runtime_context` / OTel `context`      be restored also from another context, which tokens
                                               cannot do; without: AttributeError at import, a
                                               supported MLflow has it (3.10 to 3.17 read)
`tracing.provider.provider`, `_get_tracer`     to hear of every span whichever API opens it, one
                                               OpenTelemetry span processor is added to MLflow's
                                               provider; without: only our own spans are guarded
`tracing.context._USER_TRACE_CONTEXT`          to honour `context(enabled=False)` when a child is
                                               started by the watched provider's tracer itself;
                                               without: there is no such setting (3.10)
`tracing.provider._trace_disabled_state`       tells a hidden provider from a replaced one;
                                               without: a hidden one counts as replaced
`InMemoryTraceManager` and its `_traces`       the live span of an id, and whether a trace was
                                               evicted; without the latter: eviction goes unnoticed
its `_traces`, `_lock`, and of the buffer the  open traces must outlive MLflow's limits: the
`ttl` and `maxsize`, of a trace `span_dict`,   buffer is replaced by one that keeps them;
`is_remote_trace`; `_otel_id_to_mlflow_...`    without: a warning before the first loss
`LiveSpan._span` and the OpenTelemetry span's  ending without MLflow's decorations when the full
`_status`, `_attributes`                       end failed; ERROR after OK; the number of attributes
a span processor's `_on_ending`, and the       where another API ends a span of ours as ERROR, it
`_events` of a span                            gets the event that MLflow's page paints red by;
                                               without: its status alone says it
`tracing.utils.TraceJSONEncoder`               to know beforehand what MLflow's own dump will do;
                                               without: `json` with `default=str`
`tracing.sampling._SAMPLING_RATIO_OVERRIDE`    `sampling_ratio_override=`, which MLflow's decorator
                                               sets; without: the ratio is ignored
`_MlflowSampler` of a provider, and a          its decision is to be that of the whole trace, which
`NoOpSpan`'s `_span`                           3.10 takes anew for each span; without: unchanged
`SpanLogLevel.from_value`                      to tell of a wrong log level before the span opens;
                                               without (3.10): there are none
the `_dict` of OpenTelemetry's attributes      whether outputs were set in the body; without: the
                                               same, slower
`tracing.attachments.Attachment`               must not be rewritten; without (3.10): there are none
the loggers of what starts and ends spans      MLflow swallows what a signal handler raises in the
                                               middle of it, with one line in its log; without: or
                                               where that line is switched off, it stays swallowed
the OpenTelemetry span's `_span_processor`     an end that Ctrl-C interrupts before MLflow hears of
and `_readable_span`                           it is told after all; without: that span is lost
the OpenTelemetry span's `_lock`               whether a span is being written, by this very thread
                                               where a finalizer runs in the middle of it; without:
                                               closing it there is not put aside
`exporter._deferred_root_spans`                whether MLflow keeps a root back whose children run
                                               on; without: they are closed when the root ends
`exporter._async_queue._queue`                 to wait for what is pending without stopping MLflow's
                                               threads; without: MLflow's own, slower flush
the `maxsize` of that queue, and the `_queue`  room for a burst of ends; without: MLflow drops what
and `_max_queue_size` of the batch processor   does not fit, with a line in its log
`InMemoryTraceManager.register_trace`,         spans of a trace that another process began; MLflow's
`pop_trace`, `TraceInfo`                       public way drops them before their batch is exported;
                                               without: a carried span starts a trace of its own
`tracking.fluent._active_experiment_id`        the experiment in force, without asking the store;
                                               without: `set_experiment` in a worker process
`trace.info` of a live trace                   its name, request id and previews after its start,
                                               also where it is not the active one; without:
                                               unchanged
`exporter._client` and, on it, `log_spans`,    what became of each trace: MLflow swallows refusals;
`start_trace`, `_upload_trace_data`; the       without: `flush` takes for stored what was handed
processor's `_start_trace`, the queues' `put`  over
and `drop_items`, `_should_log_spans_to_...`,
a line in the log of MLflow's SQL store
`OtelSpanProcessor.on_end` and the exporter's  the same where only an OTLP endpoint is set; and
`export`, `_should_register_traces`            MLflow's own fails there on a root with user tags
`concurrent.futures.thread._threads_queues`,   the exit of the process must not wait for a dead
`_worker_threadpool`, `_at_exit_callback`      server; without: it waits as long as MLflow does
`_async_queue.activate`                        Python 3.12.1 starts no threads at exit; without:
                                               it loses there what ended in the last seconds
the provider, its once-flags and exit hook,    after a fork the child must not touch what the
the exporter's queue, the stores' engines, a   parent's threads held locked; without: what is
span's `_attributes`, `_events`, `_links`      missing stays as MLflow leaves it after a fork
SQLAlchemy's `pool._do_get`, `checkedout`      no thread may be inside SQLite while the process
                                               forks; without: the fork does not wait for it
`id_generator` of the tracer and the provider  a chosen trace id; without: the id is not chosen,
                                               which is noticed at the span and warned of
the class of the provider's `id_generator`     ids that no `random.seed()` repeats, in the tracers
                                               too that share it; without: seeded ids repeat
`TracingClient().store.get_trace_info`         whether a trace exists: the public `get_trace` cannot
                                               tell that from a store that does not answer;
                                               without: AttributeError, contained: the id is free
`provider._initialize_tracer_provider`         ids of our own from a provider's first span on, and
                                               in a test run to be on every provider that MLflow
                                               makes; without: only on those before spans of ours
`MlflowV3SpanProcessor` and its `_start_trace` a test's spans are made as MLflow makes them, and no
                                               store is asked; without: `record_spans` raises
the provider, its once-flags, the tracking     a test's recording puts back what it found, without
URI, experiment and destination in force       a flush or reset; without: what is missing stays
=============================================  ==================================================
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import logging
import os
import queue
import re
import struct
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import thread as _futures_thread
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, cast

import mlflow
from mlflow.entities import (
    LiveSpan,
    NoOpSpan,
    SpanEvent,
    SpanStatus,
    SpanStatusCode,
    TraceInfo,
    TraceLocation,
    TraceState,
)
from mlflow.environment_variables import MLFLOW_USE_DEFAULT_TRACER_PROVIDER
from mlflow.tracing import provider as _provider_module
from mlflow.tracing.client import TracingClient
from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey, TraceTagKey
from mlflow.tracing.processor.base_mlflow import BaseMlflowSpanProcessor
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracking import MlflowClient
from mlflow.tracking import fluent as _fluent
from opentelemetry import context as _otel_context_api
from opentelemetry import trace as _otel
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import INVALID_SPAN, NonRecordingSpan, SpanContext, Status, StatusCode
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from spanguard._base import locks
from spanguard._base.findings import PASSWORD
from spanguard._mlflow.buffer import ROOM, KeepingBuffer
from spanguard._mlflow.ledger import Ledger

if TYPE_CHECKING:
    from mlflow.entities import Span, Trace

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
    "Status",
    "StatusCode",
]

_TAG_PREFIX = getattr(SpanAttributeKey, "TRACE_TAG_PREFIX", "mlflow.traceTag.")
SESSION_KEY = TraceMetadataKey.TRACE_SESSION
USER_KEY = TraceMetadataKey.TRACE_USER
RUN_KEY = TraceMetadataKey.SOURCE_RUN
INPUTS_KEY = SpanAttributeKey.INPUTS
OUTPUTS_KEY = SpanAttributeKey.OUTPUTS
SPAN_TYPE_KEY = SpanAttributeKey.SPAN_TYPE

# What a span says its trace is when it records nothing.
NOOP_TRACE_ID = str(cast(Any, NoOpSpan)().trace_id)

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


# Of these, what the processor and the store read: texts, and numbers that they sum up.
TEXT_KEYS = frozenset({"mlflow.llm.model", "mlflow.llm.provider"})
AGGREGATED_KEYS = TEXT_KEYS | {"mlflow.chat.tokenUsage", "mlflow.llm.cost"}


def is_reserved(key: str) -> bool:
    """Tell whether an attribute key is MLflow's own and would break the span if overwritten."""
    return key.startswith("mlflow.") and key not in _ANNOTATION_KEYS


# -- the active span ---------------------------------------------------------------------------


class _Mode:
    """Which of OpenTelemetry's contexts MLflow uses: its own, or the process's.

    MLflow asks its environment variables at each step, a microsecond each; here the raw strings
    are compared when a trace starts, and read again only when they have changed.
    """

    __slots__ = ("_seen", "isolated", "propagates", "runtime")

    def __init__(self) -> None:
        self._seen: Any = ()
        self.refresh()

    def refresh(self) -> bool:
        """Read the settings again if they have changed; tell whether they have."""
        seen = (os.environ.get(_ISOLATED_VARIABLE), os.environ.get(_PROPAGATE_VARIABLE))
        if seen == self._seen:
            return False
        self._seen = seen
        self.isolated = bool(cast(Any, MLFLOW_USE_DEFAULT_TRACER_PROVIDER).get())
        propagate = getattr(_provider_module, _PROPAGATE_VARIABLE, None)
        self.propagates = bool(self.isolated and propagate is not None and propagate.get())
        self.runtime: Any = (
            _provider_module.mlflow_runtime_context if self.isolated else _otel_context_api
        )
        return True


_ISOLATED_VARIABLE = "MLFLOW_USE_DEFAULT_TRACER_PROVIDER"
_PROPAGATE_VARIABLE = "MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT"
_mode = _Mode()


def mode_has_changed() -> bool:
    """Look at MLflow's settings again; tell whether what is active is to be looked up anew."""
    return _mode.refresh()


def current_otel_span() -> OtelSpan:
    """Return the OpenTelemetry span that MLflow sees as active here; INVALID_SPAN if none."""
    active = _otel.get_current_span(_mode.runtime.get_current())
    if type(active) is NonRecordingSpan and active.get_span_context() is None:
        return INVALID_SPAN  # what MLflow makes active where it could not start a span
    return active


def span_in(context: Any) -> OtelSpan:
    """Return the span that is active in a context; None stands for what is active here."""
    return current_otel_span() if context is None else _otel.get_current_span(context)


class ActiveState:
    """What is active here and now. An immutable value: it can be restored in any context."""

    __slots__ = ("_context", "_otel_context", "_runtime", "_set")

    def __init__(self) -> None:
        self._set: Any = None
        self._runtime = _mode.runtime
        self._context = self._runtime.get_current()
        self._otel_context = _otel_context_api.get_current() if _mode.propagates else None

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
    """Take down what is active here."""
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


# -- hearing of every span ---------------------------------------------------------------------

_watch_lock = threading.RLock()  # re-entrant: a finalizer may open a span meanwhile
_watched: Any = None
_listening: SpanProcessor | None = None  # ours, once it was added
_tracer: Any = None  # of the watched provider


def _current_provider() -> Any:
    # The attribute where there is one: provider.get() asks the environment each time.
    wrapper: Any = _provider_module.provider
    if _mode.isolated:
        return getattr(wrapper, "_isolated_tracer_provider", None) or wrapper.get()
    return wrapper.get()


def watch(processor: SpanProcessor) -> bool:
    """Add our processor to MLflow's provider if it is not there yet. True when newly added.

    MLflow replaces its provider on `set_experiment`, `set_destination`, `enable`: so this is
    asked before each start, and costs one comparison.
    """
    global _listening, _tracer, _watched
    if _watched is not None and _current_provider() is _watched:
        return False
    with _watch_lock:
        _provider_module._get_tracer(__name__)  # initialises the provider on first use
        current = _current_provider()
        if not isinstance(current, TracerProvider):
            _tracer = _watched = None  # tracing is off
            return False
        if current is _watched:
            return False
        _import_beforehand()
        _listening = processor
        _give_own_ids(current)
        _let_children_follow(current)
        note_deliveries()
        _add(processor, current)
        _tracer = _provider_module._get_tracer(_provider_module.__name__)
        _widen_export_queues()
        _watched = current
        return True


def _import_beforehand() -> None:
    """Import what MLflow imports in the middle of spans: a fork meanwhile would have to wait."""
    for module in ("mlflow.pyfunc", "mlflow.utils.providers"):
        _optional_module(module)


def _add(processor: SpanProcessor, provider: Any) -> None:
    if isinstance(provider, TracerProvider) and processor not in _processors_of(provider):
        provider.add_span_processor(processor)


_follower: SpanProcessor | None = None
_initialize: Callable[..., None] | None = None  # MLflow's own, once we stand in its place


def follow(processor: SpanProcessor) -> None:
    """Add our processor to MLflow's provider, and to each that MLflow will put in its place.

    `watch` asks before each span of ours; this hears of the first raw span too. It is for test
    runs, and lasts as long as the process. It does not make MLflow start its provider.
    """
    global _follower
    with _watch_lock:
        _stand_in_for_initialize()
        _follower = processor
    _add(processor, _provider_module.provider.get())


def _stand_in_for_initialize() -> None:
    global _initialize
    if _initialize is None and hasattr(_provider_module, "_initialize_tracer_provider"):
        _initialize = _provider_module._initialize_tracer_provider
        cast(Any, _provider_module)._initialize_tracer_provider = _initialize_and_follow


def _initialize_and_follow(disabled: bool = False) -> None:
    """Do what MLflow does for a new provider, or make one that records; then add what is ours."""
    recording = _recording
    if recording is not None and not disabled:
        _provider_module.provider.set(recording.new_provider())
    elif _initialize is not None:
        with _noting_failure(object()):
            _initialize(disabled=disabled)
        note_deliveries()
        if disabled:
            _close_ledger()
    _give_own_ids(_provider_module.provider.get())
    if _follower is not None:
        _add(_follower, _provider_module.provider.get())


def current_provider() -> object:
    """Return what now receives new spans, to notice later that it was replaced."""
    recording = _recording
    if recording is not None:  # hidden for the length of a recording, not replaced
        return recording.hidden_provider
    state = getattr(_provider_module, "_trace_disabled_state", None)
    if state and state.get("depth"):  # hidden for the length of a call of MLflow's, not replaced
        return state.get("saved_provider")
    return _current_provider()


# -- starting ----------------------------------------------------------------------------------


def start_root(name: str, *, span_type: str, start_time_ns: int | None, **trace: Any) -> Span:
    """Start a new trace, or what MLflow makes of it: a NoOpSpan where it is off or fails."""
    return mlflow.start_span_no_context(
        name, span_type=span_type, start_time_ns=start_time_ns, **trace
    )


def start_child(parent: LiveSpan, name: str, *, span_type: str, start_time_ns: int | None) -> Span:
    """Start a span under a parent: a NoOpSpan where tracing is off, or where it fails."""
    return mlflow.start_span_no_context(
        name, span_type=span_type, parent_span=parent, start_time_ns=start_time_ns
    )


def start_plain_child(parent: LiveSpan, name: str) -> LiveSpan | None:
    """Start a span as `start_span_no_context` does, without its repeated look-up of the tracer.

    The look-up is a tenth of what a span costs. The span's type is left for the caller to write.
    None where this way is not known to be the same: then the public one is to be taken.
    """
    tracer = _tracer
    if tracer is None or _is_off_here() or is_noop(parent) or not is_buffered(parent.trace_id):
        return None
    under: Any = parent._span
    context = _otel.set_span_in_context(under, _mode.runtime.get_current())
    otel = tracer.start_span(name, context=context, attributes={})
    if not isinstance(otel, ReadableSpan):
        return None
    return live_span(parent.trace_id, f"{cast(Any, otel).context.span_id:016x}")


def _is_off_here() -> bool:
    """Tell whether `mlflow.tracing.context(enabled=False)` is in force."""
    settings = _user_context.get() if _user_context is not None else None
    return settings is not None and settings.enabled is False


def records_nothing() -> bool:
    """Tell whether a span that is started here and now would be one that ignores."""
    return _tracer is None or _is_off_here()


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
    if isinstance(inner, ReadableSpan):  # the common case first: OtelSpan's check is an ABC's
        return cast(OtelSpan, inner)
    return inner if isinstance(inner, OtelSpan) else None


def recording_span(span: Any) -> Any:
    """Return the recording OpenTelemetry span under an MLflow span, or None."""
    inner = getattr(span, "_span", None)
    return inner if isinstance(inner, ReadableSpan) else None


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
    manager = InMemoryTraceManager._instance
    traces = getattr(manager, "_traces", None)
    return traces is None or trace_id in traces


def open_spans_in(trace_id: str) -> list[LiveSpan]:
    """Return the spans of a trace that have not ended, in the order they started."""
    with _trace_manager().get_trace(trace_id) as trace:
        spans = list(trace.span_dict.values()) if trace else []
    return [span for span in spans if span.end_time_ns is None]


def all_open_spans() -> list[LiveSpan]:
    """Return every span in memory that has not ended, parents first; none before we listen."""
    if _watched is None:
        return []
    traces = getattr(InMemoryTraceManager._instance, "_traces", None) or {}
    found = [span for trace in list(traces.values()) for span in list(trace.span_dict.values())]
    return [span for span in found if span.end_time_ns is None]


def mlflow_trace_id(otel: OtelSpan) -> str | None:
    """Return the MLflow trace id of an OpenTelemetry span."""
    context = otel.get_span_context()
    found = _trace_manager().get_mlflow_trace_id_from_otel_id(context.trace_id)
    return cast("str | None", found)


def active_span() -> LiveSpan | None:
    """Return the span that MLflow's own API calls active."""
    return mlflow.get_current_active_span()


def add_to_trace(trace_id: str, tags: dict[str, str], metadata: dict[str, str]) -> None:
    """Add tags and metadata to a trace in memory; what it has already stays."""
    with _trace_manager().get_trace(trace_id) as trace:
        if trace is not None:
            trace.info.tags.update({k: v for k, v in tags.items() if k not in trace.info.tags})
            known = trace.info.trace_metadata
            known.update({k: v for k, v in metadata.items() if k not in known})


# The column is so wide, and a database that counts would refuse the whole trace.
MAX_CLIENT_REQUEST_ID_CHARS = 50


def set_client_request_id(trace_id: str | None, text: str) -> None:
    """Set the request id that a trace is known by to its client, in memory.

    As `mlflow.update_current_trace` does, which knows the active trace only.
    """
    with _trace_manager().get_trace(trace_id) as trace:
        if trace is not None:
            trace.info.client_request_id = text


def set_previews(trace_id: str | None, request: str | None, response: str | None) -> None:
    """Set what MLflow's list of traces shows of one in memory, unless it has been set before.

    As `mlflow.update_current_trace` does, which knows the active trace only. None leaves it to
    MLflow, which shows the root's inputs and outputs.
    """
    with _trace_manager().get_trace(trace_id) as trace:
        if trace is not None:
            info = trace.info
            info.request_preview = info.request_preview or request
            info.response_preview = info.response_preview or response


def has_inputs(span: Any) -> bool:
    """Tell whether inputs are recorded on a span, without decoding them."""
    return INPUTS_KEY in attribute_names(span)


def has_outputs(span: Any) -> bool:
    """Tell whether a span has outputs that are not None, without decoding them."""
    attributes = getattr(getattr(span, "_span", None), "_attributes", None)
    # OpenTelemetry's own look-up raises and catches where there is nothing: a microsecond.
    written = getattr(attributes, "_dict", attributes) or {}
    return bool(written.get(OUTPUTS_KEY, "null") != "null")


def experiment_and_run(trace_id: str) -> tuple[str | None, str | None]:
    """Return the experiment and the run that a trace in memory belongs to."""
    with _trace_manager().get_trace(trace_id) as trace:
        if trace is None:
            return None, None
        return trace.info.experiment_id, trace.info.trace_metadata.get(RUN_KEY)


# -- keeping what is open in memory ------------------------------------------------------------

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

    def __init__(self, manager: Any, guard: TraceGuard) -> None:
        self._manager = manager
        self._guard = guard

    def guard_of(self, trace: Any) -> str | None:
        return next(filter(self._guard.holds, reversed(trace.span_dict)), None)

    def is_guarded(self, trace: Any, guard: str | None) -> bool:
        if guard is not None and self._guard.holds(guard):
            return True
        root = next(iter(trace.span_dict), None)
        return root is not None and self._guard.holds(root)

    def is_busy(self, trace: Any) -> bool:
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
        known = self._manager._otel_id_to_mlflow_trace_id
        return any(known.get(otel_id) == trace_id for otel_id in list(_remote_holds))

    def dropped(self, trace_id: str, trace: Any) -> None:
        for root in _first(trace.span_dict.values()):
            otel = otel_span(root)
            if otel is not None:  # MLflow itself would keep this for ever
                known = self._manager._otel_id_to_mlflow_trace_id
                known.pop(otel.get_span_context().trace_id, None)
            if root.end_time_ns is None:
                self._guard.lost(root.span_id)


def _first(values: Iterable[Any]) -> list[Any]:
    return list(islice(values, 1))


_left_alone: Callable[[], Any] = lambda: None  # noqa: E731  # the buffer that was not replaced


def keep_open_traces(guard: TraceGuard) -> str | None:
    """See to it that MLflow forgets no trace that is open, whatever their number and age.

    MLflow replaces its buffer on a reset, and when a timeout is set: so this is asked at each
    root, and costs one comparison. Where the buffer cannot be replaced: why, once for each.
    """
    global _left_alone
    manager: Any = InMemoryTraceManager._instance
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
        return "This MLflow keeps open traces in a way unknown here, and may drop old ones"
    with manager._lock:
        kept: KeepingBuffer[Any] = KeepingBuffer(max_size, ttl, _TracePolicy(manager, guard))
        for trace_id in list(buffer):
            kept[trace_id] = buffer[trace_id]
        manager._traces = kept
    return None


# -- writing and ending ------------------------------------------------------------------------


_encode = json.JSONEncoder(ensure_ascii=False).encode
_CONSTANTS = {True: "true", False: "false"}


def _plain_encode(value: Any) -> str:
    kind = type(value)
    if kind is int:
        return int.__repr__(value)
    return _CONSTANTS[value] if kind is bool else _encode(value)


# What MLflow would look for in inputs and outputs to store it as an attachment. Only payloads
# that can hold none of it are written here; the rest goes MLflow's way.
ATTACHMENT_KEYS = frozenset({"b64_json", "audio", "image", "inline_data", "input_audio", "result"})


def write_plain(otel: Any, values: dict[str, Any]) -> None:
    """Write attributes whose values are known to be plain JSON, all in one go.

    The same strings under the same keys as `LiveSpan.set_attribute` would write
    (test_mlflow_contract.py compares them), at a third of the cost.
    """
    otel.set_attributes({key: _plain_encode(value) for key, value in values.items()})


def attribute_count(span: Any) -> int:
    """Return how many attributes a span holds, MLflow's own included; 0 for a double."""
    inner = getattr(span, "_span", None)
    attributes = getattr(inner, "_attributes", None)
    return len(attributes) if attributes is not None else 0


def attribute_names(span: Any) -> list[str]:
    """Return the names of a span's attributes, without decoding the values."""
    inner = getattr(span, "_span", None)
    return list(getattr(inner, "_attributes", None) or ())


# To compare the code of an OpenTelemetry span's status with: as a function it costs 0.1 µs more.
OTEL_ERROR = StatusCode.ERROR


def has_event(otel: Any, name: str) -> bool:
    """Tell whether an OpenTelemetry span has an event of that name."""
    return any(event.name == name for event in otel.events)


def add_last_event(otel: Any, name: str, attributes: dict[str, str]) -> None:
    """Add an event to a span that is ending: past `add_event`, and still before the store."""
    events = getattr(otel, "_events", None)
    if events is not None:
        events.append(Event(name, attributes, otel.end_time))


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


def rename(span: LiveSpan, name: str) -> None:
    """Give an open span another name, and with a root its trace, unless that was renamed before.

    MLflow stores both as it finds them when they have ended.
    """
    before = span.name
    cast(Any, otel_span(span)).update_name(name)
    if span.parent_id is None:
        with _trace_manager().get_trace(span.trace_id) as trace:
            if trace is not None and trace.info.tags.get(TraceTagKey.TRACE_NAME) == before:
                trace.info.tags[TraceTagKey.TRACE_NAME] = name


def make_event(name: str, attributes: dict[str, Any], timestamp: int | None = None) -> Any:
    """Return a span event, that happened now if no time is given."""
    at = time.time_ns() if timestamp is None else timestamp  # MLflow 3.10 takes microseconds here
    return cast(Any, SpanEvent)(name=name, attributes=attributes, timestamp=at)


# OpenTelemetry keeps so many on a span.
MAX_LINKS = 128


def make_link(trace_id: str, span_id: str, attributes: dict[str, Any] | None) -> Any:
    """Return a link to a span; None where MLflow has none (3.10)."""
    return _link(trace_id, span_id, attributes) if _link is not None else None


def is_recording_kind(otel: Any) -> bool:
    """Tell a span that records from one that stands for a remote, disabled or dropped one."""
    return isinstance(otel, ReadableSpan)


def has_ended(otel: Any) -> bool:
    """Tell whether an OpenTelemetry span has ended. Spans that never record have not."""
    return isinstance(otel, ReadableSpan) and otel.end_time is not None


_SWALLOWING = ("mlflow.entities.span", "mlflow.tracing.fluent", "mlflow.tracking.client")


class _Swallowed(logging.Filter):
    """Sees what MLflow swallows: it writes its line while the exception is being handled."""

    def __init__(self, tell: Callable[[BaseException], object]) -> None:
        super().__init__()
        self._tell = tell

    def filter(self, record: logging.LogRecord) -> bool:
        error = sys.exc_info()[1]
        if error is not None:
            self._tell(error)
        return True


def hear_of_swallowed(tell: Callable[[BaseException], object]) -> None:
    """Tell of each exception that MLflow's start or end of a span swallows, in its thread."""
    for name in _SWALLOWING:
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Swallowed) for one in logger.filters):
            logger.addFilter(_Swallowed(tell))


# How often, and after how many seconds, a span that is being written is looked at again.
_LOOKS, _PAUSE_SECONDS = 20, 0.001


def is_being_written(otel: Any) -> bool:
    """Tell whether a span is being written and cannot be ended now, however long that waits.

    OpenTelemetry writes under a lock that is not re-entrant. Another thread is done in
    microseconds; this one is never, where a finalizer runs in the middle of its write.
    """
    try:
        locked = otel._lock.locked
        if not locked():
            return False
    except AttributeError:  # gone, or another kind of span
        return False
    for _ in range(_LOOKS):
        time.sleep(_PAUSE_SECONDS)
        if not locked():
            return False
    return True


def defers_roots() -> bool:
    """Tell whether MLflow exports a root whose children are open only when they have ended."""
    return hasattr(_exporter(), "_deferred_root_spans")


def end_live(span: LiveSpan, end_time_ns: int | None) -> None:
    """End with MLflow's decorations, configured span processors too (PII masks)."""
    span.end(end_time_ns=end_time_ns)


def end_bare(otel: Any, end_time_ns: int | None) -> None:
    """End the OpenTelemetry span itself, OK unless it is an ERROR: MLflow's own end failed."""
    if otel.status.status_code is StatusCode.UNSET:
        otel.set_status(Status(StatusCode.OK))
    otel.end(end_time=end_time_ns)


def tell_of_end(otel: Any) -> None:
    """Tell the processors of a span whose end was interrupted before it came to them."""
    otel._span_processor.on_end(otel._readable_span())


# -- payloads ----------------------------------------------------------------------------------


class _PlainEncoder(json.JSONEncoder):
    def default(self, o: Any) -> Any:
        return str(o)


def _optional_module(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _optional(module: str, name: str) -> Any:
    return getattr(_optional_module(module), name, None)


_encoder = _optional("mlflow.tracing.utils", "TraceJSONEncoder") or _PlainEncoder
_user_context = _optional("mlflow.tracing.context", "_USER_TRACE_CONTEXT")  # 3.10 has none
_make_trace_id = _optional("mlflow.tracing.utils", "generate_mlflow_trace_id_from_otel_trace_id")
_link_type = _optional("mlflow.entities", "Link")  # MLflow 3.10 has none
_attachment = _optional("mlflow.tracing.attachments", "Attachment")  # MLflow 3.10 has none
_link = _optional("mlflow.entities", "Link")  # MLflow 3.10 has none


_sampling_override = _optional("mlflow.tracing.sampling", "_SAMPLING_RATIO_OVERRIDE")
_sampler = _optional("mlflow.tracing.sampling", "_MlflowSampler")
_log_levels = _optional("mlflow.entities", "SpanLogLevel")  # 3.10 has none


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


def _let_children_follow(provider: TracerProvider) -> None:
    """Let the spans of a trace share its root's sampling; 3.10 samples each of them."""
    if _sampler is not None and isinstance(provider.sampler, _sampler):
        provider.sampler = ParentBased(provider.sampler)


def sampled_out(span: Any) -> Any:
    """Return a span that ignores, and whose children do, in place of one that was sampled out."""
    if carries_decision(span):
        return span
    context = SpanContext(
        int.from_bytes(os.urandom(16), "big"), int.from_bytes(os.urandom(8), "big"), False
    )
    decided = noop_span()
    decided._span = NonRecordingSpan(context)
    return decided


def is_log_level(level: Any) -> bool:
    """Tell whether MLflow takes a log level. One that has none takes them all, and ignores them."""
    if _log_levels is None:
        return True
    if not issubclass(type(level), (str, _log_levels)):
        return False
    try:
        _log_levels.from_value(level)
    except Exception:
        return False
    return True


def payload_encoder() -> type[json.JSONEncoder]:
    """Return the encoder that MLflow serialises payloads with."""
    return cast("type[json.JSONEncoder]", _encoder)


def is_attachment(value: Any) -> bool:
    """Tell whether a value is an MLflow attachment, which MLflow stores in its own way."""
    return _attachment is not None and issubclass(type(value), _attachment)


# -- ids ---------------------------------------------------------------------------------------


_random_numbers: list[int] = []  # drawn beforehand: for each id alone it takes half a microsecond


def _random_number() -> int:
    """Return 64 bits of the operating system's randomness, not all zero."""
    while True:
        try:
            number = _random_numbers.pop()  # one step: no two threads get the same
        except IndexError:
            _random_numbers.extend(struct.unpack("256Q", os.urandom(256 * 8)))
        else:
            if number:
                return number


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_random_numbers.clear)


class OwnIds(RandomIdGenerator):
    """Ids that neither heed `random.seed()` in user code nor change what it draws next.

    OpenTelemetry's own draws from the `random` module: two runs with one seed share their ids,
    and the second replaces the first in the store (test_mlflow_contract.py).
    """

    def generate_span_id(self) -> int:
        return _random_number()

    def generate_trace_id(self) -> int:
        return _random_number() << 64 | _random_number()


def _give_own_ids(provider: Any) -> None:
    """Let a provider draw `OwnIds`, unless it has a generator that somebody has chosen for it."""
    generator = getattr(provider, "id_generator", None)
    if type(generator) is RandomIdGenerator:
        # The generator itself, not the provider's: the tracers that are made hold it as well.
        cast(Any, generator).__class__ = OwnIds


def _give_own_ids_from_the_first_span_on() -> None:
    """Give own ids to the provider that MLflow has, and to each that it makes from here on.

    At import: a root may be somebody else's, and then it is there before we listen.
    """
    _stand_in_for_initialize()
    # Not by provider.get(): that could make OpenTelemetry set up one that nobody needs.
    _give_own_ids(getattr(_provider_module.provider, "_isolated_tracer_provider", None))
    if not _mode.isolated:
        _give_own_ids(getattr(_otel, "_TRACER_PROVIDER", None))


_give_own_ids_from_the_first_span_on()

# -- a chosen trace id -------------------------------------------------------------------------

# None, or the id that the next root gets, in a list that is empty once one has it.
_wanted_trace_id: ContextVar[list[int] | None] = ContextVar(
    "spanguard_wanted_trace_id", default=None
)


class _ChosenIds(IdGenerator):
    """Gives out the wanted trace id where there is one, else what the wrapped generator gives."""

    def __init__(self, wrapped: IdGenerator) -> None:
        self._wrapped = wrapped

    def generate_span_id(self) -> int:
        return self._wrapped.generate_span_id()

    def generate_trace_id(self) -> int:
        wanted = _wanted_trace_id.get()
        try:
            return wanted.pop() if wanted else self._wrapped.generate_trace_id()
        except IndexError:  # a thread that shares the context was quicker
            return self._wrapped.generate_trace_id()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def is_trace_id_random(self) -> bool:
        return _wanted_trace_id.get() is None and self._wrapped.is_trace_id_random()


def _choose_ids(owner: Any) -> None:
    generator = getattr(owner, "id_generator", None)
    if generator is not None and not isinstance(generator, _ChosenIds):
        owner.id_generator = _ChosenIds(generator)


@contextmanager
def trace_id_chosen(hex_id: str) -> Iterator[None]:
    """Give the next root that starts in this context the given OpenTelemetry trace id.

    That root only: others that start inside the same call of MLflow's get ids of their own.
    Where the seam is missing the id is not taken: see `otel_trace_id_of`.
    """
    # Looked at for each start: MLflow replaces its provider, and others may replace the
    # generator. The SDK caches tracers and each has a generator of its own; older ones make a
    # tracer for each call, with the provider's.
    tracer: Any = _provider_module._get_tracer(_provider_module.__name__)
    _choose_ids(_current_provider())
    _choose_ids(getattr(tracer, "_tracer", tracer))
    wanted = [int(hex_id, 16)]
    token = _wanted_trace_id.set(wanted)
    try:
        yield
    finally:
        wanted.clear()  # also for the contexts that were copied from this one
        _wanted_trace_id.reset(token)


def otel_trace_id_of(span: Any) -> str | None:
    """Return the OpenTelemetry trace id of a span that records, as 32 digits; else None."""
    otel = recording_span(span)
    return f"{otel.get_span_context().trace_id:032x}" if otel is not None else None


def knows_trace(otel_trace_id: int) -> bool:
    """Tell whether MLflow holds a trace with this OpenTelemetry id: open, or not exported."""
    return _trace_manager().get_mlflow_trace_id_from_otel_id(otel_trace_id) is not None


def trace_exists(trace_id: str) -> bool:
    """Ask the store for a trace, readable or not. May block as long as MLflow's retries do."""
    return _stored_info(trace_id) is not None


def has_ended_in_store(trace_id: str) -> bool:
    """Ask the store whether a trace has its root, ended. May block as `trace_exists` does."""
    info = _stored_info(trace_id)
    return info is not None and info.state in (TraceState.OK, TraceState.ERROR)


def _stored_info(trace_id: str) -> TraceInfo | None:
    try:
        # Not the public get_trace(): its None may as well mean that the store does not answer,
        # or that the trace is there and cannot be read.
        return cast(TraceInfo, TracingClient().store.get_trace_info(trace_id))
    except mlflow.MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            return None
        raise


# -- a trace that another process began --------------------------------------------------------

_SQLITE = "sqlite:///"


def tracking_uri() -> str:
    """Return the tracking URI in force; a relative SQLite path made absolute, to travel."""
    uri = mlflow.get_tracking_uri()
    path = uri.removeprefix(_SQLITE)
    if path == uri or not path or path.startswith((":memory:", "file:")):
        return uri
    return _SQLITE + os.path.abspath(path)


def active_experiment_id() -> str | None:
    """Return the experiment that new traces go to, None for the default one. Asks no store."""
    found = getattr(_fluent, "_active_experiment_id", None)
    return found or os.environ.get("MLFLOW_EXPERIMENT_ID") or None


def experiment_of(trace_id: str) -> str | None:
    """Return the experiment of a trace that is still in MLflow's buffer."""
    with _trace_manager().get_trace(trace_id) as trace:
        location = trace.info.trace_location if trace is not None else None
        experiment = getattr(location, "mlflow_experiment", None)
        return experiment.experiment_id if experiment is not None else None


def adopt_destination(uri: str, experiment_id: str | None) -> None:
    """Send the traces of this process where those of another process go."""
    if tracking_uri() != uri:
        mlflow.set_tracking_uri(uri)
    if experiment_id is None or experiment_id == (active_experiment_id() or "0"):
        return
    if hasattr(_fluent, "_active_experiment_id"):
        # set_experiment() would ask the store, for minutes where it is down.
        cast(Any, _fluent)._active_experiment_id = experiment_id
    else:
        mlflow.set_experiment(experiment_id=experiment_id)


def traceparent_of(otel: OtelSpan) -> str:
    """Return the W3C traceparent of a span."""
    context = otel.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def remote_span(traceparent: str) -> OtelSpan | None:
    """Return a stand-in for the span that a W3C traceparent names; None if it is not one."""
    found = _otel.get_current_span(
        TraceContextTextMapPropagator().extract({"traceparent": traceparent})
    )
    return found if found.get_span_context().is_valid else None


def mlflow_trace_id_of(otel_trace_id: int) -> str:
    """Return the id that MLflow gives to a trace with this OpenTelemetry trace id."""
    if _make_trace_id is None:
        return f"tr-{otel_trace_id:032x}"
    return str(_make_trace_id(otel_trace_id))


def link(otel: Any, trace_id: str, span_id: str) -> None:
    """Link a span that has just started to one of another trace, where MLflow has links."""
    own_id = mlflow_trace_id(otel)
    live = live_span(own_id, f"{otel.context.span_id:016x}") if own_id else None
    if live is not None and _link_type is not None:
        live.add_link(_link_type(trace_id, span_id))


_remote_lock = threading.RLock()
_remote_holds: dict[int, int] = {}


def hold_remote_trace(otel_trace_id: int, trace_id: str, experiment_id: str | None) -> None:
    """Let MLflow take spans of a trace whose root is in another process, until released.

    Several jobs of one trace may hold it at a time. MLflow's own
    `set_tracing_context_from_http_request_headers` drops the trace when the first of them ends,
    and the spans that still wait for their batch with it.
    """
    location = TraceLocation.from_experiment_id(experiment_id) if experiment_id else None
    with _remote_lock:
        held = _remote_holds.get(otel_trace_id, 0)
        _remote_holds[otel_trace_id] = held + 1
        if held == 0:
            if is_buffered(trace_id):
                # It ended here a moment ago and waits for its batch: in its place MLflow would
                # find this one, and lose it.
                hand_over()
            info = TraceInfo(
                trace_id=trace_id,
                trace_location=cast(Any, location),
                request_time=cast(Any, None),
                state=TraceState.IN_PROGRESS,
            )
            _trace_manager().register_trace(otel_trace_id, info, is_remote_trace=True)


def release_remote_trace(otel_trace_id: int) -> None:
    """Undo one hold. Call `hand_over` before: what still waits for its batch is dropped."""
    with _remote_lock:
        held = _remote_holds.pop(otel_trace_id, 0) - 1
        if held > 0:
            _remote_holds[otel_trace_id] = held
        else:
            _trace_manager().pop_trace(otel_trace_id)


# -- flushing ----------------------------------------------------------------------------------


def _processor() -> Any:
    """Return MLflow's own processor of the current provider, else OTLP's, else None."""
    processors = _processors_of(_current_provider())  # none where tracing is off
    ours = [one for one in processors if isinstance(one, BaseMlflowSpanProcessor)]
    return next(iter(ours or filter(_is_otlp, processors)), None)


def _exporter() -> Any:
    return getattr(_processor(), "span_exporter", None)


def _is_otlp(processor: Any) -> bool:
    # Looked for by its name: to import it would cost everybody what a few use.
    return type(processor).__name__ == "OtelSpanProcessor"


def _pending_tasks() -> Any:
    """Return the queue of MLflow's export tasks; None where there is none, or it is unknown."""
    tasks: Any = getattr(getattr(_exporter(), "_async_queue", None), "_queue", None)
    return tasks if hasattr(tasks, "all_tasks_done") else None


def _batch() -> Any:
    """Return what holds ended spans for the exporter (MLflow 3.12 and later), or None."""
    return getattr(getattr(_processor(), "_batch_delegate", None), "_batch_processor", None)


def _widen_export_queues() -> None:
    """Let as many traces end at once as may be open at once without spanguard's holding them.

    MLflow's queues drop what does not fit: the end of 1,500 traces in a row loses half of them.
    """
    tasks = _pending_tasks()
    if tasks is not None and os.environ.get(_TASKS_VARIABLE) is None and tasks.maxsize > 0:
        tasks.maxsize = max(tasks.maxsize, ROOM * _MLFLOW_TASKS)
    batch = _batch()
    waiting = getattr(batch, "_queue", None)
    if not isinstance(waiting, deque) or not hasattr(batch, "_max_queue_size"):
        return
    if waiting.maxlen is not None and waiting.maxlen < ROOM * _OTEL_SPANS:
        batch._queue = deque(maxlen=ROOM * _OTEL_SPANS)
        batch._max_queue_size = ROOM * _OTEL_SPANS
        while waiting:  # mostly nothing: the provider is new; the oldest is rightmost
            batch._queue.append(waiting.popleft())


_TASKS_VARIABLE = "MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE"
_MLFLOW_TASKS, _OTEL_SPANS = 1000, 2048  # what the queues hold by default


def exports_in_place() -> bool:
    """Tell whether spans are stored by the thread that ends them (MLflow 3.10): none wait."""
    processor = _processor()
    return isinstance(processor, BaseMlflowSpanProcessor) and not hasattr(
        processor.span_exporter, "_async_queue"
    )


def hand_over() -> None:
    """Put what has ended into MLflow's export queue, where no later change can lose it.

    Where there is no such queue (OTLP): send it, which takes as long as the endpoint does.
    """
    current = _current_provider()
    if isinstance(current, TracerProvider):
        current.force_flush()
        batcher: Any = getattr(_exporter(), "_span_batcher", None)  # Databricks' one queue more
        if hasattr(batcher, "flush"):
            batcher.flush()


def hand_over_everything() -> None:
    """Hand over, and empty what queues there are that cannot be waited for. It may take long."""
    if exports_in_place():
        return
    hand_over()
    if hasattr(_exporter(), "_async_queue") and _pending_tasks() is None:
        # The public way stops and restarts MLflow's threads, which takes a second or two.
        mlflow.flush_trace_async_logging()


def await_stored(seconds: float) -> bool:
    """Wait until MLflow's export queue is empty, at most so long; tell whether it is.

    True where there is no queue, or none that is known: MLflow's own exit hook then waits for it.
    """
    tasks = _pending_tasks()
    if tasks is None:
        return True
    with tasks.all_tasks_done:
        return bool(
            tasks.all_tasks_done.wait_for(lambda: not tasks.unfinished_tasks, max(seconds, 0.0))
        )


def flush_everything() -> None:
    """Drain MLflow's queues into the store: milliseconds, but with a dead server minutes."""
    hand_over_everything()
    tasks = _pending_tasks()
    if tasks is not None:
        tasks.join()


# -- what becomes of a trace -------------------------------------------------------------------

_logger = logging.getLogger("spanguard")

# By OpenTelemetry trace id: MLflow's own ends in it, whatever its form.
ledger = Ledger()

GONE = "MLflow gave no reason"
# Whose deliveries are noted, and whether an ended trace is looked for in MLflow's memory.
_noted: weakref.WeakSet[Any] = weakref.WeakSet()
_notes_ends = False
# Whether the store has refused spans by themselves: a file store takes a trace when its root ends.
takes_whole_traces_only = False

_MAX_REASON_CHARS = 200
# Where data may begin: a statement's parameters, JSON, a server's words about what it was sent.
_DATA = re.compile(r"[\[{]|Response body|DETAIL")
_NO_REASON = re.compile(r"\(raised as a result of [^)]*\)")  # but what SQLAlchemy says before it
_TRACE_ID = re.compile(r"tr-[0-9a-f]{32}")  # one reason, not one for each trace


def reason_of(error: BaseException) -> str:
    """Return in a few words why MLflow or the store failed. No payload gets into them."""
    try:
        text = _DATA.split(PASSWORD.sub("://***@", str(error)), maxsplit=1)[0]
        text = _TRACE_ID.sub("tr-...", " ".join(_NO_REASON.sub("", text).split()))
        text = text.encode(errors="backslashreplace").decode()
    except Exception:
        text = ""
    return text.strip(" .:")[:_MAX_REASON_CHARS] or type(error).__qualname__


@contextmanager
def _noting_failure(*traces: Hashable) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        for trace in traces:
            ledger.refused(trace, reason_of(error))
        raise


def note_deliveries() -> None:
    """Note from here on what becomes of each trace that the current provider exports."""
    global _notes_ends, takes_whole_traces_only
    processor = _processor()
    exporter = getattr(processor, "span_exporter", None)
    is_otlp = _is_otlp(processor)
    _notes_ends = not is_otlp and hasattr(getattr(exporter, "_client", None), "start_trace")
    if exporter is None or exporter in _noted:
        return
    takes_whole_traces_only = False
    if is_otlp:
        _OtlpDelivery(processor)
    elif _notes_ends:
        _Delivery(processor)
    _noted.add(exporter)


def note_end_of_trace(otel_trace_id: int) -> None:
    """Note that a root has ended, unless MLflow has exported its trace or dropped it by now."""
    if _notes_ends and _recording is None:
        # In this order: it may be exported in this very moment.
        ledger.ended(otel_trace_id)
        if not knows_trace(otel_trace_id):
            ledger.forget(otel_trace_id)
    if at_end_of_trace is not None and _recording is None:
        at_end_of_trace()


# What is to be done when a root has ended, once the process is so far on its way out that
# nothing else of ours will run.
at_end_of_trace: Callable[[], object] | None = None


def _close_ledger() -> None:
    """Begin anew, where MLflow's tracing is reset or disabled: it has stored what it could."""
    global ledger
    old, ledger = ledger, Ledger()
    loss = old.settle(old.on_their_way(), GONE)
    if loss:
        _logger.warning("%d traces are not in the store: %s.", loss.traces, loss.reason)


def loss_is_told(span: Any) -> None:
    """Note that the user is told, at the end of this span, that its trace is lost."""
    otel = recording_span(span)
    if otel is not None:
        ledger.told(otel.get_span_context().trace_id)


def _key_of(trace_id: str) -> Hashable:
    try:
        return int(trace_id[-32:], 16)
    except (TypeError, ValueError):
        return trace_id


class _Delivery:
    """Stands where MLflow's exporter calls its client, once for a trace or a batch of spans."""

    def __init__(self, processor: Any) -> None:
        exporter = processor.span_exporter
        client = exporter._client
        self._goes_to_artifacts = getattr(
            exporter, "_should_log_spans_to_artifacts", lambda info: False
        )
        self._log_spans, client.log_spans = client.log_spans, self.log_spans
        self._store, client.start_trace = client.start_trace, self.store
        self._upload, client._upload_trace_data = client._upload_trace_data, self.upload
        self._begin, processor._start_trace = processor._start_trace, self.begin
        _sql_store_log.addFilter(_note_dropped_spans)  # once, however often
        tasks = getattr(getattr(exporter, "_async_queue", None), "_queue", None)
        if tasks is not None:
            self._put, tasks.put = tasks.put, self.put
        batch: Any = getattr(getattr(processor, "_batch_delegate", None), "_batch_processor", None)
        metrics: Any = getattr(batch, "_metrics", None)
        if hasattr(metrics, "drop_items"):
            self._batch, self._drop, metrics.drop_items = batch, metrics.drop_items, self.drop

    def begin(self, root: Any) -> Any:
        """Start a trace, for which MLflow may ask the store."""
        with _noting_failure(root.context.trace_id):
            return self._begin(root)

    def drop(self, count: int, *why: str) -> None:
        """Take note that the oldest span gives way, where the queue of ended spans is full."""
        waiting = self._batch._queue
        if not why and waiting:
            ledger.refused(waiting[-1].context.trace_id, "MLflow's queue of ended spans was full")
        self._drop(count, *why)

    def put(self, task: Any, block: bool = True, timeout: float | None = None) -> None:
        """Queue an export, or take note that there was no room for it."""
        try:
            self._put(task, block, timeout)
        except queue.Full:
            for trace_id in _trace_ids_in(task.args):
                ledger.refused(_key_of(trace_id), "MLflow's export queue was full")
            raise

    def log_spans(self, location: str, spans: list[Any]) -> Any:
        """Store spans. A store that takes none by themselves gets them with their trace."""
        try:
            return self._log_spans(location, spans)
        except BaseException as error:
            global takes_whole_traces_only
            if _refuses_single_spans(error):
                takes_whole_traces_only = True
            else:
                for trace_id in {span.trace_id for span in spans}:
                    ledger.refused(_key_of(trace_id), reason_of(error))
            raise

    def store(self, info: Any) -> Any:
        """Store the trace itself."""
        with _noting_failure(_key_of(info.trace_id)):
            stored = self._store(info)
        if not self._goes_to_artifacts(stored):
            ledger.taken(_key_of(info.trace_id))
        return stored

    def upload(self, info: Any, data: Any) -> None:
        """Store all spans of a trace in its artifact."""
        with _noting_failure(_key_of(info.trace_id)):
            self._upload(info, data)
        ledger.taken(_key_of(info.trace_id), whole=True)


_sql_store_log = logging.getLogger("mlflow.store.tracking.sqlalchemy_store")


def _note_dropped_spans(record: logging.LogRecord) -> bool:
    """Read in MLflow's log what its SQL store tells nobody else: it gave up spans in a crowd."""
    if str(record.msg).startswith("Could not create trace_info") and record.args:
        dropped = tuple(record.args)[-1]
        for trace_id in dropped if isinstance(dropped, (set, list, tuple)) else ():
            ledger.refused(_key_of(trace_id), "the store gave up some of its spans")
    return True


def _refuses_single_spans(error: BaseException) -> bool:
    return isinstance(error, NotImplementedError) or "OTLP span logging is not supported" in str(
        error
    )


def _trace_ids_in(arguments: Iterable[Any]) -> set[str]:
    """Return the traces that an export task is about: it has a trace, or a list of spans."""
    found = {argument.info.trace_id for argument in arguments if hasattr(argument, "info")}
    for argument in arguments:
        if isinstance(argument, list):
            found |= {span.trace_id for span in argument if hasattr(span, "trace_id")}
    return found


class _OtlpDelivery:
    """Stands around MLflow's OTLP processor and exporter, where these are all there is.

    MLflow's processor writes a root's tags on the ended span, which takes no more attributes: it
    fails, and the root is never sent. And 3.10 sends no tags.
    """

    def __init__(self, processor: Any) -> None:
        self._manager: Any = getattr(processor, "_trace_manager", None)
        exporter = processor.span_exporter
        self._export, exporter.export = exporter.export, self.export
        self._end, processor.on_end = processor.on_end, self.on_end

    def on_end(self, span: Any) -> None:
        """Put the tags of a root on it before MLflow's processor sees it."""
        if span.parent is None and self._manager is not None:
            ledger.ended(span.context.trace_id)
            with _noting_failure(span.context.trace_id):
                self._write_tags(span)
                self._end(span)
        else:
            self._end(span)

    def _write_tags(self, span: Any) -> None:
        trace_id = self._manager.get_mlflow_trace_id_from_otel_id(span.context.trace_id)
        with self._manager.get_trace(trace_id) as trace:
            tags = trace.info.tags if trace is not None else {}
            users = {key: tags.pop(key) for key in list(tags) if not key.startswith("mlflow.")}
        if users:
            span._attributes = {
                **(span._attributes or {}),
                **{f"{_TAG_PREFIX}{key}": value for key, value in users.items()},
            }

    def export(self, spans: Sequence[ReadableSpan]) -> Any:
        """Send a batch, and note what became of the traces in it."""
        traces = {span.context.trace_id for span in spans if span.context is not None}
        with _noting_failure(*traces):
            result = self._export(spans)
        for trace in traces:
            if result is not SpanExportResult.SUCCESS:
                ledger.refused(trace, "the OTLP endpoint did not take it")
        for span in spans:
            if span.parent is None and span.context is not None:
                ledger.taken(span.context.trace_id)
        return result


# -- recording for tests -----------------------------------------------------------------------


class SpanListener(Protocol):
    """What a recording tells of. Called in the thread that starts or ends a span."""

    def started(self, span: Any) -> None: ...

    def ended(self, span: ReadableSpan) -> None: ...

    def finished(self, trace: Trace) -> None: ...


def is_recording() -> bool:
    """Tell whether a test records: then spans go to no store, and none is to be asked."""
    return _recording is not None


def start_recording(listener: SpanListener) -> None:
    """Tell a listener of every span of this process from here on, and send none to the store."""
    global _recording
    with _watch_lock:
        _stand_in_for_initialize()
        if _recording is None:
            _mode.refresh()
            _recording = _Recording()
            _recording.install()
        _recording.listeners += (listener,)


def stop_recording(listener: SpanListener) -> None:
    """Undo one `start_recording`, in whatever order; the last one restores what was."""
    global _recording
    with _watch_lock:
        recording = _recording
        if recording is None:
            return
        recording.listeners = tuple(other for other in recording.listeners if other is not listener)
        if not recording.listeners:
            recording.stop()
            _recording = None


class _Recording(SpanProcessor):
    """Tells the listeners of spans; on a provider in the place of the one that has a store."""

    def __init__(self) -> None:
        self.listeners: tuple[SpanListener, ...] = ()
        self.hidden_provider = _current_provider()
        self._begun: set[int] = set()
        self._settings = _Settings()

    def install(self) -> None:
        """Put a provider that records in the place of the current one, which is left running."""
        wrapper: Any = _provider_module.provider
        if _mode.isolated:
            wrapper._isolated_tracer_provider = self.new_provider()
        else:
            cast(Any, _otel)._TRACER_PROVIDER = self.new_provider()
        wrapper.once._done = True
        if _follower is not None:
            _add(_follower, wrapper.get())

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

    def _start_trace(self, processor: Any, root: Any) -> TraceInfo:
        """Do what MLflow's own does, which asks the store for the experiment that is in force."""
        given = root.attributes.get(SpanAttributeKey.EXPERIMENT_ID)
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
        _trace_manager().register_trace(root.context.trace_id, info)
        return info

    def on_start(self, span: Any, parent_context: Any = None) -> None:
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

    def _take_out(self, context: Any) -> None:
        # Its trace began outside and goes to its store, which knows nothing of this span.
        trace_id = _trace_manager().get_mlflow_trace_id_from_otel_id(context.trace_id)
        with _trace_manager().get_trace(trace_id) as trace:
            if trace is not None:
                trace.span_dict.pop(f"{context.span_id:016x}", None)

    def _is_over(self, otel_trace_id: int) -> bool:
        trace_id = _trace_manager().get_mlflow_trace_id_from_otel_id(otel_trace_id)
        with _trace_manager().get_trace(trace_id) as trace:
            spans = list(trace.span_dict.values()) if trace else []
        return bool(spans) and all(span.end_time_ns is not None for span in spans)

    def _finish(self, otel_trace_id: int) -> None:
        self._begun.discard(otel_trace_id)
        finished = _trace_manager().pop_trace(otel_trace_id)
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


_recording: _Recording | None = None


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
    def _places() -> list[tuple[Any, str]]:
        wrapper: Any = _provider_module.provider
        return [
            (wrapper, "_isolated_tracer_provider"),
            (getattr(wrapper, "_isolated_tracer_provider_once", None), "_done"),
            (getattr(wrapper, "_global_provider_init_once", None), "_done"),
            (_otel, "_TRACER_PROVIDER"),
            (getattr(_provider_module, "_MLFLOW_TRACE_USER_DESTINATION", None), "_global_value"),
            (_optional_module("mlflow.tracing.config"), "_MLFLOW_TRACING_CONFIG"),
            (_optional_module("mlflow.tracking._tracking_service.utils"), "_tracking_uri"),
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


# -- the end of the process --------------------------------------------------------------------


def start_export_threads() -> None:
    """Start MLflow's export threads now. Python 3.12.1 starts none at exit, and they would be late.

    Without them, what ended in the last seconds is lost there (test_exit.py).
    """
    activate = getattr(getattr(_exporter(), "_async_queue", None), "activate", None)
    if activate is not None:
        activate()


def do_not_join_workers() -> None:
    """Keep the interpreter's exit from waiting for MLflow's export threads, which are daemons.

    `concurrent.futures` joins every pool's threads before any atexit hook runs, and one that
    retries against a dead server takes minutes. They go on exporting meanwhile.
    """
    joined: Any = getattr(_futures_thread, "_threads_queues", None)
    executor = getattr(getattr(_exporter(), "_async_queue", None), "_worker_threadpool", None)
    for thread in list(getattr(executor, "_threads", ())):
        if joined is not None and thread.daemon:
            joined.pop(thread, None)


def let_go_at_exit() -> None:
    """Give up what is not stored: take back the exit hooks in which MLflow would wait for it."""
    queue = getattr(_exporter(), "_async_queue", None)
    if queue is not None:
        atexit.unregister(queue._at_exit_callback)
    handler = getattr(_current_provider(), "_atexit_handler", None)
    if handler is not None:
        atexit.unregister(handler)


# -- after a fork ------------------------------------------------------------------------------


def has_pending() -> bool:
    """Tell whether MLflow's threads have something to export. For a moment it may be both."""
    if _watched is None:
        return False
    tasks = _pending_tasks()
    waiting = getattr(_batch(), "_queue", None)
    return bool(waiting or (tasks is not None and tasks.unfinished_tasks))


def start_afresh_in_child() -> None:
    """Give a forked child a tracing of its own, that no lock of the parent's threads can stop.

    Nothing of the parent's is called, flushed or joined here: the threads that would answer do
    not exist in the child. `mlflow.tracing.reset()` hangs there with exports pending.
    """
    global _remote_lock, _tracer, _watch_lock, _watched, ledger
    _watched = _tracer = None
    ledger = Ledger()
    _watch_lock, _remote_lock = threading.RLock(), threading.RLock()
    _remote_holds.clear()
    locks.let_go_below(_current_provider(), _recording)
    _leave_provider_behind()
    manager: Any = InMemoryTraceManager
    manager._instance_lock = threading.RLock()
    manager._instance = None
    _mode.runtime.attach(Context())
    _leave_engines_behind()


def let_go_of_span(otel: Any) -> None:
    """In a forked child: let code of the parent's write on a span that the parent has open."""
    for holder in (otel, *(getattr(otel, part, None) for part in _PARTS_OF_A_SPAN)):
        locks.let_go_of(getattr(holder, "_lock", None))


_PARTS_OF_A_SPAN = ("_attributes", "_events", "_links")


def _leave_provider_behind() -> None:
    wrapper: Any = _provider_module.provider
    old = _current_provider()
    for processor in _processors_of(old):
        queue = getattr(getattr(processor, "span_exporter", None), "_async_queue", None)
        if queue is not None:
            queue._is_active = False  # so its atexit callback has nothing to wait for
    if _mode.isolated:
        handler = getattr(old, "_atexit_handler", None)
        if handler is not None:
            atexit.unregister(handler)
        wrapper._isolated_tracer_provider = None
    elif isinstance(old, TracerProvider):
        # The process's own provider stays; MLflow adds its processors to it again. 3.10 looks
        # for its own in the first place: ours are added after it.
        ours = (_listening, _follower)
        kept = [p for p in _processors_of(old) if not hasattr(p, "span_exporter") and p not in ours]
        cast(Any, old._active_span_processor)._span_processors = tuple(kept)
    for flag in ("_isolated_tracer_provider_once", "_global_provider_init_once"):
        once = getattr(wrapper, flag, None)
        if once is not None:
            setattr(wrapper, flag, type(once)())
    registry: Any = sys.modules.get("mlflow.tracing.processor.base_mlflow")
    if hasattr(registry, "_batch_processor_registry"):
        registry._batch_processor_registry = weakref.WeakSet()
        registry._batch_processor_registry_lock = threading.Lock()


def _processors_of(provider: Any) -> tuple[Any, ...]:
    active = getattr(provider, "_active_span_processor", None)
    return tuple(getattr(active, "_span_processors", ()))


def _leave_engines_behind() -> None:
    """Let the child open connections of its own: SQLite's may not be used across a fork."""
    global _pausing
    _pausing = threading.RLock()
    while _gates:
        _gates.pop().open()
    for engine in _engines():
        locks.let_go_below(engine)
        engine.dispose(close=False)
    for store in _sql_stores():
        if hasattr(store, "_engine_map_lock"):
            store._engine_map_lock = threading.Lock()


def _engines() -> list[Any]:
    return [
        engine
        for store in _sql_stores()
        for engine in list((getattr(store, "_engine_map", None) or {}).values())
    ]


def _sql_stores() -> list[Any]:
    """Return the classes that have engines."""
    modules = [sys.modules.get(f"mlflow.store.{kind}.sqlalchemy_store") for kind in _STORES]
    return [store for store in (getattr(m, "SqlAlchemyStore", None) for m in modules) if store]


_STORES = ("tracking", "model_registry")


class _Gate:
    """Keeps a pool of connections shut: those that are out may come back, and none goes out."""

    def __init__(self, pool: Any, opens_by: float) -> None:
        self._pool = pool
        self._opens_by = opens_by
        self._forking = threading.get_ident()
        self._shut = threading.Lock()
        self._shut.acquire()

    def shut(self) -> None:
        self._pool._do_get = self

    def __call__(self) -> Any:
        """Get a connection, as the pool does, when the gate is open again.

        Hooks of somebody else's that ask the store in the middle of a fork are not kept waiting;
        nor, for longer than a fork may take, is a thread that such a hook waits for.
        """
        seconds = self._opens_by - time.monotonic()
        is_kept_waiting = threading.get_ident() != self._forking and seconds > 0
        if is_kept_waiting and self._shut.acquire(timeout=seconds):
            self._shut.release()
        return type(self._pool)._do_get(self._pool)

    def await_empty(self) -> None:
        """Wait until nobody has a connection, and nobody who passed is about to get one."""
        while self._is_passed() or self._pool.checkedout():
            if time.monotonic() > self._opens_by:
                return
            time.sleep(0.001)

    def _is_passed(self) -> bool:
        getting = type(self._pool)._do_get.__code__
        for frame in _frames_of_all_threads():
            within: FrameType | None = frame
            while within is not None:
                if within.f_code is getting:
                    return True
                within = within.f_back
        return False

    def open(self) -> None:
        vars(self._pool).pop("_do_get", None)
        self._shut.release()


def _frames_of_all_threads() -> list[FrameType]:
    # The collector must not run in the middle of this: a finalizer that asks for them again
    # would wait for ever (Python 3.11).
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return list(sys._current_frames().values())
    finally:
        if was_enabled:
            gc.enable()


_gates: list[_Gate] = []
_pausing = threading.RLock()  # held by the thread that forks; two may do so at once


def pause_stores(deadline: float) -> None:
    """Before a fork: wait until no thread is inside SQLite, and let none in until it is over.

    What a thread has locked in SQLite stays locked in the child for ever, and SQLite takes the
    parent's locks on the file for the child's: that one hangs, or damages the database
    (test_fork_locks.py). What is not over by the deadline is not waited for.
    """
    engines = [engine for engine in _engines() if engine.dialect.name == "sqlite"]
    pools = [engine.pool for engine in engines if hasattr(engine.pool, "checkedout")]
    if not pools or not _pausing.acquire(timeout=max(0.0, deadline - time.monotonic())):
        return
    if _gates:  # a hook that forks, in the middle of a fork
        return
    _gates.extend(_Gate(pool, deadline) for pool in pools)
    for gate in _gates:
        gate.shut()
    for gate in _gates:
        gate.await_empty()


def resume_stores() -> None:
    """In the parent, after a fork: let the other threads go on."""
    while _is_pausing():
        while _gates:
            _gates.pop().open()
        _pausing.release()


def _is_pausing() -> bool:
    """Tell whether it is this thread that pauses the stores."""
    return bool(cast(Any, _pausing)._is_owned())


def find_experiment(id_or_name: str) -> str | None:
    """Ask the store for the id of an experiment that traces can go to, None if there is none.

    An id comes before a name. May block as long as MLflow's retries do.
    """
    client = MlflowClient()
    found = None
    try:
        found = client.get_experiment(id_or_name)
    except mlflow.MlflowException as error:
        # A name is an invalid id to some stores, and an unknown one to others.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    if found is None:
        found = client.get_experiment_by_name(id_or_name)
    # A deleted one takes no traces.
    return found.experiment_id if found is not None and found.lifecycle_stage == "active" else None


Ender = Callable[[SpanStatus, "int | None"], None]
