"""Processes that run for weeks: nothing grows, and leaks are told of."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
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

import spanguard
from spanguard import TraceStateManager, traced_span
from spanguard._mlflow import queue
from spanguard.exceptions import SpanOpenTooLongWarning
from tests.mlflow.small_buffer import limit_buffer
from tests.store import Store, await_true

pytestmark = pytest.mark.versions


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
    await_true(lambda: watchdogs() == [])  # one that an earlier test stopped may still end
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
