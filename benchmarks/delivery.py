"""How many traces arrive, how quickly, and what that costs: MLflow's own way, and spanguard's.

    python benchmarks/delivery.py            # several minutes: MLflow needs them
    python benchmarks/delivery.py --quick    # a minute, with small bursts

Each row is a process of its own with a store of its own, one after the other: a burst of traces as
fast as they can be recorded, then a flush. *complete* is read back from the store's tables. CPU is
the process's own, in ms a trace, recording included; a server's is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WAYS = ("MLflow", "spanguard", "deliver()")
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
_RESULT = "result: "


# -- one burst, in a process of its own ----------------------------------------------------------


def record(way: str, traces: int, spans: int) -> None:
    """Record traces with so many spans each, and wait until they are stored."""
    import mlflow

    import spanguard

    mlflow.set_experiment("burst")
    client = mlflow.MlflowClient()
    client.end_trace(client.start_trace("warm up").trace_id)
    mlflow.flush_trace_async_logging()
    if way == "deliver()":
        spanguard.deliver()
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(traces):
        if way == "MLflow":
            raw(client, spans)
        else:
            guarded(spans)
    recorded = time.perf_counter() - started
    if way == "MLflow":
        mlflow.flush_trace_async_logging()
    else:
        spanguard.flush(timeout=None)
    seconds = time.perf_counter() - started
    found = {
        "recorded": recorded,
        "seconds": seconds,
        "cpu": time.process_time() - cpu,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(_RESULT + json.dumps(found), flush=True)


def raw(client: Any, spans: int) -> None:
    root = client.start_trace("root", inputs={"question": "how many?"})
    for _ in range(spans - 1):
        child = client.start_span("child", root.trace_id, root.span_id, inputs={"limit": 5})
        client.end_span(root.trace_id, child.span_id, outputs={"answer": 42})
    client.end_trace(root.trace_id, outputs={"answer": 42})


def guarded(spans: int) -> None:
    from spanguard import traced_span

    with traced_span("root", inputs={"question": "how many?"}) as root:
        for _ in range(spans - 1):
            with traced_span("child", inputs={"limit": 5}) as child:
                child.set_outputs({"answer": 42})
        root.set_outputs({"answer": 42})


# -- all of them ---------------------------------------------------------------------------------


def measure(way: str, traces: int, spans: int, uri: str, database: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--record", way, str(traces), str(spans)]
    environment = {**os.environ, **_QUIET, "MLFLOW_TRACKING_URI": uri}
    done = subprocess.run(
        command, env=environment, cwd=database.parent, stdout=subprocess.PIPE, text=True, check=True
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith(_RESULT))
    found: dict[str, float] = json.loads(line.removeprefix(_RESULT))
    with sqlite3.connect(database) as connection:
        (found["complete"],) = connection.execute(
            "SELECT count(*) FROM trace_info t WHERE status = 'OK' AND ? = "
            "(SELECT count(*) FROM spans s WHERE s.trace_id = t.request_id)",
            (spans,),
        ).fetchone()
        (found["spans"],) = connection.execute("SELECT count(*) FROM spans").fetchone()
    return found


@contextmanager
def serving(database: Path, workers: int) -> Iterator[str]:
    """Run `mlflow server` on loopback; the block gets its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = f"sqlite:///{database}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    command += ["--port", str(port), "--workers", str(workers)]
    server = subprocess.Popen(
        command,
        env={**os.environ, **_QUIET},
        cwd=database.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _await(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def _await(address: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(address, timeout=1)
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise RuntimeError("mlflow server did not start")


def rows(quick: bool) -> Iterator[tuple[str, int, int, int]]:
    """Yield what to measure: its name, traces, spans of each, and workers of a server, or none."""
    for traces in (200, 500) if quick else (1_000, 3_000, 20_000):
        yield f"SQLite, {traces:,} traces of 2 spans", traces, 2, 0
    spans = 2_000 if quick else 30_000
    yield f"SQLite, one trace of {spans:,} spans", 1, spans, 0
    for workers in (1,) if quick else (1, 4):
        traces = 200 if quick else 3_000
        yield f"server, {workers} workers, {traces:,} traces of 2", traces, 2, workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--record", nargs=3, metavar=("WAY", "TRACES", "SPANS"))
    given = parser.parse_args()
    if given.record:
        way, traces, spans = given.record
        record(way, int(traces), int(spans))
        return
    print(f"{'':46}{'complete':>10}{'traces/s':>10}{'ratio':>7}{'CPU ms':>8}{'MB':>6}")
    for name, traces, spans, workers in rows(given.quick):
        if given.only is None or given.only in name:
            _print_row(name, traces, spans, workers)


def _print_row(name: str, traces: int, spans: int, workers: int) -> None:
    first: float | None = None
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            database = Path(folder) / "mlflow.db"
            if workers:
                with serving(database, workers) as uri:
                    found = measure(way, traces, spans, uri, database)
            else:
                found = measure(way, traces, spans, f"sqlite:///{database}", database)
        # Only what has arrived counts: to lose quickly is not quick.
        arrived = found["complete"] if traces > 1 else traces * found["spans"] / spans
        rate = arrived / found["seconds"]
        first = first or rate
        print(
            f"{name + ', ' + way:46}{found['complete']:>10,.0f}{rate:>10,.1f}"
            f"{rate / first:>7.1f}{found['cpu'] / traces * 1000:>8.1f}{found['memory']:>6.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
