"""How pytest is run with the plugin, and a file of tests that leak."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import pytest

ROOT = Path(__file__).parents[2]

LEAKS = """
import mlflow, spanguard
from spanguard import traced_span

kept = []

def test_raw():
    kept.append(mlflow.MlflowClient().start_trace("by raw"))

def test_after_raw():
    assert spanguard.open_spans() == []

def test_fluent():
    kept.append(mlflow.start_span("by fluent"))
    kept[-1].__enter__()

def test_after_fluent(spans):
    assert mlflow.get_current_active_span() is None
    with mlflow.start_span("root"):
        pass
    assert spans.one("root").parent_id is None

def test_block():
    kept.append(traced_span("by block"))
    kept[-1].__enter__()

def test_after_block():
    assert mlflow.get_current_active_span() is None
"""


class Run(Protocol):
    def __call__(self, *arguments: str, **files: str) -> pytest.RunResult: ...
