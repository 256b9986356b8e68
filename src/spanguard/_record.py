"""Write on a span so that nothing can go wrong: sanitised, each write on its own, ERROR sticky.

Shared by the block that opened a span, the proxy its user holds, and whoever closes it instead.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

from spanguard import _mlflow
from spanguard._config import current_limits
from spanguard._findings import contained
from spanguard._mlflow import SpanStatus, SpanStatusCode
from spanguard._outcome import Outcome, describe, event_attributes
from spanguard._payload import clean, clean_text, is_plain, is_simple
from spanguard.exceptions import InvalidSpanArgumentError

__all__ = ["attribute", "attributes", "end", "exception", "inputs", "orphan", "outputs"]

OUTCOME = "spanguard.outcome"
OPENED_AT = "spanguard.opened_at"
ORPHANED_BY = "spanguard.orphaned_by"
MORE_ATTRIBUTES = "spanguard.more_attributes"

_NOT_THE_USERS = ("mlflow.", "spanguard.")


def start(span: Any, span_type: str | None, value: Any, named: dict[str, Any]) -> None:
    """Write what a span starts with, in one go where it is plain.

    Args:
        span: the span.
        span_type: its type, if that is still to be written.
        value: its inputs, or None.
        named: its attributes, under keys that `attribute_names` has made.
    """
    with contained("recording what a span starts with"):
        otel = _mlflow.recording_span(span)
        plain: dict[str, Any] = {} if span_type is None else {_mlflow.SPAN_TYPE_KEY: span_type}
        if value is not None:
            if otel is not None and is_simple(value):
                plain[_mlflow.INPUTS_KEY] = value
            else:
                inputs(span, value)
        room = otel is not None and len(named) <= current_limits().attributes
        for name, attribute_value in named.items():
            if room and is_plain(attribute_value):
                plain[name] = attribute_value
            else:
                _set(span, name, attribute_value)
        if plain:
            _mlflow.write_plain(otel, plain)


def attribute_names(
    values: dict[Any, Any],
) -> tuple[dict[str, Any], list[InvalidSpanArgumentError]]:
    """Return attributes under clean keys, and a finding for each key that is MLflow's own."""
    findings: list[InvalidSpanArgumentError] = []
    named: dict[str, Any] = {}
    for key, value in values.items():
        name = clean_text(key)
        if _mlflow.is_reserved(name):
            findings.append(reserved_key(name))
            name = f"user.{name}"
        named[name] = value
    return named, findings


def inputs(span: Any, value: Any) -> None:
    """Set the inputs."""
    with contained("recording inputs"):
        otel = _mlflow.recording_span(span)
        if otel is not None and is_simple(value):
            _mlflow.write_plain(otel, {_mlflow.INPUTS_KEY: value})
        else:
            span.set_inputs(clean(value))


def outputs(span: Any, value: Any) -> None:
    """Set the outputs."""
    with contained("recording outputs"):
        otel = _mlflow.recording_span(span)
        if otel is not None and is_simple(value):
            _mlflow.write_plain(otel, {_mlflow.OUTPUTS_KEY: value})
        else:
            span.set_outputs(clean(value))


def attribute(span: Any, key: Any, value: Any) -> InvalidSpanArgumentError | None:
    """Set one attribute; return a finding if its key is MLflow's own."""
    findings = attributes(span, {key: value})
    return findings[0] if findings else None


def attributes(span: Any, values: dict[Any, Any]) -> list[InvalidSpanArgumentError]:
    """Set several attributes; return a finding for each reserved key."""
    named, findings = attribute_names(values)
    with contained("recording attributes"):
        otel = _mlflow.recording_span(span)
        count = len(named) + _mlflow.attribute_count(span)
        room = otel is not None and count <= current_limits().attributes
        plain: dict[str, Any] = {}
        for name, value in named.items():
            if room and is_plain(value):
                plain[name] = value
            else:
                _set(span, name, value)
        if plain:
            _mlflow.write_plain(otel, plain)
    return findings


def reserved_key(name: str) -> InvalidSpanArgumentError:
    return InvalidSpanArgumentError(
        f"The attribute key {name!r} is MLflow's own and would break the span. "
        f"It was recorded as 'user.{name}'; choose a key that does not start with 'mlflow.'."
    )


def _set(span: Any, name: str, value: Any) -> None:
    with contained("recording an attribute"):
        cap = current_limits().attributes
        if _mlflow.attribute_count(span) >= cap and _is_over(span, name, cap):
            _fold(span, name, value)
        else:
            span.set_attribute(name, clean(value))


def _is_over(span: Any, name: str, cap: int) -> bool:
    names = _mlflow.attribute_names(span)
    return name not in names and sum(not key.startswith(_NOT_THE_USERS) for key in names) >= cap


# Attributes over the cap. MLflow would make room for them by dropping its own trace id, which
# makes the trace unreadable; so they share one attribute. Keyed by the span, dropped with it.
_folded: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


def _fold(span: Any, name: str, value: Any) -> None:
    folded = _folded.setdefault(span, {})
    folded[name] = clean(value)
    if len(folded).bit_count() == 1:
        # Written at 1, 2, 4, 8 ... and at the end: each write encodes all of them.
        _write_folded(span, folded)


def _write_folded(span: Any, folded: dict[str, Any]) -> None:
    span.set_attribute(MORE_ATTRIBUTES, clean(folded))


# -- how it ended ------------------------------------------------------------------------------


def exception(span: Any, raised: BaseException, ended: Outcome) -> None:
    """Record an exception: one event per span, and for an error the attributes and the status.

    The stack trace is recorded where the exception is met first: the innermost span.
    """
    span_id = getattr(span, "span_id", None)
    met_in = _met_in(raised)
    if met_in is None or met_in != span_id:
        with contained("recording an exception"):
            _event(span, raised, ended, with_stack=met_in is None)
    if met_in is None:
        _mark_met(raised, span_id)
    if ended.status == "ERROR":
        described = describe(raised)
        for key, value in described.items():
            _own(span, key, value)
        error(span, f"{described['error_type']}: {described['error_message']}")


def _event(span: Any, raised: BaseException, ended: Outcome, *, with_stack: bool) -> None:
    happened = _mlflow.make_event("exception", event_attributes(raised, with_stack=with_stack))
    if ended.status == "ERROR":
        span.add_event(happened)
    else:
        _mlflow.add_quiet_event(span, happened)


# On the exception itself: builtin exceptions take no weak reference, a strong one would keep
# its frames alive, and an id() is soon another exception's.
_MET = "__spanguard_met_in__"


def _met_in(raised: BaseException) -> Any:
    try:
        return vars(raised).get(_MET)
    except Exception:
        return None


def _mark_met(raised: BaseException, span_id: Any) -> None:
    try:
        vars(raised)[_MET] = span_id  # not setattr: a frozen dataclass may refuse it
    except Exception:
        pass


def outcome(span: Any, ended: Outcome) -> None:
    """Write the outcome; its absence says ok."""
    if ended.name != "ok":
        _own(span, OUTCOME, ended.name)


def orphan(span: Any, ended: Outcome, *, opened_at: str, orphaned_by: str) -> None:
    """Record that a span was ended in its opener's stead."""
    outcome(span, ended)
    _own(span, OPENED_AT, opened_at)
    _own(span, ORPHANED_BY, orphaned_by)
    if ended.status == "ERROR" and _mlflow.status_code(span) != "ERROR":
        error(span, f"{ended.name}: opened at {opened_at}, closed by {orphaned_by}")


def error(span: Any, text: str) -> None:
    """Set status ERROR, whatever was set before."""
    with contained("setting the status"):
        _mlflow.set_error(span, clean_text(text, current_limits().message_chars))


def _own(span: Any, key: str, value: Any) -> None:
    """Write an attribute of ours: never folded, they are few."""
    with contained("recording an outcome"):
        span.set_attribute(key, clean(value))


def end(
    span: Any,
    ender: Callable[[SpanStatus, int | None], None] | None,
    end_time_ns: int | None = None,
) -> None:
    """End with an explicit status, ERROR if it is already that; make sure that it has ended."""
    otel = _mlflow.recording_span(span)
    if otel is not None:
        if _folded and span in _folded:
            with contained("recording attributes over the cap"):
                _write_folded(span, _folded.pop(span))
        if otel.start_time > (end_time_ns or time.time_ns()):
            end_time_ns = otel.start_time  # never before its start: the duration would be negative
    try:
        with contained("ending a span"):
            if ender is None:
                _mlflow.end_live(span, end_time_ns)
            else:
                is_error = _mlflow.status_code(span) == "ERROR"
                code = SpanStatusCode.ERROR if is_error else SpanStatusCode.OK
                ender(SpanStatus(code, _mlflow.description(span)), end_time_ns)
    finally:
        if otel is not None and otel.end_time is None:
            _mlflow.end_bare(otel, end_time_ns)
