"""What a function of others does, told by all that its code names."""

from __future__ import annotations

from types import CodeType, FunctionType

__all__ = ["names_in", "names_of", "names_of_function"]


def names_of(code: CodeType) -> str:
    """Return what code names, in the order in which it does so: the same in each Python."""
    return " ".join(code.co_names)


def names_of_function(function: object) -> str:
    """Return what a function names; "" for what is none, or has somebody else's around it.

    MLflow's own decorators say nothing of what a function does. wrapt's objects look like what is
    inside of them, `__code__` included.
    """
    if type(function) is not FunctionType:
        return ""
    inside = getattr(function, "__wrapped__", None)
    if inside is not None:
        is_mlflows = str(function.__globals__.get("__name__")).startswith("mlflow.")
        return names_of_function(inside) if is_mlflows else ""
    return names_of(function.__code__)


def names_in(owner: object, name: str) -> str:
    """Return what a function of a class or a module names; "" if there is none."""
    return names_of_function(getattr(owner, name, None))
