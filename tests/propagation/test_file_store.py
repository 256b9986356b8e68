"""A file store takes whole traces only: what it cannot take of other processes is told."""

from __future__ import annotations

import pytest

from tests.processes import run_script
from tests.store import Store

SCRIPT = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
import mlflow, spanguard
from spanguard import carry, traced_span
from tests.jobs import job

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context({method!r})) as pool:
        with traced_span("root") as root, traced_span("child"):
            pids = {{pool.submit(carry(job), number).result() for number in range(3)}}
        assert len(pids) == 1
    assert spanguard.flush(60)
    trace = mlflow.get_trace(root.trace_id)
    print(sorted({{span.name for span in trace.data.spans}}))
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_spans_of_other_processes_are_told_lost_once_with_the_cure(
    method: str, store: Store
) -> None:
    """A worker warns once for a function; the rest of the trace is whole and readable."""
    done = run_script(
        SCRIPT.format(method=method),
        store,
        MLFLOW_TRACKING_URI=f"file://{store.path.parent / 'mlruns'}",
        MLFLOW_ALLOW_FILE_STORE="true",
    )
    assert done.stdout.strip() == "['child', 'root']", done.stderr
    assert done.stderr.count("TraceLostWarning") == 1, done.stderr
    assert "set_tracking_uri('sqlite:///mlflow.db')" in done.stderr


def test_a_database_takes_them_without_a_warning(store: Store) -> None:
    """Where the spans arrive, nothing is told."""
    done = run_script(SCRIPT.format(method="spawn"), store)
    assert done.stdout.strip() == "['child', 'job', 'root', 'step']", done.stderr
    assert "Warning" not in done.stderr
