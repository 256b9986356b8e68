"""Times that users give, in nanoseconds."""

from __future__ import annotations

from spanguard._base.values import (
    number_of,
)
from spanguard.exceptions import InvalidSpanArgumentError

__all__ = ["read_time"]


def read_time(
    argument: str, value: object, span_name: str
) -> tuple[int | None, InvalidSpanArgumentError | None]:
    """Read a time in nanoseconds: the time, None for now; and what is wrong with it."""
    if value is None:
        return None, None
    nanoseconds = number_of(value)
    if nanoseconds is not None and 0 < nanoseconds < 2**63:
        return int(nanoseconds), None
    return None, InvalidSpanArgumentError(
        f"{argument} of span {span_name!r} is not a time in nanoseconds since 1970; now "
        "was taken. Pass time.time_ns().",
        span_name=span_name,
    )
