"""An interrupt at any line of ours reaches the user; no span, trace or context is lost by it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import (
    TraceStateManager,
    carry,
    current_span,
    guard,
    trace_batch,
    traced,
    traced_span,
)
from spanguard._base import settings
from spanguard._process import registry, watchdog
from tests.store import Store
from tests.whole.interrupts import (
    Line,
    Place,
    by_ctrl_c,
    by_signal_handler,
    places_of,
    run_interrupted,
)

# -- what is interrupted -------------------------------------------------------------------------


def nested_blocks() -> None:
    with traced_span("root", inputs={"a": 1}, tags={"k": "v"}):
        with traced_span("child", attributes={"n": 1}) as child:
            child.set_outputs("x")
        with contextlib.suppress(ValueError):
            with traced_span("failing"):
                raise ValueError("of the block")


def leaking_blocks() -> None:
    with traced_span("root") as root:
        mlflow.MlflowClient().start_span("left", root.trace_id, root.span_id)


@traced
def double(x: int) -> int:
    return 2 * x


@traced
def calls_double() -> int:
    return double(1) + double(x=2)


@traced
def numbers() -> Iterator[int]:
    with traced_span("inside"):
        yield from range(2)


def generators() -> None:
    with traced_span("root"):
        for _ in numbers():
            pass
        for _ in numbers():
            break


@traced
async def stream() -> AsyncIterator[int]:
    for number in range(2):
        yield number


@traced
async def reads() -> int:
    return sum([number async for number in stream()])


def coroutines() -> None:
    asyncio.run(reads())


def push_and_pop() -> None:
    manager = TraceStateManager()
    manager.push_trace("root")
    child = manager.push_trace("child")
    manager.push_trace("left")
    manager.pop_trace(child, outputs=1)
    manager.pop_trace()


def pushed_blocks() -> None:
    with TraceStateManager(scope="process") as manager:
        with manager.trace("root"):
            manager.push_trace("left")


def guarded() -> None:
    with guard() as client:
        root = client.start_trace("root", inputs={"a": 1})
        span = client.start_span("child", root.trace_id, root.span_id)
        client.start_span("left", root.trace_id, span.span_id)
        client.end_span(root.trace_id, span.span_id, outputs=1)
        client.end_trace(root.trace_id)


def batches() -> None:
    trace_batch([1, 2], double, name="batch")


def carried() -> None:
    with traced_span("root"):
        with spanguard.capture().attach():
            carry(double)(3)


def set_for_a_block() -> None:
    with spanguard.strict(), spanguard.limits(value_chars=10) as caps:
        assert caps.value_chars == 10
        with spanguard.watch(open_longer_than=60):
            pass


def closing() -> None:
    with traced_span("root"):
        traced_span("left").__enter__()
        spanguard.close_open_spans()


WORKS: list[Callable[[], Any]] = [
    nested_blocks,
    leaking_blocks,
    calls_double,
    generators,
    coroutines,
    push_and_pop,
    pushed_blocks,
    guarded,
    batches,
    carried,
    set_for_a_block,
    closing,
]

# -- the sweep -----------------------------------------------------------------------------------


def interrupts_of(work: Callable[[], Any]) -> list[tuple[Line, int]]:
    """Return where a piece of work is to be interrupted: at each line, and at which turn of it.

    That is each line that it runs below each function of ours that it calls, if no work before it
    in the list does: the first time it comes there, or the last, by turns.
    """
    seen: set[Place] = set()
    for earlier in WORKS[: WORKS.index(work)]:
        seen.update(places_of(earlier))
    new = [(place[1], turns) for place, turns in places_of(work).items() if place not in seen]
    return [(line, turns[-(number % 2)]) for number, (line, turns) in enumerate(new)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
def test_an_interrupt_at_any_line_of_ours(
    store: Store, work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(store, work, by_ctrl_c, monkeypatch)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("work", [nested_blocks, push_and_pop], ids=lambda work: work.__name__)
def test_what_a_signal_handler_raises_at_any_line_of_ours(
    store: Store, work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the user's exception, also where MLflow contains what its processors raise."""
    sweep(store, work, by_signal_handler, monkeypatch)


def sweep(
    store: Store,
    work: Callable[[], Any],
    by: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupt a piece of work at each line of ours that it runs, and look at what is left."""
    # One worker: SQLite's lock loses traces where ten of MLflow's wait for it for long.
    monkeypatch.setenv("MLFLOW_ASYNC_TRACE_LOGGING_MAX_WORKERS", "1")
    started: dict[str, str] = {}
    note_started_traces(monkeypatch, started)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work()
        places = interrupts_of(work)
        wrong: list[str] = []
        for number, (line, turn) in enumerate(places):
            where = f"{line[0].rpartition('/')[2]}:{line[1]} ({turn})"
            wrong += interrupt(work, line, turn, by, where)
            for trace_id in list(started):
                started[trace_id] = started[trace_id] or where
            if number % 100 == 99:
                spanguard.flush(60)
    spanguard.flush(60)
    lost = [f"{where}: the trace is lost" for where in unreadable(started)]
    print(
        f"\n{work.__name__}: {len(places)} interrupts, {len(wrong)} violations, "
        f"{len(started)} traces, {len(lost)} unreadable"
    )
    assert wrong + lost == [], "\n".join(wrong + lost)


def interrupt(
    work: Callable[[], Any], line: Line, turn: int, by: Callable[[], None], where: str
) -> list[str]:
    """Interrupt a piece of work; return what is not as it should be afterwards."""
    wrong = []
    if not run_interrupted(work, line, turn, by):
        wrong.append(f"{where}: the interrupt did not reach the user")
    spanguard.close_open_spans()
    if spanguard.open_spans():
        wrong.append(f"{where}: open: {[span.name for span in spanguard.open_spans()]}")
    if current_span() is not None or mlflow.get_current_active_span() is not None:
        wrong.append(f"{where}: a span is still active")
        leave_context()
    if is_setting_in_force():
        gc.collect()  # a batch keeps the interrupt that it raises, and with it all its frames
    if is_setting_in_force():
        wrong.append(f"{where}: a setting is still in force")
        settings.context_settings.set(())
        with spanguard.watch(None):  # whose end starts or stops what is to run
            watchdog._blocks.clear()
    if registry.open:
        kept = [entry.label for entry in registry.open.values()]
        wrong.append(f"{where}: kept for ever: {kept}")
        registry.open.clear()
    return wrong


def is_setting_in_force() -> bool:
    spanguard.open_spans()  # looks again at what was put aside
    return watchdog._watchdog is not None or not all(
        block.is_dropped for block in settings.context_settings.get()
    )


def leave_context() -> None:
    from opentelemetry.trace import INVALID_SPAN

    from spanguard._mlflow import active

    active.activate(INVALID_SPAN)


def note_started_traces(monkeypatch: pytest.MonkeyPatch, started: dict[str, str]) -> None:
    """Write down the id of each trace in which MLflow has started a span."""
    from mlflow.tracing.trace_manager import InMemoryTraceManager

    register = InMemoryTraceManager.register_span

    def note(self: Any, span: Any) -> Any:
        started[span.trace_id] = ""
        return register(self, span)

    monkeypatch.setattr(InMemoryTraceManager, "register_span", note)


def unreadable(started: dict[str, str]) -> list[str]:
    """Return where the traces were interrupted that the store does not give back."""
    readable: set[str] = set()
    token: str | None = None
    while True:
        page = mlflow.MlflowClient().search_traces(
            locations=["0"], max_results=500, page_token=token
        )
        readable |= {trace.info.trace_id for trace in page}
        token = page.token
        if not token:
            return [where for trace_id, where in started.items() if trace_id not in readable]
