"""The raw client's spans, and what is in the database of them, readable or not."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LiveSpan, Trace
from packaging.version import Version

from tests.store import Store

VERSION = Version(mlflow.__version__)
# Ended spans wait in a queue for a thread. Before: the thread that ends a span writes it.
BATCHING = Version("3.12") <= VERSION
# A span gets a log level when it ends: one attribute more, and exceptions raise it.
LOG_LEVELS = hasattr(LiveSpan, "set_log_level")
# A root that ends before its children waits for them.
DEFERRAL = Version("3.13") <= VERSION
# A provider that was replaced is shut down, a hidden one is kept, and a root that still waits is
# stored at the exit.
RETIRES = Version("3.15") <= VERSION


def of_waiting_roots(count: int) -> list[str]:
    """Return the names of the spans that can be read of so many traces whose root waits for ever.

    Where it is stored neither at its end nor at the exit, its trace stays a readable fragment.
    """
    return ["root"] * count if DEFERRAL and not RETIRES else []


def child_of(parent: Any, name: str = "child", **kwargs: Any) -> Any:
    return MlflowClient().start_span(name, parent.trace_id, parent.span_id, **kwargs)


def end(span: Any, **kwargs: Any) -> None:
    MlflowClient().end_span(span.trace_id, span.span_id, **kwargs)


def is_open(span: Any) -> bool:
    return span.end_time_ns is None


def name_of(trace: Trace) -> str | None:
    return trace.info.tags.get("mlflow.traceName")


def state_of(trace: Trace) -> str:
    return str(trace.info.state.value)


def names(traces: list[Trace]) -> list[str]:
    return sorted(span.name for trace in traces for span in trace.data.spans)


def by_root(store: Store) -> dict[str, Trace]:
    """Return the readable traces by the name of their root span."""
    found = {}
    for trace in store.what_is_left():
        (root,) = (span for span in trace.data.spans if span.parent_id is None)
        found[root.name] = trace
    return found


def left_at_exit(store: Store) -> list[Trace]:
    """Return the traces that are readable once MLflow shut down, as it does at a clean exit."""
    store.traces()
    mlflow.tracing.reset()
    return store.traces(flush=False)


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def stored_spans(path: Path) -> list[str]:
    """Return the names of the spans in the database, of readable traces or not."""
    return sorted(name for (name,) in rows(path, "select name from spans"))


def stored_traces(path: Path) -> list[tuple[str, str]]:
    """Return id and state of the traces in the database, readable or not."""
    return rows(path, "select request_id, status from trace_info")
