"""Attached contexts as blocks: entered once, and in an event loop nobody is kept waiting."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import TraceContext, carry, current_span, traced_span
from spanguard._mlflow import ids, remote
from spanguard._propagation import carry as _carry
from spanguard._propagation import destinations
from tests.store import Store, await_true

REMOTE_ID = "0af7651916cd43dd8448eb211c80319c"
HEADER = f"00-{REMOTE_ID}-b7ad6b7169203331-01"


def from_another_process(store: Store, number: int = 0) -> TraceContext:
    """What a worker gets from a process whose trace is still open."""
    otel_id = f"{int(REMOTE_ID, 16) + number:032x}"
    header = HEADER.replace(REMOTE_ID, otel_id)
    return TraceContext(f"tr-{otel_id}", header, store.uri, "0", None, "another process")


def waiting_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "spanguard-aside"]


def stored_names(store: Store) -> list[str]:
    with sqlite3.connect(store.path) as connection:
        return [name for (name,) in connection.execute("select name from spans order by name")]


# -- once ------------------------------------------------------------------------------------------


def contexts(store: Store) -> list[TraceContext]:
    with traced_span("over"):
        late = spanguard.capture()
    return [
        spanguard.capture(),
        late,
        TraceContext.from_headers({"traceparent": HEADER}),
        from_another_process(store),
        TraceContext(),
    ]


async def enter_async(block: Any) -> None:
    await block.__aenter__()


def enter(block: Any) -> None:
    block.__enter__()


def enter_in_task(block: Any) -> None:
    asyncio.run(enter_async(block))


def enter_in_thread(block: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(block.__enter__).result()


@pytest.mark.parametrize("again", [enter, enter_in_task, enter_in_thread])
def test_an_attachment_is_good_for_one_block(store: Store, again: Callable[[Any], None]) -> None:
    """Entered again, inside or afterwards, it refuses; where one was stays as it is."""
    with traced_span("root") as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for context in contexts(store):
            block = context.attach()
            with block:
                inside = current_span()
                with pytest.raises(RuntimeError, match=r"entered before.*context\.attach\(\)"):
                    again(block)
                assert (current_span() is None) == (inside is None)
            assert current_span() is root
            with pytest.raises(RuntimeError, match="entered before"):
                again(block)
            assert current_span() is root
            block.__exit__(None, None, None)
            assert current_span() is root
    assert destinations.jobs == 0


# -- in an event loop ------------------------------------------------------------------------------

needs_batches = pytest.mark.skipif(
    ids.make_trace_id is None or not hasattr(mlflow.entities, "Link"),
    reason="this MLflow writes each span where it ends",
)


async def leave_block(context: TraceContext) -> None:
    async with context.attach():
        with traced_span("job"):
            pass


async def call_carried(context: TraceContext) -> None:
    async def job() -> None:
        with traced_span("job"):
            pass

    await _carry.CarriedCoroutineFunction(job, context)()


async def exhaust_carried(context: TraceContext) -> None:
    async def jobs() -> Any:
        with traced_span("job"):
            yield 1

    work = _carry.CarriedAsyncGeneratorFunction(jobs, context)
    assert [item async for item in work()] == [1]


async def close_carried(context: TraceContext) -> None:
    async def jobs() -> Any:
        with traced_span("job"):
            yield 1
            yield 2

    stream = _carry.CarriedAsyncGeneratorFunction(jobs, context)()
    assert await stream.__anext__() == 1
    await stream.aclose()


@needs_batches
@pytest.mark.parametrize("work", [leave_block, call_carried, exhaust_carried, close_carried])
def test_the_event_loop_goes_on_while_the_store_is_waited_for(
    store: Store, work: Callable[[TraceContext], Any]
) -> None:
    """The store is busy until another task of the loop lets go of it."""

    async def main() -> None:
        writer = sqlite3.connect(store.path, isolation_level=None)
        writer.execute("begin immediate")
        turns = []

        async def let_go() -> None:
            for turn in range(20):
                await asyncio.sleep(0.001)
                turns.append(turn)
            writer.execute("rollback")
            writer.close()

        others = asyncio.create_task(let_go())
        await work(from_another_process(store))
        assert len(turns) == 20
        assert others.done()
        assert stored_names(store) == ["job"]

    asyncio.run(main())


@needs_batches
def test_a_task_that_is_cancelled_while_it_waits_lets_go_of_everything(store: Store) -> None:
    async def main() -> None:
        writer = sqlite3.connect(store.path, isolation_level=None)
        writer.execute("begin immediate")
        task = asyncio.create_task(leave_block(from_another_process(store)))
        while not remote.remote_holds:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        writer.execute("rollback")
        writer.close()

    asyncio.run(main())
    await_true(lambda: destinations.jobs == 0 and not remote.remote_holds)
    assert current_span() is None
    assert stored_names(store) == ["job"]


def test_tasks_for_two_stores_take_turns_in_one_event_loop(
    store: Store, template: Path, tmp_path: Path
) -> None:
    other = Store(tmp_path / "other.db")
    shutil.copy(template, other.path)

    async def job(target: Store, number: int, begun: asyncio.Event) -> None:
        async with from_another_process(target, number).attach():
            begun.set()
            with traced_span(f"job {number}"):
                await asyncio.sleep(0.05)

    async def main() -> None:
        begun = [asyncio.Event() for _ in range(4)]
        jobs = [job((store, other)[n % 2], n, begun[n]) for n in range(4)]
        await asyncio.gather(*jobs)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main())
    assert stored_names(store) == ["job 0", "job 2"]
    assert stored_names(other) == ["job 1", "job 3"]
    assert destinations.jobs == 0


def test_a_task_that_gives_up_waiting_for_its_turn_takes_none(
    store: Store, template: Path, tmp_path: Path
) -> None:
    other = Store(tmp_path / "other.db")
    shutil.copy(template, other.path)

    async def hold(entered: asyncio.Event, leave: asyncio.Event) -> None:
        async with from_another_process(store).attach():
            entered.set()
            await leave.wait()

    async def wait_for_turn() -> None:
        async with from_another_process(other, 1).attach():
            raise AssertionError("it was given up")

    async def main() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()
        holder = asyncio.create_task(hold(entered, leave))
        await entered.wait()
        waiter = asyncio.create_task(wait_for_turn())
        await asyncio.sleep(0.05)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert destinations.jobs == 1
        leave.set()
        await holder

    asyncio.run(main())
    await_true(lambda: not waiting_threads())
    assert destinations.jobs == 0


def test_findings_of_an_async_block_are_raised_after_all_is_delivered(store: Store) -> None:
    async def main() -> None:
        with spanguard.strict():
            async with from_another_process(store).attach():
                traced_span("left").__enter__()

    with pytest.raises(spanguard.OrphanedSpanError, match="left"):
        asyncio.run(main())
    assert stored_names(store) == ["left"]
    assert destinations.jobs == 0


def test_an_exception_in_an_async_block_passes_as_it_is(store: Store) -> None:
    error = KeyError("mine")

    async def fail() -> None:
        raise error

    async def main() -> None:
        with pytest.raises(KeyError) as caught:
            async with from_another_process(store).attach():
                raise error
        assert caught.value is error
        with traced_span("root"), pytest.raises(KeyError) as caught:
            await carry(fail)()
        assert caught.value is error

    asyncio.run(main())
