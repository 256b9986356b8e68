"""A trace for each request: middleware for any ASGI application.

It depends on the protocol alone, and knows the routes of Starlette and FastAPI where they are used.
"""

from __future__ import annotations

import codecs
import functools
import inspect
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from spanguard import _mlflow
from spanguard._base.findings import contained, settle
from spanguard._base.site import CalledFunction, user_site
from spanguard._base.tasks import is_cancellation
from spanguard._lifecycle.opening import open_span
from spanguard._lifecycle.request import MAX_SPAN_NAME_CHARS, SpanRequest
from spanguard._propagation.carry import Attachment, TraceContext, capture
from spanguard._record import writing
from spanguard._record.outcome import CLOSED_EARLY, ERROR, OK, Outcome
from spanguard._record.payload import clean_text

__all__ = ["TraceMiddleware"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY_BYTES = 100_000
"""So much of each body is recorded, where bodies are recorded at all."""

MAX_REQUEST_ID_CHARS = 128

MAX_PREVIEW_CHARS = 250

# In the scope of a request that has its span: a middleware inside another adds no second one.
TRACED = "spanguard.traced"


class TraceMiddleware:
    """Record one trace for each HTTP request and WebSocket connection of an ASGI application.

    `app.add_middleware(TraceMiddleware)` in Starlette and FastAPI, added last; around any other,
    or for the response headers also on an unhandled exception, `app = TraceMiddleware(app)`.
    The span is ambient for the endpoint, for its thread where it is no coroutine, for the parts
    of a streamed body and for background tasks: what they open nests under it. It is named by
    method and route, `GET /items/{item_id}`, and ends with

    - ERROR for a status of 500 and above, an exception, or a response that was not completed;
    - OK and `closed_early` where the client left before the end;
    - ERROR and `cancelled` where the server cancelled the request;
    - OK else, also for a status of 400 to 499: the client's mistake is not the service's.

    In MLflow's list of traces, which shows no names, a request without inputs and outputs is shown
    as `GET /items/7` and `200`.

    A request's `traceparent` continues the caller's trace; a request id is taken from the request
    or made, recorded, and in traces that start here MLflow's `client_request_id`. The response
    has both headers, unless the application sets them. Junk in either is ignored. The span's time
    ends with the last part of the body; background tasks still belong to it, and the trace is
    stored after them.

    Exceptions pass through unchanged, and nothing of the tracing raises into a request. In strict
    mode, what a request left open raises `OrphanedSpanError` after the response. Lifespan and
    unknown scopes are not touched. No header, query, body or address is recorded unless asked for.

    Args:
        app: the application.
        name: gives a span's name, asked with the scope when the request ends; None stands for the
            usual one. For routers other than Starlette's and FastAPI's.
        exclude: paths that are not traced; `"/static/*"` for all below.
        trust_traceparent: whether to continue a caller's trace. Say False where strangers call:
            they could add spans to any trace whose id they know.
        request_id_header: the header of the request id; None for no request id.
        capture_headers: names of the headers to record, of requests and of responses.
        capture_bodies: whether to record the bodies of requests and responses as inputs and
            outputs, the first 100,000 bytes of each, unless the endpoint has set these.
        strict: overrides `strict()` and the environment for these spans.

    >>> import asyncio
    >>> from spanguard.asgi import TraceMiddleware
    >>> async def application(scope, receive, send):
    ...     await send({"type": "http.response.start", "status": 204, "headers": []})
    ...     await send({"type": "http.response.body"})
    >>> async def send(message):
    ...     print(message["type"], [name for name, _ in message.get("headers", [])])
    >>> asyncio.run(TraceMiddleware(application)({"type": "http", "path": "/"}, None, send))
    http.response.start [b'traceparent', b'x-request-id']
    http.response.body []
    """

    def __init__(
        self,
        app: Callable[[Any, Any, Any], Awaitable[None]],
        *,
        name: Callable[[Scope], str | None] | None = None,
        exclude: str | Collection[str] = (),
        trust_traceparent: bool = True,
        request_id_header: str | None = "x-request-id",
        capture_headers: Collection[str] = (),
        capture_bodies: bool = False,
        strict: bool | None = None,
    ) -> None:
        self.app = app
        self._exclude = _listed(exclude)
        self._trusts = trust_traceparent
        self._options = _Options(
            name=name,
            request_id_header=(request_id_header or "").lower(),
            headers=frozenset(header.lower() for header in _listed(capture_headers)),
            bodies=capture_bodies,
            strict=strict,
            called=CalledFunction(app) if inspect.isroutine(app) else None,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._traces(scope):
            await self.app(scope, receive, send)
            return
        with self._place_in_callers_trace(scope):
            exchange = self._begin(scope)
            if exchange is None:
                await self.app(scope, receive, send)
            else:
                await exchange.run(self.app, receive, send)

    def _traces(self, scope: Scope) -> bool:
        if scope.get("type") not in ("http", "websocket") or TRACED in scope:
            return False
        path = str(scope.get("path", ""))
        return not any(fnmatchcase(path, pattern) for pattern in self._exclude)

    def _place_in_callers_trace(self, scope: Scope) -> Attachment:
        headers = scope.get("headers", ()) if self._trusts else ()
        # Without waiting for the store: the server is still there in a moment, and has others to
        # serve.
        return Attachment(TraceContext.from_headers(headers), hand_over=_mlflow.hand_over)

    def _begin(self, scope: Scope) -> _Exchange | None:
        with contained("opening the span of a request"):
            scope[TRACED] = True
            return _Exchange(self._options, scope)
        return None


@dataclass(frozen=True)
class _Options:
    """What a middleware was told that holds for each of its spans."""

    name: Callable[[Scope], str | None] | None
    request_id_header: str  # "" for none
    headers: frozenset[str]
    bodies: bool
    strict: bool | None
    called: CalledFunction | None  # a framework's own __call__ tells nobody anything


def _listed(names: str | Collection[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


# -- one request -------------------------------------------------------------------------------

_METHODS = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"}
)
_BODY_PARTS = frozenset(
    {"http.response.body", "http.response.pathsend", "http.response.zerocopysend"}
)

# How frameworks say that the client has gone. By name: they are not imported here.
_GONE = frozenset({"ClientDisconnect", "WebSocketDisconnect"})

# WebSocket close codes: done, going away, none given; those say that nothing went wrong.
_NO_CODE = 1005
_NORMAL_CLOSE = frozenset({1000, 1001, _NO_CODE})
_SERVER_FAILED = 1011


class _Exchange:
    """One request or connection from its call to its return: its span, and what messages tell.

    Each message passes as it is, but for the headers that a response gets in addition. Whatever
    fails here is contained: the message goes its way.
    """

    def __init__(self, options: _Options, scope: Scope) -> None:
        self._options = options
        self._scope = scope
        self._is_socket = scope["type"] == "websocket"
        self._status: int | None = None
        self._is_complete = False  # all was said that is owed
        self._ended_ns: int | None = None
        self._left_as: Outcome | None = None  # what it means that the client left, if it did
        self._close_code: int | None = None
        self._send_error: OSError | None = None
        self._request_body = _Body()
        self._response_body = _Body()
        request_id = self._take_request_id()
        request = SpanRequest(
            (),
            name=f"{self._label} {scope.get('path', '')}",
            attributes=self._first_attributes(),
            strict=options.strict,
        )
        request.function = options.called
        self._opened = open_span(request)
        self._headers_out = capture().to_headers()  # of the span that was just opened
        if request_id:
            self._headers_out[options.request_id_header] = request_id
            self._identify(request_id)

    @property
    def _label(self) -> str:
        if self._is_socket:
            return "WEBSOCKET"
        method = str(self._scope.get("method", "")).upper()
        return method if method in _METHODS else "HTTP"  # what strangers send is no name

    def _take_request_id(self) -> str:
        header = self._options.request_id_header
        if not header:
            return ""
        given = map(_readable_id, _values(self._scope.get("headers", ()), header))
        return next(filter(None, given), None) or uuid.uuid4().hex

    def _first_attributes(self) -> dict[str, Any]:
        scope = self._scope
        found: dict[str, Any] = {"url.path": scope.get("path", "")}
        if not self._is_socket:
            found["http.request.method"] = clean_text(scope.get("method", ""), 32)
        return found | self._captured("http.request.header", scope.get("headers", ()))

    def _captured(self, prefix: str, headers: Iterable[Any]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, value in headers if self._options.headers else ():
            lower = _text(name).lower()
            if lower in self._options.headers:
                found.setdefault(f"{prefix}.{lower}", []).append(_text(value))
        return found

    def _identify(self, request_id: str) -> None:
        """Record the request id; with a root, MLflow knows the trace by it too."""
        self._write({"http.request.id": request_id})
        if self._opened.is_root and len(request_id) <= _mlflow.MAX_CLIENT_REQUEST_ID_CHARS:
            _mlflow.set_client_request_id(self._opened.live.trace_id, request_id)

    # -- messages

    async def run(self, app: Any, receive: Receive, send: Send) -> None:
        """Call the application; end the span as that ends."""
        try:
            await app(self._scope, self._receiving(receive), self._sending(send))
        except BaseException as error:
            self._finish(error)
            raise
        self._finish(None)

    def _receiving(self, receive: Receive) -> Receive:
        async def traced_receive() -> Message:
            message = await receive()
            with contained("noting what a request receives"):
                self._note_received(message)
            return message

        return traced_receive

    def _sending(self, send: Send) -> Send:
        async def traced_send(message: Message) -> None:
            outgoing = message
            with contained("noting what a request sends"):
                outgoing = self._note_sent(message)
            try:
                await send(outgoing)
            except OSError as error:  # how a server says that the client has gone
                self._send_error = error
                self._left_as, self._ended_ns = CLOSED_EARLY, None
                raise

        return traced_send

    def _note_received(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.request" and self._options.bodies:
            self._request_body.add(message.get("body", b""))
        elif kind == "http.disconnect" and not self._is_complete:
            self._left_as = CLOSED_EARLY
        elif kind == "websocket.disconnect" and self._close_code is None:
            self._close_code = int(message.get("code") or _NO_CODE)
            self._left_as = OK if self._close_code in _NORMAL_CLOSE else CLOSED_EARLY

    def _note_sent(self, message: Message) -> Message:
        """Note what the application sends, and return what is to be sent."""
        kind = message["type"].removeprefix("websocket.")
        if kind == "http.response.start":
            self._status = int(message["status"])
            return self._with_headers(message)
        if kind == "accept":
            self._is_complete = True
            return self._with_headers(message)
        if kind == "close":
            if not self._is_complete:
                self._status = 403  # what the protocol makes of a handshake that is refused
            self._is_complete, self._close_code = True, int(message.get("code") or 1000)
        elif kind in _BODY_PARTS:
            if self._options.bodies:
                self._response_body.add(message.get("body", b""))
            if not message.get("more_body"):
                self._is_complete, self._ended_ns = True, time.time_ns()
        return message

    def _with_headers(self, message: Message) -> Message:
        """Return a message with our headers; where the application sets one, that one stays."""
        given = list(message.get("headers") or ())
        self._write(self._captured("http.response.header", given))
        ours = []
        for name, value in self._headers_out.items():
            own = _values(given, name)
            if not own:
                ours.append((name.encode(), value.encode()))
            elif name == self._options.request_id_header:
                self._identify(_readable_id(own[0]) or value)
        return {**message, "headers": given + ours}

    # -- the end

    def _finish(self, raised: BaseException | None) -> None:
        """End the span as the exchange ended, and raise or warn of what was left open under it."""
        opened, outcome = self._opened, None
        with contained("recording the end of a request"):
            outcome = self._outcome(raised)
            if self._records:
                self._write_last(raised)
        findings = opened.close(raised, outcome=outcome, end_time_ns=self._ended_ns)
        if findings:
            settle(findings, strict=opened.strict, raised=raised, site=user_site(2))

    @property
    def _records(self) -> bool:
        return self._opened.is_open and not _mlflow.is_noop(self._opened.live)

    def _write(self, attributes: dict[str, Any]) -> None:
        if attributes and self._records:
            writing.attributes(self._opened.live, attributes)

    def _write_last(self, raised: BaseException | None) -> None:
        live = self._opened.live
        failure = self._failure() if raised is None else None
        if failure is not None:
            writing.outcome(live, ERROR)
            writing.error(live, failure)
        if self._request_body.size and not _mlflow.has_inputs(live):
            writing.inputs(live, self._request_body.recordable())
        if self._response_body.size and not _mlflow.has_outputs(live):
            writing.outputs(live, self._response_body.recordable())
        found = {
            "http.response.status_code": self._status,
            "websocket.close_code": self._close_code,
        }
        self._write({name: value for name, value in found.items() if value is not None})
        self._write_name()
        if self._opened.is_root:
            self._write_previews(failure if raised is None else type(raised).__name__)

    def _write_previews(self, failure: str | None) -> None:
        """Tell this request from others in MLflow's list, which shows no names.

        Inputs and outputs, where there are any, say more: MLflow shows them by itself.
        """
        live = self._opened.live
        asked = clean_text(f"{self._label} {self._scope.get('path', '')}", MAX_PREVIEW_CHARS)
        code = self._close_code if self._status is None else self._status
        answered = failure if code is None else str(code)
        _mlflow.set_previews(
            live.trace_id,
            None if _mlflow.has_inputs(live) else asked,
            None if _mlflow.has_outputs(live) else answered,
        )

    def _write_name(self) -> None:
        """Name the span by its route, which is known once a router has had the request."""
        route = _route(self._scope)
        if route is not None:
            self._write({"http.route": route})
        _mlflow.rename(self._opened.live, clean_text(self._name(route), MAX_SPAN_NAME_CHARS))

    def _name(self, route: str | None) -> str:
        """Return the span's name. What strangers try must not become as many names."""
        given = None
        if self._options.name is not None:
            with contained("the function name= of a TraceMiddleware"):
                given = self._options.name(self._scope)
        if given and isinstance(given, str):
            return given
        if route is not None:
            return f"{self._label} {route}"
        has_router = "app" in self._scope or "router" in self._scope
        if has_router or self._status == 404:
            return self._label
        return f"{self._label} {self._scope.get('path', '')}"

    def _failure(self) -> str | None:
        """Return what went wrong without an exception."""
        if self._status is not None and self._status >= 500:
            return f"HTTP {self._status}"
        if self._left_as is not None:
            return None
        if self._close_code == _SERVER_FAILED:
            return f"the connection was closed with {_SERVER_FAILED}"
        if self._is_complete:
            return None
        return "the response was not completed" if self._status else "no response was sent"

    def _outcome(self, raised: BaseException | None) -> Outcome | None:
        """Return the outcome where the client left; else an exception or a failure tells it."""
        if self._failure() is None and (raised is None or self._tells_of_leaving(raised)):
            return self._left_as
        return None

    def _tells_of_leaving(self, raised: BaseException) -> bool:
        """Tell an exception that says no more than that the client has left."""
        return (
            raised is self._send_error or is_cancellation(raised) or type(raised).__name__ in _GONE
        )


# -- headers and bodies ------------------------------------------------------------------------

# Nothing in an id that could end a log line, a header or a filter string.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._~:;,/+=@#|-]+")


def _readable_id(value: str) -> str:
    """Return what is fit to be a request id, cut at its greatest length; "" for junk."""
    stripped = value.strip()
    return stripped[:MAX_REQUEST_ID_CHARS] if _REQUEST_ID.fullmatch(stripped) else ""


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, (bytes, bytearray)) else str(value)


def _values(headers: Iterable[Any], name: str) -> list[str]:
    return [_text(value) for key, value in headers if _text(key).lower() == name]


class _Body:
    """The first bytes of a body, and how many there were in all."""

    __slots__ = ("_kept", "size")

    def __init__(self) -> None:
        self.size = 0
        self._kept = bytearray()

    def add(self, chunk: Any) -> None:
        self.size += len(chunk)
        self._kept += chunk[: MAX_BODY_BYTES - len(self._kept)]

    def recordable(self) -> str:
        """Return text, which MLflow shows as JSON where it is that; of anything else, the size."""
        cut = self.size - len(self._kept)
        try:
            # The last character may be cut in two: an incremental decoder takes that.
            found = codecs.getincrementaldecoder("utf-8")().decode(self._kept, final=not cut)
        except UnicodeDecodeError:
            return f"[spanguard: {self.size} bytes that are no text]"
        return f"{found}[spanguard: {cut} bytes cut]" if cut else found


# -- routes ------------------------------------------------------------------------------------


def _route(scope: Scope) -> str | None:
    """Return the path with each parameter's name for its value: `/items/{item_id}`.

    From what the routers of Starlette and FastAPI leave in the scope. It has mounts and prefixes
    in it, which a route knows nothing of. None where no router found one.
    """
    endpoint = scope.get("endpoint")
    if endpoint is None:
        return None
    parameters = scope.get("path_params") or {}
    if _is_application(scope, endpoint):
        # It tells nothing of routes of its own: static files, a router that found none.
        mounted = scope.get("root_path", "")[len(scope.get("app_root_path", "")) :]
        above = _template(mounted, parameters)
        return None if above is None else f"{above}/{{path}}"
    root, path = scope.get("app_root_path", scope.get("root_path", "")), scope["path"]
    return _template(path[len(root) :] if path.startswith(f"{root}/") else path, parameters)


def _is_application(scope: Scope, endpoint: Any) -> bool:
    is_handler = inspect.isroutine(endpoint) or isinstance(endpoint, (type, functools.partial))
    return not is_handler or hasattr(scope.get("route"), "routes")


def _template(path: str, parameters: dict[str, Any]) -> str | None:
    """Return a path with names for values; None where a value is not found as it was written.

    From the right: of equal values, the last parameter is the last in the path.
    """
    for name, value in reversed(parameters.items()):
        found = list(re.finditer(rf"/{re.escape(str(value))}(?=/|$)", path))
        if not found:
            return None
        path = f"{path[: found[-1].start()]}/{{{name}}}{path[found[-1].end() :]}"
    return path
