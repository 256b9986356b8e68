"""The middleware under a real server: uvicorn on loopback, in a thread or a process of its own."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import BackgroundTasks, FastAPI, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from mlflow.entities import Trace
from starlette.requests import Request
from websockets.sync.client import connect

import spanguard
from spanguard import current_span, traced, traced_span
from spanguard.asgi import TraceMiddleware
from spanguard.exceptions import OrphanedSpanWarning
from tests.store import Store, await_true, outcome, status


@pytest.fixture(autouse=True)
def stored_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/asgi.md advises for MLflow 3.10: else each span is stored in the event loop.

    SQLite lets no two threads write at once, and what waits for longer than 20 seconds is lost.
    """
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "true")


@contextmanager
def serving(app: Any) -> Iterator[int]:
    """Serve an application on a free port until the block ends; yield the port."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        await_true(lambda: server.started)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def get(port: int, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET", path, headers=given)
    response = connection.getresponse()
    try:
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, response.read()
    finally:
        connection.close()


async def fetch(port: int, path: str, request_id: str) -> int:
    """Get a path, one of many at a time; return the status, 0 for a response that broke off."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"GET {path} HTTP/1.1", "Host: here", "Connection: close"]
    lines += [f"X-Request-ID: {request_id}", "", ""]
    writer.write("\r\n".join(lines).encode())
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    is_whole = b"chunked" not in head or body.endswith(b"0\r\n\r\n")
    return int(head.split()[1]) if is_whole else 0


# -- many at a time ----------------------------------------------------------------------------


def shop() -> FastAPI:
    app = FastAPI()

    @app.get("/item/{number}")
    async def item(number: int) -> int:
        async with traced_span("look up"):
            await asyncio.sleep(0.001)
        return number

    @app.get("/blocking/{number}")
    def blocking(number: int) -> int:  # in a thread of Starlette's pool
        with traced_span("block"):
            return number

    @app.get("/missing/{number}")
    async def missing(number: int) -> None:
        with traced_span("search"):
            raise HTTPException(404)

    @app.get("/busy/{number}")
    async def busy(number: int) -> None:
        raise HTTPException(503)

    @app.get("/bug/{number}")
    async def bug(number: int) -> None:
        with traced_span("step"):
            raise ValueError(f"bug {number}")

    @app.get("/stream/{number}")
    async def stream(number: int) -> StreamingResponse:
        @traced
        async def parts() -> AsyncIterator[str]:
            for part in range(5):
                yield f"{number}.{part};"
                await asyncio.sleep(0)

        return StreamingResponse(parts())

    @app.get("/broken/{number}")
    async def broken(number: int) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "so far"
            raise RuntimeError("in the middle")

        return StreamingResponse(parts())

    app.add_middleware(TraceMiddleware)
    return app


# Path, the response's status, the trace's, the span in it and that one's status.
MIX: list[tuple[str, int, str, str | None, str | None]] = [
    ("item", 200, "OK", "look up", "OK"),
    ("blocking", 200, "OK", "block", "OK"),
    ("missing", 404, "OK", "search", "ERROR"),
    ("busy", 503, "ERROR", None, None),
    ("bug", 500, "ERROR", "step", "ERROR"),
    ("stream", 200, "OK", "parts", "OK"),
    ("broken", 0, "ERROR", None, None),
    ("nowhere", 404, "OK", None, None),
]


def test_200_requests_at_a_time_are_200_traces(store: Store) -> None:
    """Each with the right status, with its own spans and nobody else's; none is lost."""

    async def all_at_once(port: int) -> list[int]:
        calls = [fetch(port, f"/{MIX[n % len(MIX)][0]}/{n}", f"id-{n}") for n in range(200)]
        return await asyncio.gather(*calls)

    with serving(shop()) as port:
        statuses = asyncio.run(all_at_once(port))
    assert statuses == [MIX[n % len(MIX)][1] for n in range(200)]
    traces = store.traces()
    assert len(traces) == 200
    assert store.rows() == 200
    by_id = {trace.info.client_request_id: trace for trace in traces}
    for n in range(200):
        path, _, state, inner, inner_status = MIX[n % len(MIX)]
        trace = by_id[f"id-{n}"]
        assert trace.info.state.value == state, path
        request, *inside = sorted(trace.data.spans, key=lambda span: span.start_time_ns)
        assert request.get_attribute("url.path") == f"/{path}/{n}"
        assert request.name == ("GET" if path == "nowhere" else f"GET /{path}/{{number}}")
        assert [span.name for span in inside] == ([inner] if inner else [])
        assert [status(span) for span in inside] == ([inner_status] if inner_status else [])
        assert {span.parent_id for span in inside} <= {request.span_id}
        if path in ("bug", "broken"):
            assert request.get_attribute("error_type") in ("ValueError", "RuntimeError")
    assert spanguard.open_spans() == []


# -- one at a time -----------------------------------------------------------------------------


def test_requests_on_one_connection_are_a_trace_each(store: Store) -> None:
    ambient: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            ambient.append(current_span())
            await traced_app(scope, receive, send)
            ambient.append(current_span())

    @traced
    async def inside() -> None:
        pass

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await inside()
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    traced_app = TraceMiddleware(answer)
    with serving(app) as port:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        for path in ("/first", "/second"):
            connection.request("GET", path)
            assert connection.getresponse().read() == b"ok"
        connection.close()
    assert ambient == [None] * 4
    first, second = store.traces()
    assert [trace.info.tags["mlflow.traceName"] for trace in (first, second)] == [
        "GET /first",
        "GET /second",
    ]
    assert [len(trace.data.spans) for trace in (first, second)] == [2, 2]


def test_a_streamed_response_that_the_client_cuts_off(store: Store) -> None:
    app = FastAPI()

    @traced
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1000
            with traced_span("wait"):
                await asyncio.sleep(0.001)

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(endless())

    app.add_middleware(TraceMiddleware)
    with serving(app) as port:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/stream")
        response = connection.getresponse()
        assert len(response.read(3000)) == 3000
        open_now = [span.name for span in spanguard.open_spans()]
        assert open_now[:2] == ["GET /stream", "endless"]
        response.close()
        connection.close()
        await_true(lambda: not spanguard.open_spans())
    spans = store.trace().data.spans
    by_name = {span.name: span for span in spans}
    request = by_name["GET /stream"]
    assert (status(request), outcome(request)) == ("OK", "closed_early")
    # Starlette cancels the generator where it awaits, and drops it where it does not.
    assert outcome(by_name["endless"]) in ("cancelled", "closed_early")
    assert request.get_attribute("http.response.status_code") == 200
    assert by_name["endless"].parent_id == request.span_id


def test_an_upload_that_the_client_breaks_off(store: Store) -> None:
    """Starlette raises ClientDisconnect, which is no error of the service."""
    app, begun = FastAPI(), threading.Event()

    async def read(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await Request(scope, receive).body()

    app.mount("/raw", read)
    app.add_middleware(TraceMiddleware)
    with serving(app) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"POST /raw/7 HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\npart")
            assert begun.wait(60)
        await_true(lambda: not spanguard.open_spans())
    (request,) = store.trace().data.spans
    assert (request.name, status(request), outcome(request)) == (
        "POST /raw/7",
        "OK",
        "closed_early",
    )


def test_an_unhandled_exception_has_our_headers_where_all_is_wrapped(store: Store) -> None:
    with serving(TraceMiddleware(shop())) as port:
        code, headers, _ = get(port, "/bug/1", x_request_id="abc")
    assert (code, headers["x-request-id"]) == (500, "abc")
    request = next(span for span in store.trace().data.spans if span.parent_id is None)
    assert request.get_attribute("http.response.status_code") == 500
    assert headers["traceparent"].split("-")[2] == request.span_id
    assert outcome(request) == "error"


def test_background_tasks_belong_to_the_request(store: Store) -> None:
    app, may_end = FastAPI(), threading.Event()

    def mail() -> None:
        with traced_span("mail"):
            assert may_end.wait(60)

    @app.get("/order")
    async def order(tasks: BackgroundTasks) -> str:
        tasks.add_task(mail)
        return "ordered"

    app.add_middleware(TraceMiddleware)
    with serving(app) as port:
        assert get(port, "/order")[0] == 200  # the response does not wait for the task
        may_end.set()
    spans = store.spans()
    assert spans["mail"].parent_id == spans["GET /order"].span_id
    assert (outcome(spans["mail"]), outcome(spans["GET /order"])) == ("ok", "ok")
    assert spans["GET /order"].end_time_ns <= spans["mail"].start_time_ns


def test_a_leak_in_an_endpoint_is_closed_with_its_line(store: Store) -> None:
    app = FastAPI()

    @app.get("/leak")
    async def leak() -> str:
        traced_span("leak").__enter__()
        return "fine"

    app.add_middleware(TraceMiddleware)
    with pytest.warns(OrphanedSpanWarning, match="test_asgi_server.py"):
        with serving(app) as port:
            assert get(port, "/leak")[0] == 200
    assert outcome(store.spans()["leak"]) in ("orphaned", "abandoned")


def test_a_websocket_is_one_trace(store: Store) -> None:
    app = FastAPI()

    @app.websocket("/chat/{room}")
    async def chat(socket: WebSocket, room: str) -> None:
        await socket.accept()
        while True:
            with traced_span("answer"):
                await socket.send_text(await socket.receive_text() + room)

    app.add_middleware(TraceMiddleware)
    with serving(app) as port:
        with connect(f"ws://127.0.0.1:{port}/chat/7") as client:
            client.send("hello ")
            assert client.recv() == "hello 7"
            assert client.response is not None
            assert len(client.response.headers["traceparent"]) == 55
            client.close(1001, "leaving")
        await_true(lambda: not spanguard.open_spans())
    trace = store.trace()
    request = next(span for span in trace.data.spans if span.parent_id is None)
    assert (request.name, status(request)) == ("WEBSOCKET /chat/{room}", "OK")
    assert outcome(request) == "ok"
    assert request.get_attribute("websocket.close_code") == 1001
    assert len(trace.data.spans) == 3  # the second answer waited for a message that never came


def test_a_server_that_does_not_wait_cancels_what_is_in_flight(store: Store) -> None:
    app, begun = FastAPI(), threading.Event()

    @app.get("/slow")
    async def slow() -> None:
        with traced_span("step"):
            begun.set()
            await asyncio.Event().wait()

    app.add_middleware(TraceMiddleware)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=0)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
            assert begun.wait(60)
            server.should_exit = True
            thread.join(60)
    spans = store.spans()
    assert {name: (status(s), outcome(s)) for name, s in spans.items()} == {
        "GET /slow": ("ERROR", "cancelled"),
        "step": ("ERROR", "cancelled"),
    }


# -- two services ------------------------------------------------------------------------------

STOCK = """
import socket, sys
import uvicorn
from fastapi import FastAPI
from spanguard import traced_span
from spanguard.asgi import TraceMiddleware

app = FastAPI()

@app.get("/stock/{item}")
def stock(item: str) -> int:
    with traced_span("count"):
        return 3

app.add_middleware(TraceMiddleware)
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="critical")).run(sockets=[listener])
"""


@contextmanager
def stock_service(store: Store) -> Iterator[int]:
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": store.uri,
        "PYTHONPATH": str(Path(spanguard.__file__).parent.parent),
    }
    with subprocess.Popen(
        [sys.executable, "-c", STOCK], env=environment, stdout=subprocess.PIPE, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()
            process.wait(60)


def test_a_call_from_service_to_service_is_one_trace(store: Store) -> None:
    """Two processes, one store: each calls its part by the other's traceparent."""
    app = FastAPI()

    @app.get("/order/{item}")
    def order(item: str) -> str:
        with traced_span("ask stock"):
            return get(stock_port, f"/stock/{item}", **spanguard.capture().to_headers())[2].decode()

    app.add_middleware(TraceMiddleware)
    with stock_service(store) as stock_port, serving(app) as port:
        bodies = {get(port, f"/order/{n}", x_request_id=f"order-{n}")[2] for n in range(5)}
        assert bodies == {b'"3"'}
        # The other service hands its spans over on its own, without being asked or ended.
        await_true(lambda: [len(trace.data.spans) for trace in store.traces()] == [4] * 5)
    for trace in store.traces():
        assert trace.info.state.value == "OK"
        assert parents(trace) == {
            "GET /order/{item}": None,
            "ask stock": "GET /order/{item}",
            "GET /stock/{item}": "ask stock",
            "count": "GET /stock/{item}",
        }
    assert store.rows() == 5


def parents(trace: Trace) -> dict[str, str | None]:
    names = {span.span_id: span.name for span in trace.data.spans}
    return {span.name: names.get(span.parent_id or "") for span in trace.data.spans}
