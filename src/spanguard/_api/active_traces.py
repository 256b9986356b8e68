"""The traces that are open under a business id."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from mlflow.entities import LiveSpan

from spanguard._api.custom_ids import client_request_id
from spanguard._base.findings import contained
from spanguard._lifecycle import chosen_ids
from spanguard._lifecycle.handle import SpanHandle
from spanguard._lifecycle.opening import open_handle
from spanguard._lifecycle.request import SpanRequest
from spanguard._mlflow import memory, starting
from spanguard._record.text import whole_text

__all__ = ["ActiveTraces"]


# Of all managers, held for a look into one. Re-entrant: a finalizer may end a trace meanwhile.
_lock = threading.RLock()


def start_afresh_in_child() -> None:
    """Have a lock of its own in a forked child: a thread of the parent may have held it."""
    global _lock
    _lock = threading.RLock()


class ActiveTraces:
    """Open traces by their business id: claimed, taken, let go: see `CustomTraceManager`."""

    def __init__(
        self,
        client: Any = None,
        *,
        id_factory: Callable[[Any, Any], str] | None = None,
        strict: bool | None = None,
    ) -> None:
        self._client = client
        self._id_factory = id_factory
        self._strict = strict
        # By custom id, of all threads and tasks; None: about to start. What another API ended is
        # in it until the next look.
        self._traces: dict[str, SpanHandle | None] = {}

    def _claim(self, custom_id: str, request: SpanRequest) -> bool:
        """Take an id for a trace that is about to start; False if one has it, here or stored."""
        with _lock:
            self._forget_ended()
            if custom_id in self._traces:
                return False
            self._traces[custom_id] = None
        is_free = False
        try:
            is_free = chosen_ids.reserve(request)
        finally:
            if not is_free:
                self._traces.pop(custom_id, None)
        return is_free

    def _open(self, custom_id: str, request: SpanRequest) -> SpanHandle:
        try:
            handle = open_handle(request, activate=False)
        except BaseException:
            self._traces.pop(custom_id, None)
            raise
        if not starting.is_noop(handle.live):
            with contained("recording a client request id"):
                memory.set_client_request_id(handle.live.trace_id, client_request_id(custom_id))
        with _lock:
            self._traces[custom_id] = handle
        return handle

    def _take(self, custom_id: str) -> SpanHandle | None:
        """Take an open trace off the manager. Exactly one caller gets it, in whatever thread."""
        with _lock:
            handle = self._traces.get(custom_id)
            if handle is None:
                return None
            del self._traces[custom_id]
        return handle if handle.is_open else None

    def _let_go(self, custom_id: str, handle: SpanHandle) -> None:
        with _lock:
            if self._traces.get(custom_id) is handle:
                del self._traces[custom_id]

    def _forget_ended(self) -> None:
        """Let go of what another API has ended. Call it locked."""
        for custom_id, handle in list(self._traces.items()):
            if handle is not None and not handle.is_open:
                self._let_go(custom_id, handle)

    # -- looking

    def get_active_trace(self, custom_trace_id: str) -> LiveSpan | None:
        """Return the root span of the open trace that this manager started under an id, or None."""
        handle = self._traces.get(whole_text(custom_trace_id))
        return handle.proxy if handle is not None and handle.is_open else None  # type: ignore[return-value]

    @property
    def active_traces(self) -> Mapping[str, LiveSpan]:
        """The root spans of the open traces by custom id, read-only, as it is now.

        A trace leaves it when it ends, by whatever API.
        """
        traces = list(self._traces.items())
        active: Any = {key: one.proxy for key, one in traces if one is not None and one.is_open}
        return MappingProxyType(active)
