"""What runs on after the span it was begun under, on another strand, is no orphan."""

from __future__ import annotations

import asyncio
import threading
import types
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import carry, current_span, traced, traced_span
from tests.store import Store, outcome, status

pytestmark = [
    pytest.mark.versions,
    pytest.mark.filterwarnings("error::spanguard.SpanguardWarning"),
]


def assert_all_ok(store: Store, *names: str) -> dict[str, Any]:
    spans = store.spans()
    assert {name: (status(spans[name]), outcome(spans[name])) for name in names} == dict.fromkeys(
        names, ("OK", "ok")
    )
    return spans


# -- ways to run on ----------------------------------------------------------------------------


def in_a_task(begin: Callable[[Callable[[], Any]], Any]) -> None:
    """Begin in a coroutine, and let the task go on after it has returned."""

    async def main() -> None:
        go_on = asyncio.Event()

        async def late() -> None:
            with traced_span("late") as span:
                started.set()
                await go_on.wait()
                with traced_span("later still"):
                    pass
                span.set_outputs("whole")

        started = asyncio.Event()
        tasks: list[Any] = []

        def start() -> None:
            tasks.append(asyncio.get_running_loop().create_task(late()))

        async def body() -> None:
            start()
            await started.wait()

        await begin(body)
        go_on.set()
        await tasks[0]

    asyncio.run(main())


def test_a_task_that_a_block_began_ends_as_it_ends(store: Store) -> None:
    async def begin(body: Any) -> None:
        with traced_span("root", strict=True):
            with traced_span("step", strict=True):
                await body()
        assert current_span() is None

    in_a_task(begin)
    spans = assert_all_ok(store, "root", "step", "late", "later still")
    assert spans["late"].parent_id == spans["step"].span_id
    assert spans["late"].outputs == "whole"
    assert spans["root"].end_time_ns < spans["late"].end_time_ns


def test_a_task_that_a_traced_coroutine_began_ends_as_it_ends(store: Store) -> None:
    async def begin(body: Any) -> None:
        @traced(strict=True)
        async def root() -> str:
            await body()
            return "result"

        assert await root() == "result"

    in_a_task(begin)
    spans = assert_all_ok(store, "root", "late", "later still")
    assert spans["root"].outputs == "result"


def test_a_root_that_failed_is_recorded_as_it_was_when_it_was_left(store: Store) -> None:
    async def begin(body: Any) -> None:
        with pytest.raises(ValueError):
            with traced_span("root", strict=True) as root:
                await body()
                raise ValueError("root's own")
        assert root.status.status_code.value == "ERROR"

    in_a_task(begin)
    spans = store.spans()
    assert (status(spans["root"]), outcome(spans["root"])) == ("ERROR", "error")
    assert (status(spans["late"]), outcome(spans["late"])) == ("OK", "ok")


@pytest.mark.parametrize("carried", [True, False], ids=["carried", "plain"])
def test_a_pooled_job_that_a_traced_function_began_ends_as_it_ends(
    store: Store, carried: bool
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def job(trace_id: str) -> str:
        with traced_span("late", trace_id=None if carried else trace_id) as span:
            begun.set()
            go_on.wait(10)
            span.set_outputs("whole")
        return "done"

    with ThreadPoolExecutor(1) as pool:

        @traced(strict=True)
        def root() -> Future[str]:
            trace_id = current_span().trace_id  # type: ignore[union-attr]
            future = pool.submit(carry(job) if carried else job, trace_id)
            begun.wait(10)
            return future

        future = root()
        with pytest.warns(spanguard.SpanguardWarning, match="wait for spans .* 'late'"):
            assert spanguard.flush(0.2) is False, "its root is still out"
        assert [span.name for span in spanguard.open_spans()] == ["late"]
        go_on.set()
        assert future.result() == "done"
    spans = assert_all_ok(store, "root", "late")
    assert spans["late"].outputs == "whole"
    assert spans["late"].parent_id == spans["root"].span_id


def test_the_user_sees_a_waiting_root_closed(store: Store) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def late(trace_id: str) -> None:
        with traced_span("late", trace_id=trace_id):
            begun.set()
            go_on.wait(10)

    with traced_span("root") as root:
        thread = threading.Thread(target=late, args=(root.trace_id,))
        thread.start()
        begun.wait(10)
    assert root.status.status_code.value == "OK"
    assert current_span() is None
    with pytest.warns(spanguard.SpanguardWarning, match="has ended"):
        root.set_attribute("too", "late")
    with traced_span("next"):
        pass
    go_on.set()
    thread.join()
    spans = assert_all_ok(store, "root", "late", "next")
    assert spans["root"].get_attribute("too") is None
    assert spans["next"].trace_id != spans["root"].trace_id


# -- streams -----------------------------------------------------------------------------------


def test_a_stream_that_a_traced_function_began_and_returned(store: Store) -> None:
    @traced(strict=True)
    def numbers() -> Iterator[int]:
        with traced_span("inside the stream", strict=True):
            yield from range(3)

    @traced(strict=True)
    def root() -> Iterator[int]:
        stream = numbers()
        assert next(stream) == 0  # to see early whether it works
        return stream

    assert list(root()) == [1, 2]
    spans = assert_all_ok(store, "root", "numbers", "inside the stream")
    assert spans["numbers"].outputs == [0, 1, 2]
    assert spans["inside the stream"].parent_id == spans["numbers"].span_id


def test_an_async_stream_that_a_traced_coroutine_began_and_returned(store: Store) -> None:
    @traced(strict=True)
    async def numbers() -> AsyncIterator[int]:
        for number in range(3):
            yield number

    @traced(strict=True)
    async def root() -> AsyncIterator[int]:
        stream = numbers()
        assert await stream.__anext__() == 0
        return stream

    async def main() -> list[int]:
        return [number async for number in await root()]

    assert asyncio.run(main()) == [1, 2]
    assert_all_ok(store, "root", "numbers")


def autologged(client: mlflow.MlflowClient) -> Any:
    """Return a module that opens spans as MLflow's autologging does, for a user's library."""
    module = types.ModuleType("mlflow.somelibrary.autolog")
    source = """
def stream(client, parent, items):
    span = client.start_span("streamed", parent.trace_id, parent.span_id)
    def read():
        for item in items:
            yield item
        client.end_span(span.trace_id, span.span_id, outputs=items)
    return read()
"""
    exec(compile(source, "/lib/mlflow/somelibrary/autolog.py", "exec"), module.__dict__)
    return module


def test_an_autologged_stream_that_the_caller_reads_to_its_end(
    store: Store, client: mlflow.MlflowClient
) -> None:
    library = autologged(client)

    @traced(strict=True)
    def root() -> Any:
        return library.stream(client, current_span(), [1, 2, 3])

    assert list(root()) == [1, 2, 3]
    spans = assert_all_ok(store, "root", "streamed")
    assert spans["streamed"].outputs == [1, 2, 3]


def test_what_a_user_leaves_open_on_the_same_strand_is_closed_at_once(
    store: Store, client: mlflow.MlflowClient
) -> None:
    with pytest.raises(spanguard.OrphanedSpanError) as caught:
        with traced_span("root", strict=True) as root:
            client.start_span("left", root.trace_id, root.span_id)
    assert [span.name for span in caught.value.spans] == ["left"]
    assert spanguard.open_spans() == []
    assert outcome(store.spans()["left"]) == "orphaned"


# -- the end of the wait -----------------------------------------------------------------------


def leave_open_in_a_live_thread() -> tuple[Any, threading.Event, threading.Thread]:
    begun, go_on = threading.Event(), threading.Event()
    held: list[Any] = []

    def late(trace_id: str) -> None:
        held.append(traced_span("late", trace_id=trace_id))
        held[0].__enter__()
        begun.set()
        go_on.wait(30)

    with traced_span("root") as root:
        thread = threading.Thread(target=late, args=(root.trace_id,), daemon=True)
        thread.start()
        begun.wait(10)
    assert [span.name for span in spanguard.open_spans()] == ["late"]
    return held, go_on, thread


def test_a_root_waits_no_longer_than_it_was_told_to(store: Store) -> None:
    with pytest.warns(spanguard.OrphanedSpanWarning, match="'late'"):
        with spanguard.limits(outlive_seconds=2):
            held, go_on, thread = leave_open_in_a_live_thread()
        assert spanguard.flush(60), "the root ends when its time is up"
        go_on.set()
        thread.join()
    assert outcome(store.spans()["late"]) == "orphaned"
    assert outcome(store.spans()["root"]) == "ok"
    del held


def test_a_root_waits_no_longer_than_the_strand_lives(store: Store) -> None:
    with pytest.warns(spanguard.OrphanedSpanWarning, match="'late'"):
        held, go_on, thread = leave_open_in_a_live_thread()
        go_on.set()
        thread.join()
        assert spanguard.flush(60)
    assert outcome(store.spans()["late"]) == "orphaned"
    del held


def test_closing_all_ends_what_outlives_and_the_root_as_it_was(store: Store) -> None:
    held, go_on, thread = leave_open_in_a_live_thread()
    assert spanguard.close_open_spans() == 1
    assert spanguard.open_spans() == []
    go_on.set()
    thread.join()
    spans = store.spans()
    assert (outcome(spans["root"]), outcome(spans["late"])) == ("ok", "orphaned")
    del held


def test_carried_work_is_over_when_its_callable_returns(store: Store) -> None:
    held: list[Any] = []

    def leaks() -> None:
        held.append(traced_span("left by the job"))
        held[0].__enter__()

    with ThreadPoolExecutor(1) as pool:
        with pytest.warns(spanguard.OrphanedSpanWarning, match="left by the job"):
            with traced_span("root"):
                pool.submit(carry(leaks)).result()
        assert spanguard.open_spans() == [], "though the pool's thread lives on"
    assert outcome(store.spans()["left by the job"]) == "orphaned"


# -- other people's roots (issue 9, H42) ---------------------------------------------------------


def end_by_client(root: Any) -> None:
    mlflow.MlflowClient().end_trace(root.trace_id)


def end_by_itself(root: Any) -> None:
    root.end()


@pytest.mark.filterwarnings("default::spanguard.SpanguardWarning")
@pytest.mark.parametrize("end", [end_by_client, end_by_itself])
@pytest.mark.parametrize("opened_by", ["manager", "guard", "block"])
def test_what_is_ours_and_open_under_a_raw_root_closes_before_it(
    store: Store, client: mlflow.MlflowClient, end: Callable[[Any], None], opened_by: str
) -> None:
    root = client.start_trace("root")
    manager = spanguard.TraceStateManager()
    held: Any = None
    if opened_by == "manager":
        manager.push_trace("left", trace_id=root.trace_id)
    elif opened_by == "guard":
        spanguard.guard().start_span("left", root.trace_id, root.span_id)
    else:
        held = traced_span("left", trace_id=root.trace_id)
        held.__enter__()
    with pytest.warns(spanguard.OrphanedSpanWarning, match="left"):
        end(root)
    assert spanguard.open_spans() == []
    assert current_span() is None
    spans = store.spans()
    assert (outcome(spans["root"]), outcome(spans["left"])) == ("ok", "orphaned")


@pytest.mark.filterwarnings("default::spanguard.SpanguardWarning")
def test_code_that_pushes_and_fails_under_a_fluent_root(store: Store) -> None:
    manager = spanguard.TraceStateManager()

    @mlflow.trace
    def root() -> None:
        manager.push_trace("pushed")
        manager.push_trace("pushed deeper")
        raise ValueError("before the pop")

    with pytest.warns(spanguard.OrphanedSpanWarning), pytest.raises(ValueError):
        root()
    assert manager.depth == 0
    spans = store.spans()
    assert [outcome(spans[name]) for name in ("pushed", "pushed deeper")] == ["orphaned"] * 2
    assert status(spans["root"]) == "ERROR"


def test_what_outlives_a_fluent_root_is_readable(store: Store) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def late(trace_id: str) -> None:
        with traced_span("late", trace_id=trace_id):
            begun.set()
            go_on.wait(10)

    with spanguard.traced_span("warm up"):
        pass
    with mlflow.start_span("root") as root:
        thread = threading.Thread(target=late, args=(root.trace_id,))
        thread.start()
        begun.wait(10)
        if not defers_roots():
            go_on.set()
            thread.join()
    go_on.set()
    thread.join()
    assert_all_ok(store, "root", "late")


def defers_roots() -> bool:
    from spanguard._mlflow import queue

    return queue.defers_roots()


def test_a_middleware_with_a_span_around_call_next(store: Store) -> None:
    pytest.importorskip("starlette")
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    @traced(strict=True)
    async def stream() -> AsyncIterator[str]:
        for number in range(3):
            await asyncio.sleep(0)
            yield str(number)

    async def endpoint(request: Any) -> Any:
        with traced_span("endpoint", strict=True):
            return StreamingResponse(stream())

    class Traced(BaseHTTPMiddleware):
        async def dispatch(self, request: Any, call_next: Any) -> Any:
            with traced_span("request", strict=True):
                return await call_next(request)

    app = Starlette(routes=[Route("/", endpoint)], middleware=[Middleware(Traced)])
    assert get(app) == b"012"
    spans = assert_all_ok(store, "request", "endpoint", "stream")
    assert spans["stream"].outputs == ["0", "1", "2"]


def get(app: Any) -> bytes:
    """Call an ASGI application as a server does, and return the body."""
    body = b""
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    scope |= {"asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"}

    asked = 0

    async def receive() -> Any:
        nonlocal asked
        asked += 1
        if asked > 1:
            await asyncio.Event().wait()  # a client that stays
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal body
        body += message.get("body", b"")

    asyncio.run(app(scope, receive, send))
    return body
