"""The middleware, called as a server calls it: scopes and messages by hand, all else real.

What only a real server shows is in test_asgi_server.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from fastapi import APIRouter, FastAPI
from mlflow.entities import Span
from mlflow.tracing.trace_manager import InMemoryTraceManager
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

import spanguard
from spanguard import current_span, traced_span
from spanguard._base import findings
from spanguard._mlflow import remote
from spanguard.asgi import TraceMiddleware
from spanguard.asgi._exchange import Exchange
from spanguard.asgi._messages import MAX_BODY_BYTES
from spanguard.exceptions import InvalidSpanArgumentWarning, OrphanedSpanWarning
from tests.store import Store, outcome, own_attributes, status

REMOTE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
REMOTE_TRACE = "tr-0af7651916cd43dd8448eb211c80319c"

Message = dict[str, Any]

DISCONNECT = {"type": "http.disconnect"}


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


def stored_bytes(store: Store) -> bytes:
    spanguard.flush(60)
    return b"".join(path.read_bytes() for path in store.path.parent.glob("mlflow.db*"))


# -- names -------------------------------------------------------------------------------------


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


def starlette_app() -> Starlette:
    deeper = Starlette(routes=[Route("/a/{x:int}", endpoint)])
    mounted = Mount("/m/{k}", routes=[Route("/n/{o}", endpoint), Mount("/deeper", app=deeper)])
    return Starlette(
        routes=[
            Route("/items/{item}", endpoint),
            Route("/p/{path:path}/end", endpoint),
            mounted,
            Host("other.test", app=Router([Route("/h/{h}", endpoint)])),
            Mount("/", app=StaticFiles(directory=".")),
        ]
    )


NAMES = {
    fastapi_app: [
        ("GET", "/items/7", "GET /items/{item_id}"),
        ("GET", "/items/no-number", "GET /items/{item_id}"),
        ("POST", "/items/7", "POST /items/{item_id}"),
        ("GET", "/items/7/", "GET"),
        ("GET", "/api/v1/things/3", "GET /api/v1/things/{thing}"),
        ("GET", "/api/v1/orgs/o/3/z", "GET /api/v1/orgs/{org}/{thing}/z"),
        ("GET", "/api/v1/orgs/3/3/z", "GET /api/v1/orgs/{org}/{thing}/z"),
        ("GET", "/sub/acme/a/3", "GET /sub/{tenant}/a/{x}"),
        ("GET", "/sub/acme/none/3", "GET /sub/{tenant}/{path}"),
        ("GET", "/fast/q/1", "GET /fast/q/{q}"),
        ("GET", "/static/mlflow.db", "GET /static/{path}"),
        ("GET", "/docs", "GET /docs"),
        ("GET", "/wp-admin", "GET"),
        ("BREW", "/wp-admin", "HTTP"),
    ],
    starlette_app: [
        ("GET", "/items/7", "GET /items/{item}"),
        ("GET", "/p/a/b/c/end", "GET /p/{path}/end"),
        ("GET", "/m/1/n/2", "GET /m/{k}/n/{o}"),
        ("GET", "/m/1/deeper/a/7", "GET /m/{k}/deeper/a/{x}"),
        ("GET", "/m/1/deeper/a/007", "GET"),  # 7 is not found in it
        ("GET", "/m/1/none", "GET /m/{k}/{path}"),
        ("GET", "/wp-admin", "GET /{path}"),
    ],
}


@pytest.mark.parametrize("make", NAMES, ids=lambda make: make.__name__)
def test_a_trace_is_named_by_method_and_route(store: Store, make: Callable[[], Any]) -> None:
    """What strangers try does not become as many names."""
    app = make()
    for method, path, _ in NAMES[make]:
        call(app, scope(path, method=method))
    found = {}
    for trace in store.traces():
        (span,) = trace.data.spans
        assert trace.info.tags["mlflow.traceName"] == span.name
        assert (span.get_attribute("http.route") or "") == span.name.partition(" ")[2]
        asked = span.get_attribute("http.request.method"), span.get_attribute("url.path")
        found[asked] = span.name
    assert found == {(method, path): name for method, path, name in NAMES[make]}


def test_without_a_router_a_trace_is_named_by_its_path(store: Store) -> None:
    """Unless nothing was found there: it may be anything then."""
    for code, path in ((200, "/plain"), (503, "/plain"), (404, "/wp-admin")):
        call(answering(code), scope(path))
    assert [span.name for span in requests(store)] == ["GET /plain", "GET /plain", "GET"]
    assert trace_names(store) == {"GET /plain", "GET"}


def trace_names(store: Store) -> set[str]:
    return {trace.info.tags["mlflow.traceName"] for trace in store.traces()}


def test_a_root_path_is_not_part_of_the_route(store: Store) -> None:
    call(fastapi_app(), scope("/gate/sub/acme/a/3", root_path="/gate"))
    assert request(store).name == "GET /sub/{tenant}/a/{x}"


def test_another_router_gives_names_by_a_function(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that gives none, or fails, leaves the usual one."""
    monkeypatch.setattr(findings, "reraise_internal", False)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["template"] = "/things/<id>"
        await answering()(scope, receive, send)

    for name in (
        lambda scope: f"call {scope['template']}",
        lambda scope: None,
        lambda scope: 1 / 0,
    ):
        call(app, scope("/things/7"), name=name)
    names = [span.name for span in requests(store)]
    assert names == ["call /things/<id>", "GET /things/7", "GET /things/7"]
    assert trace_names(store) == set(names)


def test_a_trace_that_was_renamed_keeps_its_name(store: Store) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        mlflow.update_current_trace(tags={"mlflow.traceName": "mine"})
        await fastapi_app()(scope, receive, send)

    call(app, scope("/items/7"))
    assert (request(store).name, trace_names(store)) == ("GET /items/{item_id}", {"mine"})


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


# -- traceparent -------------------------------------------------------------------------------


def continued(header: str | None, **options: Any) -> tuple[Wire, list[str]]:
    """Call with a traceparent; return what the server saw, and the trace in the endpoint."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        span = current_span()
        seen.append(span.trace_id if span is not None else "")
        with traced_span("inside"):
            pass
        await answering()(scope, receive, send)

    headers = [(b"traceparent", header.encode("latin-1"))] if header is not None else []
    return call(app, scope(headers=headers), **options), seen


def test_a_callers_trace_is_continued(store: Store) -> None:
    wire, seen = continued(REMOTE)
    assert seen == [REMOTE_TRACE]
    spans = store.spans()
    assert spans["GET /"].parent_id == "b7ad6b7169203331"
    assert spans["GET /"].trace_id == REMOTE_TRACE
    assert spans["inside"].parent_id == spans["GET /"].span_id
    assert wire.headers["traceparent"] == REMOTE.replace("b7ad6b7169203331", spans["GET /"].span_id)
    assert current_span() is None


def test_a_callers_trace_in_this_process_is_continued(store: Store) -> None:
    with traced_span("caller") as caller:
        header = spanguard.capture().to_headers()["traceparent"]
        # In a thread, as a server has it: nothing is ambient there.
        thread = asyncio.to_thread(continued, header)
        asyncio.run(thread)
    spans = store.spans()
    assert spans["GET /"].parent_id == caller.span_id
    assert spans["inside"].parent_id == spans["GET /"].span_id


def test_a_client_that_gives_back_a_traceparent_does_not_cost_the_trace(store: Store) -> None:
    """The trace has ended here, and waits in MLflow's buffer for its batch."""
    first, _ = continued(None)
    second, _ = continued(first.headers["traceparent"])
    trace = store.trace()
    assert trace.info.state.value == "OK"
    names = sorted(span.name for span in trace.data.spans)
    assert names == ["GET /", "GET /", "inside", "inside"]
    assert first.headers["traceparent"][:35] == second.headers["traceparent"][:35]


def test_a_traceparent_that_is_junk_is_ignored(store: Store) -> None:
    junk = [
        "",
        "junk",
        REMOTE.upper() + "-",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "\xe9" * 10,
        "0" * 60_000,
    ]
    with pytest.warns(InvalidSpanArgumentWarning, match="traceparent"):
        for header in junk:
            continued(header)
    assert [span.name for span in requests(store)] == ["GET /"] * len(junk)


def test_a_stranger_is_not_trusted_where_that_is_said(store: Store) -> None:
    wire, seen = continued(REMOTE, trust_traceparent=False)
    assert seen == [store.trace().info.trace_id] != [REMOTE_TRACE]
    assert wire.headers["traceparent"][3:35] != REMOTE[3:35]


def test_a_callers_decision_not_to_record_is_shared(store: Store) -> None:
    wire, _ = continued(REMOTE[:-1] + "0")
    assert wire.sent[0]["status"] == 200
    assert wire.headers.get("traceparent", "-00").endswith("-00")  # MLflow 3.10 knows of none
    assert store.rows() == 0


def test_the_message_of_an_application_is_not_changed(store: Store) -> None:
    """And where it sets one of our headers itself, that one stays."""
    start = {"type": "http.response.start", "status": 200, "headers": [(b"Traceparent", b"mine")]}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start)
        await send({"type": "http.response.body"})

    wire = call(app)
    assert start["headers"] == [(b"Traceparent", b"mine")]
    assert [name for name, _ in wire.sent[0]["headers"]] == [b"Traceparent", b"x-request-id"]


# -- the request id ----------------------------------------------------------------------------


def identified(*given: str, **options: Any) -> Wire:
    headers = [(b"X-Request-ID", value.encode("latin-1")) for value in given]
    return call(answering(), scope(headers=headers), **options)


def recorded_ids(store: Store) -> tuple[Any, Any]:
    trace = store.trace()
    return trace.data.spans[0].get_attribute("http.request.id"), trace.info.client_request_id


def test_a_request_id_is_taken_recorded_and_given_out(store: Store) -> None:
    wire = identified(" order-7:retry/2 ")
    assert wire.headers["x-request-id"] == "order-7:retry/2"
    assert recorded_ids(store) == ("order-7:retry/2", "order-7:retry/2")
    query = "client_request_id = 'order-7:retry/2'"
    assert len(mlflow.search_traces(filter_string=query, return_type="list")) == 1


def test_a_request_id_that_is_missing_or_junk_is_replaced(store: Store) -> None:
    junk = ["", " ", "a b", "a'b", 'a"b', "<script>", "\xe9", "a\tb", "$(x)"]
    made = {identified(value).headers["x-request-id"] for value in junk}
    made.add(identified().headers["x-request-id"])
    assert len(made) == len(junk) + 1
    for value in made:
        assert (len(value), int(value, 16) > 0) == (32, True)
    assert {trace.info.client_request_id for trace in store.traces()} == made


def test_a_long_request_id_is_cut(store: Store) -> None:
    """And kept out of MLflow's column, which takes 50 characters on some databases."""
    assert identified("x" * 500).headers["x-request-id"] == "x" * 128
    assert recorded_ids(store) == ("x" * 128, None)


def test_an_applications_own_request_id_stays_and_is_recorded(store: Store) -> None:
    wire = call(answering(headers=[(b"X-Request-Id", b"mine")]))
    assert wire.sent[0]["headers"][:1] == [(b"X-Request-Id", b"mine")]
    assert [name for name, _ in wire.sent[0]["headers"]] == [b"X-Request-Id", b"traceparent"]
    assert recorded_ids(store) == ("mine", "mine")


def test_the_header_of_the_request_id_can_be_named(store: Store) -> None:
    headers = [(b"x-correlation-id", b"abc")]
    wire = call(answering(), scope(headers=headers), request_id_header="X-Correlation-ID")
    assert wire.headers["x-correlation-id"] == "abc"
    assert recorded_ids(store) == ("abc", "abc")


def test_without_a_header_there_is_no_request_id(store: Store) -> None:
    wire = identified("abc", request_id_header=None)
    assert "x-request-id" not in wire.headers
    assert recorded_ids(store) == (None, None)


# -- what is recorded --------------------------------------------------------------------------


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


def posted(body: bytes, **options: Any) -> Wire:
    headers = [(b"authorization", b"Bearer s3cr3t"), (b"x-api-key", b"s3cr3t")]
    given = scope("/login", headers=headers, query_string=b"token=s3cr3t")
    parts = [
        {"type": "http.request", "body": body[:3], "more_body": True},
        {"type": "http.request", "body": body[3:]},
    ]
    return call(echo, given, *parts, **options)


def test_nothing_of_headers_query_bodies_and_address_is_recorded(store: Store) -> None:
    posted(b'{"password": "s3cr3t"}')
    assert own_attributes(request(store)).keys() == {
        "http.request.method",
        "url.path",
        "http.request.id",
        "http.response.status_code",
    }
    assert (request(store).inputs, request(store).outputs) == (None, None)
    assert b"s3cr3t" not in stored_bytes(store)
    assert b"203.0.113.7" not in stored_bytes(store)


def test_headers_are_recorded_when_asked_for(store: Store) -> None:
    call(
        answering(headers=[(b"X-Cache", b"hit"), (b"x-other", b"o")]),
        scope(headers=[(b"Accept", b"a"), (b"accept", b"b"), (b"x-tenant", b"t")]),
        capture_headers=["accept", "X-Cache"],
    )
    found = own_attributes(request(store))
    assert {name: value for name, value in found.items() if ".header." in name} == {
        "http.request.header.accept": ["a", "b"],
        "http.response.header.x-cache": ["hit"],
    }


def test_bodies_are_recorded_when_asked_for(store: Store) -> None:
    limit = MAX_BODY_BYTES
    cases: list[tuple[bytes, Any]] = [
        (b'{"a": [1, "\xc3\xa9"]}', {"a": [1, "é"]}),  # MLflow reads JSON as such
        (b'{"a": ', '{"a": '),
        (b"\x89PNG", "[spanguard: 4 bytes that are no text]"),
        (b"x" * (limit - 1) + b"\xc3\xa9", "x" * (limit - 1) + "[spanguard: 1 bytes cut]"),
    ]
    for body, _ in cases:
        posted(body, capture_bodies=True)
    found = requests(store)
    assert [span.inputs for span in found] == [expected for _, expected in cases]
    assert [span.outputs for span in found] == [expected for _, expected in cases]


def test_inputs_and_outputs_of_the_endpoint_stay(store: Store) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        span = current_span()
        assert span is not None
        span.set_inputs("mine")
        span.set_outputs("mine too")
        await echo(scope, receive, send)

    call(app, None, {"type": "http.request", "body": b"{}"}, capture_bodies=True)
    assert (request(store).inputs, request(store).outputs) == ("mine", "mine too")


# -- what MLflow's list shows ------------------------------------------------------------------


def previews(store: Store) -> list[tuple[str | None, str | None]]:
    """Return what the list of traces shows of each, oldest first."""
    return [(t.info.request_preview, t.info.response_preview) for t in store.traces()]


@pytest.mark.parametrize("make", [fastapi_app, starlette_app])
def test_the_list_tells_requests_apart(store: Store, make: Callable[[], Any]) -> None:
    """A trace's previews are method and path, as they were asked for, and the status."""
    app = make()
    for method, path in (("GET", "/items/7"), ("GET", "/items/8"), ("POST", "/items/8")):
        call(app, scope(path, method=method))
    call(answering(204), scope("/ask", method="POST"))
    assert previews(store) == [
        ("GET /items/7", "200"),
        ("GET /items/8", "200"),
        ("POST /items/8", "405"),
        ("POST /ask", "204"),
    ]


def test_the_list_shows_how_a_request_failed(store: Store) -> None:
    """Without a status the response's preview is what went wrong."""

    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError("secret")

    async def say_nothing(scope: Any, receive: Any, send: Any) -> None:
        pass

    with pytest.raises(LookupError):
        call(fail)
    call(say_nothing)
    call(answering(503))
    assert previews(store) == [
        ("GET /", "LookupError"),
        ("GET /", "no response was sent"),
        ("GET /", "503"),
    ]


def test_the_list_shows_a_connection(store: Store) -> None:
    """A WebSocket's previews are its path and the code that closed it."""
    with contextlib.suppress(Exception):
        connect("/chat/7", hung_up(1001))
    assert previews(store) == [("WEBSOCKET /chat/7", "1001")]


def test_the_list_shows_inputs_and_outputs_where_there_are_any(store: Store) -> None:
    """What a request's span has for inputs and outputs says more than a path and a status."""
    call(echo, scope(method="POST"), {"type": "http.request", "body": b"hi"}, capture_bodies=True)
    assert previews(store) == [('"hi"', '"hi"')]


def test_the_list_shows_what_the_endpoint_says(store: Store) -> None:
    """Previews that the endpoint sets stay."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        mlflow.update_current_trace(request_preview="mine", response_preview="mine too")
        await answering()(scope, receive, send)

    call(app)
    assert previews(store) == [("mine", "mine too")]


def test_a_path_of_any_length_and_kind_is_shown(store: Store) -> None:
    """What strangers ask for neither costs the trace nor fills the list."""
    call(answering(404), scope("/" + "x" * 100_000))
    call(answering(404), {**scope(), "path": "/\ud800"})
    (long, _), (odd, _) = previews(store)
    assert long is not None and len(long) < 400
    assert odd == "GET /\\ud800"


# -- web sockets -------------------------------------------------------------------------------

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
