"""A batch is one trace with a span per item, wherever the items run and however they end."""

from __future__ import annotations

import gc
import io
import itertools
import multiprocessing
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import trace_batch, traced_span
from tests.api.batches import children, invert, root_of
from tests.conftest import reset_tracing
from tests.store import Store, outcome, own_attributes, status

# -- what is recorded ------------------------------------------------------------------------------


def test_a_batch_is_a_root_and_a_child_per_item(store: Store, executor: Executor | None) -> None:
    batch = trace_batch([1, 0, 3, 4], invert, name="batch", executor=executor)
    assert [item.result for item in batch] == [12, None, 4, 3]
    root, items = root_of(store), children(store)
    assert (root.name, status(root)) == ("batch", "OK")
    assert root.inputs == {"item_count": 4}
    assert root.outputs == {"processed_count": 3, "failed_count": 1, "success_rate": 0.75}
    assert [span.get_attribute("item_id") for span in items] == [0, 1, 2, 3]
    assert [span.name for span in items] == ["invert"] * 4
    assert [span.inputs for span in items] == [1, 0, 3, 4]
    assert [span.outputs for span in items] == [12.0, None, 4.0, 3.0]
    assert [status(span) for span in items] == ["OK", "ERROR", "OK", "OK"]
    assert own_attributes(items[1]) == {
        "item_id": 1,
        "spanguard.outcome": "error",
        "error": "division by zero",
        "error_type": "ZeroDivisionError",
        "error_message": "division by zero",
    }


def test_spans_of_the_function_nest_under_its_items(
    store: Store, executor: Executor | None
) -> None:
    def work(n: int) -> None:
        with traced_span(f"step {n}"):
            pass

    trace_batch(range(3), work, name="batch", executor=executor)
    items = children(store)
    steps = {s.name: s.parent_id for s in store.trace().data.spans if s.name.startswith("step")}
    assert steps == {f"step {n}": items[n].span_id for n in range(3)}


def test_a_batch_nests_under_the_ambient_span(store: Store, executor: Executor | None) -> None:
    def inner(n: int) -> None:
        trace_batch([n], invert, name=f"inner {n}")

    with traced_span("job") as job:
        trace_batch([1, 2], inner, name="batch", executor=executor)
        assert spanguard.current_span() is job
    spans = store.trace().data.spans
    (batch,) = [span for span in spans if span.name == "batch"]
    assert batch.parent_id == job.span_id
    items = children(store)
    inners = {span.name: span.parent_id for span in spans if span.name.startswith("inner ")}
    assert inners == {"inner 1": items[0].span_id, "inner 2": items[1].span_id}
    assert len(spans) == 1 + 1 + 2 + 2 + 2


def test_items_belong_to_the_batch_whatever_the_iterable_holds_open(
    store: Store, executor: Executor | None
) -> None:
    def pull() -> Iterator[int]:
        with traced_span("reading"):
            yield from (1, 2, 3)

    trace_batch(pull(), invert, name="batch", executor=executor)
    spans = store.trace().data.spans
    root = root_of(store)
    assert sorted(s.name for s in spans if s.parent_id == root.span_id) == ["invert"] * 3 + [
        "reading"
    ]


def test_without_tracing_the_work_is_done(store: Store, executor: Executor | None) -> None:
    mlflow.tracing.disable()
    try:
        batch = trace_batch([1, 0, 2], invert, name="batch", executor=executor)
    finally:
        mlflow.tracing.enable()
    assert [item.result for item in batch] == [12, None, 6]
    assert store.traces() == []


def test_a_batch_that_is_sampled_out_leaves_no_items(
    store: Store, executor: Executor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0")
    reset_tracing()
    batch = trace_batch([1, 0, 2], invert, name="batch", executor=executor)
    assert len(batch.succeeded) == 2
    assert store.traces() == []


def test_an_empty_batch_succeeded(store: Store, executor: Executor | None) -> None:
    batch = trace_batch([], invert, name="batch", executor=executor)
    assert (len(batch), batch.success_rate, batch.failed) == (0, 1.0, ())
    assert root_of(store).outputs == {"processed_count": 0, "failed_count": 0, "success_rate": 1.0}


@pytest.mark.parametrize(
    ("item_name", "names"),
    [
        (None, ["invert", "invert"]),
        ("number", ["number", "number"]),
        (lambda n: f"number {n}", ["number 1", "number 2"]),
    ],
)
def test_items_are_named(store: Store, item_name: Any, names: list[str]) -> None:
    trace_batch([1, 2], invert, name="batch", item_name=item_name)
    assert [span.name for span in children(store)] == names


def test_a_naming_function_that_fails_costs_the_name_only(store: Store) -> None:
    def name(n: int) -> str:
        raise LookupError(n)

    with pytest.warns(spanguard.SpanguardWarning, match="item_name raised LookupError"):
        batch = trace_batch([1, 2], invert, name="batch", item_name=name)
    assert [item.result for item in batch] == [12, 6]
    assert [span.name for span in children(store)] == ["invert", "invert"]


def test_an_expected_exception_is_no_failure(store: Store, executor: Executor | None) -> None:
    batch = trace_batch(
        [1, 0],
        invert,
        name="batch",
        executor=executor,
        expected=ZeroDivisionError,
        on_error="raise",
    )
    assert (batch.success_rate, batch[1].ok, type(batch[1].error)) == (1, True, ZeroDivisionError)
    assert [(status(s), outcome(s)) for s in children(store)] == [("OK", "ok"), ("OK", "expected")]
    assert root_of(store).outputs["processed_count"] == 2


def test_attributes_and_type_are_the_roots(store: Store) -> None:
    trace_batch([1], invert, name="batch", span_type="CHAIN", attributes={"run": 7})
    assert root_of(store).span_type == "CHAIN"
    assert own_attributes(root_of(store)) == {"run": 7}


def test_strict_is_handed_on(store: Store, client: Any, executor: Executor | None) -> None:
    def leak(n: int) -> None:
        span = spanguard.current_span()
        assert span is not None
        client.start_span("leaked", span.trace_id, span.span_id)

    batch = trace_batch([1], leak, name="batch", executor=executor, strict=True)
    assert isinstance(batch[0].error, spanguard.OrphanedSpanError)


# -- streaming -------------------------------------------------------------------------------------


def test_here_the_next_item_is_pulled_when_the_last_is_done() -> None:
    events: list[str] = []

    def pull() -> Iterator[int]:
        for n in range(3):
            events.append(f"pull {n}")
            yield n

    trace_batch(pull(), lambda n: events.append(f"work {n}"), name="batch")
    assert events == ["pull 0", "work 0", "pull 1", "work 1", "pull 2", "work 2"]


@pytest.mark.parametrize(("max_in_flight", "most"), [(None, 4), (3, 3), (1, 1)])
def test_no_more_are_in_flight_than_asked_for(max_in_flight: int | None, most: int) -> None:
    pulled = finished = ahead = 0
    lock = threading.Lock()
    reached = threading.Event()

    def pull() -> Iterator[int]:
        nonlocal pulled, ahead
        for n in range(40):
            with lock:
                pulled += 1
                ahead = max(ahead, pulled - finished)
            if pulled >= most:
                reached.set()
            yield n

    def work(n: int) -> None:
        nonlocal finished
        assert reached.wait(30)  # until the batch has pulled as far ahead as it goes
        with lock:
            finished += 1

    with ThreadPoolExecutor(2) as pool:
        batch = trace_batch(pull(), work, name="b", executor=pool, max_in_flight=max_in_flight)
    assert len(batch) == len(batch.succeeded) == 40
    assert ahead == most


def test_inputs_are_let_go_of(executor: Executor | None) -> None:
    class Item:
        pass

    alive: weakref.WeakSet[Item] = weakref.WeakSet()
    most = 0

    def pull() -> Iterator[Item]:
        nonlocal most
        for _ in range(30):
            item = Item()
            alive.add(item)
            most = max(most, len(alive))
            yield item

    batch = trace_batch(pull(), id, name="batch", executor=executor)
    gc.collect()
    assert len(batch) == 30
    assert len(alive) == 0
    assert most <= 12


def test_results_come_in_input_order_however_they_end() -> None:
    second_done = threading.Event()

    def work(n: int) -> int:
        if n == 0:
            assert second_done.wait(30)
        else:
            second_done.set()
        return n

    with ThreadPoolExecutor(2) as pool:
        batch = trace_batch([0, 1], work, name="batch", executor=pool)
    assert [(item.index, item.result) for item in batch] == [(0, 0), (1, 1)]


def test_the_result_is_a_sequence_of_outcomes() -> None:
    batch = trace_batch([1, 0, 2], invert, name="batch")
    assert len(batch) == 3
    assert [item.index for item in batch.succeeded] == [0, 2]
    assert [item.index for item in batch.failed] == [1]
    assert batch.success_rate == 2 / 3
    assert batch[-1] == list(batch)[2]
    assert batch[:2] == tuple(batch)[:2]
    assert (batch[1].ok, batch[1].result) == (False, None)
    assert isinstance(batch[1].error, ZeroDivisionError)
    assert repr(batch) == "<BatchResult: 2 succeeded, 1 failed>"


# -- processes -------------------------------------------------------------------------------------


class Awkward(Exception):
    """Pickles, and cannot be unpickled: that breaks a process pool which lets it through."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)


def in_a_worker(n: int) -> tuple[int, int]:
    if n == 1:
        raise LookupError("one")
    if n == 2:
        raise Awkward(2, "two")
    with traced_span("step"):
        return n, os.getpid()


def die(n: int) -> int:
    if n == 1:
        os._exit(9)
    return n


def process_pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def test_in_processes_it_is_one_trace(store: Store) -> None:
    with process_pool() as pool:
        batch = trace_batch(range(4), in_a_worker, name="batch", executor=pool)
    assert [item.ok for item in batch] == [True, False, False, True]
    first = batch[0].result
    assert first is not None and first[1] != os.getpid()
    assert isinstance(batch[1].error, LookupError)
    assert "in_a_worker" in str(batch[1].error.__cause__)
    assert isinstance(batch[2].error, RuntimeError)
    assert str(batch[2].error).endswith("Awkward: two")
    items = children(store)
    assert [status(span) for span in items] == ["OK", "ERROR", "ERROR", "OK"]
    assert [span.inputs for span in items] == [0, 1, 2, 3]
    assert items[2].get_attribute("error_type").endswith("Awkward")
    spans = store.trace().data.spans
    steps = [span.parent_id for span in spans if span.name == "step"]
    assert sorted(steps) == sorted([items[0].span_id, items[3].span_id])
    assert root_of(store).outputs == {"processed_count": 2, "failed_count": 2, "success_rate": 0.5}


@pytest.mark.parametrize("kind", ["collection", "endless iterator"])
def test_a_killed_worker_fails_its_items_and_loses_no_trace(store: Store, kind: str) -> None:
    items = range(8) if kind == "collection" else itertools.count()
    with process_pool() as pool:
        batch = trace_batch(items, die, name="batch", executor=pool)
    assert not batch[1].ok and isinstance(batch[1].error, BrokenExecutor)
    if kind == "collection":
        assert len(batch) == 8
        assert [item.index for item in batch.failed] == list(range(len(batch.succeeded), 8))
    root, spans = root_of(store), children(store)
    assert status(root) == "ERROR"
    assert "BrokenProcessPool" in str(root.get_attribute("error_type"))
    assert root.outputs["failed_count"] == len(batch.failed) > 0
    assert [span.get_attribute("item_id") for span in spans] == [item.index for item in batch]
    assert [status(s) for s in spans] == ["OK" if item.ok else "ERROR" for item in batch]


# -- progress --------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("items", [[1, 0, 2], iter([1, 0, 2])])
def test_progress_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch, items: Any) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    trace_batch(items, invert, name="[batch]", progress=True)
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "[batch]" in shown
    assert "3/3" in shown or "3/?" in shown


@pytest.mark.parametrize(("stream", "progress"), [(io.StringIO, True), (Terminal, False)])
def test_progress_is_shown_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], progress: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    trace_batch([1, 2], invert, name="batch", progress=progress)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
