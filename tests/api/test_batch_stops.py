"""What stops a batch: its items' exceptions, an interrupt, and what it is wrongly given."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import pytest

import spanguard
from spanguard import trace_batch
from tests.api.batches import children, invert, root_of
from tests.store import Store, outcome, status


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_a_batch_that_stops_raises_the_items_own_exception(
    store: Store, executor: Executor | None, error: BaseException
) -> None:
    def work(n: int) -> int:
        if n == 1:
            raise error
        return n

    with pytest.raises(type(error)) as caught:
        trace_batch(itertools.count(), work, name="batch", executor=executor, on_error="raise")
    assert caught.value is error
    root, items = root_of(store), children(store)
    assert status(root) == "ERROR"
    assert status(items[1]) == "ERROR"
    assert root.outputs["failed_count"] == 1
    assert root.outputs["processed_count"] == len(items) - 1
    assert spanguard.open_spans() == []


def test_an_interrupt_stops_also_where_failures_are_recorded(
    store: Store, executor: Executor | None
) -> None:
    def work(n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace_batch(itertools.count(), work, name="batch", executor=executor)
    assert outcome(root_of(store)) == outcome(children(store)[0]) == "interrupted"
    assert spanguard.open_spans() == []


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """As in a terminal: a suite that a shell started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_raises")
def test_ctrl_c_while_waiting_stops_the_batch(store: Store) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def work(n: int) -> None:
        if n == 1:
            signal.pthread_kill(main, signal.SIGINT)

    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(KeyboardInterrupt):
            trace_batch(waiting_after(2), work, name="batch", executor=pool, max_in_flight=8)
    assert outcome(root_of(store)) == "interrupted"
    assert spanguard.open_spans() == []


def waiting_after(count: int) -> Iterator[int]:
    yield from range(count)
    threading.Event().wait(30)
    raise AssertionError("not interrupted")


def test_stopping_cancels_what_has_not_begun_and_waits_for_what_runs(store: Store) -> None:
    running, waiting, cancelled = threading.Event(), threading.Event(), threading.Event()
    begun: list[int] = []

    class Pool(ThreadPoolExecutor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            future = super().submit(fn, *args, **kwargs)
            if args[0] == 3:
                future.add_done_callback(lambda done: done.cancelled() and cancelled.set())
                waiting.set()
            return future

    def work(n: int) -> None:
        begun.append(n)
        if n == 0:
            assert running.wait(30) and waiting.wait(30)
            raise ValueError(n)
        running.set()
        assert cancelled.wait(30)  # both workers are busy until 3 has been cancelled

    with Pool(2) as pool:
        with pytest.raises(ValueError):
            trace_batch(itertools.count(), work, name="batch", executor=pool, on_error="raise")
        root = root_of(store)  # the pool has not been waited for, the items have
    assert 1 in begun and 3 not in begun
    assert root.outputs["failed_count"] == 1
    one = children(store)[1]
    assert (one.get_attribute("item_id"), status(one)) == (1, "OK")
    assert one.end_time_ns is not None and root.end_time_ns is not None
    assert one.end_time_ns <= root.end_time_ns


def test_an_exception_of_the_iterable_passes_through(
    store: Store, executor: Executor | None
) -> None:
    error = OSError("the file ended")

    def pull() -> Iterator[int]:
        yield 1
        raise error

    with pytest.raises(OSError) as caught:
        trace_batch(pull(), invert, name="batch", executor=executor)
    assert caught.value is error
    assert (status(root_of(store)), outcome(root_of(store))) == ("ERROR", "error")
    assert all(status(span) == "OK" for span in children(store))
    assert spanguard.open_spans() == []


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"on_error": "skip"}, ValueError),
        ({"max_in_flight": 0}, ValueError),
        ({"max_in_flight": True}, ValueError),
        ({"fn": 3}, TypeError),
    ],
)
def test_wrong_arguments_raise_before_anything_opens(
    store: Store, wrong: dict[str, Any], error: type[Exception]
) -> None:
    arguments: dict[str, Any] = {"items": [1], "fn": invert, "name": "batch"}
    with pytest.raises(error):
        trace_batch(**(arguments | wrong))
    assert store.traces() == []


def test_a_coroutine_function_is_refused() -> None:
    async def work(n: int) -> int:
        return n

    with pytest.raises(TypeError, match="coroutine function"):
        trace_batch([1], work, name="batch")


def test_an_executor_that_was_shut_down_is_a_mistake_in_the_call(store: Store) -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(RuntimeError, match="shutdown"):
        trace_batch(itertools.count(), invert, name="batch", executor=pool)
    assert status(root_of(store)) == "ERROR"


def test_an_item_that_somebody_cancels_has_failed(store: Store) -> None:
    class Cancelling(ThreadPoolExecutor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            future: Any = super().submit(fn, *args, **kwargs)
            if args[0] == 1:
                assert future.cancel()
                release.set()
            return future

    release = threading.Event()

    def work(n: int) -> None:
        assert release.wait(30)

    with Cancelling(1) as pool:
        batch = trace_batch([0, 1], work, name="batch", executor=pool)
    assert [item.ok for item in batch] == [True, False]
    assert [status(span) for span in children(store)] == ["OK", "ERROR"]
    assert children(store)[1].get_attribute("error_type").endswith("CancelledError")
