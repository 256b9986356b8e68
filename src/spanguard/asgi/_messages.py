"""What is read in scopes and messages: bodies, routes, request ids."""

from __future__ import annotations

import codecs
import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from typing import Any

__all__ = [
    "Application",
    "Headers",
    "Body",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "listed",
    "readable_id",
    "route_of",
    "text_at",
    "values",
]


Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Headers = Iterable[tuple[object, object]]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 100_000
"""So much of each body is recorded, where bodies are recorded at all."""

MAX_REQUEST_ID_CHARS = 128


def listed(names: str | Collection[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


# -- headers and bodies ------------------------------------------------------------------------

# Nothing in an id that could end a log line, a header or a filter string.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._~:;,/+=@#|-]+")


def readable_id(value: str) -> str:
    """Return what is fit to be a request id, cut at its greatest length; "" for junk."""
    stripped = value.strip()
    return stripped[:MAX_REQUEST_ID_CHARS] if _REQUEST_ID.fullmatch(stripped) else ""


def text_at(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, (bytes, bytearray)) else str(value)


def values(headers: Headers, name: str) -> list[str]:
    return [text_at(value) for key, value in headers if text_at(key).lower() == name]


class Body:
    """The first bytes of a body, and how many there were in all."""

    __slots__ = ("_kept", "size")

    def __init__(self) -> None:
        self.size = 0
        self._kept = bytearray()

    def add(self, chunk: bytes) -> None:
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


def route_of(scope: Scope) -> str | None:
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


def _is_application(scope: Scope, endpoint: object) -> bool:
    is_handler = inspect.isroutine(endpoint) or isinstance(endpoint, (type, functools.partial))
    return not is_handler or hasattr(scope.get("route"), "routes")


def _template(path: str, parameters: dict[str, object]) -> str | None:
    """Return a path with names for values; None where a value is not found as it was written.

    From the right: of equal values, the last parameter is the last in the path.
    """
    for name, value in reversed(parameters.items()):
        found = list(re.finditer(rf"/{re.escape(str(value))}(?=/|$)", path))
        if not found:
            return None
        path = f"{path[: found[-1].start()]}/{{{name}}}{path[found[-1].end() :]}"
    return path
