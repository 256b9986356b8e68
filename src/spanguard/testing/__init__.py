"""Spans in tests: what was recorded, without a server, and whether all of it was closed.

The pytest plugin offers both as the fixture `spans` and the option `--spanguard-strict`; this
is the same for any other test runner.

>>> import spanguard
>>> from spanguard.testing import no_open_spans, record_spans
>>> with record_spans() as spans, no_open_spans():
...     with spanguard.traced_span("checkout"):
...         with spanguard.traced_span("price", inputs={"item": "apple"}) as span:
...             span.set_outputs(0.5)
>>> spans.names
['checkout', 'price']
>>> spans.one("price").outputs
0.5
"""

from __future__ import annotations

import io
import threading
import time
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mlflow.entities import Span, Trace, TraceData, TraceInfo, TraceLocation, TraceState

from spanguard import _mlflow
from spanguard._base import findings as _findings
from spanguard._base.findings import settle
from spanguard._base.site import Site, user_site
from spanguard._mlflow import OtelSpan
from spanguard._process import registry as _registry
from spanguard._process.ambient import AmbientMark
from spanguard._process.dropped import do_put_aside
from spanguard._process.registry import Entry, OpenSpan
from spanguard.exceptions import OrphanedSpanError, SpanguardError

__all__ = [
    "RecordedSpan",
    "RecordedSpans",
    "SpansLeftOpenError",
    "forget_warnings",
    "no_open_spans",
    "record_spans",
]


# -- what was recorded -------------------------------------------------------------------------


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
        return "error" if _mlflow.status_code(self) == "ERROR" else "ok"

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

    def _known(self, span: Any) -> Any:
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

        spans: list[Any] = [span for span in self if span.trace_id == trace_id]
        spans += _mlflow.open_spans_in(trace_id)
        drawn = io.StringIO()
        trace = Trace(self._info(trace_id, spans), TraceData(spans))
        Console(file=drawn, width=120, color_system=None).print(TraceTree(trace))
        return "\n".join(line.rstrip() for line in drawn.getvalue().splitlines())

    def _info(self, trace_id: str, spans: list[Any]) -> TraceInfo:
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


class _Filling:
    """Puts what a recording tells of into the list, in the order of the starts."""

    def __init__(self, spans: RecordedSpans) -> None:
        self._spans = spans
        self._lock = threading.Lock()
        self._starts: dict[tuple[int, int], int] = {}

    def started(self, span: Any) -> None:
        with self._lock:
            self._starts[_ids(span)] = len(self._starts)

    def ended(self, span: Any) -> None:
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


@contextmanager
def record_spans() -> Iterator[RecordedSpans]:
    """Record the spans of a with-block in a list, and send them to no store.

    The spans are those of every API of MLflow's and of ours, from all threads and tasks of this
    process. Neither the tracking server nor the experiment is asked: it takes milliseconds, and
    works without any. Recordings may be nested; each hears of all spans in its own block.

    At the end everything is as it was: the tracing provider and its destination, the tracking
    URI and the experiment, also where the block has changed them. What the block left open is
    closed as ERROR, `orphaned`, with an `OrphanedSpanWarning` that names the line, and the
    ambient span is restored. In strict mode that raises `SpansLeftOpenError`, unless an exception
    of yours is on its way.

    A line that leaks is warned of once in each recording, whatever was warned of before.

    Traces are not in a store, so `mlflow.get_trace` does not find them; `spans.traces` has them.
    Other processes started from the block do not record here.

    >>> import mlflow
    >>> import spanguard
    >>> from spanguard.testing import record_spans
    >>> with record_spans() as spans:
    ...     with mlflow.start_span("answer"), spanguard.traced_span("search"):
    ...         pass
    >>> [span.name for span in spans.children("answer")]
    ['search']
    """
    spans = RecordedSpans()
    filling = _Filling(spans)
    _mlflow.start_recording(filling)
    try:
        with _findings.afresh(), _checked("the end of the recording", strict=None):
            yield spans
    finally:
        _mlflow.stop_recording(filling)


def forget_warnings() -> None:
    """Let every line warn again, and every failure be logged again: it is else once per process.

    For tests of code that leaves spans open. `record_spans`, the fixture `spans`, and records of
    warnings such as `pytest.warns` start afresh by themselves.

    >>> from spanguard.testing import forget_warnings
    >>> forget_warnings()
    """
    _findings.forget_sites()


# -- what was left open ------------------------------------------------------------------------


class SpansLeftOpenError(OrphanedSpanError, AssertionError):
    """Spans were still open, or the ambient span was changed, when a test ended.

    They are closed, and the ambient span is restored, by the time this is raised.

    Attributes:
        spans: what was left open, in the order it was opened, as `OpenSpan` records.
    """


@contextmanager
def no_open_spans() -> Iterator[None]:
    """Assert that a with-block closes every span it opens, whatever API opened it.

    Spans count in every thread and task. Those that another thread is just about to end are
    waited for, at most a second. What is left open is closed as ERROR, `orphaned`, and the
    ambient span is restored, so that nothing leaks into the next test.

    Raises:
        SpansLeftOpenError: a span was left open, or was garbage-collected while open, or the
            ambient span was changed. It names the lines that opened the spans. It never takes
            the place of an exception of yours, but becomes a note on it.

    >>> import mlflow
    >>> from spanguard.testing import no_open_spans
    >>> with no_open_spans():
    ...     root = mlflow.MlflowClient().start_trace("forgotten")
    ... # doctest: +ELLIPSIS
    Traceback (most recent call last):
    spanguard.testing.SpansLeftOpenError: Span 'forgotten' (...) was left open, opened at ...
    """
    with _checked("the end of no_open_spans", strict=True, unraised=True):
        yield


@contextmanager
def _checked(closed_by: str, *, strict: bool | None, unraised: bool = False) -> Iterator[None]:
    check = LeakCheck(unraised=unraised)
    raised: BaseException | None = None
    try:
        yield
    except BaseException as error:
        raised = error
        raise
    finally:
        leaks = check.finish(closed_by)
        if leaks:
            settle([leaks.error()], strict=strict, raised=raised, site=user_site())


# How long a span that another thread has opened may still take to end.
_THREADS_SECONDS = 1.0

_CLOSED = "Closed now, as ERROR. End each span where its work ends, or open it with traced_span."
_RESTORED = "Restored now. Leave each block in the thread or task that has entered it."


class Leaks:
    """What a `LeakCheck` found, in words and as records. False if it found nothing."""

    def __init__(self) -> None:
        self.spans: list[OpenSpan] = []
        self.site: Site | None = None
        self._facts: list[str] = []
        self._cures: dict[str, None] = {}

    def add(
        self, fact: str, cure: str = "", spans: Sequence[OpenSpan] = (), site: Site | None = None
    ) -> None:
        self._facts.append(fact)
        if cure:
            self._cures[cure] = None
        self.spans += spans
        self.site = self.site or site

    def __bool__(self) -> bool:
        return bool(self._facts)

    def __str__(self) -> str:
        return "\n".join([*self._facts, *self._cures])

    def error(self) -> SpansLeftOpenError:
        """Return the error that says it."""
        error = SpansLeftOpenError(str(self))
        error.spans = self.spans
        error.site = self.site
        return error


class LeakCheck:
    """What is opened from here on, until `finish` looks whether it is closed again.

    Args:
        unraised: count as well what broke a rule where nobody could be told: a span that was
            garbage-collected while open, or was left open by code that raised.
    """

    def __init__(self, *, unraised: bool = False) -> None:
        _registry.follow()
        self._before = _open_ids()
        self._ambient = AmbientMark()
        self._astray: list[OtelSpan] = []
        self._sites: dict[int, Site] = {}
        self._unraised: list[SpanguardError] = []
        _registry.heard.append(self._sites)
        if unraised:
            _findings.unraised.append(self._unraised)

    # -- what is allowed

    @contextmanager
    def allowing(self, spans: set[int]) -> Iterator[None]:
        """Allow what the block opens to stay open and ambient; add it to `spans`."""
        before = _open_ids()
        try:
            yield
        finally:
            spans |= _open_ids() - before
            self._before |= spans
            self._ambient = AmbientMark()

    def forbid(self, spans: set[int]) -> None:
        """Take an allowance back."""
        self._before -= spans

    # -- what is found

    @contextmanager
    def in_context_of_its_own(self) -> Iterator[None]:
        """Check what is ambient here as well: in the context of a task, say."""
        mark = AmbientMark()
        try:
            yield
        finally:
            self._check_ambient(mark)

    def finish(self, closed_by: str) -> Leaks:
        """Close what was left open, restore what was ambient, and tell of it."""
        do_put_aside(of_all=True)  # what was dropped while open
        leaks, left = Leaks(), self._left_open()
        self._stop_listening()
        for entry in left:
            report = entry.report()
            name = f"{report.name!r} ({report.span_id})"
            fact = f"Span {name} was left open, opened at {report.opened_at}."
            leaks.add(fact, _CLOSED, [report], entry.site)
        for entry in reversed(left):
            _registry.close_orphan(entry, closed_by)
        self._check_ambient(self._ambient)
        self._tell_astray(leaks, {entry.span_id for entry in left})
        for finding in self._unraised:
            if isinstance(finding, OrphanedSpanError):
                leaks.add(str(finding), spans=finding.spans, site=finding.site)
        return leaks

    def _left_open(self) -> list[Entry]:
        deadline = time.monotonic() + _THREADS_SECONDS
        while True:
            left = [
                entry
                for entry in _registry.open_entries()
                if entry.span_id not in self._before and entry.is_open
            ]
            others = _other_threads()
            if (
                not any(entry.strand.thread in others for entry in left)
                or time.monotonic() > deadline
            ):
                return left
            time.sleep(0.002)

    def _check_ambient(self, mark: AmbientMark) -> None:
        changed = mark.change()
        if changed is not None:
            self._astray.append(changed)
            mark.restore()

    def _tell_astray(self, leaks: Leaks, told: set[int]) -> None:
        for span in self._astray:
            context: Any = span.get_span_context()  # None for a NoOpSpan's
            span_id = context.span_id if context is not None else 0
            if span_id in told:
                continue
            fact, site = "The active span was changed", self._sites.get(span_id)
            if site is not None:
                name = f"{getattr(span, 'name', '?')!r} ({span_id:016x})"
                ended = "has ended but " if _mlflow.has_ended(span) else ""
                fact = f"Span {name} {ended}was left active, opened at {site}"
            leaks.add(f"{fact}.", _RESTORED, site=site)

    def _stop_listening(self) -> None:
        _remove(_registry.heard, self._sites)
        _remove(_findings.unraised, self._unraised)


def _remove(lists: list[Any], mine: Any) -> None:
    """Remove an object, not one that is equal to it."""
    lists[:] = [other for other in lists if other is not mine]


def _open_ids() -> set[int]:
    return {entry.span_id for entry in _registry.open_entries()}


def _other_threads() -> set[threading.Thread]:
    return set(threading.enumerate()) - {threading.current_thread()}
