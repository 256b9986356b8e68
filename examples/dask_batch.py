"""A batch on a Dask cluster of two worker processes: one trace holds the root and all items.

    pip install "spanguard[dask]"
    python examples/dask_batch.py

Traces go to the MLflow server at MLFLOW_TRACKING_URI. Without one the example starts a server of
its own, with a SQLite file in a temporary folder, and stops it at the end. On a cluster that
exists already, replace the LocalCluster by `Client("tcp://scheduler:8786")`.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
from distributed import Client, LocalCluster

import spanguard
from spanguard import carry, traced, traced_span

ITEMS = 20


@traced
def score(item: int) -> float:
    """Do the work for one item. It runs in a worker process, which needs no set-up."""
    with traced_span("square", span_type="TOOL"):
        return float(item * item)


def run_batch(client: Client) -> str:
    with traced_span("batch", inputs={"items": ITEMS}) as root:
        scores = client.gather(client.map(carry(score), range(ITEMS)))
        root.set_outputs({"processed_count": len(scores), "sum": sum(scores)})
        return root.trace_id


# -- a server to send the traces to ----------------------------------------------------------------


@contextmanager
def tracking_server() -> Iterator[str]:
    """Give the address of the MLflow server to use: the user's, or one of our own."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("http"):
        yield uri
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        port = free_port()
        command = f"mlflow server --workers 1 --host 127.0.0.1 --port {port}".split()
        storage = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
        storage += ["--default-artifact-root", f"{folder}/artifacts"]
        server = subprocess.Popen(
            [sys.executable, "-m", *command, *storage],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            uri = f"http://127.0.0.1:{port}"
            await_health(uri, server)
            yield uri
        finally:
            server.terminate()
            server.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def await_health(uri: str, server: "subprocess.Popen[bytes]") -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"The MLflow server ended with code {server.returncode}.")


# -- the whole of it -------------------------------------------------------------------------------


def main() -> None:
    with tracking_server() as uri:
        mlflow.set_tracking_uri(uri)
        with (
            LocalCluster(
                n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0"
            ) as cluster,
            Client(cluster) as client,
        ):
            trace_id = run_batch(client)

        spanguard.flush()
        trace = mlflow.get_trace(trace_id)
        counts = Counter(span.name for span in trace.data.spans)
        (root,) = (span for span in trace.data.spans if span.parent_id is None)
        below_root = sum(span.parent_id == root.span_id for span in trace.data.spans)
        print(f"trace {trace_id}: {trace.info.state.value}, outputs {root.outputs}")
        print(f"{len(trace.data.spans)} spans: {dict(counts)}, {below_root} right below the root")


if __name__ == "__main__":
    main()
