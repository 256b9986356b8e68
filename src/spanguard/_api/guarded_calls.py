"""What a guarded client makes of a raw call's arguments, and gives back."""

from __future__ import annotations

from typing import Any, TypeVar

from mlflow.tracking import MlflowClient

from spanguard._base.values import attribute_of, is_a, text_of
from spanguard._lifecycle.handle import SpanHandle
from spanguard._lifecycle.proxy import SpanProxy
from spanguard._lifecycle.request import SpanRequest
from spanguard._mlflow import memory

__all__ = ["GuardedSpan", "LateClient", "TraceRequest", "id_of", "starts_spans"]


T = TypeVar("T")


def starts_spans(client: object) -> bool:
    """Tell whether a client is one, or a double of one."""
    starts = (attribute_of(client, name) for name in ("start_span", "start_trace"))
    return is_a(client, MlflowClient) or any(map(callable, starts))


def id_of(given: T) -> T | str:
    """Return an id; a string itself, as it may be known by its identity, of a subclass its text."""
    text = text_of(given)
    return given if text is None else text


class TraceRequest(SpanRequest):
    """What `start_trace` asks for. The trace that it joins takes its tags without ado."""

    __slots__ = ()

    def misplaced_under(self, parent: Any) -> list[str]:
        experiment_id, run_id = memory.experiment_and_run(parent.trace_id)
        misplaced = []
        if self.experiment_id is not None and text_of(self.experiment_id) != experiment_id:
            misplaced.append("experiment_id")
        if self.run_id is not None and text_of(self.run_id) != run_id:
            misplaced.append("run_id")
        return misplaced


class GuardedSpan(SpanProxy):
    """A span through the safe proxy, under the trace id that tells which start_trace it is of."""

    def __init__(self, handle: SpanHandle, trace_id: object) -> None:
        super().__init__(handle.live, handle)
        self._self_trace_id = trace_id

    @property
    def trace_id(self) -> object:
        return self._self_trace_id

    @property
    def request_id(self) -> object:
        return self._self_trace_id


class LateClient(MlflowClient):
    """A client that is made when something is asked of it: making one can fail."""

    def __init__(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_is_made" in vars(self):
            raise AttributeError(f"MlflowClient has no attribute {name!r}")
        super().__init__()
        self._is_made = True
        return getattr(self, name)
