"""Where a new span goes: under which parent, in which trace."""

from __future__ import annotations

from typing import Any, NamedTuple

from spanguard._mlflow import memory, names, spans, starting
from spanguard._mlflow.active import mode_has_changed
from spanguard._mlflow.shapes import HasContext, MlflowSpan
from spanguard._process import registry
from spanguard._process.ambient import Active, StandIn, ambient_span
from spanguard.exceptions import InvalidParentError, TraceLostError

__all__ = ["Place", "place", "root_place"]


class Place(NamedTuple):
    """A place for a new span.

    `parent` None and `new_trace` False leaves it to MLflow: under what is active, where that is
    no span of this process (a remote parent, or one that was sampled out), else a new trace.
    """

    parent: MlflowSpan | None = None
    new_trace: bool = False
    finding: InvalidParentError | TraceLostError | None = None
    lost_parent: str | None = None
    ambient: Active | None = None  # what was active, where that was looked up


_NEW_TRACE = Place(new_trace=True)
_LEFT_TO_MLFLOW = Place()


def root_place() -> Place:
    """Return the place of a root, also inside another trace."""
    return _NEW_TRACE


def place(name: str, trace_id: str | None, parent_id: str | None) -> Place:
    """Find the place that the caller asked for, or the nearest one that keeps the span readable.

    A parent that ended, is unknown or belongs to another trace: the trace's root, with a finding.
    A trace that is over or unknown: a new trace, with a finding.
    """
    if trace_id is None and parent_id is None:
        return _under_ambient(name)
    if trace_id == names.NOOP_TRACE_ID:  # tracing is off, or was when the parent started
        return Place(starting.noop_span())
    if parent_id is not None:
        parent = _open_parent(trace_id, parent_id)
        if parent is not None:
            return Place(parent)
        return _instead_of(name, trace_id, parent_id)
    ambient = _open_ambient()
    if ambient is not None and ambient.trace_id == trace_id:
        return Place(ambient)
    root = _open_root(trace_id)
    return Place(root) if root is not None else _instead_of(name, trace_id, None)


def _is_remote_ambient(trace_id: str, parent_id: str | None) -> bool:
    """Tell whether a span of another process is ambient here, and is the one asked for."""
    active = ambient_span()
    context = active.get_span_context()
    return (
        context.is_remote
        and memory.mlflow_trace_id(active) == trace_id
        and parent_id in (None, f"{context.span_id:016x}")
    )


def _under_ambient(name: str) -> Place:
    active: Any = ambient_span()
    entry = active.entry if type(active) is StandIn else None
    if entry is not None and not entry.ended and entry.live is not None:
        return Place(entry.live, False, None, None, active)
    if not active.get_span_context().is_valid:
        return _under_ambient(name) if mode_has_changed() else _LEFT_TO_MLFLOW
    return _under_other(name, active)


def _under_other(name: str, active: Any) -> Place:
    """Place under a span of another API."""
    entry = registry.entry_of(active)
    if entry is None and spans.has_ended(active):
        # It ended but is still active here: its nearest open ancestor.
        above = active.parent
        entry = registry.entry_by_id(f"{above.span_id:016x}") if above is not None else None
        if entry is None:
            return _NEW_TRACE
    if entry is None:
        return _unregistered(active)
    parent = entry.mlflow_span()
    if parent is None:
        return Place(new_trace=True, finding=_evicted(name, entry))
    return Place(parent)


def _unregistered(active: HasContext) -> Place:
    """Place under a span opened before we listened, or leave a foreign one to MLflow."""
    trace_id = memory.mlflow_trace_id(active)
    span_id = f"{active.get_span_context().span_id:016x}"
    parent = memory.live_span(trace_id, span_id) if trace_id else None
    return Place(parent) if parent is not None else _LEFT_TO_MLFLOW


def _open_ambient() -> MlflowSpan | None:
    entry = registry.entry_of(ambient_span())
    return entry.mlflow_span() if entry is not None else None


def _open_parent(trace_id: str | None, span_id: str) -> MlflowSpan | None:
    entry = registry.entry_by_id(span_id)
    if entry is not None:
        span = entry.mlflow_span()
        matches = span is not None and (trace_id is None or span.trace_id == trace_id)
        return span if matches else None
    span = memory.live_span(trace_id, span_id) if trace_id else None
    return span if span is not None and span.end_time_ns is None else None


def _open_root(trace_id: str | None) -> MlflowSpan | None:
    root = memory.root_span(trace_id) if trace_id else None
    return root if root is not None and root.end_time_ns is None else None


def _instead_of(name: str, trace_id: str | None, parent_id: str | None) -> Place:
    """Mend a bad parent: the trace's root; the ambient span if no trace was named; a new trace."""
    if trace_id is not None and _is_remote_ambient(trace_id, parent_id):
        return _LEFT_TO_MLFLOW
    asked = f"parent span {parent_id}" if parent_id is not None else f"trace {trace_id}"
    wrong = f"The {asked} of span {name!r} has ended, is unknown or belongs to another trace"
    cure = "Pass the id of a span that is still open, or none to nest under the active span."
    if trace_id is None:
        mended, where = _under_ambient(name), "the active span"
    else:
        root = _open_root(trace_id)
        mended = Place(root) if root is not None else _NEW_TRACE
        where = "the root of the trace" if root is not None else "a new trace"
    finding = InvalidParentError(
        f"{wrong}; it was recorded under {where}. {cure}",
        span_name=name,
        span_id=parent_id,
        trace_id=trace_id,
    )
    lost = "/".join(part for part in (trace_id, parent_id) if part)
    return Place(mended.parent, mended.new_trace, finding, lost)


def _evicted(name: str, entry: registry.Entry) -> TraceLostError:
    return TraceLostError(
        f"MLflow has dropped the trace of {entry.label} from its buffer; span {name!r} starts a "
        "new trace. Raise MLFLOW_TRACE_BUFFER_MAX_SIZE or MLFLOW_TRACE_BUFFER_TTL_SECONDS "
        "before the first span.",
        span_name=name,
        span_id=entry.hex_id,
    )
