"""Every private or half-public name of MLflow's and OpenTelemetry's that is used here, as data.

`spanguard check` prints them, `seam_check` looks for them, and tests/mlflow/test_seams.py fails by
the name of one that an MLflow lacks. Who uses another such name writes it down here.
"""

from __future__ import annotations

from spanguard._mlflow.seam import FORKED, PROVIDER, SDK, UNDONE, Seam, each
from spanguard._mlflow.seams_of_delivery import ON_THE_WAY_TO_THE_STORE
from spanguard._mlflow.seams_of_recording import QUICK_RECORDING

__all__ = ["SEAMS"]


_WRAPPER = f"{PROVIDER}_TracerProviderWrapper."
_MANAGER = "mlflow.tracing.trace_manager:InMemoryTraceManager."
_TRACE = "mlflow.tracing.trace_manager:_Trace."
_KEYS = "mlflow.tracing.constant:"
_NOT_ACTIVE = "Spans of ours are not MLflow's active span: what is opened below them starts a trace"
_UNNOTICED = "Before MLflow 3.15 nothing is recorded; later, a change of provider goes unnoticed."
_NO_LIVE_SPAN = "No span can be found by its id, and none is recorded."
_EVICTED = "MLflow drops open traces at its own limits, in number and age, and nobody is told."
_REMOTE = "A span that is carried to another process starts a trace of its own."
_KEY = "Nothing: the key itself is known."

_OPENING = (
    Seam(
        f"{PROVIDER}mlflow_runtime_context", "active", f"{_NOT_ACTIVE} of its own.", is_needed=True
    ),
    Seam(f"{PROVIDER}provider", "provider, watching", _UNNOTICED, is_needed=True, flush_needs=True),
    Seam(f"{_WRAPPER}get", "provider", _UNNOTICED, is_needed=True, flush_needs=True),
    Seam(
        f"{PROVIDER}_get_tracer",
        "provider, ids",
        "Nothing is recorded.",
        until="3.14",  # from 3.15 on its public name is get_bridged_tracer_provider
        is_needed=True,
        flush_needs=True,
    ),
    Seam(
        f"{PROVIDER}get_bridged_tracer_provider",
        "provider, ids",
        "The private _get_tracer is used in its place.",
        since="3.15",
    ),
    Seam(
        f"{PROVIDER}_initialize_tracer_provider",
        "watching",
        "Ids of the spans before the first of ours heed random.seed(), and a test run hears only "
        "of the provider that MLflow has at its start.",
    ),
    Seam(
        f"{PROVIDER}_trace_disabled_state",
        "provider",
        "A provider that MLflow hides for a moment counts as replaced, and its traces as lost.",
        since="3.15",
    ),
    Seam(
        f"{_WRAPPER}_isolated_tracer_provider",
        "provider, watching, fork, recording",
        f"{FORKED} A start costs a microsecond more.",
    ),
    *each(
        (f"{_WRAPPER}_isolated_tracer_provider_once", f"{_WRAPPER}_global_provider_init_once"),
        "fork, recording",
        FORKED,
    ),
    *each(
        (f"{_WRAPPER}once", "opentelemetry.util._once:Once._done"),
        "recording",
        "record_spans() fails.",
    ),
    Seam("opentelemetry.trace:_TRACER_PROVIDER", "watching, recording", UNDONE),
    Seam(
        "mlflow.tracing.context:_USER_TRACE_CONTEXT",
        "starting",
        "mlflow.tracing.context(enabled=False) does not hold for children of ours.",
        since="3.11",
    ),
    Seam(
        "mlflow.tracing.sampling:_SAMPLING_RATIO_OVERRIDE",
        "starting",
        "sampling_ratio_override= is ignored.",
    ),
    Seam(
        "mlflow.tracing.sampling:_MlflowSampler",
        "starting",
        "Each span of a trace is sampled by itself.",
        until="3.10",  # from 3.11 on MLflow lets children follow their root
    ),
    Seam(
        "mlflow.entities.span:NoOpSpan._span",
        "starting",
        "The children of a span that was sampled out are recorded without it.",
    ),
    Seam(
        "mlflow.entities:SpanLogLevel.from_value",
        "starting",
        "A wrong log level is noticed by MLflow only.",
        since="3.13",
    ),
    Seam(
        f"{_WRAPPER}set",
        "watching",
        "A test that records loses what is recorded after MLflow changes its provider.",
    ),
    Seam("mlflow.entities:Link", "writing", "Links of spans are not recorded.", since="3.13"),
    Seam(
        f"{SDK}TracerProvider.id_generator",
        "ids",
        "A chosen trace id is not taken, and ids heed random.seed().",
    ),
    *each(
        (f"{SDK}Tracer.id_generator", "opentelemetry.trace:ProxyTracer._tracer"),
        "ids",
        "A chosen trace id is not taken, which is warned of at the span.",
    ),
    Seam(
        "mlflow.tracing.utils:generate_mlflow_trace_id_from_otel_trace_id",
        "ids",
        "Trace ids are made as MLflow makes them today.",
    ),
)

_MEMORY = (
    Seam(f"{_MANAGER}get_instance", "memory", _NO_LIVE_SPAN, is_needed=True, flush_needs=True),
    Seam(f"{_MANAGER}get_span_from_id", "memory", _NO_LIVE_SPAN, is_needed=True, flush_needs=True),
    Seam(f"{_MANAGER}get_root_span_id", "memory", "trace_id= without a parent finds no root."),
    Seam(
        f"{_MANAGER}get_trace",
        "memory, writing, destination",
        "Names, tags and previews of a trace stay as they were when it began.",
        is_needed=True,
        flush_needs=True,
    ),
    Seam(
        f"{_MANAGER}get_mlflow_trace_id_from_otel_id",
        "memory, exporting",
        "Spans that other APIs open are not known by their trace.",
        is_needed=True,
        flush_needs=True,
    ),
    Seam(f"{_MANAGER}register_trace", "remote, recording", _REMOTE),
    Seam(f"{_MANAGER}pop_trace", "remote, recording", _REMOTE),
    Seam(f"{_MANAGER}_instance", "memory, keeping, fork", _EVICTED),
    Seam(f"{_MANAGER}_instance_lock", "fork", FORKED),
    Seam(f"{_MANAGER}_traces", "memory, keeping", _EVICTED),
    Seam(f"{_MANAGER}_lock", "keeping", _EVICTED),
    Seam(
        f"{_MANAGER}_otel_id_to_mlflow_trace_id",
        "keeping, memory",
        "A long process keeps an entry for each trace that MLflow has dropped.",
    ),
    Seam("cachetools:TTLCache.ttl", "keeping", _EVICTED),
    Seam("cachetools:TTLCache.maxsize", "keeping", _EVICTED),
    Seam(
        f"{_TRACE}info",
        "memory, writing, destination",
        "A trace's name and tags stay.",
        is_needed=True,
        flush_needs=True,
    ),
    Seam(f"{_TRACE}span_dict", "memory, keeping", _EVICTED, is_needed=True, flush_needs=True),
    Seam(f"{_TRACE}is_remote_trace", "keeping", _REMOTE),
)

_SPAN = (
    Seam(
        "mlflow.entities:LiveSpan._span",
        "spans",
        "No span is recorded.",
        is_needed=True,
        flush_needs=True,
    ),
    Seam(f"{SDK}Span._status", "ending", "An OK that the body set hides a later error."),
    Seam(
        f"{SDK}Span._attributes",
        "spans, memory, exporting, fork, own_end, own_write",
        "Outputs that the body set are overwritten by the return value.",
    ),
    Seam(
        "opentelemetry.attributes:BoundedAttributes._dict",
        "memory, own_end, own_write",
        "An end is slower.",
    ),
    Seam(
        f"{SDK}Span._events",
        "writing, fork",
        "A span that another API ends as ERROR is not red in MLflow's page.",
    ),
    Seam(f"{SDK}Span._links", "fork", FORKED),
    Seam(
        f"{SDK}Span._lock",
        "spans, fork, own_write",
        "A span that is dropped while it is written may keep its thread waiting for ever.",
    ),
    *each(
        (f"{SDK}Span._span_processor", f"{SDK}Span._readable_span"),
        "ending",
        "A span whose end Ctrl-C interrupts is lost.",
    ),
    Seam(
        f"{SDK}SpanProcessor._on_ending",
        "spanguard._process.listening",
        "A root that another API ends is unreadable where spans below it are open, and an ERROR "
        "that another API ends is not red in MLflow's page.",
    ),
    Seam(
        "mlflow.tracing.utils:TraceJSONEncoder",
        "payloads",
        "Payloads are cut by what plain JSON makes of them.",
    ),
    Seam(
        "mlflow.tracing.attachments:Attachment",
        "payloads",
        "Attachments are recorded as text.",
        since="3.11",
    ),
    *each(
        (
            "mlflow.entities.span:_logger",
            "mlflow.tracing.fluent:_logger",
            "mlflow.tracking.client:_logger",
        ),
        "swallowed, own_end, own_start",
        "What a signal handler raises in the middle of a start or an end stays swallowed.",
    ),
    *each(
        (
            f"{_KEYS}SpanAttributeKey.INPUTS",
            f"{_KEYS}SpanAttributeKey.OUTPUTS",
            f"{_KEYS}SpanAttributeKey.SPAN_TYPE",
            f"{_KEYS}SpanAttributeKey.EXPERIMENT_ID",
            f"{_KEYS}TraceMetadataKey.TRACE_SESSION",
            f"{_KEYS}TraceMetadataKey.TRACE_USER",
            f"{_KEYS}TraceMetadataKey.SOURCE_RUN",
            f"{_KEYS}TraceTagKey.TRACE_NAME",
        ),
        "names",
        _KEY,
    ),
    Seam(f"{_KEYS}SpanAttributeKey.TRACE_TAG_PREFIX", "names", _KEY, since="3.13"),
)

SEAMS: tuple[Seam, ...] = (*_OPENING, *_MEMORY, *_SPAN, *QUICK_RECORDING, *ON_THE_WAY_TO_THE_STORE)
