"""One trace across worker processes, by every engine, read back from the store.

The workers are told nothing: a pool outlives the test that starts it, and serves the stores of
the later ones.
"""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import cloudpickle
import joblib
import mlflow
import pytest
from mlflow.entities import Span, Trace

import spanguard
from spanguard import carry, traced_span
from tests import jobs
from tests.store import Store, await_true, outcome, status

JOBS = 20


def forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "spanguard"])  # imported once, not per process
    return context


@pytest.fixture(scope="module")
def spawned() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def dask_client() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=2,
            processes=True,
            dashboard_address=":0",
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # or it writes a token into the user's home
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # its workers import tests.jobs
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


def named(trace: Trace, name: str) -> list[Span]:
    return [span for span in trace.data.spans if span.name == name]


def assert_whole(trace: Trace, numbers: list[int]) -> None:
    """Check the trace of jobs under one root: nothing missing, all in its place, all OK."""
    assert trace.info.state.value == "OK"
    (root,) = (span for span in trace.data.spans if span.parent_id is None)
    assert (root.name, status(root), outcome(root)) == ("root", "OK", "ok")
    found, steps = named(trace, "job"), named(trace, "step")
    assert sorted(span.inputs for span in found) == numbers
    assert {span.parent_id for span in found} == {root.span_id}
    assert sorted(span.parent_id for span in steps) == sorted(span.span_id for span in found)
    assert {status(span) for span in trace.data.spans} == {"OK"}
    assert len(trace.data.spans) == 1 + 2 * len(numbers)


# -- every engine ----------------------------------------------------------------------------------


def run_in(pool: Executor) -> list[int]:
    return list(pool.map(carry(jobs.job), range(JOBS)))


def by_threads(_: pytest.FixtureRequest) -> list[int]:
    with ThreadPoolExecutor(4) as pool:
        return run_in(pool)


def by_spawn(request: pytest.FixtureRequest) -> list[int]:
    return run_in(request.getfixturevalue("spawned"))


def by_forkserver(_: pytest.FixtureRequest) -> list[int]:
    with ProcessPoolExecutor(2, forkserver()) as pool:
        return run_in(pool)


def by_fork(_: pytest.FixtureRequest) -> list[int]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        return run_in(pool)


def by_joblib(_: pytest.FixtureRequest) -> list[int]:
    work = carry(jobs.job)
    calls = (joblib.delayed(work)(number) for number in range(JOBS))
    return list(joblib.Parallel(n_jobs=2, backend="loky")(calls))


def by_dask(request: pytest.FixtureRequest) -> list[int]:
    client = request.getfixturevalue("dask_client")
    return list(client.gather(client.map(carry(jobs.job), range(JOBS))))


def by_dask_executor(request: pytest.FixtureRequest) -> list[int]:
    return run_in(request.getfixturevalue("dask_client").get_executor())


def by_ray(request: pytest.FixtureRequest) -> list[int]:
    ray = request.getfixturevalue("ray")
    task = ray.remote(carry(jobs.job))
    return list(ray.get([task.remote(number) for number in range(JOBS)]))


ENGINES = [
    by_threads,
    by_spawn,
    by_forkserver,
    by_fork,
    by_joblib,
    by_dask,
    by_dask_executor,
    by_ray,
]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
def test_one_trace_by_every_engine(
    store: Store, request: pytest.FixtureRequest, engine: Callable[..., list[int]]
) -> None:
    with traced_span("root") as root:
        pids = engine(request)
    trace = store.trace()
    assert trace.info.trace_id == root.trace_id
    assert_whole(trace, list(range(JOBS)))
    assert {span.get_attribute("pid") for span in named(trace, "job")} == set(pids)
    elsewhere = engine is not by_threads
    assert (multiprocessing.current_process().pid not in pids) == elsewhere


def test_a_pool_serves_one_store_after_the_other(
    store: Store, template: Path, tmp_path: Path, spawned: ProcessPoolExecutor
) -> None:
    other = Store(tmp_path / "other.db")
    shutil.copy(template, other.path)
    pids = []
    for target in (store, other):
        mlflow.set_tracking_uri(target.uri)
        with traced_span("root"):
            pids.append(set(spawned.map(carry(jobs.job), range(4))))
        spanguard.flush(60)
    assert set.union(*pids) and len(set.union(*pids)) <= 2
    assert [len(trace.data.spans) for trace in store.traces()] == [9]
    mlflow.set_tracking_uri(other.uri)
    assert_whole(other.trace(), list(range(4)))


def test_jobs_go_to_the_experiment_of_their_root(
    store: Store, spawned: ProcessPoolExecutor
) -> None:
    mlflow.set_experiment("elsewhere")
    with traced_span("root"):
        spawned.submit(carry(jobs.job), 0).result()
    trace = store.trace()
    assert_whole(trace, [0])
    elsewhere = mlflow.get_experiment_by_name("elsewhere").experiment_id
    assert trace.info.experiment_id == elsewhere
    with sqlite3.connect(store.path) as connection:
        stored = connection.execute("select distinct experiment_id from spans").fetchall()
    assert [str(row[0]) for row in stored] == [elsewhere]


def test_the_threads_of_a_worker_change_to_another_store_together(
    store: Store, spawned: ProcessPoolExecutor
) -> None:
    with traced_span("root"):
        numbers = list(range(8))
        spawned.submit(jobs.at_once, carry(jobs.job), numbers).result(60)
    assert_whole(store.trace(), numbers)


def test_a_generator_in_another_process(store: Store, spawned: ProcessPoolExecutor) -> None:
    with traced_span("root"):
        pids = spawned.submit(jobs.exhaust, carry(jobs.job_by_job), 3).result(60)
    assert len(pids) == 3
    assert_whole(store.trace(), [0, 1, 2])


def test_jobs_for_two_stores_take_turns_in_one_worker(
    store: Store, template: Path, tmp_path: Path
) -> None:
    """As on Dask, which runs old jobs again when it has lost their results with a worker."""
    other = Store(tmp_path / "other.db")
    shutil.copy(template, other.path)
    works = []
    for target in (store, other):
        mlflow.set_tracking_uri(target.uri)
        with traced_span("root"):
            works.append(carry(jobs.job))
        spanguard.flush(60)
    with ProcessPoolExecutor(1, forkserver()) as pool:
        pool.submit(jobs.at_once_each, works, list(range(6))).result(60)
    for target in (store, other):
        mlflow.set_tracking_uri(target.uri)
        # Their roots have ended, so each job has a trace of its own (test_late_work.py).
        root, *late = target.traces()
        assert [span.name for span in root.data.spans] == ["root"]
        assert [len(trace.data.spans) for trace in late] == [2] * 6
        found = [job.inputs for trace in late for job in named(trace, "job")]
        assert sorted(found) == list(range(6))
        assert {trace.info.state.value for trace in late} == {"OK"}


# -- how a worker ends -----------------------------------------------------------------------------


def test_a_worker_that_leaves_right_after_its_job_has_stored_it(store: Store) -> None:
    with traced_span("root"):
        worker = forkserver().Process(target=jobs.leave_after, args=(carry(jobs.job), 1))
        worker.start()
        worker.join(60)
        assert worker.exitcode == 0
        # In the store before anybody in this process does anything about it.
        with sqlite3.connect(store.path) as connection:
            stored = connection.execute("select name from spans").fetchall()
        assert {name for (name,) in stored} >= {"job", "step"}
    assert_whole(store.trace(), [1])


def test_a_job_that_runs_after_its_root_has_ended(
    store: Store, tmp_path: Path, spawned: ProcessPoolExecutor
) -> None:
    gate = tmp_path / "gate"
    with traced_span("root"):
        future = spawned.submit(carry(jobs.job_at), str(gate))
        await_true(Path(f"{gate}.waiting").exists)
    assert [span.name for span in store.trace().data.spans] == ["root"]
    gate.touch()
    future.result(60)
    assert_whole(store.trace(), [0])


def test_a_job_that_starts_after_its_root_has_ended(
    store: Store, spawned: ProcessPoolExecutor
) -> None:
    """As in one process: test_late_work.py."""
    with traced_span("root") as root:
        work = carry(jobs.job)
    assert [span.name for span in store.trace().data.spans] == ["root"]
    spawned.submit(work, 3).result(60)
    origin, late = store.traces()
    assert [span.name for span in origin.data.spans] == ["root"]
    (job,) = named(late, "job")
    assert job.parent_id is None
    assert job.get_attribute("spanguard.lost_parent") == f"{root.trace_id}/{root.span_id}"
    assert len(late.data.spans) == 2


def test_a_worker_killed_in_the_middle_of_its_job(store: Store) -> None:
    with traced_span("root") as root, ProcessPoolExecutor(1, forkserver()) as pool:
        pool.submit(carry(jobs.job), 0).result(60)
        with pytest.raises(BrokenProcessPool):
            pool.submit(carry(jobs.killed_mid_job), 1).result(60)
    trace = store.trace()
    assert trace.info.state.value == "OK"
    (found,) = (span for span in trace.data.spans if span.parent_id is None)
    assert (found.span_id, status(found), outcome(found)) == (root.span_id, "OK", "ok")
    assert [span.inputs for span in named(trace, "job")] == [0]
    assert named(trace, "killed") == []


# -- what a job leaves behind ----------------------------------------------------------------------


def test_a_failing_job_is_an_error_in_the_trace_and_to_its_caller(
    store: Store, spawned: ProcessPoolExecutor
) -> None:
    with traced_span("root"):
        with pytest.raises(KeyError, match="no 7"):
            spawned.submit(carry(jobs.failing_job), 7).result(60)
    trace = store.trace()
    (failed,) = named(trace, "job")
    assert (status(failed), failed.get_attribute("error_type")) == ("ERROR", "KeyError")
    assert trace.info.state.value == "OK"


def test_a_span_left_open_in_a_worker_is_closed_there(
    store: Store, spawned: ProcessPoolExecutor
) -> None:
    with traced_span("root") as root:
        spawned.submit(carry(jobs.leaking_job), 1).result(60)
    trace = store.trace()
    assert trace.info.state.value == "OK"
    (leaked,) = named(trace, "leaked")
    assert (status(leaked), outcome(leaked)) == ("ERROR", "orphaned")
    assert "in leaking_job" in leaked.get_attribute("spanguard.opened_at")
    assert leaked.parent_id == root.span_id


def test_strictness_goes_along_and_the_error_comes_back(
    store: Store, spawned: ProcessPoolExecutor
) -> None:
    with traced_span("root"):
        with spanguard.strict():
            work = carry(jobs.leaking_job)
        with pytest.raises(spanguard.OrphanedSpanError, match="leaked") as caught:
            spawned.submit(work, 1).result(60)
    assert [span.name for span in caught.value.spans] == ["leaked"]
    (leaked,) = named(store.trace(), "leaked")
    assert outcome(leaked) == "orphaned"


# -- Dask ------------------------------------------------------------------------------------------


def test_dask_runs_a_call_again_for_another_trace(store: Store, dask_client: Any) -> None:
    # Dask keeps the result of the same function and arguments: another root is another function.
    held = []
    for _ in range(2):
        with traced_span("root"):
            held.append(dask_client.submit(carry(jobs.job), 1))
            held[-1].result(60)
    traces = store.traces()
    assert len(traces) == 2
    for trace in traces:
        assert_whole(trace, [1])


def test_dask_repeats_the_jobs_of_a_worker_that_dies(
    store: Store, tmp_path: Path, dask_client: Any
) -> None:
    marker = str(tmp_path / "killed")
    with traced_span("root"):
        futures = dask_client.map(carry(jobs.killed_once), range(JOBS), marker=marker)
        pids = dask_client.gather(futures)
    assert Path(marker).exists() and len(pids) == JOBS
    trace = store.trace()
    assert trace.info.state.value == "OK"
    (root,) = (span for span in trace.data.spans if span.parent_id is None)
    assert (root.name, status(root)) == ("root", "OK")
    # A job whose result was lost with the worker ran twice, and is there twice.
    assert {span.inputs for span in named(trace, "job")} == set(range(JOBS))
    assert {span.parent_id for span in named(trace, "job")} == {root.span_id}


# -- Ray -------------------------------------------------------------------------------------------


def test_ray_takes_traced_functions_and_carried_generators(store: Store, ray: Any) -> None:
    @spanguard.traced
    def double(number: int) -> int:
        return 2 * number

    assert ray.remote(double)._function is double
    with traced_span("root"):
        assert ray.get(ray.remote(carry(double)).remote(2)) == 4
        items = ray.remote(carry(jobs.job_by_job)).remote(3)
        assert len([ray.get(item) for item in items]) == 3
    trace = store.trace()
    assert [span.outputs for span in named(trace, "double")] == [4]
    assert sorted(span.inputs for span in named(trace, "job")) == [0, 1, 2]


# -- pickle ----------------------------------------------------------------------------------------


def test_a_carried_function_pickles_by_plain_pickle(store: Store) -> None:
    with traced_span("root") as root:
        work = pickle.loads(pickle.dumps(carry(jobs.job)))
        assert work.__name__ == "job"
        work(1)
    trace = store.trace()
    assert trace.info.trace_id == root.trace_id
    assert_whole(trace, [1])


def test_a_function_that_cloudpickle_ships_whole_stays_traced(
    store: Store, spawned: ProcessPoolExecutor
) -> None:
    # As Dask, joblib and Ray do with what a script or a notebook defines.
    @spanguard.traced(name="inner")
    def double(number: int) -> int:
        return 2 * number

    class Doubler:
        @spanguard.traced(name="method")
        def double(self, number: int) -> int:
            return double(number)

    def work(number: int) -> int:
        return Doubler().double(number)

    with traced_span("root"):
        for function in (double, work):
            shipped = cloudpickle.dumps(carry(function))
            assert spawned.submit(jobs.call_pickled, shipped, 2).result(60) == 4
    trace = store.trace()
    assert [span.outputs for span in named(trace, "inner")] == [4, 4]
    assert [span.outputs for span in named(trace, "method")] == [4]
    # What has a name goes by its name.
    assert cloudpickle.loads(cloudpickle.dumps(jobs.traced_job)) is jobs.traced_job


def test_what_crosses_is_strings(store: Store) -> None:
    with traced_span("root", inputs="a secret of the root"):
        context = spanguard.capture()
        crossing = pickle.dumps(context)
    assert b"a secret" not in crossing
    _, fields = context.__reduce__()
    assert {type(field) for field in fields} <= {str, bool, type(None)}


def test_raw_code_on_a_guarded_client_joins_the_trace(
    store: Store, spawned: ProcessPoolExecutor
) -> None:
    with traced_span("root") as root:
        list(spawned.map(carry(jobs.raw_job), range(3)))
    trace = store.trace()
    found, leaked = named(trace, "raw job"), named(trace, "leaked")
    assert sorted(span.inputs for span in found) == [0, 1, 2]
    assert {span.parent_id for span in found} == {root.span_id}
    assert {status(span) for span in found} == {"OK"}
    assert sorted(span.parent_id for span in leaked) == sorted(span.span_id for span in found)
    assert {outcome(span) for span in leaked} == {"orphaned"}
