"""Open traces outlive the limits of MLflow's buffer, and what is leaked there is bounded."""

from __future__ import annotations

import time
from contextvars import Context
from typing import Any

import mlflow
import pytest
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from mlflow.tracing.trace_manager import InMemoryTraceManager

import spanguard
from spanguard import TraceContext, TraceStateManager, traced_span
from spanguard._mlflow import keeping, processor, queue
from spanguard._mlflow.buffer import ROOM, KeepingBuffer
from spanguard.exceptions import TraceLostWarning
from tests.mlflow.small_buffer import limit_buffer
from tests.store import Store, await_true

pytestmark = pytest.mark.versions


# -- open traces outlive MLflow's limits -------------------------------------------------------


def buffered() -> Any:
    return InMemoryTraceManager.get_instance()._traces


def open_past_the_limits(count: int, children: int, ttl: int) -> None:
    """Open so many traces at once, by each API; let them get old; end them."""
    client = mlflow.MlflowClient()
    raw = client.start_trace("raw")
    manager = TraceStateManager()
    pushed = manager.push_trace("pushed")
    fluent = mlflow.start_span("fluent")
    with fluent:
        blocks = [traced_span(f"root {n}", new_trace=True) for n in range(count)]
        spans = [block.__enter__() for block in blocks]
        due = time.monotonic() + ttl
        await_true(lambda: time.monotonic() > due)
        with traced_span("one more, to make room for", new_trace=True):
            pass
        for n, block in reversed(list(enumerate(blocks))):
            if n < children:
                with traced_span(f"child {n}", trace_id=spans[n].trace_id):
                    pass
            block.__exit__(None, None, None)
    child = client.start_span("raw child", raw.trace_id, raw.span_id)
    client.end_span(raw.trace_id, child.span_id)
    client.end_trace(raw.trace_id)
    manager.pop_trace(pushed)


def spans_by_root(store: Store) -> dict[str, int]:
    return {t.info.tags["mlflow.traceName"]: len(t.data.spans) for t in store.traces()}


def test_1500_open_traces_and_a_ttl_of_two_seconds(
    store: Store, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_buffer(monkeypatch, ttl=2)
    blocks = [traced_span(f"root {n}", new_trace=True) for n in range(1500)]
    spans = [block.__enter__() for block in blocks]
    due = time.monotonic() + 2
    await_true(lambda: time.monotonic() > due)
    with traced_span("one more, to make room for", new_trace=True):
        pass
    assert all(span.trace_id in buffered() for span in spans)
    # Storing all of them takes MLflow a minute: these are from the start, the middle, the end.
    stored = [*range(10), *range(745, 755), *range(1490, 1500)]
    for n in reversed(stored):
        with traced_span("child", trace_id=spans[n].trace_id):
            pass
        blocks.pop(n).__exit__(None, None, None)
    found = spans_by_root(store)
    assert [found.get(f"root {n}") for n in stored] == [2] * 30
    monkeypatch.setattr(MlflowV3SpanExporter, "export", lambda exporter, spans: None)
    for block in reversed(blocks):
        block.__exit__(None, None, None)
    queue.hand_over()


def test_open_traces_of_each_api_survive(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_buffer(monkeypatch, size=10, ttl=1)
    open_past_the_limits(60, children=60, ttl=1)
    found = spans_by_root(store)
    assert [found.get(f"root {n}") for n in range(60)] == [2] * 60
    assert (found["raw"], found["pushed"]) == (2, 2)  # the fluent span is the pushed one's child


def test_a_span_of_ours_keeps_a_raw_trace_whatever_raw_code_leaks(
    store: Store, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_buffer(monkeypatch, size=3)
    root = client.start_trace("kept")
    with pytest.warns(TraceLostWarning):
        with traced_span("ours", trace_id=root.trace_id):
            for n in range(3 * ROOM + 10):
                Context().run(client.start_trace, f"leaked {n}")
    client.end_trace(root.trace_id)
    assert spans_by_root(store) == {"kept": 2}


def test_leaked_raw_traces_are_bounded_and_the_loss_is_told(
    store: Store, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_buffer(monkeypatch, size=3)
    with traced_span("first"):
        pass
    with pytest.warns(TraceLostWarning, match="leaked 0 ") as caught:
        ids = [client.start_trace(f"leaked {n}").trace_id for n in range(100)]
    assert caught[0].filename == __file__
    # The oldest go, as with MLflow.
    assert list(buffered()) == ids[-3 * ROOM :]
    assert len(InMemoryTraceManager.get_instance()._otel_id_to_mlflow_trace_id) == 3 * ROOM
    assert len(spanguard.open_spans()) == 3 * ROOM


def test_ended_traces_wait_for_their_export(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_buffer(monkeypatch, size=10)
    monkeypatch.setattr(MlflowV3SpanExporter, "export", lambda exporter, spans: None)
    for n in range(35):
        with traced_span(f"root {n}"):
            pass
    assert len(buffered()) == 35
    monkeypatch.setattr(keeping, "EXPORT_SECONDS", 0.0)
    for n in range(15):
        with traced_span(f"later {n}"):
            pass
    assert len(buffered()) <= 10


def test_the_export_queues_have_room_for_a_burst(store: Store) -> None:
    with traced_span("first"):
        pass
    tasks, batch = processor.pending_tasks(), processor.batch_processor()
    if tasks is not None:
        # Of ten spans each: a task for the trace, and one for every five of its spans.
        of_one = 1 + 10 // (batch._max_export_batch_size if batch is not None else 1)
        assert tasks.maxsize == 1000 * of_one * ROOM
    if batch is not None:
        assert batch._queue.maxlen == batch._max_queue_size == 1000 * 10 * ROOM


def test_a_queue_size_that_the_user_has_set_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE", "17")
    with traced_span("first"):
        pass
    tasks = processor.pending_tasks()
    assert tasks is None or tasks.maxsize == 17


def test_a_trace_of_another_process_is_kept_while_its_context_is_attached(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_buffer(monkeypatch, size=3)
    headers = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    with TraceContext.from_headers(headers).attach():
        with traced_span("arrives first"):
            pass
        (trace_id,) = buffered()
        monkeypatch.setattr(keeping, "EXPORT_SECONDS", 0.0)
        blocks = [traced_span(f"other {n}", new_trace=True) for n in range(20)]
        for block in blocks:
            block.__enter__()
        assert trace_id in buffered()
        for block in reversed(blocks):
            block.__exit__(None, None, None)
    assert trace_id not in buffered()


def test_a_reset_of_mlflows_is_noticed(store: Store) -> None:
    for _ in range(2):
        with traced_span("root"):
            assert type(buffered()) is KeepingBuffer
        mlflow.tracing.reset()
        InMemoryTraceManager.reset()
        assert type(buffered()) is not KeepingBuffer


# -- the buffer by itself ------------------------------------------------------------------------


class Policy:
    """Traces are names; what is busy or guarded is said here."""

    def __init__(self) -> None:
        self.busy: set[str] = set()
        self.guarded: set[str] = set()
        self.dropped_ids: list[str] = []

    def guard_of(self, trace: str) -> str | None:
        return trace if trace in self.guarded else None

    def is_guarded(self, trace: str, guard: str | None) -> bool:
        return trace in self.guarded

    def is_busy(self, trace: str) -> bool:
        return trace in self.busy or trace in self.guarded

    def dropped(self, trace_id: str, trace: str) -> None:
        self.dropped_ids.append(trace_id)


def fill(buffer: KeepingBuffer[str], *names: str) -> None:
    for name in names:
        buffer[name] = name


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{n}" for n in range(count)]


def test_idle_traces_go_by_number_and_age_the_oldest_first() -> None:
    now, policy = [0.0], Policy()
    buffer = KeepingBuffer(3, 10.0, policy, lambda: now[0])
    fill(buffer, "a", "b", "c", "d")
    assert (list(buffer), policy.dropped_ids) == (["b", "c", "d"], ["a"])
    now[0] = 10.0
    fill(buffer, "e")
    assert list(buffer) == ["e"]


def test_busy_traces_stay_up_to_the_wider_limit() -> None:
    now, policy = [0.0], Policy()
    buffer = KeepingBuffer(2, 10.0, policy, lambda: now[0])
    policy.busy.update(names("b", 9))
    fill(buffer, *names("b", 2 * ROOM))
    now[0] = 100.0
    assert list(buffer) == names("b", 2 * ROOM)
    policy.busy.discard("b0")
    fill(buffer, "b8")
    assert policy.dropped_ids == ["b0"], "it was kept as busy and is no longer"
    policy.busy.add("c")
    fill(buffer, "c")
    assert policy.dropped_ids == ["b0", "b1"], "the oldest goes where all are busy"


def test_guarded_traces_stay_and_take_no_room_from_others() -> None:
    now, policy = [0.0], Policy()
    buffer = KeepingBuffer(2, 10.0, policy, lambda: now[0])
    policy.guarded.update(names("g", 500))
    policy.busy.update(names("b", 8))
    fill(buffer, *names("g", 500))
    now[0] = 100.0
    fill(buffer, *names("b", 2 * ROOM))
    assert policy.dropped_ids == []
    policy.guarded.clear()
    fill(buffer, *names("idle", 500))
    assert len(buffer) <= 2 * ROOM


def test_what_is_popped_deleted_or_cleared_leaves_nothing_behind() -> None:
    policy = Policy()
    buffer = KeepingBuffer(2, 10.0, policy)
    policy.busy.update(names("b", 5))
    fill(buffer, *names("b", 5))
    assert buffer.pop("b0") == "b0" and buffer.pop("b0", None) is None
    del buffer["b1"]
    assert len(buffer._held) == len(buffer._unseen) + len(buffer._busy) == len(buffer) == 3
    buffer.clear()
    assert not buffer and not buffer._held and not buffer._unseen and not buffer._busy
