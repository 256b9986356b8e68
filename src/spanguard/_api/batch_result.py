"""What `trace_batch` returns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, overload

__all__ = ["BatchResult", "ItemOutcome", "R", "T", "rate"]


T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True)
class ItemOutcome(Generic[R_co]):
    """What became of one item of a batch.

    Attributes:
        index: the item's position in the input, from 0; `item_id` of its span.
        result: what the function returned, or None where it raised.
        error: the exception that the item ended with, or None.
        ok: whether the item counts as processed. An `expected` exception does.
    """

    index: int
    result: R_co | None
    error: BaseException | None
    ok: bool


class BatchResult(Sequence[ItemOutcome[R_co]]):
    """The outcomes of a batch, in input order. Holds results and errors, but no inputs.

    >>> import spanguard
    >>> batch = spanguard.trace_batch([4, 0, 2], lambda n: 8 // n, name="divide")
    >>> [outcome.result for outcome in batch]
    [2, None, 4]
    >>> batch.failed[0].index, batch.failed[0].error
    (1, ZeroDivisionError('integer division or modulo by zero'))
    >>> batch.success_rate
    0.6666666666666666
    """

    def __init__(self, outcomes: Iterable[ItemOutcome[R_co]]) -> None:
        self._outcomes = tuple(outcomes)

    @property
    def succeeded(self) -> tuple[ItemOutcome[R_co], ...]:
        """The outcomes of the items that were processed, in input order."""
        return tuple(outcome for outcome in self._outcomes if outcome.ok)

    @property
    def failed(self) -> tuple[ItemOutcome[R_co], ...]:
        """The outcomes of the items that failed, in input order."""
        return tuple(outcome for outcome in self._outcomes if not outcome.ok)

    @property
    def success_rate(self) -> float:
        """The part of the items that were processed, from 0.0 to 1.0; 1.0 without items."""
        return rate(sum(outcome.ok for outcome in self._outcomes), len(self._outcomes))

    def __iter__(self) -> Iterator[ItemOutcome[R_co]]:
        return iter(self._outcomes)

    def __len__(self) -> int:
        return len(self._outcomes)

    @overload
    def __getitem__(self, index: int) -> ItemOutcome[R_co]: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[ItemOutcome[R_co], ...]: ...

    def __getitem__(self, index: int | slice) -> ItemOutcome[R_co] | tuple[ItemOutcome[R_co], ...]:
        return self._outcomes[index]

    def __repr__(self) -> str:
        ok = sum(outcome.ok for outcome in self._outcomes)
        return f"<BatchResult: {ok} succeeded, {len(self) - ok} failed>"


def rate(processed: int, total: int) -> float:
    return processed / total if total else 1.0
