"""Children of billiard, Celery's multiprocessing: what they have traced is stored."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import spanguard
from tests.processes import run_script
from tests.store import Store, await_true, outcome

pytest.importorskip("billiard")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

SLOW = {"MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS": "5000"}  # MLflow's default


@pytest.mark.parametrize("warm", [False, True], ids=["cold parent", "parent that traces"])
def test_workers_of_a_pool_that_are_recycled_lose_nothing(warm: bool, store: Store) -> None:
    """A worker that leaves after its number of tasks stores what ended, and closes the rest."""
    done = run_script(
        f"""
        import billiard
        import spanguard

        def work(number):
            with spanguard.traced_span(f"task {{number}}"):
                pass
            if number == 5:
                spanguard.traced_span("left open").__enter__()

        if {warm}:
            work("of the parent")
        pool = billiard.Pool(2, maxtasksperchild=3)
        pool.map(work, range(12), chunksize=1)
        pool.close()
        pool.join()
        assert spanguard.flush(60)
        """,
        store,
        **SLOW,
    )
    assert done.returncode == 0, done.stderr
    spans = store.spans()
    parents = {"task of the parent"} if warm else set()
    assert set(spans) == {f"task {number}" for number in range(12)} | {"left open"} | parents
    assert outcome(spans["left open"]) == "orphaned"


def test_a_process_of_billiards_own_loses_nothing(store: Store) -> None:
    """A billiard.Process is covered as one of multiprocessing is."""
    done = run_script(
        """
        import billiard
        import spanguard

        def work():
            with spanguard.traced_span("ended"):
                pass
            spanguard.traced_span("left open").__enter__()

        process = billiard.Process(target=work)
        process.start()
        process.join()
        assert process.exitcode == 0
        """,
        store,
        **SLOW,
    )
    assert done.returncode == 0, done.stderr
    assert set(store.spans()) == {"ended", "left open"}


APP = """
import pathlib
import celery, spanguard

here = pathlib.Path(__file__).parent
for name in ("queue", "control"):
    (here / name).mkdir(exist_ok=True)
app = celery.Celery("app", broker="filesystem://")
app.conf.update(
    broker_transport_options={
        "data_folder_in": str(here / "queue"),
        "data_folder_out": str(here / "queue"),
        "control_folder": str(here / "control"),
    },
    worker_prefetch_multiplier=1,
)

@app.task
def work(number):
    with spanguard.traced_span(f"task {number}"):
        (here / f"done {number}").touch()
"""


OPTIONS = [
    "--pool=prefork",
    "--concurrency=2",
    "--max-tasks-per-child=3",
    "--without-mingle",
    "--without-gossip",
    "--without-heartbeat",
]


def test_a_celery_worker_that_recycles_its_children_loses_nothing(store: Store) -> None:
    """With max-tasks-per-child, and at a warm shutdown, each finished task's trace is stored."""
    pytest.importorskip("celery")
    folder = store.path.parent
    (folder / "app.py").write_text(textwrap.dedent(APP), encoding="utf-8")
    environment = {
        **os.environ,
        **SLOW,
        "MLFLOW_TRACKING_URI": store.uri,
        "PYTHONPATH": str(Path(spanguard.__file__).parent.parent),
    }
    log = folder / "worker.log"
    with log.open("w") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "app", "worker", *OPTIONS],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        send = "from app import work\nfor number in range(10): work.delay(number)"
        subprocess.run([sys.executable, "-c", send], cwd=folder, env=environment, check=True)
        await_true(lambda: len(list(folder.glob("done *"))) == 10, 120)
        worker.terminate()
        assert worker.wait(60) == 0, log.read_text()
    finally:
        worker.kill()
        worker.wait()
    assert set(store.spans()) == {f"task {number}" for number in range(10)}, re.sub(
        r"\\x1b\\[[\\d;]*m", "", log.read_text()
    )
