"""One guarded client in many threads and tasks, and what is kept of its spans."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
import weakref
from typing import Any

import pytest
from mlflow import MlflowClient

import spanguard
from spanguard import traced_span
from spanguard._api.held import _ended, _started
from spanguard.exceptions import (
    SpanAlreadyEndedWarning,
)
from tests.api.raw_code import copy_of
from tests.store import Store


def test_one_client_in_many_threads(store: Store, either: Any) -> None:
    """Traces of their own, and children in a trace of all."""
    shared = either.start_trace("shared")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(3):
                root = either.start_trace(f"{number}.{turn}", new_trace=True)
                child = either.start_span("child", root.trace_id, root.span_id)
                other = either.start_span("other", shared.trace_id, shared.span_id)
                either.end_span(root.trace_id, child.span_id, outputs=number)
                either.end_span(shared.trace_id, other.span_id)
                either.end_trace(copy_of(root.trace_id), outputs=number)
        except BaseException as error:
            failures.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # No more of them: on MLflow 3.10 each stores its own spans, and loses them without a word
        # when SQLite keeps it waiting for 20 seconds.
        threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        either.end_trace(shared.trace_id)
    assert failures == []
    traces = store.traces()
    assert sorted(len(trace.data.spans) for trace in traces) == [2] * 15 + [16]
    for trace in traces:
        outputs = {span.outputs for span in trace.data.spans if span.outputs is not None}
        assert len(outputs) <= 1, "an end reached another thread's span"


def test_jobs_of_many_tasks_in_one_request(store: Store, either: Any) -> None:
    async def job(number: int) -> None:
        root = either.start_trace(f"job {number}")
        await asyncio.sleep(0)
        child = either.start_span("step", root.trace_id, root.span_id)
        await asyncio.sleep(0)
        either.end_span(root.trace_id, child.span_id)
        await asyncio.sleep(0)
        # Half of them have only a copy of the id: then it is the task that tells.
        either.end_trace(copy_of(root.trace_id) if number % 2 else root.trace_id, outputs=number)

    async def main() -> None:
        with traced_span("request"):
            await asyncio.gather(*(job(number) for number in range(20)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main())
    trace = store.trace()
    outputs = {span.name: span.outputs for span in trace.data.spans if span.name.startswith("job")}
    assert outputs == {f"job {number}": number for number in range(20)}


def test_an_end_in_two_threads_at_once(store: Store, guarded: MlflowClient) -> None:
    for _ in range(20):
        root = guarded.start_trace("root")
        barrier = threading.Barrier(2)

        def end(root: Any = root, barrier: Any = barrier) -> None:
            barrier.wait()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                guarded.end_trace(root.trace_id)

        threads = [threading.Thread(target=end) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(store.traces()) == 20


@pytest.mark.parametrize("how", ["guard", "raw", "span", "ancestor", "close all"])
def test_nothing_outlives_its_span(either: Any, client: MlflowClient, how: str) -> None:
    _ended.clear()
    spans = weakref.WeakSet[Any]()
    for _ in range(20):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            root = either.start_trace("root")
            child = either.start_span("child", root.trace_id, root.span_id)
            spans.add(child.__wrapped__)
            if how == "guard":
                either.end_span(root.trace_id, child.span_id)
            elif how == "raw":
                client.end_span(root.trace_id, child.span_id)
            elif how == "span":
                child.end()
            elif how == "close all":
                spanguard.close_open_spans()
            either.end_trace(root.trace_id)
    del root, child
    assert spanguard.flush(30)
    gc.collect()
    assert not either._self_home.open
    assert not _started
    assert spanguard.open_spans() == []
    assert len(spans) <= 1, "the last one may still be in a local of MLflow's exporter"
    assert len(_ended) == 20 * 4


def test_what_is_remembered_of_ended_spans_is_bounded(
    monkeypatch: pytest.MonkeyPatch, guarded: MlflowClient
) -> None:
    monkeypatch.setattr("spanguard._api.held._MAX_REMEMBERED", 50)
    _ended.clear()
    root = guarded.start_trace("root")
    first = guarded.start_span("first", root.trace_id, root.span_id)
    guarded.end_span(root.trace_id, first.span_id)
    for number in range(100):
        span = guarded.start_span(f"{number}", root.trace_id, root.span_id)
        guarded.end_span(root.trace_id, span.span_id)
    assert len(_ended) == 50
    with pytest.warns(SpanAlreadyEndedWarning):
        guarded.end_span(root.trace_id, span.span_id)
    with pytest.warns(SpanAlreadyEndedWarning):  # MLflow has it still
        guarded.end_span(root.trace_id, first.span_id)
    guarded.end_trace(root.trace_id)
