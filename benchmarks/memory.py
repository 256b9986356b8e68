"""Whether a process that pushes and pops for weeks grows.

    python benchmarks/memory.py                    # two million push/pops, a quarter of an hour
    python benchmarks/memory.py --pushes 300000    # two minutes

**The work.** Traces of four spans: a root and three nested children, pushed and popped by one
`TraceStateManager`, with a payload each; every hundredth leaves its children to be closed by the
root, every tenth is popped by handle in another thread.

**Exporting nothing.** `MlflowV3SpanExporter.export` is replaced by one that drops. It does not
even take the ended traces out of MLflow's buffer, as the real one does: so the buffer is always
full, and what is asked includes whether it is bounded.

**The measure.** The resident memory of the process, as the operating system says, after a full
garbage collection. It may be 10 % above what it was after the first 100,000 push/pops: the exit
code is 1 where it is more.
"""

from __future__ import annotations

import os

# Before mlflow is imported: nothing but the recording, and no noise.
os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
os.environ["MLFLOW_DISABLE_AGENT_HINT"] = "true"
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

import argparse
import gc
import logging
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import mlflow
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from opentelemetry.sdk.trace import ReadableSpan

import spanguard
from spanguard import TraceStateManager

PUSHES_PER_TRACE = 4
WARM_UP = 100_000
MAX_GROWTH = 1.10

INPUTS = {"question": "Does it grow?", "limit": 5}


def drop(_exporter: Any, _spans: Sequence[ReadableSpan]) -> None:
    """Stand in for `MlflowV3SpanExporter.export`: store nothing, forget nothing."""


def one_trace(manager: TraceStateManager, number: int, elsewhere: Executor) -> None:
    root = manager.push_trace("request", inputs=INPUTS, attributes={"number": number})
    spans = [manager.push_trace("step", inputs=INPUTS) for _ in range(PUSHES_PER_TRACE - 1)]
    if number % 100 == 0:
        manager.pop_trace(root, outputs="left its children open")
    elif number % 10 == 0:
        for span in (*reversed(spans), root):
            elsewhere.submit(manager.pop_trace, span, outputs="popped elsewhere").result()
    else:
        for _ in range(PUSHES_PER_TRACE):
            manager.pop_trace(outputs="popped")


def megabytes() -> float:
    """Return the resident memory; where there is no /proc, the most there has been so far."""
    gc.collect()
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def run(pushes: int, warm_up: int) -> bool:
    """Push and pop so many times; print the memory at each step; tell whether it stayed flat."""
    manager = TraceStateManager()
    started = time.perf_counter()
    after_warm_up: float | None = None
    step = max(warm_up, pushes // 20)
    used = 0.0
    with ThreadPoolExecutor(1) as elsewhere:
        for number in range(pushes // PUSHES_PER_TRACE):
            one_trace(manager, number, elsewhere)
            done = (number + 1) * PUSHES_PER_TRACE
            if done % step == 0 or done == warm_up:
                used = megabytes()
                after_warm_up = after_warm_up or used
                seconds = time.perf_counter() - started
                print(
                    f"{done:>11,.0f} push/pops  {used:7.1f} MB  "
                    f"{used / after_warm_up - 1:+6.1%}  {seconds:6.0f} s",
                    flush=True,
                )
    still_open = len(spanguard.open_spans())
    print(f"open spans: {still_open}, on the stack: {manager.depth}")
    if after_warm_up is None:
        raise SystemExit(f"at least {warm_up} push/pops, please")
    return used <= after_warm_up * MAX_GROWTH and not still_open


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure whether push and pop let memory grow.")
    parser.add_argument("--pushes", type=int, default=2_000_000)
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as directory:
        mlflow.set_tracking_uri(f"sqlite:///{Path(directory, 'mlflow.db')}")
        mlflow.set_experiment("memory")
        with mock.patch.object(MlflowV3SpanExporter, "export", drop):
            is_flat = run(options.pushes, options.warm_up)
    print("flat" if is_flat else "it grows")
    return 0 if is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
