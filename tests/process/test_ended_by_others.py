"""Another API ends a span of ours while a child is open: no block is held, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import TraceStateManager, current_span, guard, traced_span
from tests.store import Store

# What used to spin for ever in one thread can only be stopped by the whole run's time-out.
pytestmark = [
    pytest.mark.versions,
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore::spanguard.SpanguardWarning"),
]


def by_end_trace(span: Any, root: Any) -> None:
    with contextlib.suppress(mlflow.MlflowException):  # MLflow 3.10, where it has ended before
        mlflow.MlflowClient().end_trace(root.trace_id)


def by_end_span(span: Any, root: Any) -> None:
    mlflow.MlflowClient().end_span(span.trace_id, span.span_id)


def by_live_end(span: Any, root: Any) -> None:
    span.__wrapped__.end()


def in_a_thread(end: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def run(span: Any, root: Any) -> None:
        thread = threading.Thread(target=end, args=(span, root))
        thread.start()
        thread.join()

    run.__name__ = f"{end.__name__}_in_a_thread"
    return run


ENDS = [by_end_trace, by_end_span, by_live_end]
ENDS += [in_a_thread(end) for end in ENDS]


def blocks(depth: int, act: Callable[[list[Any]], None], spans: list[Any]) -> None:
    with traced_span(f"level {len(spans)}") as span:
        spans.append(span)
        if len(spans) < depth:
            blocks(depth, act, spans)
        else:
            act(spans)


def pushes(depth: int, act: Callable[[list[Any]], None], spans: list[Any]) -> None:
    manager = TraceStateManager()
    spans += [manager.push_trace(f"level {level}") for level in range(depth)]
    act(spans)
    for _ in range(depth):
        manager.pop_trace()


def guarded_spans(depth: int, act: Callable[[list[Any]], None], spans: list[Any]) -> None:
    client = guard()
    root = client.start_trace("level 0")
    spans.append(root)
    for level in range(1, depth):
        spans.append(client.start_span(f"level {level}", root.trace_id, spans[-1].span_id))
    act(spans)
    for span in reversed(spans[1:]):
        client.end_span(root.trace_id, span.span_id)
    client.end_trace(root.trace_id)


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
@pytest.mark.parametrize("open_", [blocks, pushes, guarded_spans])
def test_a_span_that_another_api_ends_with_children_open(
    store: Store, open_: Any, end: Callable[[Any, Any], None]
) -> None:
    """At each level of a chain: at the root, in the middle, at the leaf, and at all of them."""
    depth, names = 4, 0
    for levels in ([0], [1], [2], [3], [0, 1], [1, 2], [2, 1], [1, 0], [0, 1, 2, 3]):

        def act(spans: list[Any], levels: list[int] = levels) -> None:
            for level in levels:
                end(spans[level], spans[0])

        open_(depth, act, [])
        names += depth
        assert spanguard.open_spans() == []
        assert current_span() is None
    traces = store.traces()
    assert sum(len(trace.data.spans) for trace in traces) == names
    assert len(traces) == 9


def test_many_children_of_an_ended_span_are_closed_once(
    store: Store, client: mlflow.MlflowClient
) -> None:
    with traced_span("root") as root:
        middle = traced_span("middle")
        span = middle.__enter__()
        held = [traced_span(f"child {n}", parent_id=span.span_id) for n in range(50)]
        for block in held:
            block.__enter__()
        client.end_span(root.trace_id, span.span_id)
    assert len(store.trace().data.spans) == 52
    assert spanguard.open_spans() == []


SCRIPT = """
import time, warnings
import mlflow, spanguard
from spanguard import traced_span
warnings.simplefilter("ignore")
with traced_span("request"):
    with traced_span("step"):
        time.sleep(4)
    with traced_span("another step"):
        pass
print("left")
with traced_span("next request"):
    pass
print(spanguard.open_spans())
"""


def test_mlflow_ends_a_request_that_overran(store: Store) -> None:
    """By MLFLOW_TRACE_TIMEOUT_SECONDS, from a thread of its own, in the middle of the blocks."""
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": store.uri,
        "MLFLOW_TRACE_TIMEOUT_SECONDS": "1",
        "MLFLOW_TRACE_TIMEOUT_CHECK_INTERVAL_SECONDS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert done.stdout.split("\n")[:2] == ["left", "[]"]


def test_a_span_that_is_ended_and_opened_under_in_two_threads(store: Store) -> None:
    """A child that adopts itself in the very moment in which its parent ends is not lost."""
    client = mlflow.MlflowClient()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(30):
            with traced_span("root") as root:
                block = traced_span("middle")
                middle = block.__enter__()
                start = threading.Barrier(2)

                def end(start: Any = start, root: Any = root, middle: Any = middle) -> None:
                    start.wait()
                    client.end_span(root.trace_id, middle.span_id)

                thread = threading.Thread(target=end)
                thread.start()
                start.wait()
                inner = traced_span("inner", parent_id=middle.span_id, trace_id=root.trace_id)
                inner.__enter__()
                thread.join()
            assert spanguard.open_spans() == []
    traces = store.traces()
    assert len(traces) == 30
    assert {len(trace.data.spans) for trace in traces} == {3}
