"""The middleware, called as a server calls it, and applications to call: all else is real."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, FastAPI
from mlflow.entities import Span
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from spanguard.asgi import TraceMiddleware
from tests.store import Store, outcome, status

REMOTE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
Message = dict[str, Any]


def scope(path: str = "/", kind: str = "http", **more: Any) -> dict[str, Any]:
    found = {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": ("203.0.113.7", 50123),
        "server": ("127.0.0.1", 8000),
    }
    if kind == "http":
        found["method"] = "GET"
    return {**found, **more}


class Wire:
    """The server's side: what it gives to receive, and what was sent."""

    def __init__(self, *incoming: Message) -> None:
        self.incoming = list(incoming) or [{"type": "http.request"}]
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        if not self.incoming:
            await asyncio.Event().wait()
        return self.incoming.pop(0)

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def headers(self) -> dict[str, str]:
        start = next(m for m in self.sent if "headers" in m)
        return {name.decode().lower(): value.decode() for name, value in start["headers"]}


def call(app: Any, given: dict[str, Any] | None = None, *incoming: Message, **options: Any) -> Wire:
    """Call an application through the middleware; return what the server saw."""
    wire = Wire(*incoming)
    asyncio.run(TraceMiddleware(app, **options)(given or scope(), wire.receive, wire.send))
    return wire


def answering(code: int = 200, headers: Any = (), body: bytes = b"x") -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": code, "headers": list(headers)})
        await send({"type": "http.response.body", "body": body})

    return app


def requests(store: Store) -> list[Span]:
    """Return the spans of the requests, oldest first."""
    found = [s for trace in store.traces() for s in trace.data.spans if s.parent_id is None]
    return sorted(found, key=lambda span: span.start_time_ns)


def request(store: Store) -> Span:
    (span,) = requests(store)
    return span


def ended(span: Span) -> tuple[str, str]:
    return status(span), outcome(span)


async def endpoint(request: Request) -> PlainTextResponse:
    return PlainTextResponse("x")


def fastapi_app() -> FastAPI:
    app, router, deeper, mounted = FastAPI(), APIRouter(prefix="/v1"), APIRouter(), FastAPI()

    @app.get("/items/{item_id}")
    async def item(item_id: int) -> int:
        return item_id

    @router.get("/things/{thing}")
    async def thing(thing: str) -> str:
        return thing

    @deeper.get("/{thing}/z")
    async def deep(org: str, thing: str) -> str:
        return org + thing

    @mounted.get("/q/{q}")
    async def q(q: str) -> str:
        return q

    router.include_router(deeper, prefix="/orgs/{org}")
    app.include_router(router, prefix="/api")
    app.mount("/sub/{tenant}", Starlette(routes=[Route("/a/{x:int}", endpoint)]))
    app.mount("/fast", mounted)
    app.mount("/static", StaticFiles(directory="."))
    return app


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    headers = [(b"set-cookie", b"id=s3cr3t")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body[:1], "more_body": True})
    await send({"type": "http.response.body", "body": body[1:]})


def previews(store: Store) -> list[tuple[str | None, str | None]]:
    """Return what the list of traces shows of each, oldest first."""
    return [(t.info.request_preview, t.info.response_preview) for t in store.traces()]
