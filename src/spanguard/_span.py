"""`traced_span`, and the one way in which any face of spanguard opens and closes a span."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, overload

from mlflow.entities import LiveSpan

from spanguard import _experiments, _mlflow, _record, _registry
from spanguard._config import is_strict
from spanguard._context import Ambient, ambient_span
from spanguard._findings import contained, internal_error, settle
from spanguard._outcome import ABANDONED, OK, Outcome, classify
from spanguard._payload import as_mapping, clean, clean_attributes, clean_labels, clean_text
from spanguard._placement import Place, place, root_place
from spanguard._proxy import SpanProxy, parse_status
from spanguard._registry import OpenSpan
from spanguard._site import Site, user_site
from spanguard.exceptions import (
    InvalidSpanArgumentError,
    OrphanedSpanError,
    SpanAlreadyEndedError,
    SpanguardError,
    TraceLostError,
)

__all__ = ["OpenedSpan", "SpanRequest", "current_span", "open_span", "traced_span"]

MAX_SPAN_NAME_CHARS = 4_000
LOST_PARENT = "spanguard.lost_parent"


class SpanRequest:
    """What was asked for: the arguments of `traced_span`, in either form, read and mended."""

    __slots__ = (
        "attributes",
        "client",
        "expected",
        "experiment_id",
        "findings",
        "inputs",
        "links",
        "metadata",
        "name",
        "new_trace",
        "otel_trace_id",
        "parent_id",
        "run_id",
        "session_id",
        "span_type",
        "start_time_ns",
        "strict",
        "tags",
        "trace_id",
        "user",
    )

    def __init__(
        self,
        args: tuple[Any, ...],
        *,
        name: Any = ...,
        trace_id: Any = None,
        request_id: Any = None,
        parent_id: Any = None,
        client: Any = None,
        span_type: Any = "UNKNOWN",
        inputs: Any = None,
        attributes: Any = None,
        tags: Any = None,
        metadata: Any = None,
        experiment_id: Any = None,
        run_id: Any = None,
        session_id: Any = None,
        user: Any = None,
        links: Any = None,
        start_time_ns: Any = None,
        otel_trace_id: Any = None,
        new_trace: Any = False,
        expected: Any = (),
        strict: bool | None = None,
        **unknown: Any,
    ) -> None:
        self.findings: list[SpanguardError] = []
        self.client = client
        if args:
            name, trace_id, parent_id = self._positional(args, name, trace_id, parent_id)
        self.name = self._name(name)
        self.trace_id = self._id("trace_id", request_id if trace_id is None else trace_id)
        self.parent_id = self._id("parent_id", parent_id)
        self.span_type = span_type if type(span_type) is str else self._type(span_type)
        self.inputs = inputs
        self.attributes = attributes
        self.tags = tags
        self.metadata = metadata
        self.experiment_id = experiment_id
        self.run_id = run_id
        self.session_id = session_id
        self.user = user
        self.links = links
        self.start_time_ns = None if start_time_ns is None else self._start_time(start_time_ns)
        self.otel_trace_id = None if otel_trace_id is None else self._otel_id(otel_trace_id)
        self.new_trace = bool(new_trace)
        self.expected = expected if expected == () else self._expected(expected)
        self.strict = strict
        for key in unknown:
            self._found(f"There is no argument {key!r}; it was ignored. Check its spelling.")

    def _positional(self, args: tuple[Any, ...], name: Any, trace_id: Any, parent_id: Any) -> Any:
        """Read `(name)` or the documented recipe's `(client, name, request_id, parent_id)`."""
        if len(args) == 1 and name is ...:
            return args[0], trace_id, parent_id
        self.client, rest = args[0], list(args[1:])
        if name is ... and rest:
            name = rest.pop(0)
        if rest:
            trace_id = rest.pop(0)
        if rest:
            parent_id = rest.pop(0)
        if rest:
            self._found(f"{len(rest)} positional arguments too many were ignored.")
        return name, trace_id, parent_id

    def _found(self, text: str) -> None:
        name = getattr(self, "name", None)
        self.findings.append(InvalidSpanArgumentError(text, span_name=name))

    def _name(self, name: Any) -> str:
        if type(name) is str and name:
            return clean_text(name, MAX_SPAN_NAME_CHARS)
        text = "span" if name is ... or name == "" else clean_text(name, MAX_SPAN_NAME_CHARS)
        self._found(
            f"A span needs a name that is a string with at least one character; it is called "
            f"{text!r}. Pass the name as the first argument."
        )
        return text

    def _id(self, argument: str, value: Any) -> str | None:
        if value is None or type(value) is str:
            return value
        if isinstance(value, str):
            return str.__str__(value)
        self._found(
            f"{argument} of span {self.name!r} is a {type(value).__name__}, not a string; it was "
            "ignored. Pass span.trace_id or span.span_id."
        )
        return None

    def _type(self, span_type: Any) -> str:
        if span_type is None:
            return "UNKNOWN"
        if isinstance(span_type, str):  # an enumeration's member
            return str.__str__(span_type)
        self._found(f"span_type of span {self.name!r} is not a string. Pass one of SpanType.")
        return clean_text(span_type)

    def _start_time(self, value: Any) -> int | None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                nanoseconds = int(value)
                if 0 < nanoseconds < 2**63:
                    return nanoseconds
            except (ValueError, OverflowError):
                pass
        self._found(
            f"start_time_ns of span {self.name!r} is not a time in nanoseconds since 1970; now "
            "was taken. Pass time.time_ns()."
        )
        return None

    def _otel_id(self, value: Any) -> str | None:
        try:
            if isinstance(value, str) and len(value) == 32 and int(value, 16) > 0:
                return value.lower()
        except ValueError:
            pass
        self._found(
            f"otel_trace_id of span {self.name!r} is not 32 hexadecimal digits; a fresh id was "
            "taken. Pass f'{trace_id:032x}'."
        )
        return None

    def _expected(self, expected: Any) -> tuple[type[BaseException], ...]:
        given = tuple(expected) if isinstance(expected, (tuple, list, set)) else (expected,)
        kinds = tuple(k for k in given if isinstance(k, type) and issubclass(k, BaseException))
        if len(kinds) != len(given):
            self._found(
                f"expected of span {self.name!r} holds something that is no exception class; it "
                "was ignored. Pass a tuple of exception classes."
            )
        return kinds

    # -- what belongs to a trace ---------------------------------------------------------------

    def trace_arguments(self) -> list[str]:
        """Return the names of the given arguments that mean something on a root only."""
        given = {
            "tags": self.tags,
            "metadata": self.metadata,
            "experiment_id": self.experiment_id,
            "run_id": self.run_id,
            "session_id": self.session_id,
            "user": self.user,
        }
        return [argument for argument, value in given.items() if value is not None]

    def trace_tags(self) -> dict[str, str]:
        return clean_labels(self.tags) if self.tags is not None else {}

    def trace_metadata(self) -> dict[str, str]:
        """Return the trace's metadata, session, user and run among them, by MLflow's names."""
        metadata = clean_labels(self.metadata) if self.metadata is not None else {}
        named = (
            (_mlflow.SESSION_KEY, self.session_id),
            (_mlflow.USER_KEY, self.user),
            (_mlflow.RUN_KEY, self.run_id),
        )
        for key, value in named:
            if value is not None:
                metadata[key] = clean_text(value)
        return metadata


# -- opening -----------------------------------------------------------------------------------


class OpenedSpan:
    """One span from its start to its end. Every face holds one, and ends it here, once."""

    __slots__ = (
        "__weakref__",
        "_kept",
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
        self._provider = _mlflow.current_provider()
        self.entry = _registry.entry_of(_mlflow.otel_span(live))
        self.proxy: SpanProxy = SpanProxy(live, self)
        if self.entry is not None:
            self.entry.live = live
            self.entry.opened = weakref.ref(self)
            if self.client is not None:
                self.entry.ender = _client_ender(self.client, live, is_root=is_root)

    # -- being active

    def activate(self) -> None:
        """Make the span the ambient one, and MLflow's active one, until it closes."""
        with contained("activating a span"):
            otel = _mlflow.otel_span(self.live)
            ignores = _mlflow.is_noop(self.live) and not _mlflow.carries_decision(self.live)
            if otel is None or ignores:
                return
            self.ambient = Ambient(otel)
            if self.entry is not None:
                self.entry.stand_in = self.ambient.stand_in

    def deactivate(self) -> None:
        """Leave the context as it was found, also when this is another context."""
        if self.ambient is not None:
            with contained("restoring the active span"):
                self.ambient.leave()

    # -- state

    @property
    def is_open(self) -> bool:
        """Whether the span has neither been closed here nor ended by another API."""
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

    def close(
        self,
        raised: BaseException | None = None,
        *,
        by: str = "exit",
        outcome: Outcome | None = None,
        end_time_ns: int | None = None,
    ) -> list[SpanguardError]:
        """End the span, descendants first, and return what was found wrong. Never raises."""
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
            findings += orphans_finding(self, self._close_descendants())
            lost = self._lost()
            if lost is not None:
                findings.append(lost)
            if raised is not None or outcome is not None:
                self._record_outcome(raised, outcome or classify(raised, self.expected))
        finally:
            ender = _client_ender(self.client, self.live, is_root=self.is_root)
            _record.end(self.live, ender if self.client is not None else None, end_time_ns)
        return findings

    def _close_descendants(self) -> list[tuple[OpenSpan, Site]]:
        entry = self.entry
        if entry is None:
            return []
        closed = _registry.close_descendants(entry) if entry.children else []
        if self.is_root:
            closed += _registry.close_unheard(self.live.trace_id, entry)
        return closed

    def _record_outcome(self, raised: BaseException | None, outcome: Outcome) -> None:
        if outcome is OK:
            return
        _record.outcome(self.live, outcome)
        if raised is not None and outcome.record_event:
            _record.exception(self.live, raised, outcome)
        elif outcome.status == "ERROR":
            _record.error(self.live, outcome.name)

    def _late(self) -> list[SpanguardError]:
        entry = self.entry
        if entry is not None and entry.ended and entry.children:
            _registry.close_descendants(entry)
        error = SpanAlreadyEndedError(
            f"Span {self.name!r} ({self.live.span_id}) had already ended"
            f"{self._ended_how()}; ending it again did nothing. End each span once.",
            span_name=self.name,
            span_id=self.live.span_id,
            trace_id=self.live.trace_id,
        )
        if entry is not None and entry.orphaned_by and not is_strict(self.strict):
            return []  # its orphan warning has told it
        return [error]

    def _ended_how(self) -> str:
        if self.entry is not None and self.entry.orphaned_by:
            return f", closed as an orphan of {self.entry.orphaned_by}"
        return ""

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
            settle(findings, strict=self.strict, raised=raised, site=user_site(2))

    def end_by_user(
        self, outputs: Any, attributes: Any, status: Any, end_time_ns: int | None
    ) -> None:
        """End as `span.end(...)` asks, before the block or the manager does."""
        findings = []
        if self.is_open:
            findings += self.write_last(outputs, attributes, status)
        if not isinstance(end_time_ns, int) or isinstance(end_time_ns, bool):
            end_time_ns = None
        findings += self.close(by="user", end_time_ns=end_time_ns)
        if findings:
            settle(findings, strict=self.strict, raised=sys.exc_info()[1], site=user_site(2))

    def write_last(self, outputs: Any, attributes: Any, status: Any) -> list[SpanguardError]:
        """Record what is given along with an end; return what was wrong with it."""
        findings: list[SpanguardError] = []
        if outputs is not None:
            _record.outputs(self.live, outputs)
        if attributes is not None:
            findings += _record.attributes(self.live, as_mapping(attributes))
        code, description, finding = parse_status(status)
        if finding is not None:
            findings.append(finding)
        if code == "ERROR":
            _record.error(self.live, description)
        return findings

    def __del__(self) -> None:
        # Nobody can end it any more. An attribute may be missing if __init__ was interrupted.
        if getattr(self, "closed_by", "") is not None or sys.is_finalizing():
            return
        try:
            if self.entry is not None and self.is_open:
                site = self.entry.site
                self.abandon()
                settle([_abandoned(self, site)], strict=False, raised=None, site=site)
        except Exception as error:
            internal_error("closing an abandoned span", error)

    def abandon(self) -> None:
        """End the span as one that was dropped while open."""
        entry = self.entry
        if entry is not None:
            _registry.close_descendants(entry)
            entry.opened = None  # it is this one, on its way out
            self.orphaned()
            _registry.close_orphan(entry, "garbage collection", ABANDONED)


def _abandoned(opened: OpenedSpan, site: Site) -> OrphanedSpanError:
    return OrphanedSpanError(
        f"Span {opened.name!r} ({opened.live.span_id}), opened at {site}, was garbage-collected "
        "while open and was closed as abandoned. Use it as a with-block, or keep and close it.",
        span_name=opened.name,
        span_id=opened.live.span_id,
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
    outermost: OpenedSpan, closed: list[tuple[OpenSpan, Site]]
) -> list[SpanguardError]:
    """Make one finding of what was pushed and not popped when its manager's block ended."""
    found = f"The block of a TraceStateManager ended with {len(closed)} not popped"
    return _orphans(outermost, closed, OrphanedSpanError, found)


def _orphans(
    opened: OpenedSpan,
    closed: list[tuple[OpenSpan, Site]],
    kind: type[OrphanedSpanError],
    found: str,
) -> list[SpanguardError]:
    if not closed:
        return []
    spans = [span for span, _ in closed]
    listed = "; ".join(str(span) for span in spans[:5])
    more = f"; and {len(spans) - 5} more" if len(spans) > 5 else ""
    finding = kind(
        f"{found}: {listed}{more}. Closed as ERROR, orphaned. End each span where its work ends, "
        "or open it with traced_span.",
        span_name=opened.name,
        span_id=opened.live.span_id,
        trace_id=opened.live.trace_id,
    )
    finding.spans = spans
    # The warning points at the line that leaked, not at the one that noticed.
    finding.site = closed[-1][1]
    return [finding]


def _client_ender(client: Any, live: Any, *, is_root: bool) -> Any:
    def end(status: Any, end_time_ns: int | None) -> None:
        extra = {} if end_time_ns is None else {"end_time_ns": end_time_ns}
        if is_root:
            client.end_trace(trace_id=live.trace_id, status=status, **extra)
        else:
            client.end_span(trace_id=live.trace_id, span_id=live.span_id, status=status, **extra)

    return end


def open_span(
    request: SpanRequest, *, activate: bool = True, parent: OpenedSpan | None = None
) -> OpenedSpan:
    """Open a span where the request asks for it; under `parent` where it asks for nothing.

    Where MLflow records nothing (tracing off, sampled out, broken), the span is one that ignores.

    Raises:
        InvalidSpanArgumentError, InvalidParentError: in strict mode, before anything opens.
    """
    findings = request.findings
    spot = _place(request, parent)
    if spot.finding is not None:
        findings.append(spot.finding)
    if request.tags is not None or request.metadata is not None or request.trace_arguments():
        _check_trace_arguments(request, spot)
    attributes = _attributes(request)
    if findings and is_strict(request.strict):
        settle(findings, strict=True, raised=None, site=user_site(2))
    opened = _start(request, spot, attributes)
    try:
        with contained("recording what a span starts with"):
            _record_start(opened, request, spot, attributes)
        if activate:
            opened.activate()
        if findings:
            settle(findings, strict=False, raised=None, site=user_site(2))
    except BaseException as error:  # Ctrl-C, or a warning turned into an error: leave nothing open
        opened.close(error)
        raise
    return opened


def _place(request: SpanRequest, parent: OpenedSpan | None) -> Place:
    try:
        if request.new_trace:
            return root_place()
        if parent is not None and request.trace_id is None and request.parent_id is None:
            return Place(parent.live)
        return place(request.name, request.trace_id, request.parent_id)
    except Exception as error:
        internal_error("finding the parent of a span", error)
        return Place()


def _is_child(spot: Place) -> bool:
    return spot.parent is not None


def _check_trace_arguments(request: SpanRequest, spot: Place) -> None:
    given = request.trace_arguments()
    if given and _is_child(spot):
        request.findings.append(
            InvalidSpanArgumentError(
                f"{', '.join(given)} of span {request.name!r} belong to a trace, and this span is "
                "a child. Tags and metadata were added to its trace, the rest was ignored. Pass "
                "them where the trace starts.",
                span_name=request.name,
            )
        )
    elif request.experiment_id is not None:
        finding = _experiments.check(request.experiment_id, request.name)
        if finding is not None:
            request.findings.append(finding)
            request.experiment_id = None


def _attributes(request: SpanRequest) -> dict[str, Any]:
    if not request.attributes:
        return {}
    if not isinstance(request.attributes, dict):
        request.findings.append(
            InvalidSpanArgumentError(
                f"attributes of span {request.name!r} is a {type(request.attributes).__name__}, "
                "not a dict; what it holds was recorded. Pass a dict.",
                span_name=request.name,
            )
        )
    attributes = as_mapping(request.attributes)
    for key in attributes:
        if isinstance(key, str) and _mlflow.is_reserved(key):
            request.findings.append(_record.reserved_key(key))
    return attributes


def _start(request: SpanRequest, spot: Place, attributes: dict[str, Any]) -> OpenedSpan:
    """Start the span, bare: a payload that MLflow chokes on must not cost the span."""
    live: Any = None
    with contained("starting a span"):
        _registry.watch()
        if spot.parent is None and request.otel_trace_id is not None:
            with _mlflow.trace_id_chosen(request.otel_trace_id):
                live = _start_at(request, spot, attributes)
        else:
            live = _start_at(request, spot, attributes)
    if live is None:
        live = _mlflow.noop_span()
    is_root = spot.parent is None and getattr(live, "parent_id", None) is None
    return OpenedSpan(request, live, is_root=is_root)


def _start_at(request: SpanRequest, spot: Place, attributes: dict[str, Any]) -> Any:
    if spot.parent is not None:
        return _start_child(request, spot.parent, attributes)
    hides = spot.new_trace or (
        request.client is not None and not ambient_span().get_span_context().is_valid
    )
    if hides and _mlflow.current_otel_span().get_span_context().is_valid:
        with _mlflow.no_active_span():
            return _start_root(request, attributes)
    return _start_root(request, attributes)


def _start_child(request: SpanRequest, parent: Any, attributes: dict[str, Any]) -> Any:
    if request.client is None:
        return _mlflow.start_child(
            parent, request.name, span_type=request.span_type, start_time_ns=request.start_time_ns
        )
    return request.client.start_span(
        name=request.name,
        trace_id=parent.trace_id,
        parent_id=parent.span_id,
        span_type=request.span_type,
        **_client_payloads(request, attributes),
    )


def _start_root(request: SpanRequest, attributes: dict[str, Any]) -> Any:
    trace = {"tags": request.trace_tags() or None}
    if request.experiment_id is not None:
        trace["experiment_id"] = request.experiment_id
    if request.client is None:
        return _mlflow.start_root(
            request.name,
            span_type=request.span_type,
            start_time_ns=request.start_time_ns,
            metadata=request.trace_metadata() or None,
            **trace,
        )
    given = {key: value for key, value in trace.items() if value is not None}
    payloads = _client_payloads(request, attributes)
    live = request.client.start_trace(
        name=request.name, span_type=request.span_type, **given, **payloads
    )
    metadata = request.trace_metadata()
    if metadata:
        _mlflow.add_to_trace(live.trace_id, {}, metadata)
    return live


def _client_payloads(request: SpanRequest, attributes: dict[str, Any]) -> dict[str, Any]:
    """Return what a given client is called with beside ids: what was given, made safe."""
    payloads: dict[str, Any] = {}
    if request.inputs is not None:
        payloads["inputs"] = clean(request.inputs)
    first = dict(list(attributes.items())[: _mlflow.SAFE_ATTRIBUTES])
    if first:
        payloads["attributes"] = {
            f"user.{key}" if _mlflow.is_reserved(key) else key: value
            for key, value in clean_attributes(first).items()
        }
    if request.start_time_ns is not None:
        payloads["start_time_ns"] = request.start_time_ns
    return payloads


def _record_start(
    opened: OpenedSpan, request: SpanRequest, spot: Place, attributes: dict[str, Any]
) -> None:
    live = opened.live
    if _mlflow.is_noop(live):
        return
    if request.client is None:
        if request.inputs is not None:
            _record.inputs(live, request.inputs)
        for key, value in attributes.items():
            _record.attribute(live, key, value)
    else:
        for key, value in list(attributes.items())[_mlflow.SAFE_ATTRIBUTES :]:
            _record.attribute(live, key, value)
    if spot.lost_parent is not None:
        _record.attribute(live, LOST_PARENT, spot.lost_parent)
    if _is_child(spot) and (request.tags is not None or request.trace_arguments()):
        with contained("adding to a trace"):
            metadata = request.trace_metadata()
            metadata.pop(_mlflow.RUN_KEY, None)
            _mlflow.add_to_trace(live.trace_id, request.trace_tags(), metadata)
    if request.links:
        for link in request.links if isinstance(request.links, Iterable) else [request.links]:
            opened.proxy.add_link(link)


# -- the block ---------------------------------------------------------------------------------


class traced_span:
    """Open a span for the length of a with-block; it always closes, in order, with a status.

    The span nests under the ambient span, whichever API opened that, and is itself the ambient
    span inside the block: fluent spans, `@mlflow.trace` and autologging nest under it. When the
    block is left, what it left open underneath is closed first, as ERROR and `orphaned`; then
    the span ends, as the exception that left the block says (see the outcome table in the
    README). Exceptions of the block pass through unchanged. Works with `async with` too.

    Nothing here raises into your code, except in strict mode: then bad arguments raise
    `InvalidSpanArgumentError` or `InvalidParentError` before anything opens, and what was left
    open raises `OrphanedSpanError` after everything is closed. Otherwise these are warnings.
    A `traced_span` object is good for one block: entering it again raises `RuntimeError`.

    Args:
        name: the span's name; for a root also the trace's.
        trace_id: a live trace to open the span in; `request_id` is another name for it. Without
            `parent_id`: under the ambient span if that is in this trace, else under its root.
        parent_id: the span to open it under.
        client: an MLflow client whose `start_*` and `end_*` are to be called.
        span_type: one of `mlflow.entities.SpanType`, or a string of your own.
        inputs, attributes: payloads. What MLflow cannot take is replaced, not lost.
        tags, metadata, experiment_id, run_id, session_id, user: of a trace: on roots only.
        links: `mlflow.entities.Link` objects.
        start_time_ns: nanoseconds since 1970; now, if not given.
        otel_trace_id: 32 hexadecimal digits: the OpenTelemetry trace id of a new trace.
        new_trace: start a new trace, also inside another.
        expected: exception classes that are no error here: status OK, outcome `expected`.
        strict: overrides `strict()` and the environment for this span.

    The positional form of the documented recipe is taken as well:
    `traced_span(client, "name", request_id, parent_id, **kwargs)`.

    >>> import spanguard
    >>> with spanguard.traced_span("fetch", inputs={"id": 7}) as span:
    ...     span.set_outputs("found")
    """

    __slots__ = ("_opened", "_request")

    @overload
    def __init__(
        self,
        /,
        name: str,
        *,
        trace_id: str | None = None,
        request_id: str | None = None,
        parent_id: str | None = None,
        client: Any = None,
        span_type: str = "UNKNOWN",
        inputs: Any = None,
        attributes: dict[str, Any] | None = None,
        tags: dict[str, Any] | None = None,
        metadata: dict[str, Any] | None = None,
        experiment_id: str | None = None,
        run_id: str | None = None,
        session_id: str | None = None,
        user: str | None = None,
        links: Iterable[Any] | None = None,
        start_time_ns: int | None = None,
        otel_trace_id: str | None = None,
        new_trace: bool = False,
        expected: tuple[type[BaseException], ...] | type[BaseException] = (),
        strict: bool | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        client: _mlflow.MlflowClient,
        name: str,
        request_id: str | None = None,
        parent_id: str | None = None,
        /,
        **kwargs: Any,
    ) -> None: ...

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        self._request: SpanRequest | None = SpanRequest(args, **kwargs)
        self._opened: OpenedSpan | None = None

    def __enter__(self) -> LiveSpan:
        request, self._request = self._request, None
        if request is None:
            raise RuntimeError(
                "This traced_span has been entered before. Make a new one for each block: "
                "with traced_span(...)."
            )
        self._opened = open_span(request)
        return self._opened.proxy  # type: ignore[return-value]

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.finish(exc)

    async def __aenter__(self) -> LiveSpan:
        return self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(exc_type, exc, traceback)


def current_span() -> LiveSpan | None:
    """Return the ambient span, whichever API opened it, or None.

    It comes through the same proxy that `traced_span` yields: writing to it cannot raise.

    >>> import spanguard
    >>> spanguard.current_span() is None
    True
    """
    with contained("finding the current span"):
        active: Any = ambient_span()
        entry = _registry.entry_of(active)
        if entry is not None:
            opened = entry.opened() if entry.opened is not None else None
            if opened is not None:
                return opened.proxy  # type: ignore[return-value]
            live = entry.mlflow_span()
            return SpanProxy(live) if live is not None else None  # type: ignore[return-value]
        if active.get_span_context().is_valid and not _mlflow.has_ended(active):
            live = _mlflow.active_span()
            return SpanProxy(live) if live is not None else None  # type: ignore[return-value]
    return None
