"""Storing what is on its way, in whatever store it goes to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from mlflow.entities import TraceInfo
from mlflow.tracing.export.utils import try_link_prompts_to_trace
from opentelemetry.context import attach, detach, set_value

from spanguard._base.findings import contained
from spanguard._mlflow.optional import optional
from spanguard._mlflow.outgoing import Destination, Outgoing, in_workspace
from spanguard._mlflow.rest_delivery import RestDelivery
from spanguard._mlflow.sql_delivery import SqlDelivery

__all__ = ["Sender", "destination_of", "sender_to", "unobserved"]


_TracingClient: Any = optional("mlflow.tracing.client", "TracingClient")


class Sender(Protocol):
    """What stores things at one destination."""

    def send(self, items: Sequence[Outgoing]) -> None:
        """Store all of them, or raise. What was stored by then may be sent again."""


def sender_to(destination: Destination) -> Sender:
    """Return what stores at a destination, which is an SQL store or a tracking server."""
    kind = type(destination.client.store).__name__
    return _ToServer(destination.client) if kind == "RestStore" else _ToSql(destination.client)


class _ToServer:
    def __init__(self, client: Any) -> None:
        self._client = client
        self._rest = RestDelivery(client)

    def send(self, items: Sequence[Outgoing]) -> None:
        for info, item in zip(self._rest.send(items), items, strict=True):
            if info is not None:
                _send_what_belongs_to_it(self._client, item, info)


class _ToSql:
    def __init__(self, client: Any) -> None:
        self._client = client
        self._sql = SqlDelivery(client)

    def send(self, items: Sequence[Outgoing]) -> None:
        for workspace, here in _by_workspace(items):
            with in_workspace(workspace):
                self._send(here)

    def _send(self, items: Sequence[Outgoing]) -> None:
        # Parts first: of a trace that is in the same batch, they make it a known one.
        begun = self._sql.known(items) | {item.trace_id for item in items if item.trace is None}
        new = [item for item in items if item.trace_id not in begun and not _sums_up(item)]
        if new:
            for info, item in zip(self._sql.insert(new), new, strict=True):
                _send_what_belongs_to_it(self._client, item, info)
        others = [item for item in items if item not in new]
        if others:
            self._sql.add([item for item in others if item.spans])
        for item in others:
            if item.trace is not None:
                _send_what_belongs_to_it(self._client, item, self._sql.finish(item))


# Where a store knows that start_trace came first, it does not add the spans' token usage to it.
_finalized_key = getattr(
    optional("mlflow.tracing.constant", "TraceMetadataKey"), "TRACE_INFO_FINALIZED", None
)
_SUMS = ("mlflow.trace.tokenUsage", "mlflow.trace.cost")


def _sums_up(item: Outgoing) -> bool:
    """Tell whether the spans have to come before the trace: else its tokens are counted twice."""
    if _finalized_key is not None or item.trace is None:
        return False
    return any(key in item.trace.info.trace_metadata for key in _SUMS)


def _send_what_belongs_to_it(client: Any, item: Outgoing, info: TraceInfo) -> None:
    """Upload the attachments of a stored trace and link its prompts, as MLflow does."""
    with contained("uploading the attachments of a trace"):
        attachments = item.attachments
        if attachments:
            client._upload_attachments(info, attachments)
    if item.prompts:
        with contained("linking prompts to a trace"):
            try_link_prompts_to_trace(client, item.trace_id, item.prompts, synchronous=True)


@contextmanager
def unobserved() -> Iterator[None]:
    """Let no instrumentation make spans of what is sent in a block: they would have to be sent."""
    token = attach(set_value(_SUPPRESS, True)) if _SUPPRESS is not None else None
    try:
        yield
    finally:
        if token is not None:
            detach(token)


_SUPPRESS: Any = optional("opentelemetry.context", "_SUPPRESS_INSTRUMENTATION_KEY")


def _by_workspace(items: Iterable[Outgoing]) -> list[tuple[str | None, list[Outgoing]]]:
    found: dict[str | None, list[Outgoing]] = {}
    for item in items:
        found.setdefault(item.workspace, []).append(item)
    return list(found.items())


def destination_of(uri: str) -> Destination:
    """Return where the traces of a tracking URI go."""
    return Destination(uri, _TracingClient(uri))
