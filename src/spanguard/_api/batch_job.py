"""One item of a batch: its span, and what came of it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

from spanguard._api.traced_span import traced_span
from spanguard._base.findings import contained
from spanguard._lifecycle.opening import open_handle
from spanguard._lifecycle.request import SpanRequest
from spanguard._record.outcome import describe, stack_trace

__all__ = ["Ended", "Job", "WorkerTraceback", "record_loss"]


class Ended(NamedTuple):
    """How the function ended on an item: a value, so that whatever else comes is the engine's."""

    result: Any = None
    error: BaseException | None = None
    trace: str | None = None  # the traceback, where it stays behind in another process


class Job:
    """Runs the function on one item in the item's span. Pickles where the function does."""

    __slots__ = ("expected", "function", "has_crossed", "strict")

    def __init__(
        self,
        function: Callable[[Any], object],
        expected: tuple[type[BaseException], ...],
        strict: bool | None,
        has_crossed: bool = False,
    ) -> None:
        self.function = function
        self.expected = expected
        self.strict = strict
        self.has_crossed = has_crossed

    def __reduce__(self) -> tuple[object, ...]:
        return Job, (self.function, self.expected, self.strict, True)

    def __call__(self, index: int, name: str, item: object) -> Ended:
        try:
            block = traced_span(
                name,
                inputs=item,
                attributes={"item_id": index},
                expected=self.expected,
                strict=self.strict,
            )
            with block._calling(self.function) as span:
                result = self.function(item)
                span.set_outputs(result)
        except BaseException as error:  # noqa: BLE001
            return _crossing(error) if self.has_crossed else Ended(error=error)
        return Ended(result)


def _crossing(error: BaseException) -> Ended:
    """Make ready for another process an exception that may not survive the way."""
    trace = stack_trace(error)
    try:
        pickled = pickle.dumps(error)
    except Exception:  # noqa: BLE001
        return Ended(None, error, trace)  # Dask can pickle more than pickle can
    try:
        pickle.loads(pickled)  # our own, from the line above
    except Exception:  # noqa: BLE001
        # Its __init__ asks for more than its args. Unpickling it would break the whole pool.
        described = describe(error)
        error = RuntimeError(f"{described['error_type']}: {described['error_message']}")
    return Ended(None, error, trace)


def record_loss(index: int, name: str, item: object, error: BaseException) -> None:
    """Record an item that its engine failed on, in its stead."""
    with contained("recording an item that was lost"):
        request = SpanRequest((name,), inputs=item, attributes={"item_id": index})
        open_handle(request, activate=False).close(error)


class WorkerTraceback(Exception):
    """The cause of an exception from another process: where it was raised there."""

    def __str__(self) -> str:
        return f"in a worker:\n{self.args[0]}"
