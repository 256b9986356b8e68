"""How the calls of one callable are traced, as traced objects know it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["ANNOTATIONS", "Args", "CallPlan", "Caller", "Kwargs", "LruCache", "Wrapped"]


Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Caller = Callable[[Wrapped, object, Args, Kwargs], Any]
"""What makes a call: of what is called, anything, and the arguments."""

LruCache = type(functools.lru_cache(lambda: None))


class CallPlan(Protocol):
    """How the calls of one callable are traced. It pickles where the callable does."""

    function: Any
    owner: type | None
    """The class that the function is in, once that is known."""

    @property
    def asks_owner(self) -> bool:
        """Whether that class tells if the first argument of a call is the object."""
        ...

    def named_in(self, owner: type, name: str) -> None:
        """Take note of the class that the function is in, and what it is called there."""

    def caller(self) -> Caller:
        """Return what makes a call."""
        ...

    def of(self, function: object) -> CallPlan:
        """Return the same plan for another function."""
        ...


def _set_annotations(traced: Any, value: object) -> None:
    traced.__wrapped__.__annotations__ = value


ANNOTATIONS = property(lambda traced: traced.__wrapped__.__annotations__, _set_annotations)
