"""Engines that keep a function by its name: a carried one has none, and says so."""

from __future__ import annotations

import functools
import inspect
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import spanguard
from spanguard import TraceContext, capture, carry, traced, traced_span
from spanguard.exceptions import InvalidSpanArgumentWarning
from tests.store import Store


def work(name: str) -> str:
    with traced_span(name):
        return name


async def work_async(name: str) -> str:
    return work(name)


def items(name: str) -> Any:
    yield work(name)


async def items_async(name: str) -> Any:
    yield work(name)


@traced
def traced_work(name: str) -> str:
    return work(name)


class Worker:
    """What a task object of an engine is: called, or told to send itself."""

    def __call__(self, name: str) -> str:
        return work(name)

    def delay(self, name: str) -> str:
        return self(name)

    @property
    def label(self) -> str:
        return "a worker"


def of_each_kind() -> list[Any]:
    functions = [work, work_async, items, items_async, traced_work]
    return [*functions, Worker(), Worker().delay, functools.partial(work)]


def parents(store: Store) -> dict[str, str | None]:
    spans = [span for trace in store.traces() for span in trace.data.spans]
    names = {span.span_id: span.name for span in spans}
    return {span.name: names.get(span.parent_id or "") for span in spans}


# -- any engine --------------------------------------------------------------------------------


@pytest.mark.parametrize("function", of_each_kind(), ids=lambda function: type(function).__name__)
def test_what_is_carried_cannot_be_found_by_name(function: Any) -> None:
    """Not by its own name, nor by its class's; it pickles and copies all the same."""
    carried = carry(function)
    assert "<locals>" in carried.__qualname__
    assert "<locals>" in type(carried).__qualname__
    assert not inspect.isfunction(carried)
    for dumps in (pickle.dumps, cloudpickle.dumps):
        again = pickle.loads(dumps(carried))
        assert type(again) is type(carried)
        assert again._context == carried._context
    for tells in (inspect.iscoroutinefunction, inspect.isgeneratorfunction):
        assert tells(carried) == tells(function)
    assert inspect.isasyncgenfunction(carried) == inspect.isasyncgenfunction(function)
    assert inspect.signature(carried) == inspect.signature(function)


def test_a_method_that_sends_the_function_alone_is_told_once(store: Store) -> None:
    worker = Worker()
    with traced_span("root"):
        carried: Any = carry(worker)
    with spanguard.strict(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            assert carried.delay("sent") == "sent"
        assert carried.label == "a worker"
        assert carried.__doc__ == Worker.__doc__
    (warning,) = told
    assert warning.category is InvalidSpanArgumentWarning
    assert warning.filename == __file__
    assert "delay() of carry(" in str(warning.message)
    assert "capture().to_headers()" in str(warning.message)


def test_a_function_that_has_been_given_a_way_to_be_sent_is_told(store: Store) -> None:
    def decorated(name: str) -> str:
        return work(name)

    decorated.delay = lambda name: name  # type: ignore[attr-defined]
    decorated.queue = "low"  # type: ignore[attr-defined]
    carried: Any = carry(decorated)
    with pytest.warns(InvalidSpanArgumentWarning, match="delay"):
        assert carried.delay("sent") == "sent"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert carried.queue == "low"


# -- the engines themselves --------------------------------------------------------------------


def test_rq_keeps_what_is_carried(store: Store) -> None:
    fakeredis = pytest.importorskip("fakeredis")
    rq = pytest.importorskip("rq")
    queue = rq.Queue(connection=fakeredis.FakeStrictRedis())
    with traced_span("root"), ThreadPoolExecutor(1) as pool:
        jobs = [queue.enqueue(carry(work), "carried"), queue.enqueue(carry(traced_work), "inner")]
        for job in jobs:
            # As a worker does, which gets the id alone.
            fetched = queue.fetch_job(job.id)
            assert pool.submit(fetched.perform).result() == job.args[0]
    assert parents(store) == {
        "root": None,
        "carried": "root",
        "traced_work": "root",
        "inner": "traced_work",
    }


def test_apscheduler_refuses_to_store_it_and_runs_it_from_memory(
    store: Store, tmp_path: Path
) -> None:
    pytest.importorskip("apscheduler")
    from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
    from apscheduler.schedulers.background import BackgroundScheduler

    scheduler = BackgroundScheduler()
    scheduler.add_jobstore(SQLAlchemyJobStore(f"sqlite:///{tmp_path / 'jobs.db'}"), "stored")
    scheduler.start(paused=True)
    add = functools.partial(scheduler.add_job, trigger="date", run_date="2999-01-01")
    try:
        with traced_span("root"):
            for function in (work, traced_work, work_async, Worker()):
                with pytest.raises(ValueError, match="cannot be serialized"):
                    add(carry(function), args=["x"], jobstore="stored")
            job = add(carry(work), args=["carried"])
            job.func(*job.args)
            headers = capture().to_headers()
            stored = add(attached_work, args=[headers], jobstore="stored")
            again = scheduler.get_job(stored.id, "stored")
            again.func(*again.args)
    finally:
        scheduler.shutdown()
    assert parents(store) == {"root": None, "carried": "root", "attached": "root"}


def attached_work(headers: dict[str, str]) -> str:
    """Do work as docs/carrying.md tells tasks to."""
    with TraceContext.from_headers(headers).attach():
        return work("attached")


def test_celery_is_told_of_and_takes_headers(store: Store) -> None:
    celery = pytest.importorskip("celery")
    app = celery.Celery("tests", broker="memory://", backend="cache+memory://")
    app.conf.task_always_eager = True
    task = app.task(attached_work)
    with traced_span("root"):
        assert task.delay(capture().to_headers()).get() == "attached"
        with pytest.warns(InvalidSpanArgumentWarning, match="delay"):
            carry(task).delay(capture().to_headers())
        with pytest.warns(InvalidSpanArgumentWarning, match="apply_async"):
            carry(task).apply_async((capture().to_headers(),))
    spans = store.trace().data.spans
    assert [span.name for span in spans].count("attached") == 3
