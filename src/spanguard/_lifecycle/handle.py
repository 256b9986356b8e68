"""One span from its start to its end: active, closed once, with what was found wrong."""

from __future__ import annotations

import sys
from typing import cast

from spanguard._base.config import is_strict
from spanguard._base.findings import note_unraised, settle
from spanguard._base.site import Site, is_of_library, user_site
from spanguard._lifecycle.closing import ClosingSpan
from spanguard._lifecycle.findings import abandoned
from spanguard._lifecycle.proxy import SpanProxy
from spanguard._lifecycle.times import read_time
from spanguard._mlflow import names
from spanguard._mlflow.spans import is_being_written
from spanguard._mlflow.writing import attribute_count
from spanguard._process import orphans, registry
from spanguard._process.dropped import put_aside
from spanguard._process.registry import ClosedBy, Entry, RemoteParent
from spanguard._record import writing
from spanguard._record.outcome import ABANDONED, Outcome
from spanguard._record.payload import as_mapping, clean, clean_attributes
from spanguard._record.status import parse_status
from spanguard.exceptions import SpanguardError

__all__ = ["SpanHandle", "handle_of"]


class SpanHandle(ClosingSpan):
    """One span from its start to its end. Every face holds one, and ends it here, once."""

    __slots__ = ()

    @property
    def proxy(self) -> SpanProxy:
        """The span that the user holds. Made when it is asked for: by a function it never is."""
        if self._proxy is None:
            self._proxy = SpanProxy(self.live, self)
        proxy: SpanProxy = self._proxy
        return proxy

    @proxy.setter
    def proxy(self, proxy: SpanProxy) -> None:
        self._proxy = proxy

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
        self, outputs: object, attributes: object, status: object, end_time_ns: object
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

    def _open_above(self) -> SpanHandle | None:
        """Return the nearest span above that is open, and one of ours."""
        above: Entry | RemoteParent | None = self.entry
        while above is not None:
            above = above.parent
            found = getattr(above, "handle", None)
            handle = found() if found is not None else None
            if handle is not None and handle.is_open:
                return cast("SpanHandle", handle)
        return None

    def end(
        self, outputs: object, attributes: object, status: object, end_time_ns: object
    ) -> list[SpanguardError]:
        """End with what is given along with it, and return what was found wrong. Never raises."""
        findings: list[SpanguardError] = []
        at, finding = read_time("end_time_ns", end_time_ns, self.name)
        if self.is_open:
            if finding is not None:
                findings.append(finding)
            findings += self.write_last(outputs, attributes, status)
        if self._is_called_by_its_owner():
            self.closed_by = ClosedBy.OWNER
            writing.end(self.live, self._ender(), at)
            return findings
        return findings + self.close(by=ClosedBy.USER, end_time_ns=at)

    def _is_called_by_its_owner(self) -> bool:
        """Tell whether a block around a guarded client is ending the span, by calling that."""
        entry = self.entry
        return self.closed_by is None and entry is not None and registry.is_ending_here(entry)

    def write_last(
        self, outputs: object, attributes: object, status: object
    ) -> list[SpanguardError]:
        """Record what is given along with an end; return what was wrong with it."""
        try:
            return self._write_last(outputs, attributes, status)
        except BaseException as error:  # Ctrl-C in a payload's repr (issue 9, A4)
            self.close(error)
            raise

    def _write_last(
        self, outputs: object, attributes: object, status: object
    ) -> list[SpanguardError]:
        findings: list[SpanguardError] = []
        named: dict[str, object] = {}
        if attributes is not None:
            named, reserved = writing.attribute_names(as_mapping(attributes))
            findings += reserved
        if self.client is not None:
            outputs, named = self._leave_to_client(outputs, named)
        if named:  # first, as in MLflow
            writing.attributes(self.live, named)
        if outputs is not None:
            writing.outputs(self.live, outputs)
        code, description, finding = parse_status(status)
        if finding is not None:
            findings.append(finding)
        if code == "ERROR":
            writing.error(self.live, description)
        return findings

    def _leave_to_client(
        self, outputs: object, named: dict[str, object]
    ) -> tuple[object, dict[str, object]]:
        """Keep what the client's end is to be called with; return the rest, to be recorded here.

        The client may be one that takes secrets out.
        """
        if outputs is not None:
            self._last["outputs"] = clean(outputs)
        items = list(named.items())
        room = max(0, names.SAFE_ATTRIBUTES - attribute_count(self.live))
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
        finding = abandoned(report)
        note_unraised(finding)
        settle([finding], strict=False, raised=None, site=site)

    def abandon(self) -> None:
        """End the span as one that was dropped while open."""
        entry = self.entry
        if entry is not None:
            if is_being_written(entry.otel):
                put_aside(self._close_dropped, entry.strand.thread)
                return
            orphans.close_descendants(entry, with_what_outlives=False)
            entry.handle = None  # it is this one, on its way out
            if self.is_root and entry.children and registry.claim(entry):
                self.orphaned()
                by, opened_at = "garbage collection", str(entry.site)
                writing.orphan(self.live, ABANDONED, opened_at=opened_at, orphaned_by=by)
                self._end(None)  # when what runs on under it has ended
            else:
                self.orphaned()
                orphans.close_orphan(entry, "garbage collection", ABANDONED)


def handle_of(entry: Entry | None) -> SpanHandle | None:
    """Return the handle of a span that was opened through spanguard, while somebody has it."""
    if entry is None or entry.handle is None:
        return None
    return cast("SpanHandle | None", entry.handle())
