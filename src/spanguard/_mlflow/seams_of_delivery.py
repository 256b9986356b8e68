"""The seams on a span's way to the store: processors, queues, exporters, stores. See `seams`."""

from __future__ import annotations

from spanguard._mlflow.seam import FORKED, PROVIDER, SDK, UNDONE, Seam, each

__all__ = ["ON_THE_WAY_TO_THE_STORE"]


_BASE = "mlflow.tracing.processor.base_mlflow:"
_PROCESSOR = f"{_BASE}BaseMlflowSpanProcessor."
_V3_PROCESSOR = "mlflow.tracing.processor.mlflow_v3:MlflowV3SpanProcessor."
_OTLP = "mlflow.tracing.processor.otel:OtelSpanProcessor."
_EXPORTER = "mlflow.tracing.export.mlflow_v3:MlflowV3SpanExporter."
_QUEUE = "mlflow.tracing.export.async_export_queue:AsyncTraceExportQueue."
_CLIENT = "mlflow.tracing.client:TracingClient."
_SQL_STORE = "mlflow.store.tracking.sqlalchemy_store:SqlAlchemyStore."
_BATCH = "opentelemetry.sdk.trace.export:BatchSpanProcessor."
_BATCH_QUEUE = "opentelemetry.sdk._shared_internal:BatchProcessor."
_BLIND = "Nobody can tell whether MLflow has exported a trace: flush() never says True."
_UNTOLD = "What the store refuses is not told of, and flush() never says True."
_FULL = "MLflow drops what does not fit when thousands of spans end at once."
_SLOW_EXIT = "The exit of the process waits for a dead server as long as MLflow does: minutes."

_EXPORT = (
    Seam(f"{SDK}TracerProvider._active_span_processor", "provider", _BLIND, flush_needs=True),
    Seam(
        f"{SDK}SynchronousMultiSpanProcessor._span_processors",
        "provider",
        _BLIND,
        flush_needs=True,
    ),
    Seam(
        f"{_BASE}BaseMlflowSpanProcessor",
        "processor, queue",
        _BLIND,
        flush_needs=True,
    ),
    Seam(f"{_PROCESSOR}span_exporter", "processor, exporting", _BLIND, flush_needs=True),
    Seam(f"{_V3_PROCESSOR}_start_trace", "exporting, recording", _UNTOLD, flush_needs=True),
    Seam(f"{_PROCESSOR}_get_basic_trace_metadata", "recording", "record_spans() fails."),
    Seam(f"{_PROCESSOR}_get_basic_trace_tags", "recording", "record_spans() fails."),
    Seam(f"{_PROCESSOR}_batch_delegate", "processor, exporting", _FULL, since="3.12"),
    Seam(f"{_BATCH}_batch_processor", "processor, exporting", _FULL),
    Seam(f"{_BATCH_QUEUE}_queue", "queue, exporting, fork", _FULL),
    Seam(f"{_BATCH_QUEUE}_max_queue_size", "queue", _FULL),
    Seam(f"{_BATCH_QUEUE}_max_export_batch_size", "queue", _FULL),
    Seam(f"{_BATCH_QUEUE}_metrics", "exporting", "A full queue of spans is told of without why."),
    Seam(f"{_EXPORTER}_async_queue", "processor, queue, exporting", _BLIND, flush_needs=True),
    Seam(f"{_QUEUE}_queue", "processor, exporting", _BLIND, flush_needs=True),
    Seam(
        "mlflow.tracing.export.async_export_queue:Task.args",
        "exporting",
        "What does not fit into MLflow's queue is told of without its number.",
    ),
    Seam(f"{_QUEUE}activate", "queue", "Python 3.12.1 loses what ends in its last seconds."),
    Seam(f"{_QUEUE}_is_active", "fork", FORKED),
    *each(
        (
            f"{_QUEUE}_worker_threadpool",
            f"{_QUEUE}_at_exit_callback",
            "concurrent.futures.thread:_threads_queues",
            "concurrent.futures:ThreadPoolExecutor._threads",
        ),
        "queue",
        _SLOW_EXIT,
    ),
    Seam("threading:_register_atexit", "spanguard._process.exit", _SLOW_EXIT),
    Seam(f"{SDK}TracerProvider._atexit_handler", "queue, fork", _SLOW_EXIT),
    Seam(
        f"{_EXPORTER}_deferred_root_spans",
        "queue",
        "What runs on under a root is closed when the root ends.",
        since="3.13",
    ),
    Seam(f"{_EXPORTER}_client", "exporting", _UNTOLD, flush_needs=True),
    Seam(f"{_CLIENT}log_spans", "exporting", _UNTOLD, flush_needs=True),
    Seam(f"{_CLIENT}start_trace", "exporting", _UNTOLD, flush_needs=True),
    Seam(f"{_CLIENT}_upload_trace_data", "exporting", _UNTOLD, flush_needs=True),
    Seam(
        f"{_EXPORTER}_should_log_spans_to_artifacts",
        "exporting",
        "A trace counts as stored before its spans are, where these go to artifacts.",
        flush_needs=True,
    ),
    Seam(
        "mlflow.store.tracking.sqlalchemy_store:SqlAlchemyStore says Could not create trace_info",
        "exporting",
        "flush() takes for whole a trace of which the SQL store gave up spans in a crowd.",
        since="3.12",
        flush_needs=True,
    ),
    Seam(
        f"{_OTLP}_trace_manager",
        "exporting",
        "Where only an OTLP endpoint is set, a root with tags is not sent.",
    ),
    Seam(
        "mlflow.tracing.export.uc_table:DatabricksUCTableSpanExporter._span_batcher",
        "queue",
        "On Databricks, spans that have ended may be lost when their trace moves on.",
    ),
)

_STORE = (
    Seam(
        f"{_CLIENT}store",
        "stored",
        "Whether a chosen id is taken already cannot be asked: it counts as free.",
    ),
    Seam(
        "mlflow.tracking.fluent:_active_experiment_id",
        "destination, recording",
        "Spans of another process go to the experiment of its environment variables.",
    ),
    Seam(f"{_SQL_STORE}_engine_map", "fork", FORKED),
    Seam(f"{_SQL_STORE}_engine_map_lock", "fork", FORKED),
    Seam("sqlalchemy.pool:QueuePool._do_get", "fork", "A fork does not wait for SQLite's locks."),
    Seam("sqlalchemy.pool:QueuePool.checkedout", "fork", "A fork does not wait for SQLite."),
    Seam(
        f"{_BASE}retire_batch_processor",
        "processor",
        "Where the experiment changes while a trace is open, its loss is not told of.",
        since="3.15",
    ),
    *each(
        (f"{_BASE}_batch_processor_registry", f"{_BASE}_batch_processor_registry_lock"),
        "fork",
        FORKED,
        since="3.12",
    ),
    *each(
        (
            f"{PROVIDER}_MLFLOW_TRACE_USER_DESTINATION",
            "mlflow.tracing.destination:UserTraceDestinationRegistry._global_value",
            "mlflow.tracing.config:_MLFLOW_TRACING_CONFIG",
            "mlflow.tracking._tracking_service.utils:_tracking_uri",
        ),
        "recording",
        UNDONE,
    ),
)

_DELIVER = (
    *each(
        (f"{_EXPORTER}_is_async_enabled", f"{_EXPORTER}_log_spans", f"{_EXPORTER}_log_trace"),
        "takeover, outgoing",
        "deliver() leaves the delivery to MLflow.",
    ),
    Seam(
        "mlflow.tracing.fluent:_set_last_active_trace_id",
        "takeover",
        "With deliver(), get_last_active_trace_id() lags by a second.",
        until="3.11",
    ),
    *each(
        (f"{_SQL_STORE}_start_trace_once", f"{_SQL_STORE}_log_spans_once"),
        "sql_delivery",
        "With deliver(), a deadlock of the database is tried again twice over.",
        since="3.15",
    ),
    *each(
        (f"{_SQL_STORE}ManagedSessionMaker", f"{_SQL_STORE}engine"),
        "sql_delivery",
        "deliver() stores nothing in an SQL store.",
    ),
    Seam(
        "sqlalchemy.sql.dml:ValuesBase._multi_values",
        "sql_sessions",
        "With deliver(), storing takes half as long again.",
    ),
    *each(
        (f"{_CLIENT}_upload_attachments", "mlflow.entities:Span._attachments"),
        "sending, on_disk, outgoing",
        "With deliver(), attachments of spans are not stored.",
        since="3.11",
    ),
    Seam(
        "opentelemetry.context:_SUPPRESS_INSTRUMENTATION_KEY",
        "sending",
        "With deliver(), instrumentation of HTTP clients may make spans of what is delivered.",
    ),
    Seam(
        "opentelemetry.sdk.trace:ReadableSpan._resource",
        "on_disk",
        "A trace that is stored from disk lacks the tags of its OpenTelemetry resource.",
    ),
)

ON_THE_WAY_TO_THE_STORE: tuple[Seam, ...] = (*_EXPORT, *_STORE, *_DELIVER)
