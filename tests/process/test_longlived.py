"""Processes that run for weeks: no open trace is lost, nothing grows, and leaks are told of."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from mlflow.tracing.trace_manager import InMemoryTraceManager

import spanguard
from spanguard import TraceContext, TraceStateManager, traced_span
from spanguard._mlflow import keeping, processor, queue
from spanguard._mlflow.buffer import ROOM, KeepingBuffer
from spanguard.exceptions import SpanOpenTooLongWarning, TraceLostWarning
from tests.store import Store, await_true

pytestmark = pytest.mark.versions

# -- open traces outlive MLflow's limits -------------------------------------------------------


def limit_buffer(monkeypatch: pytest.MonkeyPatch, *, size: int = 1000, ttl: int = 3600) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_BUFFER_MAX_SIZE", str(size))
    monkeypatch.setenv("MLFLOW_TRACE_BUFFER_TTL_SECONDS", str(ttl))
    InMemoryTraceManager.reset()


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
        assert tasks.maxsize == 1000 * ROOM
    if batch is not None:
        assert batch._queue.maxlen == batch._max_queue_size == 2048 * ROOM


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


# -- nothing grows -------------------------------------------------------------------------------


def in_a_context(elsewhere: ThreadPoolExecutor) -> None:
    manager = managers[0]
    root = manager.push_trace("request", inputs={"n": 1})
    manager.push_trace("step")
    manager.push_trace("inner").set_outputs(1)
    manager.pop_trace(outputs=1)
    manager.pop_trace()
    assert manager.pop_trace() is root


def left_to_the_root(elsewhere: ThreadPoolExecutor) -> None:
    manager = managers[0]
    root = manager.push_trace("request")
    manager.push_trace("leaked")
    mlflow.MlflowClient().start_span("raw", root.trace_id, root.span_id)
    manager.pop_trace(root)


def popped_in_another_thread(elsewhere: ThreadPoolExecutor) -> None:
    manager = managers[0]
    spans = [manager.push_trace("request"), manager.push_trace("step")]
    for span in reversed(spans):
        elsewhere.submit(manager.pop_trace, span).result()


def pushed_in_another_thread(elsewhere: ThreadPoolExecutor) -> None:
    manager = managers[0]
    manager.pop_trace(elsewhere.submit(manager.push_trace, "request", new_trace=True).result())


def overlapping(elsewhere: ThreadPoolExecutor) -> None:
    """The next begins before the last one ends, without end."""
    manager = managers[0]
    waiting.append(Context().run(manager.push_trace, "request"))
    if len(waiting) > 3:
        manager.pop_trace(waiting.pop(0))


def shared_by_all(elsewhere: ThreadPoolExecutor) -> None:
    manager = managers[1]
    elsewhere.submit(manager.push_trace, "request").result()
    manager.push_trace("step")
    manager.pop_trace()
    manager.pop_trace()


def in_tasks(elsewhere: ThreadPoolExecutor) -> None:
    manager = managers[0]

    async def child() -> None:
        with manager.trace("child"):
            await asyncio.sleep(0)

    async def main() -> None:
        manager.push_trace("request")
        await asyncio.gather(child(), child())
        manager.pop_trace()

    asyncio.run(main())


def popping_nothing(elsewhere: ThreadPoolExecutor) -> None:
    manager = managers[0]
    span = manager.push_trace("request")
    manager.pop_trace(span)
    manager.pop_trace(span)
    assert manager.pop_trace() is None


managers: list[TraceStateManager] = []
waiting: list[Any] = []


@pytest.fixture
def nothing_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let MLflow's exporter drop: it does not even take ended traces out of the buffer."""
    monkeypatch.setattr(MlflowV3SpanExporter, "export", lambda exporter, spans: None)
    limit_buffer(monkeypatch, size=5)
    managers[:] = [TraceStateManager(), TraceStateManager(scope="process")]
    waiting.clear()


def memory_after(
    work: Callable[[ThreadPoolExecutor], None], elsewhere: ThreadPoolExecutor, times: int
) -> tuple[int, Counter[str]]:
    """Do the work so many times in this context; return the bytes in use and our objects then."""
    for _ in range(times):
        work(elsewhere)
    queue.hand_over()
    gc.collect()
    kinds = (type(found) for found in gc.get_objects())  # not isinstance(): some stand in
    ours = Counter(k.__qualname__ for k in kinds if str(k.__module__).startswith("spanguard."))
    return tracemalloc.get_traced_memory()[0], ours


PATTERNS = [
    in_a_context,
    left_to_the_root,
    popped_in_another_thread,
    pushed_in_another_thread,
    overlapping,
    shared_by_all,
    in_tasks,
    popping_nothing,
]


@pytest.mark.filterwarnings("ignore::spanguard.SpanguardWarning")
@pytest.mark.parametrize("work", PATTERNS)
def test_a_manager_does_not_grow(
    work: Callable[[ThreadPoolExecutor], None], store: Store, nothing_exported: None
) -> None:
    with ThreadPoolExecutor(1) as elsewhere:
        tracemalloc.start()
        try:
            readings = [memory_after(work, elsewhere, 40) for _ in range(4)]
        finally:
            tracemalloc.stop()
        grown = [after - before for (before, _), (after, _) in pairwise(readings)]
        # What leaks, leaks each time; what another thread imports meanwhile is there once.
        assert min(grown) < 40_000  # one span is 4,000 and more
        assert readings[-1][1] == readings[-2][1]
        assert len(spanguard.open_spans()) == len(waiting)
        for span in waiting:
            managers[0].pop_trace(span)
    assert spanguard.open_spans() == []
    assert not any(manager._pushed for manager in managers)


def test_the_memory_benchmark_runs() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    done = run_python(script, "--pushes", "400", "--warm-up", "200")
    assert done.returncode == 0, done.stderr
    assert "400 push/pops" in done.stdout and "flat" in done.stdout


# -- the watchdog --------------------------------------------------------------------------------


def run_python(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(spanguard.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": source, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def watchdogs() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "spanguard-watchdog"]


def told(caplog: pytest.LogCaptureFixture) -> str:
    lines = [r.getMessage() for r in caplog.records if r.name == "spanguard"]
    return "\n".join(line for line in lines if "open for longer" in line)


def line_here() -> int:
    return sys._getframe(1).f_lineno


def test_a_span_that_stays_open_is_told_of_with_its_line(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with spanguard.watch(open_longer_than=0.05), pytest.warns(SpanOpenTooLongWarning) as caught:
        with traced_span("slow", strict=True):
            line = line_here() - 1
            await_true(lambda: told(caplog) and caught.list)
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, line)
    for text in (str(warning.message), told(caplog)):
        assert "'slow'" in text and f"test_longlived.py:{line} in test_a_span" in text
    assert store.trace().info.status.value == "OK"


def test_each_span_is_told_of_once_whichever_api_opened_it(
    store: Store, client: mlflow.MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    with spanguard.watch(open_longer_than=0.05), warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody is there to catch it: the log has it
        root = client.start_trace("raw")
        await_true(lambda: "'raw'" in told(caplog))
        with mlflow.start_span("fluent"):
            await_true(lambda: "'fluent'" in told(caplog))
            with traced_span("ours"):
                await_true(lambda: "'ours'" in told(caplog))
    client.end_trace(root.trace_id)
    assert [told(caplog).count(f"'{name}'") for name in ("raw", "fluent", "ours")] == [1, 1, 1]
    assert "raised" not in caplog.text and "failed" not in caplog.text


def test_a_second_span_of_the_same_line_is_in_the_log_and_no_second_warning(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with spanguard.watch(open_longer_than=0.05), pytest.warns(SpanOpenTooLongWarning) as caught:
        for name in ("first", "second"):
            with traced_span(name):
                await_true(lambda name=name: f"'{name}'" in told(caplog))
        with traced_span("elsewhere"):  # told of after it: then a second warning would be there
            await_true(lambda: len(caught) > 1)
    assert [w.lineno for w in caught][1] != caught[0].lineno


def test_spans_within_the_limit_are_not_told_of(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with spanguard.watch(open_longer_than=0.5):
        with traced_span("late"):
            for _ in range(20):
                with traced_span("quick"):
                    pass
            await_true(lambda: told(caplog))
    assert "'late'" in told(caplog) and "'quick'" not in told(caplog)


def test_it_is_off_by_default_and_a_block_restores_what_was() -> None:
    assert watchdogs() == []
    outer = spanguard.watch(100)
    (before,) = watchdogs()
    with spanguard.watch(open_longer_than=200) as setting:
        assert setting.open_longer_than == 200
        before.join(30)
        assert len(watchdogs()) == 1
    with spanguard.watch(None):
        await_true(lambda: watchdogs() == [])
    assert len(watchdogs()) == 1
    with outer:
        pass
    await_true(lambda: watchdogs() == [])


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), "300", True])
def test_a_limit_that_is_none_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match="positive number of seconds"):
        spanguard.watch(limit)
    assert watchdogs() == []


def test_it_does_not_keep_the_process(store: Store) -> None:
    script = "import spanguard; spanguard.watch(3600); spanguard.traced_span('open').__enter__()"
    done = run_python("-c", script, MLFLOW_TRACKING_URI=store.uri)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_watches_its_own_spans_only(store: Store) -> None:
    script = """
    import logging, os, sys, threading
    import spanguard

    told = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record):
            if "open for longer" in record.getMessage():
                print(os.getpid() == parent, record.getMessage(), flush=True)
                told.set()

    logging.getLogger("spanguard").addHandler(Listener())
    parent = os.getpid()
    with spanguard.traced_span("parents"):
        with spanguard.watch(0.3):
            assert told.wait(60)
            told.clear()
            pid = os.fork()
            if pid == 0:
                with spanguard.traced_span("childs"):
                    os._exit(0 if told.wait(60) else 1)
            assert os.waitpid(pid, 0)[1] == 0
    """
    done = run_python("-c", textwrap.dedent(script), MLFLOW_TRACKING_URI=store.uri)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("True 1 spans") and "'parents'" in first
    assert second.startswith("False 1 spans") and "'childs'" in second
