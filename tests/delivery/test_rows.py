"""What `deliver()` stores is what MLflow stores: the same rows in every table."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest

import spanguard
from tests.conftest import reset_tracing
from tests.delivery.tables import tables_of
from tests.delivery.varied import record

pytestmark = pytest.mark.versions


def store_at(folder: Path, template: Path) -> Path:
    folder.mkdir()
    path = folder / "mlflow.db"
    shutil.copy(template, path)
    reset_tracing()
    mlflow.set_tracking_uri(f"sqlite:///{path}")
    return path


def rows_of_mlflow(folder: Path, template: Path) -> dict[str, list[dict[str, Any]]]:
    path = store_at(folder, template)
    record(mlflow.MlflowClient())
    assert spanguard.flush(60)
    return tables_of(path)


def without_fault_of_mlflow(tables: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Leave out the experiment of a span: 3.10 and 3.11 write the one that is in force, or 0.

    The trace's own is right in both.
    """
    if before((3, 12)):
        for row in tables["spans"]:
            del row["experiment_id"]
    return tables


def before(version: tuple[int, int]) -> bool:
    return tuple(int(part) for part in mlflow.__version__.split(".")[:2]) < version


@pytest.fixture
def _one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let MLflow export in one thread: with more, which comes last is a matter of luck."""
    monkeypatch.setenv("MLFLOW_ASYNC_TRACE_LOGGING_MAX_WORKERS", "1")


@pytest.mark.usefixtures("_one_after_the_other")
def test_the_rows_are_those_that_mlflow_writes(tmp_path: Path, template: Path) -> None:
    expected = without_fault_of_mlflow(rows_of_mlflow(tmp_path / "mlflows", template))
    path = store_at(tmp_path / "ours", template)
    spanguard.deliver()
    record(mlflow.MlflowClient())
    assert spanguard.flush(60)
    found = without_fault_of_mlflow(tables_of(path))
    assert spanguard.delivery().stored == len(expected["trace_info"])
    assert found.keys() == expected.keys()
    for table, rows in expected.items():
        assert len(found[table]) == len(rows), table
        for one, other in zip(found[table], rows, strict=True):
            assert one == other, table
