"""A web socket's connection is one span, however it closes."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from spanguard import traced_span
from spanguard.asgi import TraceMiddleware
from tests.asgi.wire import Message, Wire, call, ended, previews, request, requests, scope
from tests.store import Store, status

CONNECT = {"type": "websocket.connect"}


def hello(text: str = "hello") -> Message:
    return {"type": "websocket.receive", "text": text}


def hung_up(code: int | None) -> Message:
    return {"type": "websocket.disconnect", "code": code}


async def chat(websocket: WebSocket) -> None:
    await websocket.accept()
    while True:
        text = await websocket.receive_text()  # raises WebSocketDisconnect at the end
        with traced_span("answer", inputs=text):
            await websocket.send_text(text.upper())


async def close_with(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.close(int(websocket.path_params["code"]))


async def refuse(websocket: WebSocket) -> None:
    await websocket.close(1008)


async def deny(websocket: WebSocket) -> None:
    answer = JSONResponse({"error": "later"}, int(websocket.path_params["code"]))
    await websocket.send_denial_response(answer)


async def fail(websocket: WebSocket) -> None:
    await websocket.accept()
    raise ValueError("boom")


sockets = Starlette(
    routes=[
        WebSocketRoute("/chat/{room}", chat),
        WebSocketRoute("/close/{code}", close_with),
        WebSocketRoute("/refuse", refuse),
        WebSocketRoute("/deny/{code}", deny),
        WebSocketRoute("/fail", fail),
    ]
)


def connect(path: str, *incoming: Message, app: Any = sockets) -> Wire:
    extensions: dict[str, Any] = {"websocket.http.response": {}}
    given = scope(path, "websocket", scheme="ws", extensions=extensions)
    return call(app, given, CONNECT, *incoming)


def test_a_connection_is_one_span(store: Store) -> None:
    with contextlib.suppress(Exception):
        connect("/chat/7", hello("a"), hello("b"), hung_up(1000))
    trace = store.trace()
    span, *answers = sorted(trace.data.spans, key=lambda s: s.start_time_ns)
    assert trace.info.tags["mlflow.traceName"] == span.name == "WEBSOCKET /chat/{room}"
    assert [answer.inputs for answer in answers] == ["a", "b"]
    assert {answer.parent_id for answer in answers} == {span.span_id}
    assert span.get_attribute("http.route") == "/chat/{room}"
    assert span.get_attribute("websocket.close_code") == 1000


def test_how_the_client_closes(store: Store) -> None:
    cases = {1000: "ok", 1001: "ok", 1005: "ok", None: "ok", 1006: "closed_early"}
    cases |= {1012: "closed_early", 4000: "closed_early"}
    for code in cases:
        with contextlib.suppress(Exception):
            connect("/chat/7", hung_up(code))
    assert [ended(s) for s in requests(store)] == [("OK", expected) for expected in cases.values()]
    codes = [span.get_attribute("websocket.close_code") for span in requests(store)]
    assert codes == [code or 1005 for code in cases]


def test_how_the_application_closes(store: Store) -> None:
    for code in (1000, 1008, 4000, 1011):
        connect(f"/close/{code}")
    assert [status(span) for span in requests(store)] == ["OK", "OK", "OK", "ERROR"]
    codes = [span.get_attribute("websocket.close_code") for span in requests(store)]
    assert codes == [1000, 1008, 4000, 1011]


def test_a_connection_that_is_not_accepted(store: Store) -> None:
    for path in ("/refuse", "/deny/429", "/deny/503"):
        connect(path)
    assert [status(span) for span in requests(store)] == ["OK", "OK", "ERROR"]
    codes = [span.get_attribute("http.response.status_code") for span in requests(store)]
    assert codes == [403, 429, 503]


def test_an_exception_in_a_connection(store: Store) -> None:
    with pytest.raises(ValueError, match="boom"):
        connect("/fail")
    assert (status(request(store)), request(store).get_attribute("error")) == ("ERROR", "boom")


def test_an_exception_after_the_client_has_hung_up_is_an_error(store: Store) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
        raise ValueError("while cleaning up")

    with pytest.raises(ValueError):
        connect("/", hung_up(1000), app=app)
    assert status(request(store)) == "ERROR"


def test_a_handshake_without_an_answer_is_an_error(store: Store) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    connect("/", app=app)
    assert request(store).status.description == "no response was sent"


def test_a_connection_that_is_lost_while_sending(store: Store) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send"})

    async def send(message: Any) -> None:
        if message["type"] == "websocket.send":
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        asyncio.run(TraceMiddleware(app)(scope(kind="websocket"), Wire().receive, send))
    assert ended(request(store)) == ("OK", "closed_early")


def test_a_connection_that_the_application_leaves_to_the_server_to_close(store: Store) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})

    connect("/", app=app)
    assert ended(request(store)) == ("OK", "ok")


def test_a_handshake_has_our_headers(store: Store) -> None:
    assert connect("/close/1000").headers.keys() == {"traceparent", "x-request-id"}


def test_the_list_shows_a_connection(store: Store) -> None:
    """A WebSocket's previews are its path and the code that closed it."""
    with contextlib.suppress(Exception):
        connect("/chat/7", hung_up(1001))
    assert previews(store) == [("WEBSOCKET /chat/7", "1001")]
