"""A status in any form, read."""

from __future__ import annotations

from typing import Any

from mlflow.entities import SpanStatus, SpanStatusCode
from opentelemetry.trace import Status, StatusCode

from spanguard._base.values import attribute_of, is_a, text_of
from spanguard._record.text import clean_text, safe_repr
from spanguard.exceptions import InvalidSpanArgumentError

__all__ = ["parse_status"]


_CODES = frozenset({"OK", "ERROR", "UNSET"})
_STATUSES = (SpanStatus, Status)
_STATUS_CODES = (SpanStatusCode, StatusCode)


def parse_status(
    status: Any, description: object = None
) -> tuple[str | None, str, InvalidSpanArgumentError | None]:
    """Read a status in any form and case: its code, its description, and what is wrong with it.

    MLflow's statuses and OpenTelemetry's. An unreadable status reads as ERROR: whoever says
    something else than OK about an end does not mean that all went well, and it must be seen.
    """
    if status is None:
        return None, "", None
    if is_a(status, _STATUSES):
        if description is None:
            description = attribute_of(status, "description")
        status = attribute_of(status, "status_code")
    text = status.name if is_a(status, _STATUS_CODES) else text_of(status)
    described = clean_text("" if description is None else description, _DESCRIPTION_CHARS)
    code = text.strip().upper() if text is not None else None
    if code in _CODES:
        return code, described, None
    shown = clean_text(safe_repr(status), 100)
    return (
        "ERROR",
        f"invalid status {shown}",
        InvalidSpanArgumentError(
            f"The status {shown} is not one of OK, ERROR, UNSET; ERROR was recorded. "
            "Pass 'OK' or 'ERROR'."
        ),
    )


_DESCRIPTION_CHARS = 10_000
