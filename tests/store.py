"""Read traces back from the store: not from MLflow's memory, where all is still well."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Span, Trace

import spanguard


@dataclass(frozen=True)
class Store:
    """A SQLite store, and the traces that are readable in it."""

    path: Path

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.path}"

    def traces(self, *, flush: bool = True) -> list[Trace]:
        """Return all readable traces, oldest first, whole."""
        if flush:
            assert spanguard.flush(60)
        return self._readable()

    def what_is_left(self) -> list[Trace]:
        """Return all readable traces, oldest first, where some are lost on purpose."""
        spanguard.flush(60)
        return self._readable()

    def _readable(self) -> list[Trace]:
        experiments = [e.experiment_id for e in mlflow.MlflowClient().search_experiments()]
        found: list[Trace] = mlflow.search_traces(
            locations=experiments, return_type="list", max_results=5000
        )
        return sorted(found, key=lambda trace: trace.info.request_time)

    def trace(self) -> Trace:
        """Return the one readable trace."""
        traces = self.traces()
        assert len(traces) == 1, f"{len(traces)} traces instead of one"
        return traces[0]

    def spans(self) -> dict[str, Span]:
        """Return the spans of all readable traces by name. Names must be unique."""
        spans = [span for trace in self.traces() for span in trace.data.spans]
        named = {span.name: span for span in spans}
        assert len(named) == len(spans), "two spans share a name"
        return named

    def rows(self) -> int:
        """Return how many traces the store knows of, readable or not."""
        import sqlite3

        spanguard.flush(60)
        with sqlite3.connect(self.path) as connection:
            return int(connection.execute("select count(*) from trace_info").fetchone()[0])


def status(span: Span) -> str:
    return str(span.status.status_code.value)


def outcome(span: Span) -> str:
    return str(span.get_attribute("spanguard.outcome") or "ok")


def own_attributes(span: Span) -> dict[str, Any]:
    """Return a span's attributes without MLflow's own."""
    return {k: v for k, v in span.attributes.items() if not k.startswith("mlflow.")}


def parents(store: Store) -> dict[str, str | None]:
    """Return each span's parent by name."""
    spans = store.spans()
    names = {span.span_id: name for name, span in spans.items()}
    return {name: names.get(span.parent_id) for name, span in spans.items()}


def await_true(condition: Any, seconds: float = 30.0) -> None:
    """Wait for a condition that another thread or process brings about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)
