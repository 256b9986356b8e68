"""Standing between MLflow's span processor and its store, in place of its batch and its queue."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from mlflow.tracing.utils import maybe_get_request_id
from mlflow.utils import uri as _uri
from opentelemetry.sdk.trace import ReadableSpan

from spanguard._mlflow.optional import optional
from spanguard._mlflow.outgoing import Destination
from spanguard._mlflow.processor import is_of_mlflow, processor_in_force, sends_otlp
from spanguard._mlflow.provider import processors_of
from spanguard._mlflow.seam_check import is_missing

__all__ = [
    "Place",
    "await_stored",
    "finish",
    "follow",
    "forget_parents",
    "give_back",
    "goes_on_delivering",
    "hand_over",
    "is_taken_over",
    "left_behind",
    "make_stage",
    "tell_why_not",
    "waits_for",
]


class Waiting(Protocol):
    """What knows of all that went our way and is not stored."""

    def take_over(self) -> None:
        """Take out of MLflow's memory what has ended, also of traces that go on."""

    def await_stored(self, seconds: float) -> bool:
        """Wait until all is stored, at most so long; tell whether it is."""
        ...

    def finish(self, *, is_stored: bool) -> int:
        """Put on disk what will not be stored any more; return how many traces that are."""
        ...


class Stage(Protocol):
    """What stands there: for MLflow's processor its batch, for MLflow's exporter its queue."""

    place: Place

    def on_end(self, span: ReadableSpan) -> None:
        """Take a span that has ended."""

    def force_flush(self, timeout_millis: float = ...) -> bool:
        """Take over from MLflow's memory what has ended, also of traces that go on."""
        ...

    def shutdown(self) -> None:
        """Do the same, for the provider is replaced."""

    def put(self, task: Any) -> None:
        """Take an export task of MLflow's exporter."""

    def flush(self, terminate: bool = ...) -> None:
        """Wait until all is stored."""

    def is_active(self) -> bool: ...
    def activate(self) -> None: ...


_MISSING: Any = object()  # an attribute that was not there


@dataclass
class Place:
    """What was there before a stage stood there."""

    destination: Destination
    export: Callable[[Sequence[ReadableSpan]], object]
    before: dict[tuple[int, str], tuple[Any, Any]] = field(default_factory=dict)

    def replace(self, owner: Any, name: str, value: object) -> None:
        self.before[id(owner), name] = owner, vars(owner).get(name, _MISSING)
        setattr(owner, name, value)

    def restore(self) -> None:
        for (_, name), (owner, value) in self.before.items():
            if value is _MISSING:
                vars(owner).pop(name, None)
            else:
                setattr(owner, name, value)


_set_last_trace = optional("mlflow.tracing.fluent", "_set_last_active_trace_id")

# Who makes a stage for a place, while whole traces are delivered by us; and who is told where
# that cannot be.
make_stage: Callable[[Place], Stage] | None = None
tell_why_not: Callable[[str], None] = lambda reason: None  # noqa: E731

# Who knows what went our way: also when nothing does any more.
waits_for: Waiting | None = None

# MLflow's queues of what had ended before: they are still emptied.
left_behind: list[Any] = []

# Weakly: MLflow makes a new processor with each set_experiment(), and forgets the one before.
_stages: weakref.WeakSet[Any] = weakref.WeakSet()
_left_alone: weakref.WeakSet[Any] = weakref.WeakSet()


def is_taken_over() -> bool:
    """Tell whether what ends now goes our way."""
    return _has_stage(processor_in_force())


def goes_on_delivering(replaced: object) -> bool:
    """Tell whether what ends on a provider that MLflow has replaced still goes our way."""
    return any(map(_has_stage, processors_of(replaced)))


def _has_stage(processor: object) -> bool:
    return getattr(getattr(processor, "span_exporter", None), "_async_queue", None) in _stages


def follow() -> None:
    """Stand at the processor that is in force, if we are to and do not yet."""
    if make_stage is None:
        return
    processor = processor_in_force()
    if processor is None or processor in _left_alone or _has_stage(processor):
        return
    reason = _reason_against(processor)
    if reason is not None:
        _left_alone.add(processor)
        tell_why_not(reason)
        return
    _take_over(processor, make_stage)


_SEAMS = (
    "mlflow.tracing.export.mlflow_v3:MlflowV3SpanExporter._async_queue",
    "mlflow.tracing.export.mlflow_v3:MlflowV3SpanExporter._should_log_async",
    "mlflow.tracing.export.mlflow_v3:MlflowV3SpanExporter._client",
    "mlflow.tracing.export.async_export_queue:Task.args",
    "mlflow.tracing.processor.base_mlflow:BaseMlflowSpanProcessor.span_exporter",
)
_STORES = ("SqlAlchemyStore", "RestStore")


def _reason_against(processor: Any) -> str | None:
    """Return why the way to the store is left to MLflow; None where it need not be."""
    if sends_otlp(processor) or not is_of_mlflow(processor):
        return "traces go to an OpenTelemetry endpoint"
    missing = [path for path in _SEAMS if is_missing(path)]
    if missing:
        return f"this MLflow lacks {missing[0]}"
    exporter = processor.span_exporter
    if type(exporter).__name__ != "MlflowV3SpanExporter":
        return f"traces go through {type(exporter).__name__}"
    client = exporter._client
    if cast("Any", _uri).is_databricks_uri(client.tracking_uri):
        return "traces go to Databricks"
    store = type(client.store).__name__
    return None if store in _STORES else f"traces go to a store of the type {store}"


def _take_over(processor: Any, make: Callable[[Place], Stage]) -> None:
    exporter = processor.span_exporter
    processor.force_flush()  # what has ended before goes MLflow's way
    destination = Destination(exporter._client.tracking_uri, exporter._client)
    place = Place(destination, exporter.export)
    stage = make(place)
    tasks = getattr(getattr(exporter, "_async_queue", None), "_queue", None)
    if tasks is not None:
        left_behind.append(tasks)
    place.replace(exporter, "_async_queue", stage)
    place.replace(exporter, "_is_async_enabled", True)
    if hasattr(processor, "_batch_delegate"):
        place.replace(processor, "_batch_delegate", stage)
        place.replace(processor, "on_end", _also_when_retired(processor, stage))
    else:  # MLflow 3.10 and 3.11 have none: each span goes to the exporter by itself
        place.replace(exporter, "export", _export_to(stage, exporter.export))
    _stages.add(stage)


def _also_when_retired(processor: Any, stage: Stage) -> Callable[[ReadableSpan], None]:
    """Let the spans that are open when MLflow replaces the provider go our way all the same.

    It shuts the processor down and takes its batch away: what ended after that was lost.
    """
    end = processor.on_end

    def on_end(span: ReadableSpan) -> None:
        if processor._batch_delegate is None:
            processor._batch_delegate = stage
        end(span)

    return on_end


def _export_to(
    stage: Stage, export: Callable[[Sequence[ReadableSpan]], object]
) -> Callable[[Sequence[ReadableSpan]], object]:
    def take(spans: Sequence[ReadableSpan]) -> object:
        if maybe_get_request_id(is_evaluate=True):  # which reads the traces back at once
            return export(spans)
        for span in spans:
            if span.parent is None and _set_last_trace is not None and span.attributes:
                # MLflow does it in the thread that exports, which was the one that ended.
                _set_last_trace(_unquoted(span.attributes.get("mlflow.traceRequestId")))
            stage.on_end(span)
        return None

    return take


def _unquoted(text: object) -> str:
    return str(text).strip('"')


def give_back() -> None:
    """Let MLflow's own batch and queue stand there again."""
    given = list(_stages)
    _stages.clear()
    _left_alone.clear()
    for stage in given:
        stage.place.restore()


def forget_parents() -> None:
    """In a forked child: the stages of the parent are the parent's."""
    global _stages, _left_alone
    left_behind.clear()
    _stages, _left_alone = weakref.WeakSet(), weakref.WeakSet()


def hand_over() -> None:
    """Take out of MLflow's memory what has ended and goes our way."""
    if waits_for is not None:
        waits_for.take_over()


def await_stored(seconds: float) -> bool:
    """Wait until what went our way is stored, at most so long; tell whether it is."""
    return waits_for is None or waits_for.await_stored(seconds)


def finish(*, is_stored: bool) -> int:
    """At the end of the process: put on disk what is not stored; return how many traces."""
    return waits_for.finish(is_stored=is_stored) if waits_for is not None else 0
