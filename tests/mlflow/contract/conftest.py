"""MLflow exports in order, so that what is measured is what it does."""

from __future__ import annotations

import pytest

from spanguard._mlflow import provider


@pytest.fixture(autouse=True)
def _in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export when a test flushes, in one batch and one thread: so nothing is a matter of luck."""
    monkeypatch.setenv("MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS", "60000")
    monkeypatch.setenv("MLFLOW_ASYNC_TRACE_LOGGING_MAX_WORKERS", "1")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let spanguard not listen, though a test that recorded spans before made it, for good."""
    monkeypatch.setattr(provider, "follower", None)
