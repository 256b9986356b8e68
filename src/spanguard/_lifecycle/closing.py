"""How an opened span ends: once, its descendants first, whoever ends it and whatever happens."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

from mlflow.entities import SpanStatus

from spanguard._base.collector import is_collecting
from spanguard._base.config import is_strict
from spanguard._base.findings import contained, internal_error
from spanguard._base.interrupts import all_held_back, forget_held_back, raise_held_back
from spanguard._base.open_span import OpenSpan
from spanguard._base.site import Site
from spanguard._lifecycle.findings import already_ended_finding, orphans_finding
from spanguard._lifecycle.request import SpanRequest
from spanguard._mlflow import ending, exporting, memory, processor, provider, starting, takeover
from spanguard._mlflow.shapes import Client, MlflowSpan
from spanguard._mlflow.spans import is_being_written, otel_span
from spanguard._process import orphans, outliving, registry
from spanguard._process.ambient import Active, Ambient
from spanguard._process.dropped import all_put_aside, do_put_aside, is_inside_tracing, put_aside
from spanguard._process.registry import ClosedBy
from spanguard._record import writing
from spanguard._record.outcome import OK, Outcome, classify
from spanguard.exceptions import SpanguardError, TraceLostError

__all__ = ["ClosingSpan"]


def _client_ender(
    client: Client, live: MlflowSpan, last: dict[str, Any], *, is_root: bool
) -> ending.Ender:
    def end(status: SpanStatus, end_time_ns: int | None) -> None:
        if otel_span(live) is not None and not memory.is_buffered(live.trace_id):
            # Evicted. The client would ask the store for it: for minutes, if that is down.
            ending.end_live(live, end_time_ns)
            return
        extra = dict(last) if end_time_ns is None else {**last, "end_time_ns": end_time_ns}
        if is_root:
            client.end_trace(trace_id=live.trace_id, status=status, **extra)
        else:
            client.end_span(trace_id=live.trace_id, span_id=live.span_id, status=status, **extra)

    return end


_NOTHING: dict[str, Any] = {}  # what there is to be given to where there is no client


class ClosingSpan:
    """One span that this process has opened, and its way to its end: see `SpanHandle`."""

    __slots__ = (
        "__weakref__",
        "_kept",
        "_last",
        "_provider",
        "_proxy",
        "ambient",
        "client",
        "closed_by",
        "entry",
        "expected",
        "is_root",
        "live",
        "name",
        "on_orphaned",
        "strict",
    )

    def __init__(self, request: SpanRequest, live: MlflowSpan, *, is_root: bool) -> None:
        self.name = request.name
        self.client = request.client
        self.expected: tuple[type[BaseException], ...] = request.expected
        self.strict = request.strict
        self.live = live
        self.is_root = is_root
        self.closed_by: ClosedBy | None = None
        self.ambient: Ambient | None = None
        self.on_orphaned: Callable[[], object] | None = None
        self._proxy: Any = None  # see SpanHandle.proxy
        self._kept: list[SpanguardError] = []
        # What a given client's end is to be called with.
        self._last: dict[str, Any] = _NOTHING if request.client is None else {}
        self._provider = provider.current_provider()
        self.entry = registry.entry_of(otel_span(live))
        if self.entry is not None:
            self.entry.live = live
            self.entry.handle = weakref.ref(self)
            self.entry.ender = self._ender()

    def _ender(self) -> ending.Ender | None:
        if self.client is None:
            return None
        return _client_ender(self.client, self.live, self._last, is_root=self.is_root)

    # -- being active

    def activate(self, below: Active | None = None, *, kind: type[Ambient] = Ambient) -> None:
        """Make the span the ambient one, and MLflow's active one, until it closes."""
        try:
            otel = otel_span(self.live)
            ignores = starting.is_noop(self.live) and not starting.carries_decision(self.live)
            if otel is None or ignores:
                return
            # Entered last: an interrupt before that has changed nothing, and from there on the
            # end of the span, by whatever API, takes it back.
            ambient = self.ambient = kind(otel, below)
            if self.entry is not None:
                self.entry.stand_in = ambient.stand_in
                ambient.stand_in.entry = self.entry
            ambient.enter()
        except Exception as error:  # noqa: BLE001 - as `contained`, which costs a microsecond
            internal_error("activating a span", error)

    def deactivate(self) -> None:
        """Leave the context as it was found, also when this is another context."""
        if self.ambient is not None:
            try:
                self.ambient.leave()
            except Exception as error:  # noqa: BLE001
                internal_error("restoring the active span", error)

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
        self.closed_by = ClosedBy.ANCESTOR
        self.deactivate()
        if self.on_orphaned is not None:
            self.on_orphaned()

    def close_as_orphan(self, orphaned_by: str) -> list[tuple[OpenSpan, Site]]:
        """End the span in its opener's stead, descendants first; report what was open."""
        if self.entry is None:  # a user's double
            self.close()
            self.closed_by = ClosedBy.ANCESTOR
            return []
        closed = orphans.close_descendants(self.entry, with_what_outlives=False)
        report = orphans.close_orphan(self.entry, orphaned_by)
        return closed if report is None else [*closed, (report, self.entry.site)]

    def close(
        self,
        raised: BaseException | None = None,
        *,
        by: ClosedBy = ClosedBy.EXIT,
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
            or (entry is not None and is_being_written(entry.otel))
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
        by: ClosedBy,
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
        except Exception as error:  # noqa: BLE001
            internal_error("closing a span", error)
        finally:
            if by is not ClosedBy.USER:
                self.deactivate()
        return findings

    def _close_interrupted(
        self, raised: BaseException, by: ClosedBy, end_time_ns: int | None
    ) -> None:
        """Finish what an interrupt left half done (issue 9, A2)."""
        if self.closed_by is None:
            self.closed_by = by
        entry = self.entry
        try:
            if (entry is None or not entry.ended) and not starting.is_noop(self.live):
                with contained("closing a span after an interrupt"):
                    self._close_descendants()
                    self._record_outcome(raised, classify(raised, self.expected))
                    writing.end(self.live, self._ender(), end_time_ns)
        finally:
            if entry is not None:
                orphans.make_sure_of_end(entry)
            self.deactivate()

    def _claim(self) -> bool:
        if self.closed_by is not None:
            return False
        return self.entry is None or registry.claim(self.entry)

    def _close_claimed(
        self, raised: BaseException | None, outcome: Outcome | None, end_time_ns: int | None
    ) -> list[SpanguardError]:
        findings: list[SpanguardError] = []
        if starting.is_noop(self.live):
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
            orphans.make_sure_of_end(entry)

    def _close_descendants(self, *, with_what_outlives: bool = True) -> list[tuple[OpenSpan, Site]]:
        entry = self.entry
        if entry is None:
            return []
        closed: list[tuple[OpenSpan, Site]] = []
        if entry.children:
            closed += orphans.close_descendants(entry, with_what_outlives=with_what_outlives)
        if self.is_root:
            closed += orphans.close_unheard(
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
        if self.closed_by is ClosedBy.FORK:
            return []  # it is open in the parent process, which will end it
        entry = self.entry
        if entry is not None and entry.ended and entry.children:
            orphans.close_descendants(entry, with_what_outlives=False)
        orphaned_by = entry.orphaned_by if entry is not None else None
        if orphaned_by is not None and not is_strict(self.strict):
            return []  # its orphan warning has told it
        live = self.live
        return [already_ended_finding(self.name, live.span_id, live.trace_id, orphaned_by)]

    def _still_arrives(self) -> bool:
        """Tell whether what ends on this span's provider arrives, though MLflow has another now."""
        return takeover.goes_on_delivering(self._provider) or processor.goes_on_writing(
            self._provider
        )

    def _lost(self) -> TraceLostError | None:
        """Notice at the end of a span that its trace can no longer arrive."""
        otel = otel_span(self.live)
        if otel is None:
            return None
        if not memory.is_in_memory(otel):
            why = "MLflow has evicted it from its buffer (too many open traces, or open too long)"
            cure = (
                "Raise MLFLOW_TRACE_BUFFER_MAX_SIZE or MLFLOW_TRACE_BUFFER_TTL_SECONDS before "
                "the first span."
            )
        elif provider.current_provider() is not self._provider and not self._still_arrives():
            why = "the tracing destination, experiment or tracking URI changed while it was open"
            cure = "Set the experiment and the tracking URI before the trace starts."
        else:
            return None
        exporting.loss_is_told(self.live)
        trace_id = self.live.trace_id
        return TraceLostError(
            f"The trace {trace_id} of span {self.name!r} ({self.live.span_id}) may be lost: "
            f"{why}. {cure}",
            span_name=self.name,
            span_id=self.live.span_id,
            trace_id=trace_id,
        )
