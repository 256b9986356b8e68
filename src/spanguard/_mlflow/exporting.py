"""What becomes of each trace that MLflow exports."""

from __future__ import annotations

import logging
import queue
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mlflow.entities import Span, TraceInfo
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult

from spanguard._mlflow import provider
from spanguard._mlflow.ledger import Ledger
from spanguard._mlflow.memory import knows_trace
from spanguard._mlflow.names import TAG_PREFIX
from spanguard._mlflow.processor import processor_in_force, sends_otlp
from spanguard._mlflow.reasons import GONE, reason_of
from spanguard._mlflow.shapes import RecordingSpan
from spanguard._mlflow.spans import recording_span

__all__ = [
    "at_end_of_trace",
    "close_ledger",
    "ledger",
    "loss_is_told",
    "note_deliveries",
    "note_end_of_trace",
    "note_refused",
    "note_stored",
    "noting_failure",
    "takes_whole_traces_only",
]


_logger = logging.getLogger("spanguard")

# By OpenTelemetry trace id: MLflow's own ends in it, whatever its form.
ledger = Ledger()
# Whose deliveries are noted, and whether an ended trace is looked for in MLflow's memory.
_noted: weakref.WeakSet[object] = weakref.WeakSet()
_notes_ends = False
# Whether the store has refused spans by themselves: a file store takes a trace when its root ends.
takes_whole_traces_only = False


@contextmanager
def noting_failure(*traces: Hashable) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        for trace in traces:
            ledger.refused(trace, reason_of(error))
        raise


def note_deliveries() -> None:
    """Note from here on what becomes of each trace that the current provider exports."""
    global _notes_ends, takes_whole_traces_only
    processor = processor_in_force()
    exporter = getattr(processor, "span_exporter", None)
    is_otlp = sends_otlp(processor)
    _notes_ends = not is_otlp and _Delivery.can_stand_at(processor)
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
    if _notes_ends and provider.recorder is None:
        # In this order: it may be exported in this very moment.
        ledger.ended(otel_trace_id)
        if not knows_trace(otel_trace_id):
            ledger.forget(otel_trace_id)
    if at_end_of_trace is not None and provider.recorder is None:
        at_end_of_trace()


# What is to be done when a root has ended, once the process is so far on its way out that
# nothing else of ours will run.
at_end_of_trace: Callable[[], object] | None = None


def close_ledger() -> None:
    """Begin anew, where MLflow's tracing is reset or disabled: it has stored what it could."""
    global ledger
    old, ledger = ledger, Ledger()
    loss = old.settle(old.on_their_way(), GONE)
    if loss:
        _logger.warning("%d traces are not in the store: %s.", loss.traces, loss.reason)


def note_stored(trace_id: str) -> None:
    """Note that a trace is in the store that did not go there through MLflow's exporter."""
    ledger.taken(_key_of(trace_id))


def note_refused(trace_id: str, reason: str) -> None:
    """Note that such a trace, or a part of it, is not in the store and will not be."""
    ledger.refused(_key_of(trace_id), reason)


def loss_is_told(span: object) -> None:
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

    @staticmethod
    def can_stand_at(processor: object) -> bool:
        """Tell whether all is there of what it stands in front of."""
        client = getattr(getattr(processor, "span_exporter", None), "_client", None)
        steps = ("log_spans", "start_trace", "_upload_trace_data")
        return hasattr(processor, "_start_trace") and all(hasattr(client, step) for step in steps)

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

    def begin(self, root: RecordingSpan) -> object:
        """Start a trace, for which MLflow may ask the store."""
        with noting_failure(root.context.trace_id):
            return self._begin(root)

    def drop(self, count: int, *why: str) -> None:
        """Take note that the oldest span gives way, where the queue of ended spans is full."""
        waiting = self._batch._queue
        if not why and waiting:
            ledger.refused(
                waiting[-1].context.trace_id,
                "MLflow's queue of ended spans was full",
                for_room=True,
            )
        self._drop(count, *why)

    def put(self, task: Any, block: bool = True, timeout: float | None = None) -> None:
        """Queue an export, or take note that there was no room for it."""
        try:
            self._put(task, block, timeout)
        except queue.Full:
            for trace_id in _trace_ids_in(task.args):
                ledger.refused(_key_of(trace_id), "MLflow's export queue was full", for_room=True)
                _tell_of_full_queue()
            raise

    def log_spans(self, location: str, spans: list[Span]) -> object:
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

    def store(self, info: TraceInfo) -> object:
        """Store the trace itself."""
        with noting_failure(_key_of(info.trace_id)):
            stored = self._store(info)
        if not self._goes_to_artifacts(stored):
            ledger.taken(_key_of(info.trace_id))
        return stored

    def upload(self, info: TraceInfo, data: object) -> None:
        """Store all spans of a trace in its artifact."""
        with noting_failure(_key_of(info.trace_id)):
            self._upload(info, data)
        ledger.taken(_key_of(info.trace_id), whole=True)


def _tell_of_full_queue() -> None:
    global _has_told_of_full_queue
    if not _has_told_of_full_queue:
        _has_told_of_full_queue = True
        _logger.warning(
            "MLflow's export queue is full, and it drops what does not fit. delivery() counts "
            "it; deliver() has no such limit. Logged once."
        )


_has_told_of_full_queue = False

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

    def on_end(self, span: RecordingSpan) -> None:
        """Put the tags of a root on it before MLflow's processor sees it."""
        if span.parent is None and self._manager is not None:
            ledger.ended(span.context.trace_id)
            with noting_failure(span.context.trace_id):
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
                **{f"{TAG_PREFIX}{key}": value for key, value in users.items()},
            }

    def export(self, spans: Sequence[ReadableSpan]) -> object:
        """Send a batch, and note what became of the traces in it."""
        traces = {span.context.trace_id for span in spans if span.context is not None}
        with noting_failure(*traces):
            result = self._export(spans)
        for trace in traces:
            if result is not SpanExportResult.SUCCESS:
                ledger.refused(trace, "the OTLP endpoint did not take it")
        for span in spans:
            if span.parent is None and span.context is not None:
                ledger.taken(span.context.trace_id)
        return result
