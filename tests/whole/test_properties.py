"""Random programs over every face: whatever they do, all spans end once and nothing leaks."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanguard import TraceStateManager, current_span, traced_span
from spanguard._mlflow.queue import defers_roots
from tests.programs import (
    assert_nothing_is_left,
    assert_whole,
    in_thread,
    programs,
    run_one,
    stored,
)
from tests.store import Store

pytestmark = pytest.mark.versions


class Boom(Exception):
    pass


class Halt(BaseException):
    pass


# -- programs ----------------------------------------------------------------------------------

STEPS = st.deferred(
    lambda: st.one_of(
        st.tuples(st.just("raise"), st.sampled_from([Boom, Halt, KeyboardInterrupt])),
        st.tuples(st.just("push"), st.integers(0, 2)),
        st.tuples(st.just("pop"), st.integers(0, 2)),
        st.tuples(st.just("pop handle"), st.integers(0, 2), st.integers(0, 5)),
        st.tuples(st.just("close"), st.integers(0, 2)),
        st.tuples(st.just("raw"), st.booleans()),
        st.tuples(st.just("end"), st.integers(0, 5)),
        st.tuples(st.just("raw end"), st.integers(0, 5)),
        st.tuples(st.just("write"), st.integers(0, 5)),
        st.tuples(st.just("block"), PROGRAMS),
        st.tuples(st.just("new trace"), PROGRAMS),
        st.tuples(st.just("client block"), PROGRAMS),
        st.tuples(st.just("fluent"), PROGRAMS),
        st.tuples(st.just("pushed block"), st.integers(0, 2), PROGRAMS),
        st.tuples(st.just("catch"), PROGRAMS),
        st.tuples(st.just("thread"), PROGRAMS),
        st.tuples(st.just("tasks"), PROGRAMS, PROGRAMS),
        st.tuples(st.just("left elsewhere"), PROGRAMS),
    )
)
PROGRAMS = st.lists(STEPS, max_size=5)


@dataclass
class Machine:
    """Runs a program. Everything it opens is written down."""

    managers: list[TraceStateManager]
    client: mlflow.MlflowClient
    handles: list[Any] = field(default_factory=list)
    opened: int = 0
    trace_ids: set[str] = field(default_factory=set)
    fluent: set[str] = field(default_factory=set)

    def run(self, program: list[tuple[Any, ...]]) -> None:
        for step in program:
            found = current_span()
            getattr(self, "do_" + step[0].replace(" ", "_"))(*step[1:])
            if step[0] in {"fluent", "catch"} and found is not None and is_open(found):
                # What is open is ambient again after a block, unless a push inside it stayed.
                assert current_span() is not None

    def note(self, span: Any) -> Any:
        self.opened += 1
        self.handles.append(span)
        self.trace_ids.add(span.trace_id)
        return span

    def handle(self, number: int) -> Any:
        return self.handles[number % len(self.handles)] if self.handles else None

    def do_raise(self, kind: type[BaseException]) -> None:
        raise kind

    def do_push(self, manager: int) -> None:
        self.note(self.managers[manager].push_trace(f"push {self.opened}"))

    def do_pop(self, manager: int) -> None:
        self.managers[manager].pop_trace()

    def do_pop_handle(self, manager: int, number: int) -> None:
        span = self.handle(number)
        if span is not None:
            self.managers[manager].pop_trace(span)

    def do_close(self, manager: int) -> None:
        self.managers[manager].close()

    def do_raw(self, ends: bool) -> None:
        parent = current_span()
        if parent is None or not is_open(parent):
            return
        span = self.note(self.client.start_span("raw", parent.trace_id, parent.span_id))
        # Nobody closes it below a fluent span, once the block in there was ended: see do_end().
        if ends or parent.span_id in self.fluent:
            self.client.end_span(span.trace_id, span.span_id)

    def do_end(self, number: int) -> None:
        span = self.handle(number)
        # A fluent span that ends before its children is MLflow's to lose: where their batches
        # are stored by two of its workers, "not fully exported yet" may be the end of it.
        if span is not None and span.span_id not in self.fluent:
            span.end()

    def do_raw_end(self, number: int) -> None:
        """Let MLflow's own client end a span of ours, whatever is open below it."""
        span = self.handle(number)
        if span is None or span.span_id in self.fluent or not is_open(span):
            return
        # A root is MLflow's to lose where it exports it with raw spans open below (3.10 to 3.12).
        if span.parent_id is not None or defers_roots():
            self.client.end_span(span.trace_id, span.span_id)

    def do_write(self, number: int) -> None:
        span = self.handle(number)
        if span is not None:
            span.set_attribute("k", {"v": object()})

    def do_block(self, program: Any, **kwargs: Any) -> None:
        with traced_span(f"block {self.opened}", **kwargs) as span:
            self.note(span)
            self.run(program)

    def do_new_trace(self, program: Any) -> None:
        self.do_block(program, new_trace=True)

    def do_client_block(self, program: Any) -> None:
        self.do_block(program, client=self.client)

    def do_fluent(self, program: Any) -> None:
        active = mlflow.get_current_active_span()
        if active is not None and not is_open(active):
            # What MLflow starts below an ended root is MLflow's to lose: its exporter gives the
            # trace up once nothing is open, also if the new span waits in its queue.
            return
        with mlflow.start_span("fluent") as span:
            if span.span_id is None:  # its trace is exported already: MLflow starts nothing
                assert current_span() is None
            else:
                self.fluent.add(span.span_id)
                assert self.note(current_span()).span_id == span.span_id
            # A block of ours inside closes what is open before the fluent span ends.
            self.do_block(program)

    def do_pushed_block(self, manager: int, program: Any) -> None:
        with self.managers[manager].trace("pushed block") as span:
            self.note(span)
            self.run(program)

    def do_catch(self, program: Any) -> None:
        try:
            self.run(program)
        except (Boom, Halt, KeyboardInterrupt):
            pass

    def do_thread(self, program: Any) -> None:
        in_thread(lambda: self.do_catch(program))

    def do_tasks(self, one: Any, two: Any) -> None:
        async def task(program: Any) -> None:
            await asyncio.sleep(0)
            self.do_catch(program)
            await asyncio.sleep(0)

        async def main() -> None:
            await asyncio.gather(task(one), task(two))

        # A loop of its own in this thread, inside whatever is open here, if none runs yet.
        if asyncio._get_running_loop() is None:
            asyncio.run(main())

    def do_left_elsewhere(self, program: Any) -> None:
        block = traced_span("left elsewhere")
        self.note(block.__enter__())
        try:
            self.run(program)
        finally:
            in_thread(lambda: block.__exit__(None, None, None))


def is_open(span: Any) -> bool:
    return span.end_time_ns is None


# -- what must hold ----------------------------------------------------------------------------


@programs(120)
@given(program=PROGRAMS)
def test_whatever_a_program_does(store: Store, program: list[tuple[Any, ...]]) -> None:
    with run_one() as ended:
        managers = [
            TraceStateManager(),
            TraceStateManager(scope="process"),
            TraceStateManager(mlflow.MlflowClient()),
        ]
        machine = Machine(managers, mlflow.MlflowClient())
        machine.do_catch(program)
        for manager in managers:
            manager.close()
        traces = stored(machine.trace_ids)
    assert_nothing_is_left()
    assert all(not manager._pushed for manager in managers)
    assert [manager.depth for manager in managers] == [0, 0, 0]
    assert_whole(traces, ended, machine.opened)
