"""Being where a trace context was captured, for the length of a block."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from types import CodeType, TracebackType
from typing import Any, cast

from opentelemetry.trace import INVALID_SPAN
from opentelemetry.trace import Span as OtelSpan

from spanguard._base.blocks import Block
from spanguard._base.config import StrictSetting, is_strict
from spanguard._base.findings import contained, settle
from spanguard._base.site import Site, user_site
from spanguard._base.tasks import Aside, in_event_loop
from spanguard._mlflow import exporting, memory, spans, store, stored
from spanguard._mlflow.active import ActiveState, activate
from spanguard._process import exit as _exit
from spanguard._process import listening, registry
from spanguard._process.ambient import ambient_span
from spanguard._process.dropped import is_put_aside
from spanguard._process.strands import Work
from spanguard._propagation import destinations
from spanguard._propagation.destinations import leave_destination, take_destination
from spanguard._propagation.remote_work import (
    Captured,
    LateWork,
    RemoteWork,
    hand_over_spans,
    lost_in_a_file_store,
)
from spanguard.exceptions import SpanguardError, TraceLostError

__all__ = ["Attachment"]


class Attachment(Block[None]):
    """The with-block of `TraceContext.attach`. Good for one block.

    `async with` waits for the store in a thread, and blocks no other task.

    Args:
        context: where to be.
        hand_over: how to hand over what was recorded; by default the store is waited for.
        about: the function that the block runs, if it is one: warnings name it.
    """

    __slots__ = (
        "_about",
        "_before",
        "_context",
        "_hand_over",
        "_has_destination",
        "_is_entered",
        "_late",
        "_remote",
        "_strict",
        "_waits",
        "_work",
        "_work_before",
    )

    def __init__(
        self,
        context: Captured,
        *,
        hand_over: Callable[[], object] | None = None,
        about: Callable[..., object] | None = None,
    ) -> None:
        self._context = context
        self._hand_over = hand_over or hand_over_spans
        self._waits = hand_over is None
        self._about = about
        self._is_entered = False
        self._has_destination = False
        self._strict: StrictSetting | None = None
        self._before: ActiveState | None = None
        self._remote: RemoteWork | None = None
        self._work = Work()
        self._late: LateWork | None = None

    def __del__(self) -> None:
        work = getattr(self, "_work", None)
        if work is not None:
            work.is_over = True  # entered and dropped: what it left open is nobody's any more

    def __enter__(self) -> None:
        self._begin()
        arrival = _Arrival(self._context)
        if arrival.takes_time:
            asks = self._waits and not in_event_loop()
            arrival.run(may_wait=_may_wait(), asks=asks)
        else:
            arrival.run()
        self._attach(arrival)

    async def __aenter__(self) -> None:
        self._begin()
        arrival = _Arrival(self._context)
        if not arrival.takes_time:
            arrival.run()
        else:
            may_wait = not ambient_span().get_span_context().is_valid
            try:
                await Aside(lambda: arrival.run(may_wait=may_wait, asks=self._waits)).done()
            except BaseException:
                arrival.give_up()
                raise
        self._attach(arrival)

    def _begin(self) -> None:
        if self._is_entered:
            raise RuntimeError(
                "This attachment has been entered before. Make a new one for each block: "
                "with context.attach()."
            )
        self._is_entered = True

    def _attach(self, arrival: _Arrival) -> None:
        context = self._context
        self._has_destination = arrival.has_destination
        if arrival.finding is not None:
            settle([arrival.finding], strict=False, raised=None, site=self._site())
        self._work_before = self._work.begin_step()
        if context.strict is not None:
            self._strict = StrictSetting(context.strict)
            self._strict.__enter__()
        with contained("attaching a trace context"):
            if arrival.is_late:
                self._late = LateWork(context, self._site())
            elif arrival.here is not None:
                self._before = activate(arrival.here)
            elif context.traceparent is not None and context.trace_id is not None:
                self._remote = RemoteWork(context)

    def _site(self) -> Site:
        site = None if self._about is None else _site_of(self._about)
        return site or user_site(3)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        strand = self._work.strand
        thread = strand.thread if strand is not None else None
        if is_put_aside(lambda: self.__exit__(exc_type, exc, None), thread):
            return
        findings = self.leave()
        try:
            if self.has_more_to_do:
                self.deliver()
        finally:
            self.tell(findings, exc)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        findings = self.leave()
        try:
            if self.has_more_to_do:
                await Aside(self.deliver).done()
        finally:
            self.tell(findings, exc)

    def leave(self) -> list[SpanguardError]:
        """Stop being elsewhere, close what was left open; return what was found wrong."""
        before, self._before = self._before, None
        findings: list[SpanguardError] = []
        with contained("leaving an attached trace context"):
            if before is not None:
                before.restore()
            if self._late is not None:
                findings += self._late.leave()
            if self._remote is not None:
                findings += self._remote.leave()
        if self._is_entered:
            # The work is over, though the pool's thread lives on.
            self._work.end_step(self._work_before, is_over=True)
        return findings

    @property
    def has_more_to_do(self) -> bool:
        """Whether there is something to deliver, which may wait for the store."""
        return self._remote is not None or self._has_destination or self._is_for_elsewhere

    @property
    def _is_for_elsewhere(self) -> bool:
        return self._is_entered and self._context._origin not in (None, destinations.process_token)

    def deliver(self) -> None:
        """Hand over what was recorded for elsewhere, in any thread."""
        remote, self._remote = self._remote, None
        try:
            if remote is not None:
                remote.deliver(self._hand_over)
                if exporting.takes_whole_traces_only:
                    # Never an error: nothing is wrong with the work.
                    lost = [lost_in_a_file_store()]
                    settle(lost, strict=False, raised=None, site=self._site())
            elif self._is_for_elsewhere:
                hand_over_spans()
        finally:
            if self._has_destination:
                self._has_destination = False
                leave_destination()

    def tell(self, findings: list[SpanguardError], raised: BaseException | None) -> None:
        """Raise or warn of what was found, by the strictness that was attached."""
        strict = is_strict()
        if self._strict is not None:
            self._strict.__exit__(None, None, None)
            self._strict = None
        if findings:
            settle(findings, strict=strict, raised=raised, site=user_site(2))


class _Arrival:
    """What is to be found out before work begins: it may have to wait, for others or the store."""

    __slots__ = (
        "_context",
        "_is_done",
        "_is_given_up",
        "_lock",
        "finding",
        "has_destination",
        "here",
        "is_late",
    )

    def __init__(self, context: Captured) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._is_done = self._is_given_up = False
        self.has_destination = False
        self.finding: TraceLostError | None = None
        self.here: OtelSpan | None = None  # what is to be active
        self.is_late = False  # the trace is over

    @property
    def takes_time(self) -> bool:
        """Whether it may have to wait."""
        return self._context._origin not in (None, destinations.process_token)

    def run(self, *, may_wait: bool = False, asks: bool = False) -> None:
        """Find out; `asks`: also of the store, whether a trace of another process is over."""
        with contained("finding the place of carried work"):
            if self._context._origin == destinations.process_token:
                self._find_here()
            else:
                self._find_from_elsewhere(may_wait, asks)
        with self._lock:
            self._is_done = True
            if self._is_given_up:
                self._undo()

    def give_up(self) -> None:
        """Take back what was found, now or as soon as it is."""
        with self._lock:
            self._is_given_up = True
            if self._is_done:
                self._undo()

    def _undo(self) -> None:
        if self.has_destination:
            self.has_destination = False
            leave_destination()

    def _find_here(self) -> None:
        context = self._context
        self.here = _standing_span(context) or _still_open(context)
        if self.here is None:
            self.is_late = context._is_recorded
            # Without a span there, none here either; of what was sampled out, nothing.
            self.here = context._local or context._span or INVALID_SPAN

    def _find_from_elsewhere(self, may_wait: bool, asks: bool) -> None:
        context = self._context
        self.here = _still_open(context)  # of a service that calls itself
        if self.here is not None:
            return
        if context.tracking_uri is not None:
            self.finding = take_destination(context, may_wait)
            self.has_destination = self.finding is None
        # What headers name is continued, as W3C has it: another service is still at work.
        if context._is_recorded and context._origin is not None:
            self.is_late = _is_over(context, asks)


def _is_over(context: Captured, asks: bool) -> bool:
    """Tell whether the trace of another process is over, as far as that is known here."""
    if listening.has_just_ended(context._otel_trace_id):
        return True
    if not asks:
        return False
    _exit.listen()  # MLflow opens the store with its first span, which may take longer
    trace_id = cast("str", context.trace_id)
    looking = "looking up the trace that work was carried from"
    return bool(store.ask(looking, lambda: stored.has_ended_in_store(trace_id)))


def _standing_span(context: Captured) -> OtelSpan | None:
    """Return the captured span itself, or what stands for it, while it is open in its trace."""
    active = context._local
    if active is None or spans.has_ended(active):
        return None
    span_context = active.get_span_context()
    return active if span_context.trace_id == context._otel_trace_id else None


def _still_open(context: Captured) -> OtelSpan | None:
    """Return what is open here of the span that a context names: itself, or its trace's root."""
    if context.traceparent is None or context.trace_id is None:
        return None
    entry = registry.entry_by_id(context.traceparent.split("-")[2])
    if entry is not None and entry.otel is not None:
        in_trace = memory.mlflow_trace_id(entry.otel) == context.trace_id
        if in_trace:
            return cast("OtelSpan", entry.stand_in or entry.otel)
    root = memory.root_span(context.trace_id)
    if root is None or root.end_time_ns is not None:
        return None
    return spans.otel_span(root)


def _may_wait() -> bool:
    """Tell whether the jobs that would be waited for can go on meanwhile."""
    return not in_event_loop() and not ambient_span().get_span_context().is_valid


def _site_of(function: Any) -> Site | None:
    """Return the `def` line of a function, as there may be no frame of the user's to name."""
    while isinstance(function, functools.partial):
        function = function.func
    for candidate in (inspect.unwrap(function), inspect.unwrap(type(function).__call__)):
        code = getattr(candidate, "__code__", None)
        if isinstance(code, CodeType):
            return Site(code, code.co_firstlineno)
    return None
