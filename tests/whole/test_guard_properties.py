"""Random programs of raw calls, right and wrong: every trace is readable, every span ends once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlflow
from hypothesis import given
from hypothesis import strategies as st

from spanguard import guard, traced_span
from spanguard._api.held import _started
from tests.programs import (
    assert_nothing_is_left,
    assert_whole,
    in_thread,
    programs,
    run_one,
    stored,
)
from tests.store import Store


class Boom(Exception):
    pass


# -- programs ----------------------------------------------------------------------------------

# Which of the ids met so far; a copy of it; or one that nobody has ever had.
WRONG = ["tr-" + "0" * 32, "0" * 16, "", None, 3]
IDS = st.one_of(
    st.integers(0, 8),
    st.tuples(st.integers(0, 8)),
    st.sampled_from([("wrong", n) for n in range(len(WRONG))]),
)
STATUSES = st.sampled_from(["OK", "ERROR", "error", "BOGUS", None, 7])
CLIENTS = st.integers(0, 2)

STEPS = st.deferred(
    lambda: st.one_of(
        st.tuples(st.just("start_trace"), CLIENTS, st.booleans()),
        st.tuples(st.just("start_span"), CLIENTS, IDS, IDS),
        st.tuples(st.just("start_child"), CLIENTS, st.integers(0, 8)),
        st.tuples(st.just("end_span"), CLIENTS, IDS, IDS, STATUSES),
        st.tuples(st.just("end_its"), CLIENTS, st.integers(0, 8), STATUSES),
        st.tuples(st.just("end_trace"), CLIENTS, IDS, STATUSES),
        st.tuples(st.just("span_end"), st.integers(0, 8)),
        st.tuples(st.just("raw_leak"), st.integers(0, 8)),
        st.tuples(st.just("raise_")),
        st.tuples(st.just("block"), CLIENTS, st.booleans(), PROGRAMS),
        st.tuples(st.just("own_block"), PROGRAMS),
        st.tuples(st.just("fluent"), PROGRAMS),
        st.tuples(st.just("catch"), PROGRAMS),
        st.tuples(st.just("thread"), PROGRAMS),
    )
)
PROGRAMS = st.lists(STEPS, max_size=6)


@dataclass
class Machine:
    """Runs a program. Everything it opens is written down."""

    clients: list[Any]
    raw: mlflow.MlflowClient
    spans: list[Any] = field(default_factory=list)
    opened: int = 0
    trace_ids: set[str] = field(default_factory=set)
    in_fluent: bool = False

    def run(self, program: list[tuple[Any, ...]]) -> None:
        for name, *arguments in program:
            getattr(self, name)(*arguments)

    def note(self, span: Any) -> Any:
        self.opened += 1
        self.spans.append(span)
        self.trace_ids.add(span.trace_id)
        return span

    def met(self, number: int) -> Any:
        return self.spans[number % len(self.spans)] if self.spans else None

    def an_id(self, which: Any, attribute: str) -> Any:
        if isinstance(which, tuple) and which[0] == "wrong":
            return WRONG[which[1]]
        span = self.met(which[0] if isinstance(which, tuple) else which)
        found = getattr(span, attribute, None)
        if isinstance(which, tuple) and found is not None:
            return found.encode().decode()
        return found

    def start_trace(self, client: int, new_trace: bool) -> None:
        name = f"trace {self.opened}"
        self.note(self.clients[client].start_trace(name, new_trace=new_trace))

    def start_span(self, client: int, trace: Any, parent: Any) -> None:
        trace_id, parent_id = self.an_id(trace, "trace_id"), self.an_id(parent, "span_id")
        self.note(self.clients[client].start_span(f"span {self.opened}", trace_id, parent_id))

    def start_child(self, client: int, parent: int) -> None:
        span = self.met(parent)
        if span is not None:
            client = self.clients[client]
            self.note(client.start_span(f"child {self.opened}", span.trace_id, span.span_id))

    def end_span(self, client: int, trace: Any, span: Any, status: Any) -> None:
        trace_id, span_id = self.an_id(trace, "trace_id"), self.an_id(span, "span_id")
        self.clients[client].end_span(trace_id, span_id, outputs=object(), status=status)

    def end_its(self, client: int, span: int, status: Any) -> None:
        found = self.met(span)
        if found is not None:
            self.clients[client].end_span(found.trace_id, found.span_id, status=status)

    def end_trace(self, client: int, trace: Any, status: Any) -> None:
        self.clients[client].end_trace(self.an_id(trace, "trace_id"), status=status)

    def span_end(self, number: int) -> None:
        span = self.met(number)
        if span is not None:
            span.end()

    def raw_leak(self, parent: int) -> None:
        span = self.met(parent)
        if span is not None and span.end_time_ns is None:
            self.note(self.raw.start_span(f"raw {self.opened}", span.trace_id, span.span_id))

    def raise_(self) -> None:
        raise Boom

    def block(self, client: int, new_trace: bool, program: Any) -> None:
        given = self.clients[client]
        with traced_span(f"block {self.opened}", client=given, new_trace=new_trace) as span:
            self.note(span)
            self.run(program)

    def own_block(self, program: Any) -> None:
        with guard(ambient=True) as client:
            self.clients.append(client)
            self.note(client.start_trace(f"block {self.opened}"))
            self.run(program)

    def fluent(self, program: Any) -> None:
        if self.in_fluent:  # a fluent span under a fluent span that raw code ended is MLflow's
            return self.run(program)
        self.in_fluent = True
        try:
            with mlflow.start_span("fluent") as span:
                self.opened += 1
                self.trace_ids.add(span.trace_id)
                try:
                    self.run(program)
                finally:  # left to itself it ends before its children, and MLflow loses them
                    self.clients[0].end_span(span.trace_id, span.span_id)
        finally:
            self.in_fluent = False
        return None

    def catch(self, program: Any) -> None:
        try:
            self.run(program)
        except Boom:
            pass

    def thread(self, program: Any) -> None:
        in_thread(lambda: self.catch(program))


# -- what must hold ----------------------------------------------------------------------------


@programs(100)
@given(program=PROGRAMS)
def test_whatever_raw_code_does(store: Store, program: list[tuple[Any, ...]]) -> None:
    with run_one() as ended:
        raw = mlflow.MlflowClient()
        machine = Machine([guard(raw), guard(), guard(ambient=True)], raw)
        machine.catch(program)
        traces = stored(machine.trace_ids)
    assert_nothing_is_left()
    assert all(not client._self_home.open for client in machine.clients)
    assert not _started
    assert_whole(traces, ended, machine.opened)
