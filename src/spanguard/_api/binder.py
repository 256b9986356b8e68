"""The arguments of a call by parameter name, as they are recorded."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from types import FunctionType
from typing import Any

from spanguard._api.call_plan import Args, Kwargs

__all__ = ["Binder"]


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_WORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_OPAQUE = (
    inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
    inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
)


class Binder:
    """Names the arguments of a call. What can be worked out once is, at decoration.

    Args:
        function: the callable; without a signature it names its arguments `args` and `kwargs`.
        kept: True, or the names of the parameters to record.
        takes_self: whether its first argument is the object or class that it is called on. None
            if that is to be told from what it is called, and from the class it is in.
    """

    __slots__ = ("_by_word", "_defaults", "_kept", "_names", "_rest", "_self_first", "_words")

    def __init__(
        self, function: object, kept: bool | Collection[str] = True, takes_self: bool | None = None
    ) -> None:
        self._kept = kept if isinstance(kept, bool) else frozenset(kept)
        parameters = _parameters(function)
        kinds = inspect.Parameter
        self._names = [p.name for p in parameters if p.kind in _POSITIONAL]
        self._by_word = {p.name for p in parameters if p.kind in _BY_WORD}
        self._rest = next((p.name for p in parameters if p.kind is kinds.VAR_POSITIONAL), None)
        self._words = next((p.name for p in parameters if p.kind is kinds.VAR_KEYWORD), None)
        self._defaults = {p.name: p.default for p in parameters if p.default is not kinds.empty}
        if takes_self is None and _is_from_source(function) and self._names[:1] in _SELF:
            takes_self = True
        self._self_first = takes_self

    @property
    def asks_owner(self) -> bool:
        """Whether the class that a function is in tells if its first argument is self."""
        return self._self_first is None

    def unknown(self) -> list[str]:
        """Return the names that are to be kept and that no call can have an argument by."""
        if isinstance(self._kept, bool) or (self._words is not None and not self._by_word):
            return []
        known = {*self._names, *self._by_word, self._rest, self._words}
        return sorted(name for name in self._kept if name not in known)

    def bind(self, owner: type | None, args: Args, kwargs: Kwargs) -> dict[str, Any]:
        """Return the arguments by parameter name, without self or cls.

        Args:
            owner: the class that the function is a method of, if that is known.
            args: the positional arguments, the object that it is called on included.
            kwargs: the others.
        """
        names = self._names
        if args and self._has_self(owner, args[0]):
            args, names = args[1:], names[1:]
        bound = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in self._by_word:
                bound[name] = value
            elif self._words is not None:
                bound.setdefault(self._words, {})[name] = value
            else:  # Python is about to refuse the call
                bound.setdefault(name, value)
        if self._rest is not None and len(args) > len(names):
            bound[self._rest] = list(args[len(names) :])
        for name, value in self._defaults.items():
            bound.setdefault(name, value)
        kept = self._kept
        if not isinstance(kept, bool):
            bound = {name: value for name, value in bound.items() if name in kept}
        return bound

    def _has_self(self, owner: type | None, first: object) -> bool:
        if self._self_first is None:
            # By its type alone: an object's own __class__ may raise, or say what it likes.
            return owner is not None and owner in type(first).__mro__
        return self._self_first


_SELF = (["self"], ["cls"])


def _parameters(function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except Exception:  # noqa: BLE001 - a builtin without a signature, or one whose looks are deceiving
        return list(_OPAQUE)


def _is_from_source(function: Any) -> bool:
    """Tell whether parameters have the names that Python code gave them, `self` among them.

    `str.upper` calls its string `self`, and a bound method has no `self` to give.
    """
    try:
        return isinstance(inspect.unwrap(function), FunctionType)
    except Exception:  # noqa: BLE001
        return False
