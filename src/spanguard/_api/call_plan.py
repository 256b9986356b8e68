"""How the calls of one callable are traced, as traced objects know it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import wrapt

if TYPE_CHECKING:
    _FunctionWrapper = wrapt.FunctionWrapper[Any, Any]
    _CallableProxy = wrapt.CallableObjectProxy[Any]
    _ObjectProxy = wrapt.BaseObjectProxy[Any]
else:
    _FunctionWrapper = wrapt.FunctionWrapper
    _CallableProxy = wrapt.CallableObjectProxy
    _ObjectProxy = wrapt.BaseObjectProxy
if TYPE_CHECKING:

    class _Wrapping:
        __wrapped__: Any
        __qualname__: str
        _self_plan: CallPlan

        def __init__(self, plan: CallPlan) -> None: ...

else:
    _Wrapping = object  # annotations in a class here would be taken for the callable's own

__all__ = ["ANNOTATIONS", "CallPlan", "LruCache"]


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

    def caller(self) -> Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]:
        """Return what makes a call: of (what is called, anything, args, kwargs)."""
        ...

    def of(self, function: Any) -> CallPlan:
        """Return the same plan for another function."""
        ...


def _set_annotations(traced: Any, value: Any) -> None:
    traced.__wrapped__.__annotations__ = value


ANNOTATIONS = property(lambda traced: traced.__wrapped__.__annotations__, _set_annotations)
