"""Whether a client looks where its traces go: MLflow sends them to the global tracking URI."""

from __future__ import annotations

import os
from functools import lru_cache
from urllib.parse import SplitResult, urlsplit
from urllib.request import url2pathname

from spanguard._base.values import attribute_of, text_of
from spanguard._mlflow import destination
from spanguard.exceptions import InvalidSpanArgumentError

__all__ = ["elsewhere"]


_PORTS = {"http": 80, "https": 443}
_LOOPBACK = {"localhost": "127.0.0.1", "::1": "127.0.0.1"}


def elsewhere(client: object, span_name: str) -> InvalidSpanArgumentError | None:
    """Return a finding if the client was made for another store than traces go to."""
    wanted = text_of(attribute_of(client, "tracking_uri"))
    if wanted is None:  # a double
        return None
    target = destination.tracking_uri()
    if is_same_store(wanted, target):
        return None
    return InvalidSpanArgumentError(
        f"The client of span {span_name!r} was made for {_without_secrets(wanted)}, but MLflow "
        f"sends every trace to the global tracking URI, {_without_secrets(target)}. Call "
        "mlflow.set_tracking_uri() with the client's URI before the first trace.",
        span_name=span_name,
    )


@lru_cache(maxsize=64)  # asked at every start of a trace
def is_same_store(one: str, other: str) -> bool:
    """Tell whether two tracking URIs lead to the same store, however they are written."""
    if one == other:
        return True
    try:
        return _place(one) == _place(other)
    except ValueError:  # a port that is no number
        return False


def _place(uri: str) -> tuple[object, ...]:
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]  # postgresql+psycopg2 is a way to postgresql
    if scheme in ("", "file") or len(scheme) == 1:  # one letter is a drive of Windows
        path = url2pathname(parts.path) if scheme == "file" else uri
        return "file", os.path.realpath(path)
    if scheme == "sqlite" and parts.path.strip("/") not in ("", ":memory:"):
        return scheme, os.path.realpath(parts.path[1:])
    if not parts.hostname:
        return (uri.rstrip("/"),)
    host = _LOOPBACK.get(parts.hostname, parts.hostname)
    return scheme, host, parts.port or _PORTS.get(scheme), parts.path.rstrip("/")


def _without_secrets(uri: str) -> str:
    """Return a URI without user, password and query: they may be secrets."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "another URI"
    host = parts.netloc.rpartition("@")[2]
    return SplitResult(parts.scheme, host, parts.path, "", "").geturl() if host else uri
