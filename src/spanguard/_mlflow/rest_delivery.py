"""Many traces to a tracking server: each trace by its own request, all spans in one.

By MLflow's own HTTP client, without its own retries: these take minutes, and nobody could stop
them. How often, and how long after, is asked again is decided in one place (retries.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from mlflow.entities import Span, Trace, TraceData, TraceInfo
from mlflow.protos.service_pb2 import StartTraceV3
from mlflow.utils import proto_json_utils, rest_utils
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from spanguard._mlflow.optional import optional
from spanguard._mlflow.outgoing import Outgoing, in_workspace

__all__ = ["RestDelivery", "StoreError"]


T = TypeVar("T")
R = TypeVar("R")

_TRACES, _SPANS, _VERSION = "/api/3.0/mlflow/traces", "/v1/traces", "/version"
_CONNECTIONS = 4
_proto_json: Any = proto_json_utils  # which say nothing of their types
_rest: Any = rest_utils
_resource_proto = optional("mlflow.tracing.utils.otlp", "resource_to_otel_proto")


class StoreError(Exception):
    """A tracking server has answered that it does not take something.

    Attributes:
        status: the HTTP status of its answer.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class RestDelivery:
    """Sends to the tracking server of one tracking URI."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._spans_come_first: bool | None = None

    def send(self, items: Sequence[Outgoing]) -> list[TraceInfo | None]:
        """Send traces and parts of traces; return what the server has of each trace."""
        if self._spans_come_first is None:
            self._spans_come_first = self._ask_version() < (3, 12)
        if self._spans_come_first:  # a server that adds up the token usage of both
            self._send_spans(items)
            return in_parallel(self._start, items, _CONNECTIONS)
        started = in_parallel(self._start, items, _CONNECTIONS)
        self._send_spans(items)
        return started

    def _start(self, item: Outgoing) -> TraceInfo | None:
        if item.trace is None:
            return None
        trace: Any = Trace(info=item.trace.info, data=TraceData(spans=[]))
        body = _proto_json.message_to_json(StartTraceV3(trace=trace.to_proto()))
        response = self._post(item.workspace, _TRACES, data=body, content="application/json")
        answer = StartTraceV3.Response()
        _proto_json.parse_dict(response.json(), answer)
        return TraceInfo.from_proto(answer.trace.trace_info)

    def _send_spans(self, items: Iterable[Outgoing]) -> None:
        of_place: dict[tuple[str, str | None], list[Span]] = {}
        for item in items:
            of_place.setdefault((item.experiment_id, item.workspace), []).extend(item.spans)
        for (experiment_id, workspace), spans in of_place.items():
            if spans:
                self._post(
                    workspace,
                    _SPANS,
                    data=_request_with(spans),
                    content="application/x-protobuf",
                    headers={"x-mlflow-experiment-id": experiment_id},
                )

    def _ask_version(self) -> tuple[int, ...]:
        response = self._request("GET", _VERSION, timeout=10)
        _raise_unless_taken(response, _VERSION)
        return tuple(int(part) for part in response.text.split(".")[:2])

    def _post(
        self,
        workspace: str | None,
        endpoint: str,
        *,
        data: str | bytes,
        content: str,
        headers: dict[str, str] | None = None,
    ) -> Any:
        all_headers = {"Content-Type": content, **(headers or {})}
        with in_workspace(workspace):
            response = self._request("POST", endpoint, data=data, extra_headers=all_headers)
        _raise_unless_taken(response, endpoint)
        return response

    def _request(self, method: str, endpoint: str, **more: Any) -> Any:
        return _rest.http_request(
            host_creds=self._client.store.get_host_creds(),
            endpoint=endpoint,
            method=method,
            max_retries=0,
            raise_on_status=False,
            **more,
        )


def _request_with(spans: Sequence[Span]) -> bytes:
    request = ExportTraceServiceRequest()
    of_resource = request.resource_spans.add()
    if _resource_proto is not None:
        of_resource.resource.CopyFrom(_resource_proto(getattr(spans[0]._span, "resource", None)))
    of_resource.scope_spans.add().spans.extend(span.to_otel_proto() for span in spans)
    content: bytes = request.SerializeToString()
    return content


def _raise_unless_taken(response: Any, endpoint: str) -> None:
    if response.status_code == 200:
        return
    try:
        _rest.verify_rest_response(response, endpoint)
    except Exception as error:
        raise StoreError(response.status_code, str(error)) from error
    raise StoreError(response.status_code, f"HTTP status {response.status_code}")


def in_parallel(work: Callable[[T], R], items: Sequence[T], threads: int) -> list[R]:
    """Do the same for each item in a few threads; return the results in the items' order.

    Raises what the first item to fail raised, when all are done. In threads that are not waited
    for at exit, as those of `concurrent.futures` are.
    """
    results: list[Any] = [None] * len(items)
    failures: list[BaseException] = []
    numbers = iter(range(len(items)))

    def run() -> None:
        for number in numbers:  # of a range: each comes to one thread
            if failures:
                return
            try:
                results[number] = work(items[number])
            except Exception as error:  # noqa: BLE001 - raised below, in the thread that asked
                failures.append(error)

    helpers = _started(run, min(threads, len(items)) - 1)
    run()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
    return results


def _started(run: Callable[[], None], count: int) -> list[threading.Thread]:
    started: list[threading.Thread] = []
    for _ in range(count):
        thread = threading.Thread(target=run, name="spanguard-delivery-request", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is on its way out: the others do it all
            break
        started.append(thread)
    return started
