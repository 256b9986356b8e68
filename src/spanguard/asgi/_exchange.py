"""One request, or one WebSocket connection: its span, from its scope to its last message."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spanguard._base.findings import contained, settle
from spanguard._base.site import CalledFunction, user_site
from spanguard._base.tasks import is_cancellation
from spanguard._lifecycle.opening import open_handle
from spanguard._lifecycle.request import MAX_SPAN_NAME_CHARS, SpanRequest
from spanguard._mlflow import memory, starting
from spanguard._mlflow.names import MAX_CLIENT_REQUEST_ID_CHARS
from spanguard._mlflow.writing import rename
from spanguard._propagation.context import headers_here
from spanguard._record import writing
from spanguard._record.outcome import CLOSED_EARLY, ERROR, OK, Outcome
from spanguard._record.text import clean_text
from spanguard.asgi._messages import (
    Application,
    Body,
    Headers,
    Message,
    Receive,
    Scope,
    Send,
    readable_id,
    route_of,
    text_at,
    values,
)

__all__ = ["Exchange", "Options"]


MAX_PREVIEW_CHARS = 250


@dataclass(frozen=True)
class Options:
    """What a middleware was told that holds for each of its spans."""

    name: Callable[[Scope], str | None] | None
    request_id_header: str  # "" for none
    headers: frozenset[str]
    bodies: bool
    strict: bool | None
    called: CalledFunction | None  # a framework's own __call__ tells nobody anything


_METHODS = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"}
)
_REQUEST_ID = "http.request.id"
_BODY_PARTS = frozenset(
    {"http.response.body", "http.response.pathsend", "http.response.zerocopysend"}
)

# How frameworks say that the client has gone. By name: they are not imported here.
_GONE = frozenset({"ClientDisconnect", "WebSocketDisconnect"})

# WebSocket close codes: done, going away, none given; those say that nothing went wrong.
_NO_CODE = 1005
_NORMAL_CLOSE = frozenset({1000, 1001, _NO_CODE})
_SERVER_FAILED = 1011


class Exchange:
    """One request or connection from its call to its return: its span, and what messages tell.

    Each message passes as it is, but for the headers that a response gets in addition. Whatever
    fails here is contained: the message goes its way.
    """

    def __init__(self, options: Options, scope: Scope) -> None:
        self._options = options
        self._scope = scope
        self._is_socket = scope["type"] == "websocket"
        self._status: int | None = None
        self._is_complete = False  # all was said that is owed
        self._ended_ns: int | None = None
        self._left_as: Outcome | None = None  # what it means that the client left, if it did
        self._close_code: int | None = None
        self._send_error: OSError | None = None
        self._request_body = Body()
        self._response_body = Body()
        request_id = self._take_request_id()
        request = SpanRequest(
            (),
            name=f"{self._label} {scope.get('path', '')}",
            attributes=self._first_attributes(request_id),
            strict=options.strict,
        )
        request.function = options.called
        self._handle = open_handle(request)
        self._headers_out = headers_here()  # of the span that was just opened
        if request_id:
            self._headers_out[options.request_id_header] = request_id
            self._identify_trace(request_id)

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
        given = map(readable_id, values(self._scope.get("headers", ()), header))
        return next(filter(None, given), None) or uuid.uuid4().hex

    def _first_attributes(self, request_id: str) -> dict[str, object]:
        scope = self._scope
        found: dict[str, object] = {"url.path": scope.get("path", "")}
        if not self._is_socket:
            found["http.request.method"] = clean_text(scope.get("method", ""), 32)
        found |= self._captured("http.request.header", scope.get("headers", ()))
        if request_id:
            found[_REQUEST_ID] = request_id
        return found

    def _captured(self, prefix: str, headers: Headers) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, value in headers if self._options.headers else ():
            lower = text_at(name).lower()
            if lower in self._options.headers:
                found.setdefault(f"{prefix}.{lower}", []).append(text_at(value))
        return found

    def _identify(self, request_id: str) -> None:
        """Record the request id; with a root, MLflow knows the trace by it too."""
        self._write({_REQUEST_ID: request_id})
        self._identify_trace(request_id)

    def _identify_trace(self, request_id: str) -> None:
        if self._handle.is_root and len(request_id) <= MAX_CLIENT_REQUEST_ID_CHARS:
            memory.set_client_request_id(self._handle.live.trace_id, request_id)

    # -- messages

    async def run(self, app: Application, receive: Receive, send: Send) -> None:
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
            own = values(given, name)
            if not own:
                ours.append((name.encode(), value.encode()))
            elif name == self._options.request_id_header:
                self._identify(readable_id(own[0]) or value)
        return {**message, "headers": given + ours}

    # -- the end

    def _finish(self, raised: BaseException | None) -> None:
        """End the span as the exchange ended, and raise or warn of what was left open under it."""
        handle, outcome = self._handle, None
        with contained("recording the end of a request"):
            outcome = self._outcome(raised)
            if self._records:
                self._write_last(raised)
        findings = handle.close(raised, outcome=outcome, end_time_ns=self._ended_ns)
        if findings:
            settle(findings, strict=handle.strict, raised=raised, site=user_site(2))

    @property
    def _records(self) -> bool:
        return self._handle.is_open and not starting.is_noop(self._handle.live)

    def _write(self, attributes: dict[str, Any]) -> None:
        if attributes and self._records:
            writing.attributes(self._handle.live, attributes)

    def _write_last(self, raised: BaseException | None) -> None:
        live = self._handle.live
        failure = self._failure() if raised is None else None
        if failure is not None:
            writing.outcome(live, ERROR)
            writing.error(live, failure)
        if self._request_body.size and not memory.has_inputs(live):
            writing.inputs(live, self._request_body.recordable())
        if self._response_body.size and not memory.has_outputs(live):
            writing.outputs(live, self._response_body.recordable())
        route = route_of(self._scope)
        found = {
            "http.response.status_code": self._status,
            "websocket.close_code": self._close_code,
            "http.route": route,
        }
        self._write({name: value for name, value in found.items() if value is not None})
        rename(self._handle.live, clean_text(self._name(route), MAX_SPAN_NAME_CHARS))
        if self._handle.is_root:
            self._write_previews(failure if raised is None else type(raised).__name__)

    def _write_previews(self, failure: str | None) -> None:
        """Tell this request from others in MLflow's list, which shows no names.

        Inputs and outputs, where there are any, say more: MLflow shows them by itself.
        """
        live = self._handle.live
        asked = clean_text(f"{self._label} {self._scope.get('path', '')}", MAX_PREVIEW_CHARS)
        code = self._close_code if self._status is None else self._status
        answered = failure if code is None else str(code)
        memory.set_previews(
            live.trace_id,
            None if memory.has_inputs(live) else asked,
            None if memory.has_outputs(live) else answered,
        )

    def _name(self, route: str | None) -> str:
        """Return the span's name, by its route, which is known once a router had the request.

        What strangers try must not become as many names.
        """
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
