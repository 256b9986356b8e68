"""A varied set of traces, the same each time: the same ids, the same times."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlflow
from mlflow.entities import SpanEvent, SpanType

from spanguard import TraceStateManager, traced_span
from spanguard._mlflow import ids

T0 = 1_760_000_000_000_000_000  # ns
MS = 1_000_000


@contextmanager
def same_ids() -> Iterator[None]:
    """Number the spans and traces that are made in a block."""
    numbers = itertools.count(0x5EED_0000_0001)
    with mock.patch.object(ids, "_random_number", side_effect=numbers):
        yield


def record(client: mlflow.MlflowClient) -> None:
    """Record traces of every kind that has rows of its own."""
    with same_ids():
        _plain(client)
        _with_usage(client)
        _failed(client)
        _with_everything(client)
        _deep(client)
        _of_ours()
        _with_attachment(client)
        _with_odd_values(client)
        _with_late_child(client)


def _ended(client: mlflow.MlflowClient, root: Any, at: int = 9, **more: Any) -> None:
    client.end_trace(root.trace_id, end_time_ns=T0 + at * MS, **more)


def _plain(client: mlflow.MlflowClient) -> None:
    root = client.start_trace("plain", inputs={"q": 1}, start_time_ns=T0)
    child = client.start_span(
        "child", root.trace_id, root.span_id, inputs=[1, "two"], start_time_ns=T0 + MS
    )
    client.end_span(root.trace_id, child.span_id, outputs={"a": None}, end_time_ns=T0 + 2 * MS)
    _ended(client, root, outputs="done")
    _ended(client, client.start_trace("bare", start_time_ns=T0 + MS))


def _with_usage(client: mlflow.MlflowClient) -> None:
    root = client.start_trace("usage", start_time_ns=T0)
    for number in range(3):
        child = client.start_span(
            f"model-{number}",
            root.trace_id,
            root.span_id,
            span_type=SpanType.CHAT_MODEL,
            attributes={
                "mlflow.chat.tokenUsage": {
                    "input_tokens": 10 + number,
                    "output_tokens": 5,
                    "total_tokens": 15 + number,
                },
                "mlflow.llm.cost": {"input_cost": 0.1, "output_cost": 0.2, "total_cost": 0.3},
            },
            start_time_ns=T0 + MS,
        )
        client.end_span(root.trace_id, child.span_id, end_time_ns=T0 + 3 * MS)
    _ended(client, root)


def _failed(client: mlflow.MlflowClient) -> None:
    root = client.start_trace("failed", start_time_ns=T0)
    child = client.start_span("child", root.trace_id, root.span_id, start_time_ns=T0)
    child.add_event(SpanEvent("exception", timestamp=T0, attributes={"exception.type": "KeyError"}))
    client.end_span(root.trace_id, child.span_id, status="ERROR", end_time_ns=T0 + MS)
    _ended(client, root, status="ERROR")


def _with_everything(client: mlflow.MlflowClient) -> None:
    with mlflow.start_run(run_name="run"):
        root = client.start_trace(
            "everything", tags={"team": "blue", "größe": "groß"}, start_time_ns=T0
        )
        with mlflow.tracing.provider.safe_set_span_in_context(root):
            mlflow.update_current_trace(
                tags={"late": "1"},
                metadata={"mlflow.trace.session": "s-1", "mlflow.trace.user": "u-1", "own": "x"},
                client_request_id="request-1",
                request_preview="asked",
                response_preview="answered",
            )
        _ended(client, root, attributes={"deep": {"list": [1, 2, {"x": "y"}]}})


def _deep(client: mlflow.MlflowClient) -> None:
    experiment = client.create_experiment("another")
    root = client.start_trace("deep", experiment_id=experiment, start_time_ns=T0)
    above, below = root, []
    for number in range(12):  # more than MLflow takes at a time
        above = client.start_span(
            f"level-{number}", root.trace_id, above.span_id, start_time_ns=T0 + number
        )
        below.append(above)
    for number, span in enumerate(reversed(below)):
        client.end_span(root.trace_id, span.span_id, end_time_ns=T0 + MS + number)
    _ended(client, root)


def _of_ours() -> None:
    manager = TraceStateManager()
    top = manager.push_trace("ours", session_id="s-2", user="u-2", start_time_ns=T0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ended twice, for the sake of the times
        with traced_span("inner", span_type="TOOL", start_time_ns=T0 + MS) as inner:
            inner.end(end_time_ns=T0 + 2 * MS)
        top.end(end_time_ns=T0 + 3 * MS)
        manager.pop_trace()


def _with_attachment(client: mlflow.MlflowClient) -> None:
    try:
        from mlflow.tracing.attachments import Attachment
    except ImportError:  # MLflow 3.10 has none
        return
    picture = Attachment(content_bytes=b"\x89PNG", content_type="image/png")
    root = client.start_trace("attachment", inputs={"picture": picture}, start_time_ns=T0)
    _ended(client, root)


def _with_odd_values(client: mlflow.MlflowClient) -> None:
    root = client.start_trace("odd", inputs={"text": "日本 'quoted' \\ \n" * 50}, start_time_ns=T0)
    _ended(client, root, at=0, outputs=["x" * 5_000, 1.5, True, None])


def _with_late_child(client: mlflow.MlflowClient) -> None:
    root = client.start_trace("late", start_time_ns=T0 + MS)
    child = client.start_span("child", root.trace_id, root.span_id, start_time_ns=T0)
    client.end_span(root.trace_id, child.span_id, end_time_ns=T0 + 50 * MS)
    _ended(client, root)
