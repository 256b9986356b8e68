"""Real MLflow on a real SQLite store, for each test its own; what MLflow stored is read back."""

from __future__ import annotations

import os

# Before mlflow is imported: no telemetry, no progress noise, short waits.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS", "100")
os.environ.pop("SPANGUARD_STRICT", None)

import contextlib
import gc
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.tracing import provider
from mlflow.tracing.export import async_export_queue
from mlflow.tracing.trace_manager import InMemoryTraceManager

import spanguard
from spanguard._base import config, findings, settings
from spanguard._delivery import deliver
from spanguard._mlflow import takeover
from spanguard._mlflow.queue import hand_over
from tests.store import Store

logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)


# What begins last should not be what takes longest.
LONG = ("test_interrupts", "test_collector", "test_flush", "test_page", "test_guard_properties")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    """Keep what is imported out of the collector's way: a full collection takes a second else."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Let no finalizer run in the middle of the test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty SQLite store: migrating takes seconds, copying a file does not."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def store(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The store that this test's traces go to."""
    path = tmp_path / "mlflow.db"
    shutil.copy(template, path)
    monkeypatch.chdir(tmp_path)
    reset_tracing()
    InMemoryTraceManager.reset()
    mlflow.set_tracking_uri(f"sqlite:///{path}")
    # set_experiment() of an earlier test, for which MLflow has no public way back.
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    findings.forget_sites()
    findings.reraise_internal = True
    yield Store(path)
    findings.reraise_internal = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spanguard.close_open_spans()
    deliver_no_more()
    config._process_setting = None
    assert mlflow.get_current_active_span() is None, "the test left a span active"
    here = settings.context_settings.get()
    assert all(block.is_dropped for block in here), "the test left a setting in force"
    reset_tracing()


def deliver_no_more() -> None:
    """Leave the delivery to MLflow, with nothing that waits for a store of this test."""
    intake = deliver._intake
    if intake is not None:
        spanguard.deliver(None)
        intake._is_over = True
        intake._bell.put(None)
        for writer in intake.writers:
            writer.stop()
    takeover.left_behind.clear()
    takeover.waits_for = deliver._intake = None
    takeover.tell_why_not = lambda reason: None


def reset_tracing() -> None:
    """Reset MLflow's tracing without the second for which its idle export thread sleeps."""
    try:
        queue = getattr(provider._get_trace_exporter(), "_async_queue", None)
    except AttributeError:  # MLflow 3.10 with a global provider that is not set yet
        queue = None
    if queue is not None and queue.is_active():
        with contextlib.suppress(Exception):  # a processor of the test's may refuse
            hand_over()  # MLflow 3.12 takes what comes later into the queue, and never out of it
        # What AsyncTraceExportQueue.flush(terminate=True) does, with a task that wakes the thread.
        # Inactive and stopped, the queue exports in the caller's thread what is still put.
        queue._queue.put(async_export_queue.Task(handler=lambda: None, args=()))
        queue._is_active = False
        queue._stop_event.set()
        queue._consumer_thread.join()
        queue._queue.join()
        queue._worker_threadpool.shutdown(wait=True)
    mlflow.tracing.reset()


@pytest.fixture
def client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient()
