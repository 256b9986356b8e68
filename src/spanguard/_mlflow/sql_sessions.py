"""Sessions that MLflow's SQL store is given: they do for many traces what it does for each.

Where MLflow does something in another way than is known here, it is done in that way: only
slower. That the rows are the same, test_rows.py shows for each version.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from sqlalchemy import insert, inspect
from sqlalchemy.orm import Session

__all__ = ["SPANS_LOCATION", "CollectingSession", "NewTracesSession"]


SPANS_LOCATION = "mlflow.trace.spansLocation"

Row = dict[str, Any]
_Rows = dict[tuple[Any, tuple[str, ...]], list[Row]]


class _Passing:
    """A session that does all as the one behind it, but for what a subclass says."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


class CollectingSession(_Passing):
    """A session that keeps what is added to it, to be inserted table by table.

    SQLAlchemy's own unit of work, for all of them at once, takes four times as long.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._added: list[Any] = []
        self._rows: _Rows = {}

    def add(self, row: Any) -> None:
        self._added.append(row)

    def add_all(self, rows: Iterable[Any]) -> None:
        self._added.extend(rows)

    def flush(self) -> None:
        """Keep plain rows, and not the objects: these keep the garbage collector busy."""
        waiting, self._added = self._added, []
        for row in waiting:  # it grows meanwhile
            table, columns, lists = _shape_of(row.__class__)
            values = row.__dict__
            given = {column: values[name] for name, column in columns if name in values}
            self._rows.setdefault((table, tuple(given)), []).append(given)
            for name in lists:
                waiting.extend(values.get(name) or ())

    def insert(self) -> None:
        """Insert all rows: those of the traces themselves come first."""
        self.flush()
        for (table, _), rows in self._rows.items():
            self._session.execute(insert(table), rows)


@lru_cache(maxsize=64)
def _shape_of(kind: type) -> tuple[Any, list[tuple[str, str]], list[str]]:
    """Return the table of a model's rows, their columns by name, and the lists of others."""
    mapper: Any = inspect(kind)
    columns = [(column.key, column.columns[0].name) for column in mapper.column_attrs]
    lists = [relation.key for relation in mapper.relationships if relation.uselist]
    return mapper.local_table, columns, lists


class NewTracesSession(_Passing):
    """A session for the spans of traces that have just been inserted, whole, by `start_trace`.

    MLflow sends spans first and `start_trace` last, and what that says of a trace's times is
    what stays. So it must not be changed here.
    """

    def __init__(self, session: Session, trace_ids: set[str]) -> None:
        super().__init__(session)
        self._new = trace_ids

    def execute(self, statement: Any, *arguments: Any, **more: Any) -> Any:
        """Insert many rows as such: as one statement with all their values it is never cached."""
        rows = _rows_of_upsert(statement) if not arguments and not more else None
        if rows is None:
            return self._session.execute(statement, *arguments, **more)
        return self._session.execute(insert(statement.table), rows)

    def merge(self, row: Any, **more: Any) -> Any:
        """Leave out the tag that says where the spans are: it is inserted with the trace."""
        values = row.__dict__
        if values.get("key") == SPANS_LOCATION and values.get("request_id") in self._new:
            return row
        return self._session.merge(row, **more)

    def query(self, *entities: Any, **more: Any) -> Any:
        found = self._session.query(*entities, **more)
        is_of_traces = len(entities) == 1 and getattr(entities[0], "__name__", "") == _TRACES
        return _Traces(found) if is_of_traces else found


_TRACES = "SqlTraceInfo"
_TIMES = {"timestamp_ms", "execution_time_ms"}


class _Traces:
    """A query of traces that updates all but their times."""

    def __init__(self, query: Any) -> None:
        self._query = query

    def filter(self, *conditions: Any) -> _Traces:
        return _Traces(self._query.filter(*conditions))

    def update(self, values: dict[Any, Any], **more: Any) -> int:
        left = {key: value for key, value in values.items() if _name_of(key) not in _TIMES}
        return self._query.update(left, **more) if left else 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._query, name)


def _name_of(column: Any) -> str:
    return column if isinstance(column, str) else str(getattr(column, "key", ""))


def _rows_of_upsert(statement: Any) -> list[Row] | None:
    """Return the rows of a statement that inserts many; None where it is not known to be one."""
    many = getattr(statement, "_multi_values", None)
    if not many or len(many) != 1:
        return None
    rows = [{_name_of(column): value for column, value in row.items()} for row in many[0]]
    return rows if all("" not in row for row in rows) else None
