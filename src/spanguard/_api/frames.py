"""What stands on a manager's stack."""

from __future__ import annotations

import itertools
import weakref
from typing import NamedTuple, Protocol

from opentelemetry.trace import Span as OtelSpan

from spanguard._base.config import MAX_MESSAGE_CHARS
from spanguard._base.interrupts import is_the_users
from spanguard._base.open_span import OpenSpan
from spanguard._base.site import Site
from spanguard._base.values import kind_name
from spanguard._lifecycle.handle import SpanHandle
from spanguard._mlflow.spans import otel_span
from spanguard._process.ambient import pushed
from spanguard._process.registry import ClosedBy
from spanguard._process.strands import Strand
from spanguard._record.text import clean_text
from spanguard.exceptions import InvalidSpanArgumentError, SpanguardError

__all__ = ["Frame", "Unwound", "as_exception", "managers", "otel_span_of", "standing_frame"]


class Frame:
    """One push, linked to the one below it: the immutable value that contexts copy."""

    __slots__ = ("_handle", "above", "below", "order", "pusher")

    def __init__(self, handle: SpanHandle, below: Frame | None) -> None:
        self.order = next(_orders)
        self.above: dict[Frame, None] = {}  # pushed on it and not popped, in all contexts
        # Weak: contexts hold frames for as long as they like, and must not keep spans alive.
        self._handle = weakref.ref(handle)
        self.below = below
        self.pusher = Strand()

    @property
    def stands(self) -> bool:
        """Whether it is still to be popped. Ended by hand: yes. Closed as an orphan: no."""
        handle = self._handle()
        return handle is not None and handle.closed_by in (None, ClosedBy.USER)


_orders = itertools.count()


class _Renewed(Protocol):
    def _start_afresh(self) -> None:
        """In a forked child: have an empty stack, that no thread of the parent has locked."""


managers: weakref.WeakSet[_Renewed] = weakref.WeakSet()


def start_afresh_in_child() -> None:
    """Empty the stacks in a forked child: what is on them is open in the parent."""
    pushed.set(None)
    for manager in list(managers):
        manager._start_afresh()


class Unwound(NamedTuple):
    """What a manager had open when it was closed, and what was wrong below that."""

    spans: list[SpanHandle]
    reports: list[tuple[OpenSpan, Site]]
    findings: list[SpanguardError]


def otel_span_of(handle: object) -> OtelSpan | None:
    """Return the OpenTelemetry span under a handle, which may be anything at all."""
    try:
        return otel_span(handle)
    except BaseException as error:
        if is_the_users(error):
            raise
        return None


def as_exception(given: object, span_name: str) -> tuple[Exception, InvalidSpanArgumentError]:
    return Exception(clean_text(given, MAX_MESSAGE_CHARS)), InvalidSpanArgumentError(
        f"error of span {span_name!r} is a {kind_name(given)}, no exception; its text was recorded "
        "as one. Pass the exception.",
        span_name=span_name,
    )


def standing_frame(frame: Frame | None) -> Frame | None:
    """Return the innermost frame that stands, so that dead frames do not pile up."""
    while frame is not None and not frame.stands:
        frame = frame.below
    return frame
