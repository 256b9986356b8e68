"""Many traces into an SQL store in one transaction, as the same rows that MLflow would write.

MLflow's own `start_trace` makes the rows of each trace, against a session that only collects
them. They are inserted by table, and MLflow's own `log_spans` adds the spans of all traces in
one call. An MLflow whose rows are others is followed without a change here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import mlflow
from mlflow.entities import Span, TraceInfo
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from spanguard._mlflow.outgoing import Outgoing
from spanguard._mlflow.sql_sessions import SPANS_LOCATION, CollectingSession, NewTracesSession

__all__ = ["SqlDelivery"]


# MLflow 3.10 and 3.11 take the spans of one trace a call.
_TAKES_MANY = tuple(int(part) for part in mlflow.__version__.split(".")[:2]) >= (3, 12)

_PRAGMAS = ("foreign_keys = ON", "busy_timeout = 20000", "case_sensitive_like = true")


class SqlDelivery:
    """Writes to the SQL store of one tracking URI."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @property
    def _store(self) -> Any:
        return self._client.store

    def known(self, items: Iterable[Outgoing]) -> set[str]:
        """Return which traces the store has a row of already."""
        ids = [item.trace_id for item in items]
        info = _models().SqlTraceInfo
        with self._transaction() as session:
            return set(session.scalars(select(info.request_id).where(info.request_id.in_(ids))))

    def insert(self, items: Sequence[Outgoing]) -> list[TraceInfo]:
        """Store traces that the store does not know, all or none; return what it has of them."""
        with self._transaction() as session:
            collected = CollectingSession(session)
            stored = self._rows_of(items, collected)
            collected.add_all(_locations_of_spans(items))
            collected.insert()
            self._log_spans(items, NewTracesSession(session, {item.trace_id for item in items}))
            session.commit()
        return stored

    def add(self, items: Sequence[Outgoing]) -> None:
        """Store spans of traces that go on, or of which a part is stored, all or none."""
        with self._transaction() as session:
            self._log_spans(items, session)
            session.commit()

    def finish(self, item: Outgoing) -> TraceInfo:
        """Store the trace itself of one that the store knows a part of, as MLflow does."""
        assert item.trace is not None
        info: TraceInfo = self._store.start_trace(item.trace.info)
        return info

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with Session(self._store.engine) as session:
            if session.get_bind().dialect.name == "sqlite":
                for pragma in _PRAGMAS:
                    session.execute(text(f"PRAGMA {pragma}"))
            yield session

    def _rows_of(self, items: Sequence[Outgoing], session: CollectingSession) -> list[TraceInfo]:
        store = self._store_with(session)
        start = getattr(store, "_start_trace_once", store.start_trace)
        return [start(item.trace.info) for item in items if item.trace is not None]

    def _log_spans(self, items: Iterable[Outgoing], session: Any) -> None:
        store = self._store_with(session)
        log: Callable[[str, list[Span]], object] = getattr(
            store, "_log_spans_once", store.log_spans
        )
        for experiment_id, spans in _by_call(items):
            log(experiment_id, spans)

    def _store_with(self, session: Any) -> Any:
        """Return MLflow's store, whose every session is this one, and nobody commits it."""
        store = copy.copy(self._store)

        @contextmanager
        def the_same_session(*_: Any, **__: Any) -> Iterator[Any]:
            yield session

        store.ManagedSessionMaker = the_same_session
        # Asked for by each trace, and the same for most.
        store.get_experiment = lru_cache(maxsize=None)(store.get_experiment)
        return store


def _by_call(items: Iterable[Outgoing]) -> Iterator[tuple[str, list[Span]]]:
    """Yield what `log_spans` takes at once: spans of one experiment."""
    of_experiment: dict[str, list[Span]] = {}
    for item in items:
        if _TAKES_MANY:
            of_experiment.setdefault(item.experiment_id, []).extend(item.spans)
        elif item.spans:
            yield item.experiment_id, item.spans
    yield from of_experiment.items()


_IN_STORE = "TRACKING_STORE"


def _locations_of_spans(items: Iterable[Outgoing]) -> list[Any]:
    """Return the rows that say where the spans are: `log_spans` writes each by itself."""
    tag = _models().SqlTraceTag
    return [
        tag(request_id=item.trace_id, key=SPANS_LOCATION, value=_IN_STORE)
        for item in items
        if item.trace is not None and SPANS_LOCATION not in item.trace.info.tags
    ]


def _models() -> Any:
    from mlflow.store.tracking.dbmodels import models  # by now MLflow has it imported

    return models
