"""A trace for each request: middleware for any ASGI application.

It depends on the protocol alone, and knows the routes of Starlette and FastAPI where they are used.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Collection
from fnmatch import fnmatchcase
from typing import Any

from spanguard._base.findings import contained
from spanguard._base.site import CalledFunction
from spanguard._mlflow import queue
from spanguard._propagation.attachment import Attachment
from spanguard._propagation.context import TraceContext
from spanguard.asgi._exchange import Exchange, Options
from spanguard.asgi._messages import Receive, Scope, Send, listed

__all__ = ["TraceMiddleware"]


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
        self._exclude = listed(exclude)
        self._trusts = trust_traceparent
        self._options = Options(
            name=name,
            request_id_header=(request_id_header or "").lower(),
            headers=frozenset(header.lower() for header in listed(capture_headers)),
            bodies=capture_bodies,
            strict=strict,
            called=CalledFunction(app) if inspect.isroutine(app) else None,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for one scope, in a trace of its own if it is to be traced."""
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
        return Attachment(TraceContext.from_headers(headers), hand_over=queue.hand_over)

    def _begin(self, scope: Scope) -> Exchange | None:
        with contained("opening the span of a request"):
            scope[TRACED] = True
            return Exchange(self._options, scope)
        return None
