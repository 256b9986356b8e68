"""What guarded clients have open, and how it is found again by the ids that raw code keeps.

Raw code keeps ids and no objects, and often makes a client wherever it needs one. So what is
open belongs to the process: it lives until it ends, whatever becomes of the client that opened
it, and any guarded client ends it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import suppress
from typing import Any, NamedTuple

from spanguard._base.config import is_strict
from spanguard._base.findings import contained
from spanguard._base.interrupts import is_the_users
from spanguard._base.values import is_a, is_same
from spanguard._lifecycle.findings import already_ended_finding
from spanguard._lifecycle.handle import SpanHandle, handle_of
from spanguard._lifecycle.request import SpanRequest
from spanguard._mlflow import memory, names, spans
from spanguard._mlflow.active import current_otel_span
from spanguard._mlflow.shapes import Client, MlflowSpan
from spanguard._process import listening, registry
from spanguard._process.ambient import other_span
from spanguard._process.strands import Strand
from spanguard._record.text import clean_text, safe_repr
from spanguard.exceptions import SpanguardError, UnknownSpanError

__all__ = ["Found", "Home", "find_parent", "find_span", "find_trace", "is_given_out"]


class Held:
    """A span that a guarded client opened, held until it ends."""

    __slots__ = ("_asked_trace_id", "handle", "home", "strand", "trace_id")

    def __init__(
        self, handle: SpanHandle, home: Home, asked_trace_id: object, strand: Strand | None
    ) -> None:
        self.handle = handle
        self.home = home
        self.trace_id = handle.live.trace_id
        self._asked_trace_id = asked_trace_id  # another one, where a bad parent was mended
        self.strand = strand  # that start_trace was called in; None for what start_span opened
        if strand is not None:
            self.trace_id = _another(self.trace_id)

    def is_in(self, trace_id: object) -> bool:
        """Tell whether the span is in a trace, or was asked for there."""
        return (
            trace_id is None
            or is_same(trace_id, self.trace_id)
            or is_same(trace_id, self._asked_trace_id)
        )

    def let_go(self) -> None:
        """Note that the span has ended, by whatever API."""
        with contained("letting an ended span go"):
            self.home.open.pop(self.handle.live.span_id, None)
            _started.pop(id(self.trace_id), None)
            _remember(self)
            ambient = self.handle.ambient
            if ambient is not None:
                active: object = current_otel_span()
                if active is ambient.stand_in:  # else another one is on top
                    self.handle.deactivate()
                ambient.stand_in.fall_back()  # the entry knows that of a block around it only


class Home:
    """What one guarded client has open, in the order it was opened, and how it ends spans."""

    __slots__ = ("client", "has_failed_start", "open", "strict")

    def __init__(self, client: Client | None, strict: bool | None) -> None:
        self.client = client
        self.strict = strict
        self.open: dict[str, Held] = {}
        self.has_failed_start = False  # whether a start failed: its span is one without an id

    def hold(self, handle: SpanHandle, asked_trace_id: object, *, starts_trace: bool) -> Held:
        """Hold a span until it ends, so that its ids lead to it."""
        held = Held(handle, self, asked_trace_id, Strand() if starts_trace else None)
        self.open[handle.live.span_id] = held
        if starts_trace:
            _started[id(held.trace_id)] = held
        if handle.entry is not None:
            handle.entry.on_end = held.let_go
        return held

    def drop_ended(self) -> None:
        """Let go of ended spans of doubles: of their end no processor tells."""
        for held in list(self.open.values()):
            if held.handle.entry is None and not held.handle.is_open:
                held.let_go()

    def last_thread(self) -> threading.Thread | None:
        """Return the thread that opened what is open and was opened last."""
        last = next(reversed(self.open.copy().values()), None)
        entry = last.handle.entry if last is not None else None
        return entry.strand.thread if entry is not None else None


# What start_trace opened, by the identity of the id it gave out. Spans that joined a trace share
# its id, and end_trace() is given nothing else. The very string object tells which of them is
# meant, through callbacks, other threads, and at a second end. Where only an equal string
# arrives, the innermost is taken.
_started: dict[int, Held] = {}


def _another(text: str) -> str:
    """Return an equal string that is an object of its own."""
    return text.encode("utf-8", "replace").decode() if type(text) is str else text


def is_given_out(trace_id: object) -> bool:
    """Tell whether this very object is the id of a start_trace whose span is open."""
    return id(trace_id) in _started


class _Ended(NamedTuple):
    """What is remembered of an ended span: enough to tell a double end from an unknown id."""

    name: str
    span_id: str
    trace_id: str
    orphaned_by: str | None

    def finding(self, strict: bool | None) -> SpanguardError | None:
        if self.orphaned_by is not None and not is_strict(strict):
            return None  # its orphan warning has told it
        return already_ended_finding(self.name, self.span_id, self.trace_id, self.orphaned_by)


_MAX_REMEMBERED = 10_000
_ended: OrderedDict[object, _Ended] = OrderedDict()  # a dict is slow to drop its oldest


def _remember(held: Held) -> None:
    handle = held.handle
    orphaned_by = handle.entry.orphaned_by if handle.entry is not None else None
    ended = _Ended(handle.name[:100], handle.live.span_id, held.trace_id, orphaned_by)
    _ended[ended.span_id] = ended
    if held.strand is not None:
        _ended[id(held.trace_id)] = ended
        if handle.is_root:
            _ended[held.trace_id] = ended
    while len(_ended) > _MAX_REMEMBERED:
        with suppress(KeyError):  # another thread was quicker
            _ended.popitem(last=False)


# -- finding -----------------------------------------------------------------------------------


class Found(NamedTuple):
    """The span that ids mean, and what is wrong with them."""

    handle: SpanHandle | None = None
    finding: SpanguardError | None = None


def find_parent(home: Home, trace_id: object, parent_id: object) -> SpanHandle | None:
    """Return the parent if a guarded client opened it, and it is open, in the trace asked for."""
    held = _held(home, parent_id)
    fits = held is not None and held.handle.is_open and held.is_in(trace_id)
    return held.handle if held is not None and fits else None


def find_span(home: Home, trace_id: object, span_id: object) -> Found:
    """Find the span to end by `end_span`, whichever API opened it."""
    held = _held(home, span_id)
    if held is not None:
        finding = None if held.is_in(trace_id) else _elsewhere(held.handle, trace_id)
        return Found(held.handle, finding)
    if _records_nothing(trace_id) or (span_id is None and home.has_failed_start):
        return Found()
    if type(span_id) is not str:
        return Found(finding=_unknown("span", span_id))
    ended = _ended.get(span_id)
    if ended is not None:
        return Found(finding=ended.finding(home.strict))
    span = _span_in_memory(trace_id, span_id)
    if span is None:
        return Found(finding=_unknown("span", span_id))
    found = _take_over(home, span)
    if found.handle is not None and trace_id not in (None, span.trace_id):
        return Found(found.handle, _elsewhere(found.handle, trace_id))
    return found


def find_trace(home: Home, trace_id: object) -> Found:
    """Find the span to end by `end_trace`: a root, or a child that `start_trace` opened."""
    found = _find_given_out(home, trace_id)
    if found is not None:
        return found
    if _records_nothing(trace_id):
        return Found()
    if type(trace_id) is not str:
        return Found(finding=_unknown("trace", trace_id))
    held = _innermost(home, trace_id)
    if held is not None:
        return Found(held.handle)
    ended = _ended.get(trace_id)
    if ended is not None:
        return Found(finding=ended.finding(home.strict))
    return _find_root(home, trace_id)


def _find_given_out(home: Home, trace_id: object) -> Found | None:
    """Find what start_trace gave this very object out for."""
    held = _started.get(id(trace_id))
    if held is not None:
        return Found(held.handle)
    ended = _ended.get(id(trace_id))
    if ended is not None and ended.trace_id is trace_id:
        return Found(finding=ended.finding(home.strict))
    return None


def _find_root(home: Home, trace_id: str) -> Found:
    """Find the root of a trace that no guarded client started."""
    root = memory.root_span(trace_id)
    if root is None:
        return Found(finding=_unknown("trace", trace_id))
    if root.end_time_ns is None and _is_of_a_block(root):
        return Found(finding=_not_ours(trace_id, root))
    return _take_over(home, root)


def _records_nothing(trace_id: object) -> bool:
    """Tell whether an id is that of every span that started while tracing was off."""
    return type(trace_id) is str and trace_id == names.NOOP_TRACE_ID


def _held(home: Home, span_id: Any) -> Held | None:
    try:
        held = home.open.get(span_id)
    except BaseException as error:  # not hashable or not comparable, so no id
        if is_the_users(error):
            raise
        return None
    if held is None:
        entry = registry.entry_by_id(span_id)
        keeper = getattr(entry.on_end, "__self__", None) if entry is not None else None
        held = keeper if isinstance(keeper, Held) else None
    return held


def _span_in_memory(trace_id: object, span_id: str) -> MlflowSpan | None:
    entry = registry.entry_by_id(span_id)
    if entry is not None:
        return entry.mlflow_span()
    return memory.live_span(trace_id, span_id) if type(trace_id) is str else None


def _innermost(home: Home, trace_id: str) -> Held | None:
    """Return what start_trace opened last in a trace: here and by this client, if it did."""
    here = Strand()
    found = [held for held in list(_started.values()) if held.trace_id == trace_id]
    found.reverse()
    return max(found, key=lambda held: (held.strand == here, held.home is home), default=None)


def _is_of_a_block(root: MlflowSpan) -> bool:
    """Tell whether a root is one that a block or a manager holds, and will end."""
    otel = spans.otel_span(root)
    entry = registry.entry_of(otel)
    if entry is not None and entry.handle is not None and entry.handle() is not None:
        return True
    active = other_span().get_span_context()
    return otel is not None and active.trace_id == otel.get_span_context().trace_id


def _take_over(home: Home, span: MlflowSpan) -> Found:
    """Return a span of another API as one of ours, to end it as ours end."""
    if span.end_time_ns is not None:
        finding = already_ended_finding(span.name, span.span_id, span.trace_id, None)
        return Found(finding=finding)
    otel = spans.otel_span(span)
    entry = registry.entry_of(otel)
    if entry is None:
        listening.hear_of(span.trace_id)
        entry = registry.entry_of(otel)
    handle = handle_of(entry)
    if handle is None:
        request = SpanRequest((), name=span.name, client=home.client, strict=home.strict)
        handle = SpanHandle(request, span, is_root=span.parent_id is None)
        home.hold(handle, None, starts_trace=handle.is_root)
    return Found(handle)


# -- what is wrong with ids --------------------------------------------------------------------


def _id_text(given: object) -> str:
    return clean_text(given if is_a(given, str) else safe_repr(given), 100)


def _unknown(kind: str, given: object) -> UnknownSpanError:
    shown = _id_text(given)
    return UnknownSpanError(
        f"There is no open {kind} with the id {shown} in this process; nothing was ended. Pass "
        f"the {kind}_id of the span that start_trace() or start_span() returned.",
        span_id=shown if kind == "span" else None,
        trace_id=shown if kind == "trace" else None,
    )


def _elsewhere(handle: SpanHandle, trace_id: object) -> UnknownSpanError:
    live = handle.live
    return UnknownSpanError(
        f"Span {handle.name!r} ({live.span_id}) is in trace {live.trace_id}, not in trace "
        f"{_id_text(trace_id)}; it was ended all the same. Pass the two ids of one span.",
        span_name=handle.name,
        span_id=live.span_id,
        trace_id=live.trace_id,
    )


def _not_ours(trace_id: str, root: MlflowSpan) -> UnknownSpanError:
    return UnknownSpanError(
        f"No start_trace() is open in trace {_id_text(trace_id)}: its root {root.name!r} "
        f"({root.span_id}) belongs to a block or a manager, which ends it. Nothing was ended. "
        "Call end_trace() once for each start_trace().",
        span_name=root.name,
        span_id=root.span_id,
        trace_id=trace_id,
    )
