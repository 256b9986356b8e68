"""Work that begins after the trace it was carried from has ended: its own trace, and a link."""

from __future__ import annotations

import asyncio
import functools
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import mlflow
import pytest
from mlflow.entities import Trace

import spanguard
from spanguard import capture, carry, current_span, traced_span
from spanguard.exceptions import InvalidParentWarning
from tests.store import Store

HAS_LINKS = hasattr(mlflow.entities.LiveSpan, "add_link")


def by_traced_span(name: str) -> None:
    with traced_span(name), traced_span(f"{name} step"):
        pass


def by_fluent(name: str) -> None:
    with mlflow.start_span(name), traced_span(f"{name} step"):
        pass


def by_raw_client(name: str) -> None:
    client = mlflow.MlflowClient()
    root = client.start_trace(name)
    client.end_span(
        root.trace_id, client.start_span(f"{name} step", root.trace_id, root.span_id).span_id
    )
    client.end_trace(root.trace_id)


def by_manager(name: str) -> None:
    manager = spanguard.TraceStateManager()
    manager.push_trace(name)
    manager.push_trace(f"{name} step")
    manager.pop_trace()
    manager.pop_trace()


FACES: list[Callable[[str], None]] = [by_traced_span, by_fluent, by_raw_client, by_manager]


def call(work: Any, name: str) -> None:
    work(name)


def call_pickled(work: Any, name: str) -> None:
    """As a queue inside one process does."""
    pickle.loads(pickle.dumps(work))(name)


def call_attached(work: Any, name: str) -> None:
    with work._context.attach():
        work._function(name)


def call_in_task(work: Any, name: str) -> None:
    async def attached() -> None:
        async with work._context.attach():
            work._function(name)

    asyncio.run(attached())


WAYS: list[Callable[[Any, str], None]] = [call, call_pickled, call_attached, call_in_task]


def assert_followed(origin: Any, followers: list[Trace]) -> None:
    """Check that traces are whole, of their own, and linked to the span they come from."""
    for trace in followers:
        root, step = sorted(trace.data.spans, key=lambda span: span.parent_id is not None)
        assert root.parent_id is None
        assert step.parent_id == root.span_id
        assert step.name == f"{root.name} step"
        lost = f"{origin.trace_id}/{origin.span_id}"
        assert root.get_attribute("spanguard.lost_parent") == lost
        assert step.get_attribute("spanguard.lost_parent") is None
        assert trace.info.state.value == "OK"
        if HAS_LINKS:
            assert [(link.trace_id, link.span_id) for link in root.links] == [
                (origin.trace_id, origin.span_id)
            ]
            assert step.links == []


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_late_work_in_one_process_is_a_trace_of_its_own_with_a_link(store: Store, way: Any) -> None:
    with traced_span("root"), traced_span("caller") as caller:
        works = [carry(face) for face in FACES]
    with traced_span("meanwhile") as meanwhile, ThreadPoolExecutor(1) as pool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for work in works:
                pool.submit(way, work, work.__name__).result()
                way(work, work.__name__)
        assert current_span() is meanwhile
    origin, *followers, alone = sorted(
        store.traces(), key=lambda t: (t.data.spans[0].name == "meanwhile", t.info.request_time)
    )
    assert {span.name for span in origin.data.spans} == {"root", "caller"}
    assert [span.name for span in alone.data.spans] == ["meanwhile"]
    assert alone.data.spans[0].get_attribute("spanguard.lost_parent") is None
    assert len(followers) == 2 * len(FACES)
    assert_followed(caller, followers)


def test_late_work_between_processes_is_the_same(store: Store) -> None:
    with traced_span("root"), traced_span("caller") as caller:
        works = [carry(face) for face in FACES]
        early = carry(by_traced_span)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(early, "early").result(120)
    assert len(store.trace().data.spans) == 4
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for work in works:
            pool.submit(work, work.__name__).result(120)
    origin, *followers = store.traces()
    assert {span.name for span in origin.data.spans} == {"root", "caller", "early", "early step"}
    assert len(followers) == len(FACES)
    assert_followed(caller, followers)


def test_late_work_is_told_once_for_each_function(store: Store) -> None:
    """At its `def` line: a pool's thread has no frame of the user's."""
    with traced_span("root"):
        works = [carry(face) for face in (by_traced_span, by_manager, functools.partial(by_fluent))]
    with spanguard.strict(), ThreadPoolExecutor(1) as pool:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for work in works * 3:
                pool.submit(work, "late").result()
    places = [(warning.category, warning.filename, warning.lineno) for warning in told]
    lines = [face.__code__.co_firstlineno for face in (by_traced_span, by_manager, by_fluent)]
    assert places == [(InvalidParentWarning, __file__, line) for line in lines]


def test_late_work_that_opens_nothing_is_not_told(store: Store) -> None:
    with traced_span("root"):
        work = carry(lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        work()
    assert len(store.traces()) == 1


def test_work_after_an_inner_trace_does_not_land_in_the_outer_one(store: Store) -> None:
    with traced_span("outer"):
        with traced_span("inner", new_trace=True) as inner:
            work = carry(by_traced_span)
        with pytest.warns(InvalidParentWarning):
            work("late")
        assert current_span().name == "outer"  # type: ignore[union-attr]
    found = {trace.data.spans[0].name: trace for trace in store.traces()}
    assert {name: len(trace.data.spans) for name, trace in found.items()} == {
        "outer": 1,
        "inner": 1,
        "late": 2,
    }
    assert_followed(inner, [found["late"]])


def test_work_that_began_in_time_goes_on_in_its_trace(store: Store) -> None:
    """Also where it was carried from a span that ended, in a trace that is open."""
    with traced_span("root"):
        with traced_span("step"):
            work = carry(by_traced_span)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            work("late")
    assert len(store.trace().data.spans) == 4


def test_what_late_work_starts_in_tasks_is_linked_and_what_comes_after_is_not(
    store: Store,
) -> None:
    with traced_span("root") as root:
        context = capture()

    async def later() -> None:
        await asyncio.sleep(0)
        by_traced_span("in a task")

    async def main() -> None:
        async with context.attach():
            task = asyncio.create_task(later())
        by_traced_span("after")
        await task

    asyncio.run(main())
    found = {trace.data.spans[0].name: trace for trace in store.traces()}
    assert_followed(root, [found["in a task"]])
    (after,) = (span for span in found["after"].data.spans if span.parent_id is None)
    assert after.get_attribute("spanguard.lost_parent") is None


def test_a_carried_generator_that_begins_late_is_linked(store: Store) -> None:
    def items() -> Iterator[int]:
        by_traced_span("item")
        yield 1

    with traced_span("root") as root:
        generate = carry(items)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert list(generate()) == [1]
    assert_followed(root, store.traces()[1:])


def test_what_was_sampled_out_is_not_recorded_later(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0")
    with traced_span("root"):
        works = [carry(by_traced_span)]
        works.append(pickle.loads(pickle.dumps(works[0])))
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "1")
    before = store.rows()
    for work in works:
        work("late")
    assert store.rows() == before
