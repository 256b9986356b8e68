"""One span from its start to its end: active, closed once, with what was found wrong."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable
from typing import Any, cast

from spanguard import _mlflow
from spanguard._base.collector import is_collecting
from spanguard._base.config import is_strict
from spanguard._base.findings import (
    all_held_back,
    contained,
    forget_held_back,
    internal_error,
    note_unraised,
    raise_held_back,
    settle,
)
from spanguard._base.site import Site, is_of_library, user_site
from spanguard._lifecycle.proxy import SpanProxy, parse_status
from spanguard._lifecycle.request import SpanRequest, read_time
from spanguard._process import outliving
from spanguard._process import registry as _registry
from spanguard._process.ambient import Ambient
from spanguard._process.dropped import (
    all_put_aside,
    do_put_aside,
    is_inside_tracing,
    put_aside,
)
from spanguard._process.registry import OpenSpan
from spanguard._record import writing
from spanguard._record.outcome import ABANDONED, OK, Outcome, classify
from spanguard._record.payload import as_mapping, clean, clean_attributes
from spanguard.exceptions import (
    OrphanedSpanError,
    SpanAlreadyEndedError,
    SpanguardError,
    TraceLostError,
)

__all__ = [
    "OpenedSpan",
    "already_ended_finding",
    "left_behind_finding",
    "left_open_finding",
    "orphans_finding",
]


class OpenedSpan:
    """One span from its start to its end. Every face holds one, and ends it here, once."""

    __slots__ = (
        "__weakref__",
        "_kept",
        "_last",
        "_provider",
        "ambient",
        "client",
        "closed_by",
        "entry",
        "expected",
        "is_root",
        "live",
        "name",
        "on_orphaned",
        "proxy",
        "strict",
    )

    def __init__(self, request: SpanRequest, live: Any, *, is_root: bool) -> None:
        self.name = request.name
        self.client = request.client
        self.expected: tuple[type[BaseException], ...] = request.expected
        self.strict = request.strict
        self.live = live
        self.is_root = is_root
        self.closed_by: str | None = None
        self.ambient: Ambient | None = None
        self.on_orphaned: Callable[[], object] | None = None
        self._kept: list[SpanguardError] = []
        self._last: dict[str, Any] = {}  # what a given client's end is to be called with
        self._provider = _mlflow.current_provider()
        self.entry = _registry.entry_of(_mlflow.otel_span(live))
        self.proxy: SpanProxy = SpanProxy(live, self)
        if self.entry is not None:
            self.entry.live = live
            self.entry.opened = weakref.ref(self)
            self.entry.ender = self._ender()

    def _ender(self) -> _mlflow.Ender | None:
        if self.client is None:
            return None
        return _client_ender(self.client, self.live, self._last, is_root=self.is_root)

    # -- being active

    def activate(self, below: Any = None, *, kind: type[Ambient] = Ambient) -> None:
        """Make the span the ambient one, and MLflow's active one, until it closes."""
        with contained("activating a span"):
            otel = _mlflow.otel_span(self.live)
            ignores = _mlflow.is_noop(self.live) and not _mlflow.carries_decision(self.live)
            if otel is None or ignores:
                return
            # Entered last: an interrupt before that has changed nothing, and from there on the
            # end of the span, by whatever API, takes it back.
            ambient = self.ambient = kind(otel, below)
            if self.entry is not None:
                self.entry.stand_in = ambient.stand_in
                ambient.stand_in.entry = self.entry
            ambient.enter()

    def deactivate(self) -> None:
        """Leave the context as it was found, also when this is another context."""
        if self.ambient is not None:
            with contained("restoring the active span"):
                self.ambient.leave()

    # -- state

    @property
    def is_open(self) -> bool:
        """Whether the span has neither been closed here nor ended by another API.

        A root that waits for what outlives it is closed.
        """
        return self.closed_by is None and not (self.entry is not None and self.entry.ended)

    def keep(self, findings: list[SpanguardError]) -> bool:
        """Hold findings of a setter back until the span closes. False if they need no wait."""
        if not is_strict(self.strict) or self.closed_by is not None:
            return False
        self._kept += findings
        return True

    # -- closing

    def orphaned(self) -> None:
        """Take note that somebody else is ending the span in its opener's stead."""
        self.closed_by = "ancestor"
        self.deactivate()
        if self.on_orphaned is not None:
            self.on_orphaned()

    def close_as_orphan(self, orphaned_by: str) -> list[tuple[OpenSpan, Site]]:
        """End the span in its opener's stead, descendants first; report what was open."""
        if self.entry is None:  # a user's double
            self.close()
            self.closed_by = "ancestor"
            return []
        closed = _registry.close_descendants(self.entry, with_what_outlives=False)
        report = _registry.close_orphan(self.entry, orphaned_by)
        return closed if report is None else [*closed, (report, self.entry.site)]

    def close(
        self,
        raised: BaseException | None = None,
        *,
        by: str = "exit",
        outcome: Outcome | None = None,
        end_time_ns: int | None = None,
    ) -> list[SpanguardError]:
        """End the span, descendants first, and return what was found wrong. Never raises.

        Except for what is the user's: an interrupt inside this very code passes, and the span is
        ended all the same.
        """
        entry = self.entry
        # Where the collector closes a generator, or calls a finalizer, in the middle of a write:
        # closing here and now could wait for what this very thread holds.
        if (
            is_collecting()
            or (entry is not None and _mlflow.is_being_written(entry.otel))
            or (raised is not None and isinstance(raised, GeneratorExit) and is_inside_tracing())
        ):
            at = end_time_ns or time.time_ns()
            thread = entry.strand.thread if entry is not None else None
            put_aside(lambda: self.close(raised, by=by, outcome=outcome, end_time_ns=at), thread)
            return []
        if all_put_aside:
            do_put_aside()
        try:
            if all_held_back:
                forget_held_back()
            findings = self._close(raised, by, outcome, end_time_ns)
            if all_held_back:
                raise_held_back()
            return findings
        except BaseException as interrupt:
            forget_held_back()
            self._close_interrupted(raised or interrupt, by, end_time_ns)
            raise

    def _close(
        self,
        raised: BaseException | None,
        by: str,
        outcome: Outcome | None,
        end_time_ns: int | None,
    ) -> list[SpanguardError]:
        findings, self._kept = self._kept, []
        try:
            if not self._claim():
                findings += self._late()
            else:
                self.closed_by = by
                findings += self._close_claimed(raised, outcome, end_time_ns)
        except Exception as error:
            internal_error("closing a span", error)
        finally:
            if by != "user":
                self.deactivate()
        return findings

    def _close_interrupted(self, raised: BaseException, by: str, end_time_ns: int | None) -> None:
        """Finish what an interrupt left half done (issue 9, A2)."""
        if self.closed_by is None:
            self.closed_by = by
        entry = self.entry
        try:
            if (entry is None or not entry.ended) and not _mlflow.is_noop(self.live):
                with contained("closing a span after an interrupt"):
                    self._close_descendants()
                    self._record_outcome(raised, classify(raised, self.expected))
                    writing.end(self.live, self._ender(), end_time_ns)
        finally:
            if entry is not None:
                _registry.make_sure_of_end(entry)
            self.deactivate()

    def _claim(self) -> bool:
        if self.closed_by is not None:
            return False
        return self.entry is None or _registry.claim(self.entry)

    def _close_claimed(
        self, raised: BaseException | None, outcome: Outcome | None, end_time_ns: int | None
    ) -> list[SpanguardError]:
        findings: list[SpanguardError] = []
        if _mlflow.is_noop(self.live):
            return findings
        try:
            if self.is_root or (self.entry is not None and self.entry.children):
                closed = self._close_descendants(with_what_outlives=False)
                findings += orphans_finding(self, closed)
            lost = self._lost()
            if lost is not None:
                findings.append(lost)
            if raised is not None or outcome is not None:
                self._record_outcome(raised, outcome or classify(raised, self.expected))
        finally:
            self._end(end_time_ns)
        return findings

    def _end(self, end_time_ns: int | None) -> None:
        """End the span; a root only when nothing runs on under it any more."""
        entry, live, ender = self.entry, self.live, self._ender()
        if entry is not None and self.is_root and entry.children:
            at = end_time_ns or time.time_ns()
            writing.status_ok_unless_error(live)
            outliving.wait_for_descendants(entry, lambda: writing.end(live, ender, at))
            return
        writing.end(live, ender, end_time_ns)
        if entry is not None and not entry.ended:
            # Something in the middle of MLflow's end has failed, or was interrupted, and kept it
            # from us.
            _registry.make_sure_of_end(entry)

    def _close_descendants(self, *, with_what_outlives: bool = True) -> list[tuple[OpenSpan, Site]]:
        entry = self.entry
        if entry is None:
            return []
        closed: list[tuple[OpenSpan, Site]] = []
        if entry.children:
            closed += _registry.close_descendants(entry, with_what_outlives=with_what_outlives)
        if self.is_root:
            closed += _registry.close_unheard(
                self.live.trace_id, entry, with_what_outlives=with_what_outlives
            )
        return closed

    def _record_outcome(self, raised: BaseException | None, outcome: Outcome) -> None:
        if outcome is OK:
            return
        writing.outcome(self.live, outcome)
        if raised is not None and outcome.record_event:
            writing.exception(self.live, raised, outcome, self.entry)
        elif outcome.status == "ERROR":
            writing.error(self.live, outcome.name)

    def _late(self) -> list[SpanguardError]:
        if self.closed_by == "fork":
            return []  # it is open in the parent process, which will end it
        entry = self.entry
        if entry is not None and entry.ended and entry.children:
            _registry.close_descendants(entry, with_what_outlives=False)
        orphaned_by = entry.orphaned_by if entry is not None else None
        if orphaned_by is not None and not is_strict(self.strict):
            return []  # its orphan warning has told it
        live = self.live
        return [already_ended_finding(self.name, live.span_id, live.trace_id, orphaned_by)]

    def _lost(self) -> TraceLostError | None:
        """Notice at the end of a span that its trace can no longer arrive."""
        if _mlflow.otel_span(self.live) is None:
            return None
        trace_id = self.live.trace_id
        if not _mlflow.is_buffered(trace_id):
            why = "MLflow has evicted it from its buffer (too many open traces, or open too long)"
            cure = (
                "Raise MLFLOW_TRACE_BUFFER_MAX_SIZE or MLFLOW_TRACE_BUFFER_TTL_SECONDS before "
                "the first span."
            )
        elif _mlflow.current_provider() is not self._provider:
            why = "the tracing destination, experiment or tracking URI changed while it was open"
            cure = "Set the experiment and the tracking URI before the trace starts."
        else:
            return None
        _mlflow.loss_is_told(self.live)
        return TraceLostError(
            f"The trace {trace_id} of span {self.name!r} ({self.live.span_id}) may be lost: "
            f"{why}. {cure}",
            span_name=self.name,
            span_id=self.live.span_id,
            trace_id=trace_id,
        )

    def finish(self, raised: BaseException | None) -> None:
        """Close at the end of a block, and raise or warn of what was found."""
        findings = self.close(raised)
        if findings:
            settle(findings, strict=self.strict, raised=raised, site=self._site())

    def finish_as(self, outcome: Outcome) -> None:
        """Close with an outcome that no exception tells, and raise or warn of what was found."""
        findings = self.close(outcome=outcome)
        if findings:
            settle(findings, strict=self.strict, raised=None, site=self._site())

    def _site(self) -> Site:
        """Return the line at which a block ends; the one that opened it, if a library calls."""
        here = user_site(3)
        return self.entry.site if self.entry is not None and is_of_library(here) else here

    def end_by_user(
        self, outputs: Any, attributes: Any, status: Any, end_time_ns: int | None
    ) -> None:
        """End as `span.end(...)` asks, before the block or the manager does."""
        findings = self.end(outputs, attributes, status, end_time_ns)
        if findings:
            self.tell(findings, self.strict, user_site(2))

    def tell(self, findings: list[SpanguardError], strict: bool | None, site: Site) -> None:
        """Raise or warn of what was found at an end that was called for by hand.

        In strict mode, with an exception under way: nobody can tell here whether it is handled
        already, so the span above tells at its end, when it is known.
        """
        under_way = sys.exc_info()[1]
        if under_way is not None and is_strict(strict):
            for finding in findings:
                finding.site = finding.site or site
            above = self._open_above()
            if above is not None and above.keep(findings):
                return
        settle(findings, strict=strict, raised=under_way, site=site)

    def _open_above(self) -> OpenedSpan | None:
        """Return the nearest span above that is open, and one of ours."""
        above: Any = self.entry
        while above is not None:
            above = above.parent
            found = getattr(above, "opened", None)
            opened = found() if found is not None else None
            if opened is not None and opened.is_open:
                return cast("OpenedSpan", opened)
        return None

    def end(
        self, outputs: Any, attributes: Any, status: Any, end_time_ns: Any
    ) -> list[SpanguardError]:
        """End with what is given along with it, and return what was found wrong. Never raises."""
        findings: list[SpanguardError] = []
        at, finding = read_time("end_time_ns", end_time_ns, self.name)
        if self.is_open:
            if finding is not None:
                findings.append(finding)
            findings += self.write_last(outputs, attributes, status)
        if self._is_called_by_its_owner():
            self.closed_by = "owner"
            writing.end(self.live, self._ender(), at)
            return findings
        return findings + self.close(by="user", end_time_ns=at)

    def _is_called_by_its_owner(self) -> bool:
        """Tell whether a block around a guarded client is ending the span, by calling that."""
        entry = self.entry
        return self.closed_by is None and entry is not None and _registry.is_ending_here(entry)

    def write_last(self, outputs: Any, attributes: Any, status: Any) -> list[SpanguardError]:
        """Record what is given along with an end; return what was wrong with it."""
        try:
            return self._write_last(outputs, attributes, status)
        except BaseException as error:  # Ctrl-C in a payload's repr (issue 9, A4)
            self.close(error)
            raise

    def _write_last(self, outputs: Any, attributes: Any, status: Any) -> list[SpanguardError]:
        findings: list[SpanguardError] = []
        named: dict[str, Any] = {}
        if attributes is not None:
            named, reserved = writing.attribute_names(as_mapping(attributes))
            findings += reserved
        if self.client is not None:
            outputs, named = self._leave_to_client(outputs, named)
        if outputs is not None:
            writing.outputs(self.live, outputs)
        if named:
            writing.attributes(self.live, named)
        code, description, finding = parse_status(status)
        if finding is not None:
            findings.append(finding)
        if code == "ERROR":
            writing.error(self.live, description)
        return findings

    def _leave_to_client(self, outputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Keep what the client's end is to be called with; return the rest, to be recorded here.

        The client may be one that takes secrets out.
        """
        if outputs is not None:
            self._last["outputs"] = clean(outputs)
        items = list(named.items())
        room = max(0, _mlflow.SAFE_ATTRIBUTES - _mlflow.attribute_count(self.live))
        if items[:room]:
            self._last["attributes"] = clean_attributes(dict(items[:room]))
        return None, dict(items[room:])

    def __del__(self) -> None:
        # Nobody can end it any more. An attribute may be missing if __init__ was interrupted.
        # Only put aside: this may run in the middle of anything (see _process/dropped.py).
        entry = getattr(self, "entry", None)
        if entry is not None and not entry.ended and self.closed_by is None:
            put_aside(self._close_dropped, entry.strand.thread)

    def _close_dropped(self) -> None:
        entry = self.entry
        if entry is None or not self.is_open or sys.is_finalizing():
            return
        report, site = entry.report(), entry.site
        self.abandon()
        finding = _abandoned(report)
        note_unraised(finding)
        settle([finding], strict=False, raised=None, site=site)

    def abandon(self) -> None:
        """End the span as one that was dropped while open."""
        entry = self.entry
        if entry is not None:
            if _mlflow.is_being_written(entry.otel):
                put_aside(self._close_dropped)
                return
            _registry.close_descendants(entry, with_what_outlives=False)
            entry.opened = None  # it is this one, on its way out
            if self.is_root and entry.children and _registry.claim(entry):
                self.orphaned()
                by, opened_at = "garbage collection", str(entry.site)
                writing.orphan(self.live, ABANDONED, opened_at=opened_at, orphaned_by=by)
                self._end(None)  # when what runs on under it has ended
            else:
                self.orphaned()
                _registry.close_orphan(entry, "garbage collection", ABANDONED)


def _abandoned(span: OpenSpan) -> OrphanedSpanError:
    finding = OrphanedSpanError(
        f"Span {span.name!r} ({span.span_id}), opened at {span.opened_at}, was garbage-collected "
        "while open and was closed as abandoned. Use it as a with-block, or keep and close it.",
        span_name=span.name,
        span_id=span.span_id,
        trace_id=span.trace_id,
    )
    finding.spans = [span]
    return finding


def already_ended_finding(
    name: str, span_id: Any, trace_id: Any, orphaned_by: str | None
) -> SpanAlreadyEndedError:
    """Make a finding of a span that is ended a second time."""
    how = "" if orphaned_by is None else f", closed as an orphan of {orphaned_by}"
    return SpanAlreadyEndedError(
        f"Span {name!r} ({span_id}) had already ended{how}; ending it again did nothing. "
        "End each span once.",
        span_name=name,
        span_id=span_id,
        trace_id=trace_id,
    )


def orphans_finding(
    opened: OpenedSpan,
    closed: list[tuple[OpenSpan, Site]],
    kind: type[OrphanedSpanError] = OrphanedSpanError,
) -> list[SpanguardError]:
    """Make one finding of the descendants that a span found open at its end."""
    found = f"Span {opened.name!r} ({opened.live.span_id}) ended with {len(closed)} open below it"
    return _orphans(opened, closed, kind, found)


def left_open_finding(
    outermost: OpenedSpan, closed: list[tuple[OpenSpan, Site]], found: str
) -> list[SpanguardError]:
    """Make one finding of what a block found open at its end; `found` says which block it was."""
    return _orphans(outermost, closed, OrphanedSpanError, found)


def left_behind_finding(closed: list[tuple[OpenSpan, Site]]) -> list[SpanguardError]:
    """Make one finding of what work for another process left open."""
    found = f"Work carried from another process ended with {len(closed)} open"
    outermost = closed[-1][0] if closed else None
    return _orphans(outermost, closed, OrphanedSpanError, found)


def _orphans(
    about: OpenedSpan | OpenSpan | None,
    closed: list[tuple[OpenSpan, Site]],
    kind: type[OrphanedSpanError],
    found: str,
) -> list[SpanguardError]:
    if not closed or about is None:
        return []
    identity: Any = about.live if isinstance(about, OpenedSpan) else about
    spans = [span for span, _ in closed]
    listed = "; ".join(str(span) for span in spans[:5])
    more = f"; and {len(spans) - 5} more" if len(spans) > 5 else ""
    finding = kind(
        f"{found}: {listed}{more}. Closed as ERROR, orphaned. End each span where its work ends, "
        "or open it with traced_span.",
        span_name=about.name,
        span_id=identity.span_id,
        trace_id=identity.trace_id,
    )
    finding.spans = spans
    # The warning points at the line that leaked, not at the one that noticed.
    finding.site = closed[-1][1]
    return [finding]


def _client_ender(client: Any, live: Any, last: dict[str, Any], *, is_root: bool) -> _mlflow.Ender:
    def end(status: Any, end_time_ns: int | None) -> None:
        if _mlflow.otel_span(live) is not None and not _mlflow.is_buffered(live.trace_id):
            # Evicted. The client would ask the store for it: for minutes, if that is down.
            _mlflow.end_live(live, end_time_ns)
            return
        extra = dict(last) if end_time_ns is None else {**last, "end_time_ns": end_time_ns}
        if is_root:
            client.end_trace(trace_id=live.trace_id, status=status, **extra)
        else:
            client.end_span(trace_id=live.trace_id, span_id=live.span_id, status=status, **extra)

    return end
