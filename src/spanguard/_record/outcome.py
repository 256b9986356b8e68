"""From an exception to a status, an outcome and what is written on the span. Pure."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Literal

from spanguard._base.config import current_limits
from spanguard._base.interrupts import is_the_users
from spanguard._base.tasks import is_cancellation
from spanguard._base.values import attribute_of, is_raised_as
from spanguard._record.text import clean_text

__all__ = [
    "ABANDONED",
    "CLOSED_EARLY",
    "ERROR",
    "OK",
    "ORPHANED",
    "Outcome",
    "classify",
    "describe",
    "event_attributes",
    "stack_trace",
]


Status = Literal["OK", "ERROR"]


@dataclass(frozen=True)
class Outcome:
    """How a span ended: `status` is what MLflow stores, `name` is what it cannot say."""

    name: str
    status: Status
    record_event: bool = False


OK = Outcome("ok", "OK")
ERROR = Outcome("error", "ERROR", record_event=True)
EXPECTED = Outcome("expected", "OK", record_event=True)
CANCELLED = Outcome("cancelled", "ERROR", record_event=True)
INTERRUPTED = Outcome("interrupted", "ERROR", record_event=True)
CLOSED_EARLY = Outcome("closed_early", "OK")
ABANDONED = Outcome("abandoned", "ERROR")
ORPHANED = Outcome("orphaned", "ERROR")


def classify(
    exception: BaseException | None, expected: tuple[type[BaseException], ...] = ()
) -> Outcome:
    """Tell what an exception leaving a block means. None means nothing left it."""
    if exception is None:
        return OK
    if expected and is_raised_as(exception, expected):
        return EXPECTED
    if isinstance(exception, Exception):
        return ERROR
    if is_cancellation(exception):
        return CANCELLED
    if isinstance(exception, GeneratorExit):
        return CLOSED_EARLY
    if isinstance(exception, SystemExit):
        return INTERRUPTED if exception.code not in (None, 0) else OK
    if isinstance(exception, KeyboardInterrupt):
        return INTERRUPTED
    return ERROR  # a BaseExceptionGroup, or a BaseException of the user's own


def type_name(exception: BaseException) -> str:
    """Return the class name, qualified outside builtins."""
    kind = type(exception)
    module, name = attribute_of(kind, "__module__"), attribute_of(kind, "__qualname__", "Exception")
    return str(name) if module == "builtins" else f"{module}.{name}"


def describe(exception: BaseException) -> dict[str, str]:
    """Return the attributes that say what failed. Never raises, whatever `__str__` does."""
    message = clean_text(exception, current_limits().message_chars)
    return {
        "error": message,
        "error_type": clean_text(type_name(exception)),
        "error_message": message,
    }


def event_attributes(exception: BaseException, *, with_stack: bool) -> dict[str, str]:
    """Return the attributes of the `exception` event, by OpenTelemetry's names."""
    described = describe(exception)
    attributes = {
        "exception.type": described["error_type"],
        "exception.message": described["error_message"],
    }
    if with_stack:
        attributes["exception.stacktrace"] = stack_trace(exception)
    return attributes


def stack_trace(exception: BaseException) -> str:
    """Return the formatted stack trace, cut in the middle at the documented length."""
    limit = current_limits().message_chars
    try:
        lines = traceback.format_exception(type(exception), exception, exception.__traceback__)
        text = "".join(lines)
    except BaseException as error:
        if is_the_users(error):
            raise
        # A hostile __str__ or __cause__ chain: the frames alone still tell the place.
        text = "".join(traceback.format_tb(exception.__traceback__)) + type_name(exception)
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]}\n[spanguard: {len(text) - limit} characters cut]\n{text[-half:]}"
    return clean_text(text, limit + 100)
