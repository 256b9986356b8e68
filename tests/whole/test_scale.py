"""Many blocks, tasks and threads at once: each trace is whole, and no context grows."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import current_span, traced_span
from tests.store import Store, parents

pytestmark = pytest.mark.versions


def test_300_nested_blocks(store: Store) -> None:
    def nest(depth: int) -> None:
        if depth < 300:
            with traced_span(f"level {depth}"):
                nest(depth + 1)

    nest(0)
    found = parents(store)
    assert len(found) == 300
    assert all(found[f"level {n}"] == f"level {n - 1}" for n in range(1, 300))
    assert mlflow.get_current_active_span() is None


def test_1000_tasks(store: Store) -> None:
    async def work(number: int) -> None:
        async with traced_span(f"task {number}") as span:
            await asyncio.sleep(0.001 * (number % 7))
            assert current_span() is span
            with traced_span(f"inner {number}"):
                await asyncio.sleep(0)
            assert current_span() is span

    async def main() -> None:
        async with traced_span("root") as root:
            await asyncio.gather(*(work(number) for number in range(1000)))
            assert current_span() is root

    asyncio.run(main())
    found = parents(store)
    assert len(found) == 2001
    assert all(found[f"task {n}"] == "root" for n in range(1000))
    assert all(found[f"inner {n}"] == f"task {n}" for n in range(1000))


def test_16_threads(store: Store) -> None:
    failures: list[BaseException] = []

    def work(root: Any, number: int) -> None:
        try:
            for turn in range(10):
                with traced_span(f"{number}.{turn}", trace_id=root.trace_id) as span:
                    with traced_span(f"{number}.{turn} inner"):
                        pass
                    assert current_span() is span
                assert current_span() is None
        except BaseException as error:
            failures.append(error)

    with traced_span("root") as root:
        threads = [threading.Thread(target=work, args=(root, n)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    found = parents(store)
    assert len(found) == 1 + 16 * 10 * 2
    assert all(found[f"{n}.{t}"] == "root" for n in range(16) for t in range(10))
    assert all(found[f"{n}.{t} inner"] == f"{n}.{t}" for n in range(16) for t in range(10))


def test_1000_blocks_beside_one_another_left_first_opened_first(store: Store) -> None:
    with traced_span("root") as root:
        blocks = [
            traced_span(f"child {n}", trace_id=root.trace_id, parent_id=root.span_id)
            for n in range(1000)
        ]
        for block in blocks:
            block.__enter__()
        held = contextvars.copy_context()
        for block in blocks:
            block.__exit__(None, None, None)
        assert current_span() is root
        assert held.run(current_span) is root
    assert held.run(mlflow.get_current_active_span) is None
    found = parents(store)
    assert all(found[f"child {n}"] == "root" for n in range(1000))


def test_a_context_that_outlives_3000_nested_spans(store: Store) -> None:
    manager = spanguard.TraceStateManager()
    with traced_span("root") as root:
        for _ in range(3_000):
            manager.push_trace("deep")
        held = contextvars.copy_context()
        for _ in range(3_000):
            manager.pop_trace()
        assert held.run(mlflow.get_current_active_span).span_id == root.span_id
    assert held.run(mlflow.get_current_active_span) is None
