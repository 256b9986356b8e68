"""The arguments that several functions take, for type checkers: they find a misspelt one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from typing_extensions import TypedDict

__all__ = ["RecipeArguments", "SpanArguments", "TracedOptions"]


ExpectedErrors = tuple[type[BaseException], ...] | type[BaseException]


class RecipeArguments(TypedDict, total=False):
    """What `traced_span` takes beside client, name and ids (see there)."""

    span_type: str
    inputs: Any
    attributes: dict[str, Any] | None
    tags: dict[str, Any] | None
    metadata: dict[str, Any] | None
    experiment_id: str | None
    run_id: str | None
    session_id: str | None
    user: str | None
    links: Iterable[Any] | None
    start_time_ns: int | None
    otel_trace_id: str | None
    new_trace: bool
    expected: ExpectedErrors
    strict: bool | None
    description: str | None
    log_level: Any
    trace_destination: Any
    sampling_ratio_override: float | None


class SpanArguments(RecipeArguments, total=False):
    """What `traced_span` takes beside a name."""

    trace_id: str | None
    request_id: str | None
    parent_id: str | None
    client: Any


class TracedOptions(TypedDict, total=False):
    """What `traced` takes beside what `@mlflow.trace` takes (see there)."""

    tags: dict[str, Any] | None
    capture_inputs: bool | str | Collection[str]
    capture_outputs: bool
    redact: Callable[[str, Any], Any] | None
    max_items: int
    expected: ExpectedErrors
    client: Any
    strict: bool | None
