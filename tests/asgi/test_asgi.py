"""How a request ends, what it opens, and what the middleware leaves alone.

The tests call it as a server does; what only a real server shows is in test_asgi_server.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracing.trace_manager import InMemoryTraceManager
from starlette.requests import ClientDisconnect

import spanguard
from spanguard import current_span, traced_span
from spanguard._base import findings
from spanguard._mlflow import remote
from spanguard.asgi import TraceMiddleware
from spanguard.asgi._exchange import Exchange
from spanguard.exceptions import OrphanedSpanWarning
from tests.asgi.wire import (
    REMOTE,
    Wire,
    answering,
    call,
    ended,
    fastapi_app,
    request,
    requests,
    scope,
)
from tests.store import Store, outcome, status

DISCONNECT = {"type": "http.disconnect"}

# -- how a request ends ------------------------------------------------------------------------


def test_a_status_of_500_and_above_is_an_error(store: Store) -> None:
    codes = [200, 204, 302, 400, 401, 404, 422, 499, 500, 503, 599]
    for code in codes:
        call(answering(code))
    assert [span.get_attribute("http.response.status_code") for span in requests(store)] == codes
    states = {trace.data.spans[0].span_id: trace.info.state.value for trace in store.traces()}
    for code, span in zip(codes, requests(store), strict=True):
        expected = ("ERROR", "error", f"HTTP {code}") if code >= 500 else ("OK", "ok", "")
        assert (*ended(span), span.status.description) == expected
        assert states[span.span_id] == expected[0]


class Refused(BaseException):
    pass


@pytest.mark.parametrize("kind", [ValueError, Refused])
def test_an_exception_passes_through_as_it_is(store: Store, kind: type[BaseException]) -> None:
    for is_begun in (False, True):
        thrown = kind("boom")

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if is_begun:  # noqa: B023
                await send({"type": "http.response.start", "status": 200, "headers": []})
            raise thrown  # noqa: B023

        with pytest.raises(kind) as caught:
            call(app)
        assert caught.value is thrown
    assert [ended(span) for span in requests(store)] == [("ERROR", "error")] * 2
    assert [span.get_attribute("error") for span in requests(store)] == ["boom"] * 2
    codes = [span.get_attribute("http.response.status_code") for span in requests(store)]
    assert codes == [None, 200]
    assert current_span() is None


def test_a_cancelled_request_is_cancelled(store: Store) -> None:
    async def run() -> None:
        inside = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            inside.set()
            await asyncio.Event().wait()

        wire = Wire()
        task = asyncio.create_task(TraceMiddleware(app)(scope(), wire.receive, wire.send))
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert ended(request(store)) == ("ERROR", "cancelled")


@pytest.mark.parametrize(
    ("sends", "why"),
    [
        ([], "no response was sent"),
        (["http.response.start"], "the response was not completed"),
        (["http.response.start", "http.response.body"], "the response was not completed"),
    ],
)
def test_a_response_that_is_not_whole_is_an_error(store: Store, sends: Any, why: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for kind in sends:
            await send({"type": kind, "status": 200, "body": b"x", "more_body": True})

    call(app)
    assert ended(request(store)) == ("ERROR", "error")
    assert request(store).status.description == why


def leaving(raises: BaseException | None, code: int = 200) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": code, "headers": []})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        if raises is not None:
            raise raises

    return app


def test_a_client_that_leaves_before_the_end_is_no_error(store: Store) -> None:
    """And neither is what says no more than that. Anything else is."""
    cases: list[tuple[BaseException | None, int, tuple[str, str]]] = [
        (None, 200, ("OK", "closed_early")),
        (ClientDisconnect(), 200, ("OK", "closed_early")),
        (asyncio.CancelledError(), 200, ("OK", "closed_early")),
        (ValueError("a bug"), 200, ("ERROR", "error")),
        (OSError("disk full"), 200, ("ERROR", "error")),
        (None, 503, ("ERROR", "error")),
        (ClientDisconnect(), 503, ("ERROR", "error")),
    ]
    for raises, code, _ in cases:
        with contextlib.ExitStack() as stack:
            if raises is not None:
                stack.enter_context(pytest.raises(type(raises)))
            call(leaving(raises, code), None, DISCONNECT)
    assert [ended(span) for span in requests(store)] == [expected for _, _, expected in cases]


def test_a_client_that_leaves_after_the_end_has_not_left_early(store: Store) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answering()(scope, receive, send)
        await receive()

    call(app, None, DISCONNECT)
    assert outcome(request(store)) == "ok"


def test_a_send_that_fails_says_that_the_client_has_left(store: Store) -> None:
    gone = ConnectionResetError("gone")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise gone

    with pytest.raises(ConnectionResetError) as caught:
        asyncio.run(TraceMiddleware(answering())(scope(), Wire().receive, send))
    assert caught.value is gone
    assert ended(request(store)) == ("OK", "closed_early")


def test_an_exception_of_the_network_that_is_not_the_clients_is_an_error(store: Store) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ConnectionResetError("the database")

    with pytest.raises(ConnectionResetError):
        call(app)
    assert ended(request(store)) == ("ERROR", "error")


def test_a_file_that_the_server_sends_completes_the_response(store: Store) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.pathsend", "path": "/file"})

    call(app)
    assert ended(request(store)) == ("OK", "ok")


def test_background_work_is_in_the_trace_and_not_in_the_latency(store: Store) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answering()(scope, receive, send)
        with traced_span("background"):
            pass

    call(app)
    spans = store.spans()
    assert spans["background"].parent_id == spans["GET /"].span_id
    assert spans["GET /"].end_time_ns <= spans["background"].start_time_ns


def test_background_work_that_fails_is_an_error_of_the_request(store: Store) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answering()(scope, receive, send)
        raise ValueError("in the background")

    with pytest.raises(ValueError):
        call(app)
    assert ended(request(store)) == ("ERROR", "error")


# -- what a request opens ----------------------------------------------------------------------


async def leaky(scope: Any, receive: Any, send: Any) -> None:
    parent = mlflow.get_current_active_span()
    mlflow.start_span_no_context("leak", parent_span=parent)
    await answering()(scope, receive, send)


def test_what_an_endpoint_leaves_open_is_closed_with_its_line(store: Store) -> None:
    with pytest.warns(OrphanedSpanWarning, match=r"'leak'.*test_asgi\.py"):
        call(leaky)
    spans = store.spans()
    assert ended(spans["leak"]) == ("ERROR", "orphaned")
    assert status(spans["GET /"]) == "OK"


def test_strict_mode_raises_after_the_response(store: Store) -> None:
    wire = Wire()
    with pytest.raises(spanguard.OrphanedSpanError):
        asyncio.run(TraceMiddleware(leaky, strict=True)(scope(), wire.receive, wire.send))
    sent = [message["type"] for message in wire.sent]
    assert sent == ["http.response.start", "http.response.body"]
    assert len(store.trace().data.spans) == 2


def test_a_request_of_an_in_process_client_nests_under_its_span(store: Store) -> None:
    async def run() -> None:
        wire = Wire()
        with traced_span("test") as test:
            await TraceMiddleware(answering())(scope(), wire.receive, wire.send)
            assert current_span() is test

    asyncio.run(run())
    spans = store.spans()
    assert spans["GET /"].parent_id == spans["test"].span_id
    assert store.trace().info.client_request_id is None  # the trace is not the request's


def test_a_second_middleware_adds_no_second_span(store: Store) -> None:
    wire = call(TraceMiddleware(TraceMiddleware(answering())))
    assert len(store.trace().data.spans) == 1
    assert [name for name, _ in wire.sent[0]["headers"]] == [b"traceparent", b"x-request-id"]


def test_an_endpoint_may_end_the_span_itself(store: Store) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        span = current_span()
        assert span is not None
        span.end(outputs="early")
        await answering()(scope, receive, send)

    with pytest.warns(spanguard.SpanguardWarning, match="already ended"):
        call(app)
    assert request(store).outputs == "early"


def exchanges() -> int:
    gc.collect()
    return sum(isinstance(found, Exchange) for found in gc.get_objects())


def test_many_requests_leave_nothing_behind(store: Store) -> None:
    before = exchanges()

    async def run() -> None:
        middleware = TraceMiddleware(fastapi_app())
        for number in range(30):
            headers = [(b"traceparent", REMOTE.encode())] if number % 3 == 0 else []
            wire = Wire()
            await middleware(scope("/items/7", headers=headers), wire.receive, wire.send)

    asyncio.run(run())
    spanguard.flush(60)
    assert not remote.remote_holds
    assert exchanges() <= before
    assert spanguard.open_spans() == []
    assert len(InMemoryTraceManager.get_instance()._traces) == 0
    assert store.rows() == 21


# -- what is not traced ------------------------------------------------------------------------


def test_spanguard_does_without_the_middleware() -> None:
    check = "import sys, spanguard; sys.exit('spanguard.asgi' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(spanguard.__file__).parent.parent)}
    assert subprocess.run([sys.executable, "-c", check], env=environment).returncode == 0


@pytest.mark.parametrize("kind", ["lifespan", "anything"])
def test_other_scopes_pass_untouched(store: Store, kind: str) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend((scope, receive, send, dict(scope)))

    given = {"type": kind, "state": {}}
    wire = Wire()
    receive, send = wire.receive, wire.send
    asyncio.run(TraceMiddleware(app)(given, receive, send))
    assert seen[0] is given
    assert seen[1] is receive
    assert seen[2] is send
    assert seen[3] == {"type": kind, "state": {}}
    assert store.rows() == 0


def test_excluded_paths_are_not_traced(store: Store) -> None:
    cases: list[tuple[Any, str]] = [
        ("/health", "/health"),
        (["/health", "/static/*"], "/static/a/b.js"),
        (["/health", "/static/*"], "/health/deep"),
        ((), "/health"),
    ]
    found = [call(answering(), scope(path), exclude=exclude).headers for exclude, path in cases]
    assert found[:2] == [{}, {}]
    assert [span.get_attribute("url.path") for span in requests(store)] == [
        "/health/deep",
        "/health",
    ]


def test_tracing_that_is_off_changes_nothing_of_a_request(store: Store) -> None:
    mlflow.tracing.disable()
    try:
        wire = call(fastapi_app(), scope("/items/7"))
    finally:
        mlflow.tracing.enable()
    assert wire.sent[0]["status"] == 200
    assert "x-request-id" in wire.headers
    assert "traceparent" not in wire.headers
    assert store.rows() == 0


def test_a_message_that_is_not_by_the_protocol_is_the_servers_affair(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "reraise_internal", False)
    for message in (
        {"type": "http.response.start"},
        {"type": "http.response.start", "status": "ok"},
        {"type": "http.response.start", "status": 200, "headers": 7},
        {"type": "http.response.body", "body": 7},
        {},
    ):

        async def app(scope: Any, receive: Any, send: Any) -> None:
            assert await receive() is message  # noqa: B023
            await send(message)  # noqa: B023

        wire = call(app, None, message, capture_bodies=True)
        assert len(wire.sent) == 1
        assert wire.sent[0] is message
    assert store.rows() == 5


def test_a_scope_that_is_not_by_the_protocol_is_the_applications_affair(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "reraise_internal", False)
    called: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope)

    scopes: list[Any] = [
        {},
        {"type": []},
        {"type": "http"},
        {"type": "http", "path": 7, "method": 7, "path_params": 7, "endpoint": 7},
        {"type": "http", "headers": 7},
        {"type": "http", "headers": [7]},
    ]
    for given in scopes:
        wire = Wire()
        asyncio.run(TraceMiddleware(app, capture_headers=["a"])(given, wire.receive, wire.send))
    assert [a is b for a, b in zip(called, scopes, strict=True)] == [True] * len(scopes)
    assert (spanguard.open_spans(), current_span()) == ([], None)


def test_a_store_of_an_unknown_kind_breaks_no_request(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "reraise_internal", False)
    mlflow.set_tracking_uri("nonsense://nowhere")
    try:
        for _ in range(3):
            assert call(fastapi_app(), scope("/items/7")).sent[0]["status"] == 200
    finally:
        mlflow.set_tracking_uri(store.uri)
    assert (spanguard.open_spans(), current_span()) == ([], None)


# -- a store that does not answer --------------------------------------------------------------

SILENT_STORE = """
import asyncio, os, socket, sys
import mlflow
from spanguard import traced_span
from spanguard._process import exit as _exit
from spanguard.asgi import TraceMiddleware

silent = socket.create_server(("127.0.0.1", 0))  # takes connections, and never answers
mlflow.set_tracking_uri(f"http://127.0.0.1:{silent.getsockname()[1]}")

async def app(scope, receive, send):
    with traced_span("inside"):
        await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})

async def send(message):
    pass

async def main():
    for headers in ([], [(b"traceparent", sys.argv[1].encode())]) * 20:
        await TraceMiddleware(app)(
            {"type": "http", "method": "GET", "path": "/", "headers": headers}, None, send
        )

asyncio.run(main())
assert not _exit.is_behind, "it was waited for, and the time was up"
print("served")
sys.stdout.flush()
os._exit(0)
"""


def test_no_request_waits_for_a_store_that_does_not_answer() -> None:
    environment = {
        **os.environ,
        "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "true",  # not the default of MLflow 3.10
        "PYTHONPATH": str(Path(spanguard.__file__).parent.parent),
    }
    finished = subprocess.run(
        [sys.executable, "-c", SILENT_STORE, REMOTE],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert (finished.stdout, finished.returncode) == ("served\n", 0), finished.stderr
