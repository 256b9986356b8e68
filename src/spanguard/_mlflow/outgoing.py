"""What is on its way to the store: a trace that has ended, or a part of one that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Span, Trace
from mlflow.tracing.utils import add_size_stats_to_trace_metadata

from spanguard._base.findings import contained
from spanguard._mlflow.optional import optional

__all__ = ["Destination", "Outgoing", "in_workspace", "read_task", "size_of"]


BYTES_PER_SPAN = 4_500
"""What a span costs in memory besides its payloads (benchmarks/memory.py)."""


@dataclass(frozen=True)
class Destination:
    """Where traces go: MLflow's client of one tracking URI."""

    uri: str
    client: Any


@dataclass(eq=False)
class Outgoing:
    """One thing to store: by itself it is stored as a whole, or not at all.

    Attributes:
        trace_id: MLflow's id of the trace.
        spans: the spans that the store does not have yet.
        trace: the trace itself, when its root has ended; None for a part of an open one.
        experiment_id: where the trace belongs.
        workspace: the workspace of MLflow's that it was recorded in, if any.
        prompts: what MLflow links to the trace.
        size: about how many bytes it takes in memory.
    """

    destination: Destination
    trace_id: str
    experiment_id: str
    spans: list[Span]
    trace: Trace | None = None
    workspace: str | None = None
    prompts: Sequence[Any] = ()
    size: int = 0

    @property
    def key(self) -> str:
        """Return what tells it from all else that is on its way."""
        return (
            self.trace_id if self.trace is not None else f"{self.trace_id}#{self.spans[0].span_id}"
        )

    @property
    def attachments(self) -> dict[str, Any]:
        """Return the attachments of all its spans, by id."""
        found: dict[str, Any] = {}
        for span in self.spans if self.trace is None else self.trace.data.spans:
            found.update(getattr(span, "_attachments", None) or {})
        return found


def whole(destination: Destination, trace: Trace, prompts: Sequence[Any], *rest: Any) -> Outgoing:
    """Return a trace whose root has ended, with its size noted in it as MLflow does."""
    with contained("noting the size of a trace"):
        add_size_stats_to_trace_metadata(trace)
    spans = list(trace.data.spans)
    return Outgoing(
        destination,
        trace.info.trace_id,
        trace.info.experiment_id or "0",
        spans,
        trace,
        workspace=rest[0] if rest else None,
        prompts=prompts,
        size=size_of(trace, len(spans)),
    )


def part_of(
    destination: Destination, experiment_id: str, spans: list[Span], *rest: Any
) -> Outgoing:
    """Return spans of one trace that goes on."""
    return Outgoing(
        destination,
        spans[0].trace_id,
        experiment_id,
        spans,
        workspace=rest[0] if rest else None,
        size=BYTES_PER_SPAN * len(spans),
    )


_SIZE_KEY = "mlflow.trace.sizeStats"


def size_of(trace: Trace | None, spans: int) -> int:
    """Return about how many bytes a trace with so many spans takes in memory."""
    payloads = 0
    if trace is not None:
        with suppress(KeyError, TypeError, ValueError):
            payloads = int(json.loads(trace.info.trace_metadata[_SIZE_KEY])["total_size_bytes"])
    return payloads + BYTES_PER_SPAN * spans


def read_task(task: Any, destination: Destination) -> Outgoing | list[Outgoing] | Callable[[], Any]:
    """Return what an export task of MLflow's is about; a task that is not known, to be run."""
    kind = getattr(getattr(task, "handler", None), "__name__", "")
    arguments: tuple[Any, ...] = tuple(getattr(task, "args", ()))
    if kind == "_log_trace" and arguments and isinstance(arguments[0], Trace):
        return whole(destination, *arguments)
    if kind == "_log_spans" and len(arguments) > 1:
        experiment_id, spans, *rest = arguments
        return [part_of(destination, experiment_id, of_one, *rest) for of_one in _by_trace(spans)]
    run: Callable[[], Any] = task.handle
    return run


def _by_trace(spans: Iterable[Span]) -> list[list[Span]]:
    found: dict[str, list[Span]] = {}
    for span in spans:
        found.setdefault(span.trace_id, []).append(span)
    return list(found.values())


_workspace_context = optional("mlflow.utils.workspace_context", "ServerWorkspaceContext")


def in_workspace(workspace: str | None) -> AbstractContextManager[object]:
    """Let what is asked of a store in a block be asked in a workspace of MLflow's."""
    if workspace and _workspace_context is not None:
        block: AbstractContextManager[object] = _workspace_context(workspace)
        return block
    return nullcontext()
