"""What a piece of code left open: spans, the ambient span, threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from opentelemetry.trace import Span as OtelSpan

from spanguard._base import findings
from spanguard._base.findings import settle
from spanguard._base.open_span import OpenSpan
from spanguard._base.site import Site, user_site
from spanguard._mlflow.spans import has_ended
from spanguard._process import listening, orphans, registry
from spanguard._process.ambient import AmbientMark
from spanguard._process.dropped import do_put_aside
from spanguard._process.registry import Entry
from spanguard.exceptions import OrphanedSpanError, SpanguardError

__all__ = ["LeakCheck", "Leaks", "SpansLeftOpenError", "checked"]


T = TypeVar("T")


class SpansLeftOpenError(OrphanedSpanError, AssertionError):
    """Spans were still open, or the ambient span was changed, when a test ended.

    They are closed, and the ambient span is restored, by the time this is raised.

    Attributes:
        spans: what was left open, in the order it was opened, as `OpenSpan` records.
    """


@contextmanager
def checked(closed_by: str, *, strict: bool | None, unraised: bool = False) -> Iterator[None]:
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
        listening.follow()
        self._before = _open_ids()
        self._ambient = AmbientMark()
        self._astray: list[OtelSpan] = []
        self._sites: dict[int, Site] = {}
        self._unraised: list[SpanguardError] = []
        listening.heard.append(self._sites)
        if unraised:
            findings.unraised.append(self._unraised)

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
            orphans.close_orphan(entry, closed_by)
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
                for entry in registry.open_entries()
                if entry.span_id not in self._before and entry.is_open
            ]
            others = other_threads()
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
                ended = "has ended but " if has_ended(span) else ""
                fact = f"Span {name} {ended}was left active, opened at {site}"
            leaks.add(f"{fact}.", _RESTORED, site=site)

    def _stop_listening(self) -> None:
        _remove(listening.heard, self._sites)
        _remove(findings.unraised, self._unraised)


def _remove(lists: list[T], mine: T) -> None:
    """Remove an object, not one that is equal to it."""
    lists[:] = [other for other in lists if other is not mine]


def _open_ids() -> set[int]:
    return {entry.span_id for entry in registry.open_entries()}


def other_threads() -> set[threading.Thread]:
    return set(threading.enumerate()) - {threading.current_thread()}
