"""What is said of a span: status, duration, failure, payloads, in few words."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import PurePath

from mlflow.entities import Span, Trace

__all__ = [
    "MAX_NAME_CHARS",
    "count_of",
    "duration",
    "duration_of",
    "failure",
    "one_line",
    "opened_at_of",
    "outcome_of",
    "payloads_of",
    "start",
    "status_of",
    "trace_duration",
]


MAX_NAME_CHARS = 60
_MAX_DETAIL_CHARS = 160
_MAX_PAYLOAD_CHARS = 400


# -- reading a span ----------------------------------------------------------------------------


def start(span: Span) -> int:
    return span.start_time_ns if isinstance(span.start_time_ns, int) else 0


def status_of(span: Span) -> str:
    if span.end_time_ns is None:
        return "OPEN"
    code = span.status.status_code
    return str(getattr(code, "value", code))


def duration_of(span: Span) -> int | None:
    if span.end_time_ns is None or not isinstance(span.start_time_ns, int):
        return None
    return int(span.end_time_ns - span.start_time_ns)


def trace_duration(trace: Trace, spans: list[Span]) -> int | None:
    for span in spans:
        if span.parent_id is None and duration_of(span) is not None:
            return duration_of(span)
    recorded = trace.info.execution_duration
    return None if recorded is None else int(recorded) * 1_000_000


def _attribute(span: Span, key: str) -> str:
    """Return an attribute as text, "" if there is none or it cannot be read."""
    try:
        value = span.get_attribute(key)
    except Exception:  # noqa: BLE001 - what others wrote need not be JSON
        return ""
    return "" if value is None else str(value)


def outcome_of(span: Span) -> str:
    outcome = _attribute(span, "spanguard.outcome")
    return "" if outcome == "ok" else outcome


def opened_at_of(span: Span) -> str:
    opened_at = _attribute(span, "spanguard.opened_at")
    return f"opened at {one_line(_short_site(opened_at), _MAX_DETAIL_CHARS)}" if opened_at else ""


def _short_site(site: str) -> str:
    """Shorten the path of a `path:line in function`: relative to here, or its last two parts."""
    place, separator, function = site.rpartition(" in ")
    path = PurePath(place)
    if not separator or not path.is_absolute():
        return site
    try:
        short = str(path.relative_to(os.getcwd()))
    except (ValueError, OSError):
        short = str(PurePath("…", *path.parts[-2:]))
    return f"{short} in {function}"


def failure(span: Span) -> str:
    """Return the type and the first line of the message of what failed."""
    kind, message = _attribute(span, "error_type"), _attribute(span, "error_message")
    if not kind:
        kind, message = _exception_event(span)
    if not kind and status_of(span) == "ERROR":
        message = span.status.description or ""
    return one_line(f"{kind}: {message}" if kind and message else kind or message)


def _exception_event(span: Span) -> tuple[str, str]:
    for event in reversed(span.events):
        if event.name in ("exception", "expected_exception"):
            attributes = event.attributes or {}
            kind = attributes.get("exception.type", "")
            return str(kind), str(attributes.get("exception.message", ""))
    return "", ""


def payloads_of(span: Span) -> Iterator[tuple[str, str]]:
    """Yield what a span holds, by title, as one cut line each."""
    for title, payload in (("inputs", span.inputs), ("outputs", span.outputs)):
        if payload is not None:
            yield title, one_line(_as_json(payload), _MAX_PAYLOAD_CHARS)
    for key, value in span.attributes.items():
        if not key.startswith("mlflow."):
            yield one_line(key), one_line(_as_json(value), _MAX_PAYLOAD_CHARS)


def _as_json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except Exception:  # noqa: BLE001
        return str(value)


# -- words -------------------------------------------------------------------------------------


def duration(nanoseconds: int | None) -> str:
    """Return a duration as people read it; None is a span that has not ended.

    >>> [duration(ns) for ns in (870_000, 12_340_000, 1_234_000_000, 125_000_000_000)]
    ['870 µs', '12.3 ms', '1.23 s', '2 min 5 s']
    >>> duration(None)
    'still open'
    """
    if nanoseconds is None:
        return "still open"
    if nanoseconds < 0:
        return f"-{duration(-nanoseconds)}"
    if nanoseconds < 999_500:
        return f"{nanoseconds / 1e3:.0f} µs"
    if nanoseconds < 999_500_000:
        return f"{_three_digits(nanoseconds / 1e6)} ms"
    if nanoseconds < 59_950_000_000:
        return f"{_three_digits(nanoseconds / 1e9)} s"
    minutes, seconds = divmod(round(nanoseconds / 1e9), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _three_digits(number: float) -> str:
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"


def count_of(count: int) -> str:
    return "1 span" if count == 1 else f"{count} spans"


def one_line(text: object, limit: int = _MAX_DETAIL_CHARS) -> str:
    """Return the first line, cut, with control characters made visible: names are data."""
    first = str(text).strip().partition("\n")[0].rstrip()
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in first[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"
