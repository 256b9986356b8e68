"""What must hold after a random program, whichever face it was written for."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import mlflow
from hypothesis import HealthCheck, Phase, settings
from mlflow.entities import Trace

import spanguard
from spanguard import current_span
from spanguard._process import listening
from tests.store import outcome, status


def programs(count: int) -> settings:
    """Return how hypothesis runs so many programs on a real store."""
    return settings(
        max_examples=count,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking real stores: minutes
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@contextmanager
def run_one() -> Iterator[list[int]]:
    """Run one program in the block; afterwards the list has the ids of the spans that ended."""
    ended: list[int] = []
    original = listening.watcher.on_end

    def count(span: Any) -> None:
        ended.append(span.context.span_id)
        original(span)

    listening.watcher.on_end = count  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield ended
    finally:
        listening.watcher.on_end = original  # type: ignore[method-assign]


def stored(trace_ids: Collection[str]) -> list[Trace]:
    """Close what is open, and read the traces back from the store."""
    spanguard.close_open_spans()
    assert spanguard.flush(60)
    client = mlflow.MlflowClient()
    return [client.get_trace(trace_id) for trace_id in trace_ids]


def assert_nothing_is_left() -> None:
    """Check that the context is as found, and nothing is registered."""
    assert mlflow.get_current_active_span() is None
    assert current_span() is None
    assert spanguard.open_spans() == []


def assert_whole(traces: list[Trace], ended: list[int], opened: int) -> None:
    """Check that every span ended once, and that every one of them is in a readable trace."""
    assert None not in traces
    assert len(ended) == len(set(ended))
    spans = [span for trace in traces for span in trace.data.spans]
    assert len(spans) == opened
    assert all(trace.info.state.value in {"OK", "ERROR"} for trace in traces)
    ids = {span.span_id for span in spans}
    for span in spans:
        assert span.end_time_ns is not None
        assert status(span) in {"OK", "ERROR"}
        assert span.parent_id is None or span.parent_id in ids
        if outcome(span) == "orphaned":
            assert span.get_attribute("spanguard.opened_at")
            assert span.get_attribute("spanguard.orphaned_by")
            assert status(span) == "ERROR"


def in_thread(work: Callable[[], Any]) -> None:
    """Do work in a thread of its own, and raise here what it raises."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
