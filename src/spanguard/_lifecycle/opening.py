"""`traced_span`, and the one way in which any face of spanguard opens a span."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from spanguard._base.config import is_strict
from spanguard._base.findings import contained, internal_error, settle
from spanguard._base.interrupts import all_held_back, forget_held_back, raise_held_back
from spanguard._base.site import Site, user_site
from spanguard._base.values import attribute_of, is_a, items_of, kind_name
from spanguard._lifecycle import chosen_ids, experiments
from spanguard._lifecycle.handle import SpanHandle, handle_of
from spanguard._lifecycle.placement import Place, place, root_place
from spanguard._lifecycle.request import SpanRequest, no_client
from spanguard._mlflow import ids, memory, names, provider, starting
from spanguard._mlflow.active import current_otel_span, mode_has_changed, no_active_span
from spanguard._mlflow.provider import provider_in_force
from spanguard._mlflow.shapes import MlflowSpan
from spanguard._process import exit as _exit
from spanguard._process import orphans, registry
from spanguard._process.ambient import LOST_PARENT, ambient_span
from spanguard._process.dropped import all_put_aside, do_put_aside
from spanguard._record import writing
from spanguard._record.outcome import classify
from spanguard._record.payload import as_mapping, clean, clean_attributes
from spanguard.exceptions import InvalidSpanArgumentError, SpanguardError, SpanguardWarning

__all__ = ["open_handle"]


def open_handle(
    request: SpanRequest, *, activate: bool = True, parent: SpanHandle | None = None
) -> SpanHandle:
    """Open a span where the request asks for it; under `parent` where it asks for nothing.

    Where MLflow records nothing (tracing off, sampled out, broken), the span is one that ignores.

    Raises:
        InvalidSpanArgumentError, InvalidParentError, DuplicateTraceIdError: in strict mode,
            before anything opens.
    """
    if all_put_aside:
        do_put_aside()
    since = time.monotonic()
    try:
        if all_held_back:
            forget_held_back()
        if request.otel_trace_id is None:
            handle = _open(request, activate, parent)
        else:
            with chosen_ids.reserved(request):
                handle = _open(request, activate, parent)
        if all_held_back:
            raise_held_back()
        return handle
    except BaseException as error:  # Ctrl-C between any two lines: leave nothing open
        forget_held_back()
        _close_begun(since, error)
        raise


def _close_begun(since: float, error: BaseException) -> None:
    """Close what this thread has begun to open since then, and nobody has a hold of."""
    here = threading.current_thread()
    for entry in reversed(registry.open_entries()):
        if entry.started < since:
            break
        if entry.strand.thread is not here:
            continue
        handle = handle_of(entry)
        if handle is not None:
            handle.close(error)
        else:
            orphans.close_orphan(entry, "an interrupt of its start", classify(error), error)


def _open(request: SpanRequest, activate: bool, parent: SpanHandle | None) -> SpanHandle:
    findings = request.findings
    spot = _place(request, parent)
    if spot.finding is not None:
        findings.append(spot.finding)
    if request.for_trace:
        _check_trace_arguments(request, spot)
    attributes = {} if request.attributes is None else _attributes(request)
    if findings and is_strict(request.strict):
        settle(findings, strict=True, raised=None, site=_caller(request))
    if request.sampling_ratio is None:
        handle = _start(request, spot, attributes)
    else:
        with starting.sampled_at(request.sampling_ratio):
            handle = _start(request, spot, attributes)
    try:
        try:
            _record_start(handle, request, spot, attributes)
        except Exception as error:  # noqa: BLE001 - as `contained`, which costs a microsecond
            internal_error("recording what a span starts with", error)
        if activate:
            handle.activate(spot.ambient)
        if findings:
            settle(findings, strict=False, raised=None, site=_caller(request))
    except BaseException as error:  # Ctrl-C, or a warning turned into an error: leave nothing open
        handle.close(error)
        raise
    return handle


def _caller(request: SpanRequest) -> Site:
    found = user_site(3)
    return found if request.function is None else request.function.site(found)


def _place(request: SpanRequest, parent: SpanHandle | None) -> Place:
    try:
        if request.new_trace:
            mode_has_changed()
            return root_place()
        if parent is not None and request.trace_id is None and request.parent_id is None:
            return Place(parent.live)
        return place(request.name, request.trace_id, request.parent_id)
    except Exception as error:  # noqa: BLE001
        internal_error("finding the parent of a span", error)
        return Place()


def _is_child(spot: Place) -> bool:
    return spot.parent is not None


def _check_trace_arguments(request: SpanRequest, spot: Place) -> None:
    if _is_child(spot):
        given = request.misplaced_under(spot.parent)
        if given:
            request.findings.append(
                InvalidSpanArgumentError(
                    f"{', '.join(given)} of span {request.name!r} belong to a trace, and this span "
                    "is a child. Tags and metadata were added to its trace, the rest was ignored. "
                    "Pass them where the trace starts, or start another with new_trace=True.",
                    span_name=request.name,
                )
            )
    elif request.experiment_id is not None:
        request.experiment_id, finding = experiments.read(request.experiment_id, request.name)
        if finding is not None:
            request.findings.append(finding)


def _attributes(request: SpanRequest) -> dict[str, object]:
    if not is_a(request.attributes, dict):
        request.findings.append(
            InvalidSpanArgumentError(
                f"attributes of span {request.name!r} is a {kind_name(request.attributes)}, "
                "not a dict; what it holds was recorded. Pass a dict.",
                span_name=request.name,
            )
        )
    attributes, reserved = writing.attribute_names(as_mapping(request.attributes))
    request.findings += reserved
    return attributes


def _start(request: SpanRequest, spot: Place, attributes: dict[str, object]) -> SpanHandle:
    """Start the span, bare: a payload that MLflow chokes on must not cost the span."""
    live: MlflowSpan | None = None
    is_listening = False
    try:
        if provider.watched is None or provider_in_force() is not provider.watched:
            _exit.listen()
        is_listening = True
        if request.otel_trace_id is not None:
            with ids.trace_id_chosen(request.otel_trace_id):
                live = _start_at(request, spot, attributes)
            chosen_ids.check(request, live)
        else:
            live = _start_at(request, spot, attributes)
    except (SpanguardError, SpanguardWarning):
        raise  # of a guarded client: nothing failed, and it is for the user
    except Exception as error:  # noqa: BLE001
        # Before that nothing of the user's was given away; a client is given payloads.
        internal_error("starting a span", error, quoted=not is_listening)
    if live is None:
        live = starting.noop_span()
    if request.sampling_ratio is not None and starting.is_noop(live):
        live = starting.sampled_out(live)
    is_root = spot.parent is None and getattr(live, "parent_id", None) is None
    handle = SpanHandle(request, live, is_root=is_root)
    if request.client is not None and handle.entry is not None:
        # A client of the user's own class has frames between us and the line that called.
        handle.entry.site = user_site(3)
    if request.function is not None and handle.entry is not None:
        handle.entry.site = request.function.site(handle.entry.site)
    return handle


def _start_at(request: SpanRequest, spot: Place, attributes: dict[str, object]) -> MlflowSpan:
    if spot.parent is not None:
        return _start_child(request, spot.parent, attributes)
    hides = spot.new_trace or (
        request.client is not None and not ambient_span().get_span_context().is_valid
    )
    if hides and current_otel_span().get_span_context().is_valid:
        with no_active_span():
            return _start_root(request, attributes)
    return _start_root(request, attributes)


def _start_child(
    request: SpanRequest, parent: MlflowSpan, attributes: dict[str, object]
) -> MlflowSpan:
    start = _start_of_client(request, "start_span")
    if start is None:
        if request.start_time_ns is None:
            live = starting.start_plain_child(parent, request.name)
            if live is not None:
                return live
        return starting.start_child(
            parent, request.name, span_type=request.span_type, start_time_ns=request.start_time_ns
        )
    return start(
        name=request.name,
        trace_id=parent.trace_id,
        parent_id=parent.span_id,
        span_type=request.span_type,
        **_client_payloads(request, attributes),
    )


def _start_root(request: SpanRequest, attributes: dict[str, object]) -> MlflowSpan:
    trace = {"tags": request.trace_tags() or None}
    if request.experiment_id is not None:
        trace["experiment_id"] = request.experiment_id
    start = _start_of_client(request, "start_trace")
    if start is None:
        return starting.start_root(
            request.name,
            span_type=request.span_type,
            start_time_ns=request.start_time_ns,
            metadata=request.trace_metadata() or None,
            **trace,
        )
    given = {key: value for key, value in trace.items() if value is not None}
    payloads = _client_payloads(request, attributes)
    live = start(name=request.name, span_type=request.span_type, **given, **payloads)
    metadata = request.trace_metadata()
    if metadata:
        memory.add_to_trace(live.trace_id, {}, metadata)
    return live


def _start_of_client(request: SpanRequest, name: str) -> Callable[..., MlflowSpan] | None:
    """Return the given client's method; where it has none, it is no client, and that is told.

    Asked for here only, where it is called: a double may write down what it is asked for.
    """
    if request.client is None:
        return None
    start: Callable[..., MlflowSpan] | None = attribute_of(request.client, name)
    if callable(start):
        return start
    finding = no_client(request.client, request.name)
    settle(
        [finding] if is_strict(request.strict) else [], strict=True, raised=None, site=user_site(2)
    )
    request.findings.append(finding)
    request.client = None
    return None


def _client_payloads(request: SpanRequest, attributes: dict[str, object]) -> dict[str, object]:
    """Return what a given client is called with beside ids: what was given, made safe."""
    payloads: dict[str, object] = {}
    if request.inputs is not None:
        payloads["inputs"] = clean(request.inputs)
    first = dict(list(attributes.items())[: names.SAFE_ATTRIBUTES])
    if first:
        payloads["attributes"] = clean_attributes(first)
    if request.start_time_ns is not None:
        payloads["start_time_ns"] = request.start_time_ns
    return payloads


def _record_start(
    handle: SpanHandle, request: SpanRequest, spot: Place, attributes: dict[str, object]
) -> None:
    live = handle.live
    if starting.is_noop(live):
        return
    if request.client is None:
        writing.start(live, request.span_type, request.inputs, attributes)
    elif len(attributes) > names.SAFE_ATTRIBUTES:
        writing.attributes(live, dict(list(attributes.items())[names.SAFE_ATTRIBUTES :]))
    if spot.lost_parent is not None:
        writing.attribute(live, LOST_PARENT, spot.lost_parent)
    if request.lost_trace_id is not None:
        writing.attribute(live, chosen_ids.LOST_TRACE_ID, request.lost_trace_id)
        memory.add_to_trace(live.trace_id, {chosen_ids.LOST_TRACE_ID: request.lost_trace_id}, {})
    if request.for_trace and _is_child(spot):
        with contained("adding to a trace"):
            metadata = request.trace_metadata()
            metadata.pop(names.RUN_KEY, None)
            memory.add_to_trace(live.trace_id, request.trace_tags(), metadata)
    if not (request.description is request.log_level is request.links is None):
        _record_extras(handle, request)


def _record_extras(handle: SpanHandle, request: SpanRequest) -> None:
    if request.description is not None:
        handle.proxy.set_description(request.description)
    if request.log_level is not None:
        handle.proxy.set_log_level(request.log_level)
    if request.links is not None:
        for link in items_of(request.links, names.MAX_LINKS):
            handle.proxy.add_link(link)
