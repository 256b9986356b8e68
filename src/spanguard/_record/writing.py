"""Write on a span so that nothing can go wrong: sanitised, each write on its own, ERROR sticky.

Shared by the block that opened a span, the proxy its user holds, and whoever closes it instead.
"""

from __future__ import annotations

import time
from typing import Any

from mlflow.entities import SpanStatus, SpanStatusCode

from spanguard._base.config import current_limits
from spanguard._base.findings import contained, internal_error
from spanguard._base.values import number_of, text_of
from spanguard._mlflow import ending, spans, writing
from spanguard._mlflow.names import (
    AGGREGATED_KEYS,
    INPUTS_KEY,
    OUTPUTS_KEY,
    SPAN_TYPE_KEY,
    TEXT_KEYS,
    is_reserved,
)
from spanguard._mlflow.own_write import write_plain
from spanguard._mlflow.shapes import MlflowSpan, RecordingSpan
from spanguard._record import folding
from spanguard._record.encounters import Meets, meet
from spanguard._record.folding import set_or_fold
from spanguard._record.outcome import Outcome, describe, event_attributes
from spanguard._record.payload import (
    as_mapping,
    clean,
    clean_key,
    is_plain_under,
    is_simple,
    known_keys,
)
from spanguard._record.text import clean_text
from spanguard.exceptions import InvalidSpanArgumentError

__all__ = [
    "ORPHANED_BY",
    "OUTCOME",
    "attribute",
    "attribute_names",
    "attributes",
    "end",
    "error",
    "exception",
    "explain_end",
    "inputs",
    "orphan",
    "outcome",
    "outputs",
    "start",
    "status_ok_unless_error",
    "taken_outputs",
]


OUTCOME = "spanguard.outcome"
OPENED_AT = "spanguard.opened_at"
ORPHANED_BY = "spanguard.orphaned_by"

# By an event of this name MLflow's page paints a span red, whatever its status; by no other.
EXCEPTION = "exception"
EXPECTED_EXCEPTION = "expected_exception"

_ERROR = ending.OTEL_ERROR


def start(span: MlflowSpan, span_type: str | None, value: object, named: dict[str, object]) -> None:
    """Write what a span starts with, in one go where it is plain.

    Args:
        span: the span.
        span_type: its type, if that is still to be written.
        value: its inputs, or None.
        named: its attributes, under keys that `attribute_names` has made.
    """
    try:
        otel = spans.recording_span(span)
        plain: dict[str, object] = {} if span_type is None else {SPAN_TYPE_KEY: span_type}
        if value is not None:
            if otel is not None and is_simple(value):
                plain[INPUTS_KEY] = value
            else:
                plain = _written(otel, plain)
                inputs(span, value)
        _write_named(span, otel, named, plain, len(named))
    except Exception as error:  # noqa: BLE001 - as `contained`, which costs a microsecond
        internal_error("recording what a span starts with", error)


def attribute_names(
    values: dict[object, object],
) -> tuple[dict[str, object], list[InvalidSpanArgumentError]]:
    """Return attributes under clean keys, and a finding for each key that is MLflow's own."""
    findings: list[InvalidSpanArgumentError] = []
    named: dict[str, Any] = {}
    for key, value in values.items():
        name = key if type(key) is str and key in known_keys else clean_key(key)
        if name.startswith("mlflow."):
            if is_reserved(name):
                findings.append(reserved_key(name))
                name = f"user.{name}"
            elif name in AGGREGATED_KEYS:
                name, value = _aggregated(name, value, findings)
        named[name] = value
    return named, findings


def _aggregated(
    name: str, value: object, findings: list[InvalidSpanArgumentError]
) -> tuple[str, Any]:
    """Return what MLflow sums up over a trace as it must be: else it loses the trace."""
    if name in TEXT_KEYS:
        text = text_of(value)
        if text is not None:
            return name, text
    else:
        given = as_mapping(value)
        counts = {key: number_of(count) for key, count in given.items() if type(key) is str}
        fitting = {
            key: count
            for key, count in counts.items()
            if count is not None and -_MOST < count < _MOST
        }
        if fitting and len(fitting) == len(given):
            return name, fitting
    wanted = "a string" if name in TEXT_KEYS else "a dict of names and numbers"
    findings.append(
        InvalidSpanArgumentError(
            f"The attribute {name!r} is MLflow's own and must be {wanted}: with anything else "
            f"MLflow loses the trace. It was recorded as 'user.{name}'."
        )
    )
    return f"user.{name}", value


_MOST = 2**53  # what a database keeps of a number


def inputs(span: MlflowSpan, value: object) -> None:
    """Set the inputs."""
    _write_payload(span, INPUTS_KEY, value)


def outputs(span: MlflowSpan, value: object) -> None:
    """Set the outputs."""
    _write_payload(span, OUTPUTS_KEY, value)


def _write_payload(span: MlflowSpan, key: str, value: object) -> None:
    try:
        otel = spans.recording_span(span)
        if otel is not None and is_simple(value):
            write_plain(otel, {key: value})
        elif key is INPUTS_KEY:
            span.set_inputs(clean(value))
        else:
            span.set_outputs(clean(value))
    except Exception as error:  # noqa: BLE001
        internal_error("recording inputs or outputs", error)


def taken_outputs(span: MlflowSpan, value: object) -> None:
    """Set outputs that are clean already, and within the caps."""
    with contained("recording outputs"):
        span.set_outputs(value)


def attribute(span: MlflowSpan, key: object, value: object) -> InvalidSpanArgumentError | None:
    """Set one attribute; return a finding if its key is MLflow's own."""
    findings = attributes(span, {clean_key(key): value})  # a key may refuse to be hashed
    return findings[0] if findings else None


def attributes(span: MlflowSpan, values: dict[Any, object]) -> list[InvalidSpanArgumentError]:
    """Set several attributes; return a finding for each reserved key."""
    named, findings = attribute_names(values)
    with contained("recording attributes"):
        otel = spans.recording_span(span)
        _write_named(span, otel, named, {}, len(named) + writing.attribute_count(span))
    return findings


def _write_named(
    span: MlflowSpan,
    otel: RecordingSpan | None,
    named: dict[str, object],
    plain: dict[str, object],
    count: int,
) -> None:
    """Write attributes in their order: what is plain together with what is plain before it."""
    caps = current_limits()
    room = otel is not None and count <= caps.attributes
    for name, value in named.items():
        if room and is_plain_under(value, caps.value_chars):
            plain[name] = value
        else:
            plain = _written(otel, plain)
            set_or_fold(span, name, value)
    _written(otel, plain)


def _written(otel: RecordingSpan | None, plain: dict[str, object]) -> dict[str, object]:
    """Write what is plain; return what is then still to be written."""
    if plain:
        write_plain(otel, plain)
    return {}


def reserved_key(name: str) -> InvalidSpanArgumentError:
    return InvalidSpanArgumentError(
        f"The attribute key {name!r} is MLflow's own and would break the span. "
        f"It was recorded as 'user.{name}'; choose a key that does not start with 'mlflow.'."
    )


# -- how it ended ------------------------------------------------------------------------------


def exception(span: MlflowSpan, raised: BaseException, ended: Outcome, met_in: Meets) -> None:
    """Record an exception: one event per span, and for an error the attributes and the status.

    The stack trace is recorded where its trace meets the exception first: the innermost span.

    Args:
        span: the span.
        raised: the exception.
        ended: what the exception means for the span.
        met_in: the span's entry in the registry; None for a span that is in none.
    """
    met_before = meet(met_in, raised)
    if met_in is None or met_in.span_id not in met_before:
        with contained("recording an exception"):
            name = EXCEPTION if ended.status == "ERROR" else EXPECTED_EXCEPTION
            happened = event_attributes(raised, with_stack=not met_before)
            span.add_event(writing.make_event(name, happened))
    if ended.status == "ERROR":
        described = describe(raised)
        for key, value in described.items():
            _own(span, key, value)
        error(span, f"{described['error_type']}: {described['error_message']}")


def outcome(span: MlflowSpan, ended: Outcome) -> None:
    """Write the outcome; its absence says ok."""
    if ended.name != "ok":
        _own(span, OUTCOME, ended.name)


def orphan(span: MlflowSpan, ended: Outcome, *, opened_at: str, orphaned_by: str) -> None:
    """Record that a span was ended in its opener's stead."""
    outcome(span, ended)
    _own(span, OPENED_AT, opened_at)
    _own(span, ORPHANED_BY, orphaned_by)
    if ended.status == "ERROR" and ending.status_code(span) != "ERROR":
        error(span, f"{ended.name}: {_left_open(opened_at, orphaned_by)}")


def _left_open(opened_at: object, orphaned_by: object) -> str:
    return f"opened at {opened_at}, closed by {orphaned_by}"


_NO_WHY = "the status was set to ERROR"


def _why(span: MlflowSpan) -> dict[str, str]:
    """Return the `exception` event of an ERROR that no exception tells of."""
    opened_at, why = span.get_attribute(OPENED_AT), ending.description(span)
    if opened_at is not None:
        why = _left_open(opened_at, span.get_attribute(ORPHANED_BY))
    return {
        "exception.type": str(span.get_attribute(OUTCOME) or "error"),
        "exception.message": why or _NO_WHY,
    }


def explain_end(otel: RecordingSpan) -> None:
    """See to it that an ERROR which another API's end has brought about is seen too."""
    if not writing.has_event(otel, EXCEPTION):
        why = otel.status.description or _NO_WHY
        attributes = {"exception.type": "error", "exception.message": clean_text(why)}
        writing.add_last_event(otel, EXCEPTION, attributes)


def error(span: MlflowSpan, text: str) -> None:
    """Set status ERROR, whatever was set before."""
    with contained("setting the status"):
        ending.set_error(span, clean_text(text, current_limits().message_chars))


def status_ok_unless_error(span: MlflowSpan) -> None:
    """Set the status that a span ends with, where the end itself has to wait."""
    with contained("setting the status"):
        if ending.status_code(span) != "ERROR":
            span.set_status(SpanStatus(SpanStatusCode.OK))


def _own(span: MlflowSpan, key: str, value: object) -> None:
    """Write an attribute of ours: never folded, they are few."""
    with contained("recording an outcome"):
        span.set_attribute(key, clean(value))


def end(span: MlflowSpan, ender: ending.Ender | None, end_time_ns: int | None = None) -> None:
    """End with an explicit status, ERROR if it is already that; make sure that it has ended."""
    otel = spans.recording_span(span)
    if otel is not None:
        if folding.have_been:
            folding.write_folded(span)
        if otel.start_time > (end_time_ns or time.time_ns()):
            end_time_ns = otel.start_time  # never before its start: the duration would be negative
        if otel.status.status_code is _ERROR and not writing.has_event(otel, EXCEPTION):
            with contained("recording why a span is an error"):
                span.add_event(writing.make_event(EXCEPTION, _why(span), end_time_ns))
    try:
        if ender is None:
            ending.end_live(span, end_time_ns)
        else:
            is_error = ending.status_code(span) == "ERROR"
            code = SpanStatusCode.ERROR if is_error else SpanStatusCode.OK
            ender(SpanStatus(code, ending.description(span)), end_time_ns)
    except Exception as error:  # noqa: BLE001
        internal_error("ending a span", error)
    finally:
        if otel is not None and otel.end_time is None:
            ending.end_bare(otel, end_time_ns)
