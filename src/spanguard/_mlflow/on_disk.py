"""What is on its way to the store as plain data, to be kept in a file, and made of it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlflow.entities import LiveSpan, Span, Trace, TraceInfo
from mlflow.tracing.utils import TraceJSONEncoder
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan

from spanguard._base.findings import PASSWORD, contained
from spanguard._mlflow.memory import manager_in_force
from spanguard._mlflow.outgoing import Destination, Outgoing, size_of

__all__ = ["OpenTrace", "as_line", "as_text", "from_data", "open_trace_data"]


def uri_without_password(uri: str) -> str:
    """Return a tracking URI as it may be written down."""
    return PASSWORD.sub("://***@", uri)


def as_line(item: Outgoing) -> bytes:
    """Return one line that says all of an outgoing trace or part, but for its attachments."""
    unsent = {span.span_id for span in item.spans}
    data: dict[str, Any] = {
        "kind": "part" if item.trace is None else "trace",
        "store": uri_without_password(item.destination.uri),
        "id": item.trace_id,
        "experiment": item.experiment_id,
        "workspace": item.workspace,
        "prompts": [[prompt.name, prompt.version] for prompt in item.prompts],
        "attachments": list(item.attachments),
        "resource": _resource_of(item.spans),
    }
    if item.trace is None:
        data["spans"] = [span.to_dict() for span in item.spans]
    else:
        data["trace"] = item.trace.to_dict()
        spans = item.trace.data.spans
        if len(unsent) < len(spans):
            data["unsent"] = sorted(unsent)
    return as_text(data)


def as_text(data: Mapping[str, Any]) -> bytes:
    """Return data as a line of JSON."""
    return json.dumps(data, cls=TraceJSONEncoder).encode() + b"\n"


def from_data(
    data: Mapping[str, Any], destination: Destination, files: Mapping[str, bytes]
) -> Outgoing:
    """Return what a line was made of.

    Args:
        data: the line, read.
        destination: where it is to go.
        files: the bytes of its attachments, by id.
    """
    trace = Trace.from_dict(data["trace"]) if data["kind"] == "trace" else None
    spans = trace.data.spans if trace is not None else [Span.from_dict(s) for s in data["spans"]]
    _give_resource(spans, data.get("resource"))
    if spans and files:
        with contained("giving a stored trace its attachments"):
            attached: dict[str, Any] = {name: _Bytes(content) for name, content in files.items()}
            spans[0]._attachments = attached
    unsent = data.get("unsent")
    return Outgoing(
        destination,
        data["id"],
        data["experiment"],
        spans if unsent is None else [span for span in spans if span.span_id in unsent],
        trace,
        workspace=data.get("workspace"),
        prompts=[_Prompt(name, int(version)) for name, version in data["prompts"]],
        size=size_of(trace, len(spans)),
    )


@dataclass(frozen=True)
class _Bytes:
    """An attachment, as far as its upload looks at it."""

    content_bytes: bytes


@dataclass(frozen=True)
class _Prompt:
    """A version of a prompt, as far as linking it looks at it."""

    name: str
    version: int


def _resource_of(spans: Iterable[Span]) -> dict[str, Any]:
    for span in spans:
        resource = getattr(span._span, "resource", None)
        if resource is not None and resource.attributes:
            return dict(resource.attributes)
    return {}


def _give_resource(spans: Iterable[Span], attributes: Any) -> None:
    """Give spans the resource that they had: MLflow's own way back from JSON forgets it."""
    if attributes:
        resource = Resource(attributes)
        for span in spans:
            span._span._resource = resource


# -- traces that go on -------------------------------------------------------------------------


def open_trace_data(
    destination: Destination, ended: ReadableSpan, noted: dict[str, set[str]]
) -> dict[str, Any] | None:
    """Return what a crash must leave of a span that has ended, and of what is open above it.

    Args:
        destination: where the trace will go.
        ended: the span.
        noted: of each trace, the open spans that are written down; what is new is added.
    """
    manager, context = manager_in_force(), ended.context
    if context is None:
        return None
    trace_id = manager.get_mlflow_trace_id_from_otel_id(context.trace_id)
    with manager.get_trace(trace_id) as trace:
        if trace is None or trace_id is None:
            return None
        spans, info = dict(trace.span_dict), trace.info
    is_first = trace_id not in noted
    known = noted.setdefault(trace_id, set())
    span = spans.get(f"{context.span_id:016x}")
    if span is None:
        return None
    above = [one for one in _above(span, spans) if one.span_id not in known]
    known.update(one.span_id for one in above)
    data = {
        "kind": "ended",
        "id": trace_id,
        "store": uri_without_password(destination.uri),
        "span": span.to_dict(),
        "open": [one.to_dict() for one in above],
    }
    return {**data, "info": info.to_dict()} if is_first else data


def _above(span: LiveSpan, spans: Mapping[str, LiveSpan]) -> list[LiveSpan]:
    found: list[LiveSpan] = []
    above = spans.get(span.parent_id or "")
    while above is not None and above not in found:
        found.append(above)
        above = spans.get(above.parent_id or "")
    return found


@dataclass
class OpenTrace:
    """What a crash has left of a trace: the spans that had ended, those that were open."""

    info: dict[str, Any] | None = None
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)
    open: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, data: Mapping[str, Any]) -> None:
        """Add what one line says."""
        self.info = data.get("info", self.info)
        self.ended[data["span"]["span_id"]] = data["span"]
        for span in data["open"]:
            self.open[span["span_id"]] = span

    def finished(self, write: Callable[[dict[str, Any]], object]) -> dict[str, Any] | None:
        """Return the line of the trace, ended when its last span did; None if it has no root.

        Args:
            write: writes on the plain data of a span why it was ended.
        """
        if self.info is None:
            return None
        last = max(int(span["end_time_unix_nano"]) for span in self.ended.values())
        left = [span for key, span in self.open.items() if key not in self.ended]
        for span in left:
            span["end_time_unix_nano"] = max(last, int(span["start_time_unix_nano"]))
            write(span)
        roots = [span for span in left if not span["parent_span_id"]]
        if not roots:
            return None
        milliseconds = (last - int(roots[0]["start_time_unix_nano"])) // 1_000_000
        info = {
            **self.info,
            "state": "ERROR",
            "execution_duration_ms": max(milliseconds, 0),
        }
        spans = [*left, *self.ended.values()]
        return {
            "kind": "trace",
            "id": info["trace_id"],
            "experiment": TraceInfo.from_dict(dict(info)).experiment_id,
            "prompts": [],
            "trace": {"info": info, "data": {"spans": spans}},
        }
