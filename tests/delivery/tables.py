"""All tables of an SQL store, as far as two stores can be the same."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

# What differs between any two stores, or two runs of MLflow alone.
_NUMBERS_OF_ITS_OWN = {"db_payload_generation", "assessment_id", "created_timestamp"}
_TIMES = {"creation_time", "last_update_time", "last_updated_timestamp", "start_time", "end_time"}
# Of runs, which have ids of their own each time.
_OTHER_TABLES = {"alembic_version", "runs", "tags", "experiments"}
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|\b[0-9a-f]{32}\b")


def tables_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every table that a trace may have a row in, in an order of their own."""
    with sqlite3.connect(path) as connection:
        connection.row_factory = sqlite3.Row
        names = [
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
            if name not in _OTHER_TABLES
        ]
        found = {name: _rows(connection, name, path) for name in sorted(names)}
    return {name: rows for name, rows in found.items() if rows}


def _rows(connection: sqlite3.Connection, table: str, path: Path) -> list[dict[str, Any]]:
    rows = [dict(row) for row in connection.execute(f'SELECT * FROM "{table}"')]
    plain = [
        {
            column: _plain(value, path)
            for column, value in row.items()
            if column not in _NUMBERS_OF_ITS_OWN | _TIMES
        }
        for row in rows
    ]
    return sorted(plain, key=lambda row: json.dumps(row, sort_keys=True, default=str))


def _plain(value: Any, path: Path) -> Any:
    if not isinstance(value, str):
        return value
    text = value.replace(str(path.parent), "<folder>")
    if "mlflow-attachment://" in text or "<folder>" in text or len(text) == 32:
        return _UUID.sub("<id>", text) if "tr-" not in text or "attachment" in text else text
    return text
