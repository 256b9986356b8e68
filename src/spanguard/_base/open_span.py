"""What is told of a span that is open."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["OpenSpan"]


@dataclass(frozen=True)
class OpenSpan:
    """A span that is open, or was when it was reported.

    Attributes:
        name: the span's name.
        trace_id: its MLflow trace id.
        span_id: its MLflow span id.
        opened_at: the line that opened it, as `file.py:123 in function`.
        thread: the name of the thread that opened it.
        age: seconds since it was opened.
    """

    name: str
    trace_id: str
    span_id: str
    opened_at: str
    thread: str
    age: float

    def __str__(self) -> str:
        return f"{self.name!r} (span {self.span_id}), opened at {self.opened_at}"
