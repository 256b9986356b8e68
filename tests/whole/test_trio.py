"""On trio: its tasks are strands, its cancellation is one, and its generators end in it."""

from __future__ import annotations

import builtins
import gc
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from spanguard import (
    TraceStateManager,
    capture,
    carry,
    current_span,
    open_spans,
    traced,
    traced_span,
)
from spanguard._mlflow import remote
from spanguard._process.strands import Strand
from tests.propagation.test_attach import from_another_process, needs_batches, stored_names
from tests.propagation.test_generators import PROGRAMS, alike, async_call, async_echo, checked_async
from tests.store import Store, outcome, status

trio = pytest.importorskip("trio")


def parents(store: Store) -> dict[str, str | None]:
    spans = [span for trace in store.traces() for span in trace.data.spans]
    names = {span.span_id: span.name for span in spans}
    return {span.name: names.get(span.parent_id or "") for span in spans}


def test_trio_is_not_imported_for_its_sake() -> None:
    code = (
        "import asyncio, sys, spanguard\n"
        "async def main():\n"
        "    async with spanguard.capture().attach():\n"
        "        with spanguard.traced_span('s'): pass\n"
        "asyncio.run(main())\n"
        "assert 'trio' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# -- strands -----------------------------------------------------------------------------------


def test_a_task_is_a_strand_and_its_thread_is_another() -> None:
    strands: list[Strand] = []

    async def look(times: int) -> None:
        for _ in range(times):
            strands.append(Strand())
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        await look(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look, 2)
            nursery.start_soon(look, 2)
        assert [strand.is_over for strand in strands] == [False, True, True, True, True]

    trio.run(main)
    different = {
        tuple(one == other for other in [*strands, Strand()]) for one in [*strands, Strand()]
    }
    assert len(different) == 4
    assert strands[0].is_over


@pytest.mark.parametrize("strict", [False, True])
def test_a_task_pops_only_what_it_pushed(store: Store, strict: bool) -> None:
    manager = TraceStateManager(strict=strict)

    async def child(name: str) -> None:
        manager.push_trace(name)
        await trio.lowlevel.checkpoint()
        assert manager.pop_trace().name == name  # type: ignore[union-attr]
        if strict:
            with pytest.raises(Exception, match="thread or task that pushed"):
                manager.pop_trace()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert manager.pop_trace() is None
        await trio.lowlevel.checkpoint()

    async def main() -> None:
        manager.push_trace("root")
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(child, f"child {number}")
        assert manager.current_trace.name == "root"  # type: ignore[union-attr]
        manager.pop_trace()

    trio.run(main)
    assert parents(store) == {"root": None} | {f"child {n}": "root" for n in range(3)}
    assert {status(span) for span in store.spans().values()} == {"OK"}


def test_a_task_may_outlive_the_block_it_was_started_in(store: Store) -> None:
    async def child(begun: Any) -> None:
        with traced_span("child"):
            begun.set()
            await trio.sleep(0.01)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            begun = trio.Event()
            with traced_span("root"):
                nursery.start_soon(child, begun)
                await begun.wait()
            assert [span.name for span in open_spans()] != []

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trio.run(main)
    spans = store.spans()
    assert spans["child"].parent_id == spans["root"].span_id
    assert [outcome(span) for span in spans.values()] == ["ok", "ok"]


def test_work_is_carried_to_trios_threads_and_back(store: Store) -> None:
    def in_thread() -> None:
        with traced_span("in a thread"):
            trio.from_thread.run(carry(back))

    async def back() -> None:
        await trio.lowlevel.checkpoint()
        with traced_span("back"):
            pass

    async def main() -> None:
        with traced_span("root"):
            await trio.to_thread.run_sync(carry(in_thread))

    trio.run(main)
    assert parents(store)["in a thread"] == "root"


# -- cancellation ------------------------------------------------------------------------------


async def by_scope(work: Callable[[], Any]) -> None:
    with trio.move_on_after(0.01):
        await work()


async def by_nursery(work: Callable[[], Any]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def by_group(work: Callable[[], Any]) -> None:
    """A nursery inside the span, whose tasks are cancelled from outside of it."""

    async def nested() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            nursery.start_soon(trio.sleep_forever)

    with trio.move_on_after(0.01):
        with traced_span("above"):
            await nested()


@pytest.mark.parametrize("cancel", [by_scope, by_nursery, by_group])
def test_a_cancelled_task_is_cancelled_and_no_error(store: Store, cancel: Any) -> None:
    @traced
    async def work() -> None:
        with traced_span("inner"):
            await trio.sleep_forever()

    trio.run(cancel, work)
    spans = store.spans()
    assert {outcome(span) for span in spans.values()} == {"cancelled"}
    assert {status(span) for span in spans.values()} == {"ERROR"}
    assert spans["inner"].get_attribute("error_type") == "trio.Cancelled"


Group: Any = getattr(builtins, "BaseExceptionGroup", BaseException)
needs_groups = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python has no groups")


@needs_groups
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_group_of_cancellations_is_one(store: Store, depth: int) -> None:
    """As older nurseries raise it, and as `except*` does."""

    async def main() -> None:
        with trio.move_on_after(0), traced_span("group"):
            try:
                await trio.sleep_forever()
            except trio.Cancelled as error:
                raised: BaseException = error
                for _ in range(depth):
                    raised = Group("of cancellations", [raised])
                raise raised from None

    trio.run(main)
    assert outcome(store.spans()["group"]) == "cancelled"


@needs_groups
def test_an_error_among_cancelled_tasks_is_an_error(store: Store) -> None:
    async def fail() -> None:
        raise KeyError("mine")

    async def main() -> None:
        with traced_span("root"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                nursery.start_soon(trio.sleep_forever)

    with pytest.raises(Group):
        trio.run(main)
    assert outcome(store.spans()["root"]) == "error"


# -- generators --------------------------------------------------------------------------------


async def ticks() -> AsyncIterator[int]:
    try:
        with traced_span("inner"):
            for number in range(1_000_000):
                yield number
    finally:
        with traced_span("clean-up"):
            pass


held: list[Any] = []


async def hold(stream: Any) -> None:
    held.append(stream)
    assert await stream.__anext__() == 0


async def leave_loop(stream: Any) -> None:
    async for _ in stream:
        break
    del stream
    gc.collect()
    await trio.testing.wait_all_tasks_blocked()


async def be_cancelled(stream: Any) -> None:
    held.append(stream)
    with trio.move_on_after(0.01):
        async for _ in stream:
            await trio.sleep_forever()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("end", [hold, leave_loop, be_cancelled])
def test_what_is_suspended_when_trio_ends_is_closed_early(store: Store, end: Any) -> None:
    import trio.testing

    async def main() -> None:
        with traced_span("root"):
            await end(traced(ticks)())

    trio.run(main)
    held.clear()
    spans = store.spans()
    assert outcome(spans["ticks"]) == outcome(spans["inner"]) == "closed_early"
    assert spans["clean-up"].parent_id == spans["inner"].parent_id == spans["ticks"].span_id


def test_two_tasks_that_pull_one_generator_touch_nothing_of_one_another(store: Store) -> None:
    async def main(program: Any) -> None:
        plain, stream = async_echo(None), traced(async_echo)(None)
        for number, call in program:
            expected = await checked_async(async_call(plain, call))
            found: list[Any] = []

            async def pull(
                call: str = call, number: int = number, found: list[Any] = found
            ) -> None:
                with traced_span(f"consumer {number}") as consumer:
                    found.append(await checked_async(async_call(stream, call)))
                    assert current_span() is consumer

            async with trio.open_nursery() as nursery:
                nursery.start_soon(pull)
            assert alike(found[0], expected)
        await stream.aclose()
        await plain.aclose()

    with traced_span("root"):
        for program in PROGRAMS[::16]:
            trio.run(main, program)
    assert open_spans() == []


# -- waiting -----------------------------------------------------------------------------------


@needs_batches
def test_trio_goes_on_while_the_store_is_waited_for(store: Store) -> None:
    turns: list[int] = []

    async def let_go(writer: sqlite3.Connection) -> None:
        for turn in range(20):
            await trio.sleep(0.001)
            turns.append(turn)
        writer.execute("rollback")
        writer.close()

    async def main() -> None:
        writer = sqlite3.connect(store.path, isolation_level=None)
        writer.execute("begin immediate")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(let_go, writer)
            async with from_another_process(store).attach():
                with traced_span("job"):
                    pass
            assert len(turns) == 20
        assert stored_names(store) == ["job"]

    trio.run(main)


def test_a_task_that_attaches_a_context_of_this_process_does_not_wait(store: Store) -> None:
    async def main() -> None:
        with traced_span("root"):
            context = capture()
        async with context.attach():
            pass
        assert current_span() is None

    trio.run(main)
    assert not remote.remote_holds
