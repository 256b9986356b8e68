"""Chosen trace ids: one that is in use is not given to a second trace, which would merge them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from spanguard._base.findings import contained
from spanguard._lifecycle.request import SpanRequest
from spanguard._mlflow import ids, memory, queue, starting, store, stored
from spanguard._mlflow.shapes import MlflowSpan
from spanguard._process import exit as _exit
from spanguard._process import listening
from spanguard.exceptions import DuplicateTraceIdError, InvalidSpanArgumentError

__all__ = ["LOST_TRACE_ID", "check", "reserve", "reserved"]


# The tag and attribute of a trace whose chosen id was not to be had.
LOST_TRACE_ID = "spanguard.otel_trace_id"

# How long a trace that has just ended may take to arrive in the store; then it counts as there.
ARRIVAL_SECONDS = 1.0

_reserved: set[int] = set()
_lock = threading.RLock()


@contextmanager
def reserved(request: SpanRequest) -> Iterator[None]:
    """Keep the chosen trace id for a request while its trace starts, if it may have it."""
    if not request.is_reserved:
        _reserve_or_drop(request)
    try:
        yield
    finally:
        if request.is_reserved:
            _release(request)


def reserve(request: SpanRequest) -> bool:
    """Reserve the chosen trace id until the request's trace has started; False if it is in use.

    In use is what is open in this process, what has ended in it and is on its way to the store,
    and what the store has. If the store does not answer in two seconds the id counts as free,
    unless a trace of this very process has just ended with it: an outage costs no trace its id.
    """
    number = _number(request)
    with _lock:
        if number in _reserved:
            return False
        _reserved.add(number)
    request.is_reserved = True
    is_free = False
    try:
        is_free = not _is_in_use(number)
    finally:
        if not is_free:
            _release(request)
    return is_free


def check(request: SpanRequest, live: MlflowSpan) -> None:
    """See whether a started root has the id that was chosen for it."""
    given = ids.otel_trace_id_of(live)
    if given is None or given == request.otel_trace_id:
        return  # nothing is recorded, or all is well
    request.lost_trace_id = request.otel_trace_id
    request.findings.append(
        InvalidSpanArgumentError(
            f"This installation did not take the chosen trace id {request.otel_trace_id} of span "
            f"{request.name!r}; the trace got a fresh id, and the chosen one as the tag "
            f"{LOST_TRACE_ID!r}. Use an OpenTelemetry SDK whose tracer has an id_generator.",
            span_name=request.name,
            trace_id=live.trace_id,
        )
    )


def _reserve_or_drop(request: SpanRequest) -> None:
    """Reserve the chosen trace id; if it cannot be had, take it off the request and say why."""
    if request.trace_id is not None or request.parent_id is not None:
        request.otel_trace_id = None
        request.findings.append(
            InvalidSpanArgumentError(
                f"otel_trace_id of span {request.name!r} is for a new trace, and the span was to "
                "go into another one; it was ignored. Pass it without trace_id and parent_id.",
                span_name=request.name,
            )
        )
        return
    request.new_trace = True
    if not reserve(request):
        request.findings.append(
            DuplicateTraceIdError(
                f"The trace id {request.otel_trace_id} that was chosen for span {request.name!r} "
                f"is in use; its trace got a fresh id, and the chosen one as the tag "
                f"{LOST_TRACE_ID!r}. Choose an id for one trace only.",
                span_name=request.name,
                trace_id=ids.mlflow_trace_id_of(_number(request)),
            )
        )
        request.otel_trace_id, request.lost_trace_id = None, request.otel_trace_id


def _number(request: SpanRequest) -> int:
    return int(request.otel_trace_id or "", 16)


def _release(request: SpanRequest) -> None:
    # A trace that was started under the id has it by now.
    request.is_reserved = False
    with _lock:
        _reserved.discard(_number(request))


def _is_in_use(number: int) -> bool:
    with contained("looking up a trace id"):
        _exit.listen()  # MLflow opens the store with its first span, which may take longer
        if listening.is_open_trace(number) or memory.knows_trace(number):
            return True
        if starting.records_nothing():
            return False
        has_just_ended = listening.has_just_ended(number)
        answer = store.ask("looking up a trace id", lambda: _has_arrived(number, has_just_ended))
        return has_just_ended if answer is None else answer
    return False


def _has_arrived(number: int, has_just_ended: bool) -> bool:
    """Tell whether the store has a trace; one that is still on its way counts."""
    if has_just_ended and not queue.await_stored(ARRIVAL_SECONDS):
        return True
    return stored.trace_exists(ids.mlflow_trace_id_of(number))


def start_afresh_in_child() -> None:
    """Have a lock of its own in a forked child."""
    # What the parent was about to start stays reserved: it has the id by now.
    global _lock
    _lock = threading.RLock()
