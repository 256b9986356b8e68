"""A manager's stack: pushed and popped in any thread or task, closed from the top."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Literal

from spanguard._api.frames import (
    Frame,
    Unwound,
    as_exception,
    managers,
    otel_span_of,
    standing_frame,
)
from spanguard._base.open_span import OpenSpan
from spanguard._base.site import Site
from spanguard._base.values import is_a, text_of
from spanguard._lifecycle.findings import orphans_finding
from spanguard._lifecycle.handle import SpanHandle
from spanguard._lifecycle.opening import open_handle
from spanguard._lifecycle.request import SpanRequest
from spanguard._mlflow.spans import otel_span
from spanguard._process import orphans
from spanguard._process.ambient import OverlappingAmbient, pushed
from spanguard._process.dropped import is_put_aside
from spanguard._process.strands import Strand
from spanguard._record.text import clean_text, safe_repr
from spanguard.exceptions import SpanguardError, SpanOrderError

__all__ = ["Stack"]


Scope = Literal["context", "process"]


class Stack:
    """What a manager has pushed, in its scope; `TraceStateManager` is its face."""

    def __init__(
        self, client: Any = None, *, scope: Scope = "context", strict: bool | None = None
    ) -> None:
        if text_of(scope) not in ("context", "process"):
            shown = clean_text(safe_repr(scope), 100)
            raise ValueError(f'scope must be "context" or "process", not {shown}')
        self._client = client
        self._scope: Scope = scope
        self._strict = strict
        # What is pushed and not popped, in the order of the pushes, of all contexts.
        self._pushed: dict[Frame, SpanHandle] = {}
        self._lock = threading.RLock()
        managers.add(self)

    def _innermost(self) -> SpanHandle | None:
        with self._lock:
            return next((handle for _, handle in self._stack() if handle.is_open), None)

    def _stack(self) -> Iterator[tuple[Frame, SpanHandle]]:
        """Yield what stands on the stack in this scope, innermost first. Call it locked."""
        if self._scope == "process":
            for frame, handle in reversed(self._pushed.items()):
                if frame.stands:
                    yield frame, handle
            return
        below = pushed.get()
        while below is not None:
            found = self._pushed.get(below)
            if found is not None and below.stands:
                yield below, found
            below = below.below

    def _push_on(
        self, request: SpanRequest, parent: SpanHandle | None, below: Frame | None
    ) -> tuple[Frame, SpanHandle]:
        handle: SpanHandle | None = None
        try:
            # Overlapping: roots and siblings may be popped in any order.
            handle = open_handle(request, activate=False, parent=parent)
            handle.activate(kind=OverlappingAmbient)
            frame = Frame(handle, below)
            self._put(frame, handle)
            if self._scope == "context":
                pushed.set(frame)
            return frame, handle
        except BaseException as error:  # Ctrl-C: nobody has a handle to pop it by
            if handle is not None:
                handle.close(error)
            raise

    def _put(self, frame: Frame, handle: SpanHandle) -> None:
        # What an ancestor closes is never popped: it must not stay here for ever.
        handle.on_orphaned = lambda: self._take(frame)
        with self._lock:
            self._pushed[frame] = handle
            if frame.below is not None:
                frame.below.above[frame] = None

    def _take(self, frame: Frame) -> SpanHandle | None:
        """Take a frame off the stack. Exactly one caller gets its span, in whatever thread."""
        with self._lock:
            if frame.below is not None:
                frame.below.above.pop(frame, None)
            return self._pushed.pop(frame, None)

    def _start_afresh(self) -> None:
        self._lock = threading.RLock()  # another thread of the parent may have held it
        self._pushed = {}

    def _top_to_pop(self) -> Frame | None:
        strand = Strand()
        with self._lock:
            for frame, _ in self._stack():
                if self._scope == "process" or frame.pusher == strand:
                    return frame
        return None

    def _frame_of(self, span: object) -> Frame | None:
        wanted = otel_span_of(span)
        with self._lock:
            for frame, handle in reversed(self._pushed.items()):
                same = wanted is not None and otel_span(handle.live) is wanted
                if same or handle.proxy is span:
                    return frame
        return None

    def _pop(
        self,
        frame: Frame,
        popped: SpanHandle,
        last: tuple[object, object, object] = (None, None, None),
        raised: BaseException | None = None,
    ) -> list[SpanguardError]:
        """Close a frame that is off the stack, and what stands above it first."""
        if is_put_aside(lambda: self._pop(frame, popped, last, raised), frame.pusher.thread):
            return []
        findings: list[SpanguardError] = []
        if raised is not None and not is_a(raised, BaseException):
            raised, finding = as_exception(raised, popped.name)
            findings.append(finding)
        if popped.is_open:
            closed = self._close_above(frame, popped)
            findings += orphans_finding(popped, closed, SpanOrderError)
            findings += popped.write_last(*last)
        findings += popped.close(raised)
        if self._scope == "context":
            top = pushed.get()
            standing = standing_frame(top)
            if standing is not top:
                pushed.set(standing)
        return findings

    def _close_above(self, frame: Frame, popped: SpanHandle) -> list[tuple[OpenSpan, Site]]:
        """Close what is above a frame and below its span in the trace; the rest is independent."""
        closed: list[tuple[OpenSpan, Site]] = []
        label = popped.entry.label if popped.entry is not None else popped.name
        for handle in self._above(frame):
            if self._goes_with(popped, handle):
                closed += handle.close_as_orphan(label)
        return closed

    def _goes_with(self, popped: SpanHandle, above: SpanHandle) -> bool:
        """Tell whether a span has to be closed because one below it on the stack is popped."""
        if popped.entry is None or above.entry is None:  # a user's doubles
            return True
        if not orphans.is_below(above.entry, popped.entry):
            return False
        # One stack for all threads and tasks is one strand.
        return self._scope == "process" or not orphans.outlives(
            above.entry, [popped.entry.strand, Strand()]
        )

    def _above(self, frame: Frame) -> list[SpanHandle]:
        """Return the open spans above a frame, innermost first, in whatever context they are."""
        above: list[SpanHandle] = []
        with self._lock:
            if self._scope == "process":
                for later, handle in reversed(self._pushed.items()):
                    if later.order < frame.order:
                        break
                    above.append(handle)
            else:
                frames = list(frame.above)
                while frames:
                    higher = frames.pop()
                    frames += higher.above
                    if higher in self._pushed:
                        above.insert(0, self._pushed[higher])
        return [handle for handle in above if handle.is_open]

    def _unwind(self, raised: BaseException | None, *, is_error: bool = True) -> Unwound:
        """Close all that is pushed, last push first; return what was open, and what was found."""
        unwound = Unwound([], [], [])
        last = next(reversed(self._pushed.copy()), None)
        thread = last.pusher.thread if last is not None else None
        if is_put_aside(lambda: self._unwind(raised, is_error=is_error), thread):
            return unwound
        while True:
            with self._lock:
                frame = next(reversed(self._pushed), None)
                handle = self._take(frame) if frame is not None else None
            if handle is None:
                break
            if not handle.is_open:
                continue
            unwound.spans.append(handle)
            entry = handle.entry
            if entry is not None:
                unwound.reports.append((entry.report(), entry.site))
            if raised is None and is_error and entry is not None:
                below = orphans.close_descendants(entry)
                unwound.findings.extend(orphans_finding(handle, below))
                orphans.close_orphan(entry, "close")
            else:
                unwound.findings.extend(handle.close(raised))
        if self._scope == "context":
            pushed.set(standing_frame(pushed.get()))
        return unwound
