"""Recorded spans, and what a test asks of them."""

from __future__ import annotations

import io
import threading
from bisect import bisect
from typing import Any

from mlflow.entities import Span, Trace, TraceData, TraceInfo, TraceLocation, TraceState
from opentelemetry.sdk.trace import ReadableSpan

from spanguard._mlflow import ending, memory
from spanguard._mlflow.shapes import RecordingSpan

__all__ = ["Filling", "RecordedSpan", "RecordedSpans"]


class RecordedSpan(Span):
    """A finished span: `mlflow.entities.Span`, and what spanguard says about it.

    >>> import spanguard
    >>> from spanguard.testing import record_spans
    >>> with record_spans() as spans:
    ...     with spanguard.traced_span("find", attributes={"shop": 7}, expected=KeyError):
    ...         {}["apple"]
    Traceback (most recent call last):
    KeyError: 'apple'
    >>> span = spans.one("find")
    >>> span.outcome, span.status.status_code.value, span.user_attributes
    ('expected', 'OK', {'shop': 7})
    """

    @property
    def outcome(self) -> str:
        """How it ended: "ok", "error", "expected", "cancelled", "orphaned" and so on."""
        recorded = self.get_attribute("spanguard.outcome")
        if recorded is not None:
            return str(recorded)
        return "error" if ending.status_code(self) == "ERROR" else "ok"

    @property
    def user_attributes(self) -> dict[str, Any]:
        """Its attributes, without those of MLflow and of spanguard."""
        return {
            key: value
            for key, value in self.attributes.items()
            if not key.startswith(("mlflow.", "spanguard."))
        }


class RecordedSpans(list[RecordedSpan]):
    """The spans that have ended so far, in the order they were started.

    A list that fills while the recording lasts: spans of every API, from all threads and tasks.
    `spans.clear()` forgets what was recorded until then. Its text is the tree, for the message
    of an assertion.

    Attributes:
        traces: the traces that are over, in the order they ended, with their tags and metadata.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traces: list[Trace] = []

    @property
    def names(self) -> list[str]:
        """The names of all spans."""
        return [span.name for span in self]

    def by_name(self, name: str) -> list[RecordedSpan]:
        """Return the spans of that name."""
        return [span for span in self if span.name == name]

    def one(self, name: str) -> RecordedSpan:
        """Return the only span of that name.

        Raises:
            AssertionError: there is none, or there are several. Its text shows the tree.
        """
        found = self.by_name(name)
        if len(found) != 1:
            count = "no span" if not found else f"{len(found)} spans"
            __tracebackhide__ = True  # pytest then shows the line of the test
            raise AssertionError(
                f"There is {count} of the name {name!r} where one was expected. Recorded:\n{self}"
            )
        return found[0]

    @property
    def roots(self) -> list[RecordedSpan]:
        """The spans without a parent among the recorded ones."""
        known = {(span.trace_id, span.span_id) for span in self}
        return [span for span in self if (span.trace_id, span.parent_id) not in known]

    def children(self, span: Span | str) -> list[RecordedSpan]:
        """Return the spans right below a span, which may be given by its name if that is unique."""
        above = self._known(span)
        return [
            other
            for other in self
            if other.parent_id == above.span_id and other.trace_id == above.trace_id
        ]

    def parent(self, span: Span | str) -> RecordedSpan | None:
        """Return the span right above a span; None for a root, or while the parent is open."""
        below = self._known(span)
        for other in self:
            if other.span_id == below.parent_id and other.trace_id == below.trace_id:
                return other
        return None

    def _known(self, span: Span | str) -> Span:
        return self.one(span) if isinstance(span, str) else span

    def tree(self) -> str:
        """Draw all spans as a tree, with status, duration and what went wrong.

        What is still open above them is drawn as well.
        """
        return "\n".join(self._draw(trace_id) for trace_id in dict.fromkeys(map(_trace_id, self)))

    def _draw(self, trace_id: str) -> str:
        # rich takes a tenth of a second to import, and most tests draw nothing.
        from rich.console import Console

        from spanguard.render import TraceTree

        spans: list[Span] = [span for span in self if span.trace_id == trace_id]
        spans += memory.open_spans_in(trace_id)
        drawn = io.StringIO()
        trace = Trace(self._info(trace_id, spans), TraceData(spans))
        Console(file=drawn, width=120, color_system=None).print(TraceTree(trace))
        return "\n".join(line.rstrip() for line in drawn.getvalue().splitlines())

    def _info(self, trace_id: str, spans: list[Span]) -> TraceInfo:
        for trace in self.traces:
            if trace.info.trace_id == trace_id:
                return trace.info
        return TraceInfo(
            trace_id=trace_id,
            trace_location=TraceLocation.from_experiment_id("0"),
            request_time=min(span.start_time_ns for span in spans) // 1_000_000,
            state=TraceState.IN_PROGRESS,
        )

    def __str__(self) -> str:
        return self.tree() or "no spans"

    def __repr__(self) -> str:
        return f"<RecordedSpans {[f'{span.name}: {span.outcome}' for span in self]}>"


def _trace_id(span: Span) -> str:
    return str(span.trace_id)


class Filling:
    """Puts what a recording tells of into the list, in the order of the starts."""

    def __init__(self, spans: RecordedSpans) -> None:
        self._spans = spans
        self._lock = threading.Lock()
        self._starts: dict[tuple[int, int], int] = {}

    def started(self, span: RecordingSpan) -> None:
        with self._lock:
            self._starts[_ids(span)] = len(self._starts)

    def ended(self, span: ReadableSpan) -> None:
        recorded = RecordedSpan(span)
        with self._lock:
            place = bisect(self._spans, self._start_of(recorded), key=self._start_of)
            self._spans.insert(place, recorded)

    def finished(self, trace: Trace) -> None:
        self._spans.traces.append(trace)

    def _start_of(self, span: RecordedSpan) -> int:
        return self._starts.get(_ids(span._span), -1)


def _ids(otel: Any) -> tuple[int, int]:
    return otel.context.trace_id, otel.context.span_id
