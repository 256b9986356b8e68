"""What is recorded of a generator's items: taken when each is yielded, and no item is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spanguard._record.payload import Budget

__all__ = ["Items", "WholeItems"]


class Items:
    """Likenesses of the first items, within one budget of characters; and the number of all.

    A generator may yield one object again and again, changed, or things too big to be kept alive
    until its end (issue 9, 25).

    Args:
        most: so many items are taken; then they are only counted.
        look: sees a list of the item before it is taken, and gives back what is to be recorded.
    """

    __slots__ = ("_budget", "_look", "_most", "count", "kept", "taken")

    def __init__(self, most: int = 0, look: Callable[[list[Any]], Any] | None = None) -> None:
        self._most = most
        self._look = look
        self._budget = Budget()
        self.kept: list[object] = []
        self.taken = 0
        self.count = 0

    def take(self, item: object) -> None:
        """Take an item while there is room; count all: a long stream must not grow memory."""
        self.count += 1
        if self.count <= self._most and not self._budget.is_spent:
            self.taken += 1
            self._keep(item)

    def _keep(self, item: object) -> None:
        seen: Any = [item]
        if self._look is not None:
            seen = self._look(seen)
        for each in seen if type(seen) is list else [seen]:
            self.kept.append(self._budget.take(each))


class WholeItems(Items):
    """The first items themselves, for a reducer, which needs them as they are."""

    __slots__ = ()

    def _keep(self, item: object) -> None:
        self.kept.append(item)
