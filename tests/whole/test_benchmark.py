"""The benchmark runs and says what it promises. No timing is asserted: it measures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import spanguard

ROOT = Path(__file__).parents[2]


def run(name: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(spanguard.__file__).parent.parent)}
    environment.pop("MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS", None)
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), "--quick"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_the_benchmark_prints_both_tables() -> None:
    done = run("record.py")
    assert done.returncode == 0, done.stderr
    for variant in (
        "raw client",
        "traced_span",
        "@traced",
        "mlflow.start_span",
        "@mlflow.trace",
        "OpenTelemetry SDK",
        "ratio to raw",
    ):
        assert variant in done.stdout
    assert "open at once" in done.stdout


def test_that_of_the_other_faces_prints_its_tables() -> None:
    done = run("faces.py")
    assert done.returncode == 0, done.stderr
    for row in (
        "push / pop",
        "trace_batch, per item",
        "guard(client), bare spans",
        "the same, spanguard in use",
        "carry(f)",
        "ASGI request: TraceMiddleware",
        "a level of endless recursion: @traced",
        "memory of an open span",
    ):
        assert row in done.stdout
