"""What a function of others does, told by all that its code names."""

from __future__ import annotations

from types import CodeType

__all__ = ["names_in", "names_of", "names_of_function"]


def names_of(code: CodeType) -> str:
    """Return what code names, in the order in which it does so: the same in each Python."""
    return " ".join(code.co_names)


def names_of_function(function: object) -> str:
    """Return what a function names, or the one that it is wrapped around; "" if there is none."""
    code = getattr(getattr(function, "__wrapped__", function), "__code__", None)
    return names_of(code) if type(code) is CodeType else ""


def names_in(owner: object, name: str) -> str:
    """Return what a function of a class or a module names; "" if there is none."""
    return names_of_function(getattr(owner, name, None))
