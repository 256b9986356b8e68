"""MLflow's buffer of open traces, with limits that are soon reached."""

from __future__ import annotations

import pytest
from mlflow.tracing.trace_manager import InMemoryTraceManager


def limit_buffer(monkeypatch: pytest.MonkeyPatch, *, size: int = 1000, ttl: int = 3600) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_BUFFER_MAX_SIZE", str(size))
    monkeypatch.setenv("MLFLOW_TRACE_BUFFER_TTL_SECONDS", str(ttl))
    InMemoryTraceManager.reset()
