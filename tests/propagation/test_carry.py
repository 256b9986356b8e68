"""A trace goes where the work goes: threads, tasks, headers; processes are in their own file."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import pytest
from mlflow.entities import Trace

import spanguard
from spanguard import TraceContext, TraceStateManager, capture, carry, current_span, traced_span
from spanguard._base.config import is_strict
from spanguard.exceptions import InvalidSpanArgumentWarning, OrphanedSpanWarning
from tests.store import Store, status

pytestmark = [pytest.mark.pythons, pytest.mark.versions]

HEADER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
REMOTE_TRACE = "tr-0af7651916cd43dd8448eb211c80319c"


def named(name: str) -> str:
    with traced_span(name):
        return name


def in_thread(function: Any, *args: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def parents(trace: Trace) -> dict[str, str | None]:
    names = {span.span_id: span.name for span in trace.data.spans}
    return {span.name: names.get(span.parent_id or "") for span in trace.data.spans}


# -- threads -----------------------------------------------------------------------------------


def test_jobs_of_a_thread_pool_nest_under_the_span_they_were_carried_from(store: Store) -> None:
    with traced_span("root") as root, ThreadPoolExecutor(4) as pool:
        list(pool.map(carry(named), [f"job {n}" for n in range(20)]))
    trace = store.trace()
    assert len(trace.data.spans) == 21
    assert {s.parent_id for s in trace.data.spans if s.name != "root"} == {root.span_id}
    assert trace.info.state.value == "OK"


def test_a_thread_is_left_as_it_was_found(store: Store) -> None:
    with traced_span("root"), ThreadPoolExecutor(1) as pool:
        pool.submit(carry(named), "job").result()
        assert pool.submit(current_span).result() is None


def test_a_fluent_span_carries_and_is_carried(store: Store) -> None:
    def work() -> None:
        with mlflow.start_span("fluent child"):
            pass

    with mlflow.start_span("fluent root"):
        in_thread(carry(work))
    assert parents(store.trace())["fluent child"] == "fluent root"


def test_a_pushed_span_carries(store: Store) -> None:
    manager = TraceStateManager()
    manager.push_trace("pushed")
    in_thread(carry(named), "job")
    manager.pop_trace()
    assert parents(store.trace())["job"] == "pushed"


def test_work_after_the_end_of_its_span_nests_under_what_is_open_above(store: Store) -> None:
    with traced_span("root"):
        with traced_span("step"):
            late = carry(named)
        in_thread(late, "late")
    assert parents(store.trace())["late"] == "root"


def test_headers_of_a_trace_that_has_just_ended_here_do_not_cost_it(store: Store) -> None:
    """It still waits for its batch, in MLflow's buffer, where its continuation is put."""
    with traced_span("first"):
        headers = capture().to_headers()
    with TraceContext.from_headers(headers).attach(), traced_span("second"):
        pass
    assert {span.name for span in store.trace().data.spans} == {"first", "second"}


def test_work_after_the_end_of_its_trace_starts_its_own(store: Store) -> None:
    with traced_span("root"):
        late = carry(named)
    in_thread(late, "late")
    in_thread(pickle.loads(pickle.dumps(late)), "later")
    assert sorted(len(trace.data.spans) for trace in store.traces()) == [1, 1, 1]


def test_without_a_span_carried_work_runs_as_it_is(store: Store) -> None:
    assert in_thread(carry(named), "alone") == "alone"
    assert [trace.data.spans[0].name for trace in store.traces()] == ["alone"]


def test_carried_work_inside_another_trace_keeps_to_its_own(store: Store) -> None:
    with traced_span("root"):
        job = carry(named)
        with traced_span("other", new_trace=True):
            job("job")
            assert current_span().name == "other"  # type: ignore[union-attr]
    by_root = {trace.info.tags["mlflow.traceName"]: parents(trace) for trace in store.traces()}
    assert by_root == {"root": {"root": None, "job": "root"}, "other": {"other": None}}


def test_results_and_exceptions_pass_through(store: Store) -> None:
    error = ValueError("mine")

    def fail() -> None:
        raise error

    with traced_span("root"):
        with pytest.raises(ValueError) as caught:
            carry(fail)()
    assert caught.value is error
    assert status(store.spans()["root"]) == "OK"


# -- tasks -------------------------------------------------------------------------------------


def test_a_carried_coroutine_function_nests_in_a_task_of_another_context(store: Store) -> None:
    async def work(name: str) -> str:
        await asyncio.sleep(0)
        return named(name)

    carried: list[Any] = []

    async def main() -> list[str]:
        return await asyncio.gather(*(carried[0](f"task {n}") for n in range(10)))

    with traced_span("root") as root:
        carried.append(carry(work))
        assert inspect.iscoroutinefunction(carried[0])
        assert asyncio.iscoroutinefunction(carried[0])
        done = in_thread(asyncio.run, main())
    assert done == [f"task {n}" for n in range(10)]
    trace = store.trace()
    assert {s.parent_id for s in trace.data.spans if s.name != "root"} == {root.span_id}


def test_run_in_executor(store: Store) -> None:
    async def main() -> None:
        async with traced_span("root"):
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, carry(named), "job")

    asyncio.run(main())
    assert parents(store.trace())["job"] == "root"


# -- generators --------------------------------------------------------------------------------


def items(count: int) -> Any:
    for number in range(count):
        with traced_span(f"item {number}"):
            received = yield number
        assert received is None or received == "go on"
    return "done"


def test_a_carried_generator_runs_its_body_under_the_span_and_its_consumer_not(
    store: Store,
) -> None:
    seen: list[Any] = []

    def consume() -> None:
        with traced_span("consumer") as consumer:
            for number in work(2):
                seen.append((number, current_span() is not None))
                with traced_span(f"of the consumer {number}"):
                    pass
                assert spanguard.current_span().span_id == consumer.span_id  # type: ignore[union-attr]

    with traced_span("root"):
        work = carry(items)
        in_thread(consume)
    assert seen == [(0, True), (1, True)]
    found: dict[str, str | None] = {}
    for trace in store.traces():
        found |= parents(trace)
    assert (found["item 0"], found["item 1"]) == ("root", "root")
    assert (found["of the consumer 0"], found["of the consumer 1"]) == ("consumer", "consumer")


def test_a_carried_generator_takes_its_place_along_from_thread_to_thread(store: Store) -> None:
    with traced_span("root"):
        generator = in_thread(carry(items), 3)
        assert in_thread(next, generator) == 0
        assert in_thread(generator.send, "go on") == 1
        assert in_thread(current_span) is None
        assert list(generator) == [2]
    assert set(parents(store.trace()).values()) == {None, "root"}
    assert len(store.trace().data.spans) == 4


def test_a_carried_generator_that_is_dropped_leaves_its_context(store: Store) -> None:
    def consume() -> Any:
        for _ in work(2):
            break
        return current_span()

    with traced_span("root"):
        work = carry(items)
        assert in_thread(consume) is None
    assert parents(store.trace())["item 0"] == "root"


def test_a_carried_async_generator_runs_its_body_under_the_span(store: Store) -> None:
    async def numbers() -> Any:
        for number in range(2):
            with traced_span(f"item {number}"):
                yield number
                await asyncio.sleep(0)

    async def consume() -> list[Any]:
        return [(number, current_span()) async for number in work()]

    with traced_span("root"):
        work = carry(numbers)
        assert in_thread(asyncio.run, consume()) == [(0, None), (1, None)]
    assert set(parents(store.trace()).values()) == {None, "root"}


@pytest.mark.parametrize("wrap", [carry, spanguard.traced])
def test_strictness_inside_a_generator_stays_in_it(store: Store, wrap: Any) -> None:
    def numbers() -> Any:
        with spanguard.strict():
            yield is_strict()
            yield is_strict()

    assert [(inner, is_strict()) for inner in wrap(numbers)()] == [(True, False)] * 2


# -- the callable ------------------------------------------------------------------------------


def test_a_carried_function_looks_like_the_function() -> None:
    carried = carry(named)
    assert (carried.__name__, carried.__module__) == ("named", __name__)
    assert inspect.signature(carried) == inspect.signature(named)
    assert not inspect.iscoroutinefunction(carried)
    assert copy.copy(carried)("x") == "x"


def test_callables_of_other_kinds_are_carried(store: Store) -> None:
    class Worker:
        def __call__(self, name: str) -> str:
            return named(name)

        def method(self, name: str) -> str:
            return named(name)

    with traced_span("root"):
        jobs = [Worker(), Worker().method, functools.partial(named), lambda name: named(name)]
        done = [in_thread(carry(job), f"job {n}") for n, job in enumerate(jobs)]
    assert done == ["job 0", "job 1", "job 2", "job 3"]
    assert set(parents(store.trace()).values()) == {None, "root"}


def test_what_is_not_callable_is_refused() -> None:
    with pytest.raises(TypeError, match="takes a callable, not a int"):
        carry(3)  # type: ignore[type-var]


def test_what_crosses_is_strings(store: Store) -> None:
    with traced_span("root", inputs={"secret": "hunter2"}) as root:
        context = capture()
    pickled = pickle.dumps(context)
    assert b"hunter2" not in pickled
    again = pickle.loads(pickled)
    assert again == context
    assert hash(again) == hash(context)
    assert again.trace_id == root.trace_id
    assert again.tracking_uri == store.uri
    kinds = {type(value) for value in again._strings()}
    assert kinds <= {str, bool, type(None)}


def test_a_relative_store_travels_as_an_absolute_one(tmp_path: Any) -> None:
    mlflow.set_tracking_uri("sqlite:///relative.db")
    assert capture().tracking_uri == f"sqlite:///{tmp_path / 'relative.db'}"


def test_a_context_does_not_change() -> None:
    context = capture()
    with pytest.raises(AttributeError, match=r"cannot (assign to|delete) field"):
        context.trace_id = "tr-1"
    with pytest.raises(AttributeError, match=r"cannot (assign to|delete) field"):
        del context.trace_id


def test_strictness_goes_along(store: Store) -> None:
    def leave_open() -> None:
        with traced_span("parent") as parent:
            mlflow.start_span_no_context("leaked", parent_span=parent)

    with traced_span("root"):
        with spanguard.strict():
            job = carry(leave_open)
        with pytest.raises(spanguard.OrphanedSpanError):
            in_thread(job)
    assert status(store.spans()["leaked"]) == "ERROR"


# -- headers -----------------------------------------------------------------------------------


def test_headers_name_the_current_span(store: Store) -> None:
    with traced_span("root") as root:
        headers = capture().to_headers()
    version, trace_id, span_id, flags = headers["traceparent"].split("-")
    assert (version, f"tr-{trace_id}", span_id) == ("00", root.trace_id, root.span_id)
    assert int(flags, 16) & 1, "sampled"
    assert capture().to_headers() == {}


@pytest.mark.parametrize(
    "headers",
    [
        {"traceparent": HEADER},
        {"TraceParent": HEADER, "other": "x"},
        [(b"traceparent", HEADER.encode())],
        {"traceparent": "cc" + HEADER[2:] + "-from-the-future"},
    ],
)
def test_headers_are_read_in_any_form(headers: Any) -> None:
    context = TraceContext.from_headers(headers)
    assert context
    assert context.trace_id == REMOTE_TRACE


@pytest.mark.parametrize(
    "junk",
    [
        "",
        "junk",
        "x" * 100_000,
        HEADER.upper(),
        "ff" + HEADER[2:],
        HEADER + "-00",
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
        "\udcff",
        None,
        7,
    ],
)
def test_junk_headers_are_ignored_with_a_warning(junk: Any, store: Store) -> None:
    with spanguard.strict():  # what a stranger sends is never an error
        with pytest.warns(InvalidSpanArgumentWarning, match="traceparent"):
            context = TraceContext.from_headers({"traceparent": junk})
    assert not context
    with context.attach(), traced_span("request"):
        pass
    assert parents(store.trace()) == {"request": None}


def test_no_header_is_no_fault() -> None:
    assert not TraceContext.from_headers({"accept": "*/*"})
    assert not TraceContext.from_headers({})


def test_spans_under_a_remote_span_belong_to_its_trace(store: Store) -> None:
    with TraceContext.from_headers({"traceparent": HEADER}).attach():
        with traced_span("server") as server, mlflow.start_span("fluent"):
            assert server.trace_id == REMOTE_TRACE
        headers = capture().to_headers()
        with traced_span("by id", trace_id=REMOTE_TRACE):
            pass
    assert headers["traceparent"] == HEADER
    assert current_span() is None
    spans = {span.name: span for span in stored(REMOTE_TRACE)}
    assert spans["server"].parent_id == spans["by id"].parent_id == "b7ad6b7169203331"
    assert spans["fluent"].parent_id == spans["server"].span_id
    assert spanguard.open_spans() == []


def test_two_requests_of_one_trace_at_a_time_lose_nothing(store: Store) -> None:
    context = TraceContext.from_headers({"traceparent": HEADER})
    first_left = threading.Event()

    def request(name: str, wait: bool) -> None:
        with context.attach(), traced_span(name):
            if wait:
                assert first_left.wait(30)
            named(f"{name} step")

    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(request, "slow", True)
        pool.submit(request, "fast", False).result()
        first_left.set()
        slow.result()
    names = {span.name for span in stored(REMOTE_TRACE)}
    assert names == {"slow", "slow step", "fast", "fast step"}


def test_what_is_left_open_under_a_remote_span_is_an_orphan(store: Store) -> None:
    with pytest.warns(OrphanedSpanWarning, match=r"'left'.*test_carry\.py"):
        with TraceContext.from_headers({"traceparent": HEADER}).attach():
            traced_span("left").__enter__()
    (left,) = stored(REMOTE_TRACE)
    assert (status(left), left.get_attribute("spanguard.outcome")) == ("ERROR", "orphaned")
    assert current_span() is None


def test_a_task_that_outlives_its_request_starts_a_trace_of_its_own(store: Store) -> None:
    async def main() -> None:
        done = asyncio.Event()

        async def late() -> None:
            await done.wait()
            named("late")

        async with TraceContext.from_headers({"traceparent": HEADER}).attach():
            task = asyncio.create_task(late())
            named("request")
        done.set()
        await task

    asyncio.run(main())
    assert [span.name for span in stored(REMOTE_TRACE)] == ["request"]
    assert [parents(t) for t in store.traces() if t.info.trace_id != REMOTE_TRACE] == [
        {"late": None}
    ]


def test_a_service_that_calls_itself_nests_in_the_open_trace(store: Store) -> None:
    with traced_span("root"):
        headers = capture().to_headers()

        def serve() -> None:
            with TraceContext.from_headers(headers).attach():
                named("handler")

        in_thread(serve)
    assert parents(store.trace()) == {"root": None, "handler": "root"}


def test_an_unsampled_trace_records_nothing_here(store: Store) -> None:
    with TraceContext.from_headers({"traceparent": HEADER[:-2] + "00"}).attach():
        named("dropped")
    assert store.rows() == 0


def stored(trace_id: str) -> list[Any]:
    """Return the stored spans of a trace whose root is elsewhere."""
    from mlflow.tracing.client import TracingClient

    assert spanguard.flush(60)
    trace = TracingClient().store.get_trace(trace_id, allow_partial=True)
    return list(trace.data.spans)
