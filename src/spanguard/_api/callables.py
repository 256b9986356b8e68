"""What a traced callable looks like from outside: the callable itself, of whatever kind it is.

tests/api/test_callables.py asks every kind all that Python and frameworks ask, traced and plain.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from types import MethodType
from typing import Any

from spanguard._api.call_plan import CallPlan
from spanguard._api.traced_objects import (
    Traced,
    TracedDispatch,
    TracedFunction,
    TracedMethod,
    TracedObject,
)

__all__ = ["NotTraceable", "kind_of", "name_of", "trace_callable", "trace_class"]


class NotTraceable(Exception):
    """Nothing in the object can be called: it is left as it is."""


# -- what it is ------------------------------------------------------------------------------------


def name_of(function: Any) -> str | None:
    """Return a callable's own name, None if it has none."""
    while isinstance(function, functools.partial):
        function = function.func
    try:
        name = function.__name__
    except Exception:  # noqa: BLE001 - it has none, or is not to be asked
        return None
    return name if isinstance(name, str) else None


def kind_of(function: object) -> str:
    """Tell what a call gives back. An object counts by its `__call__`."""
    candidates = [function]
    if not inspect.isroutine(function) and not isinstance(function, functools.partial):
        candidates.append(inspect.getattr_static(type(function), "__call__", None))
    for candidate in candidates:
        if _is_generator_coroutine(candidate):
            return "call_generator_coroutine"
        if inspect.iscoroutinefunction(candidate):
            return "call_coroutine"
        if inspect.isasyncgenfunction(candidate):
            return "call_async_generator"
        if inspect.isgeneratorfunction(candidate):
            return "call_generator"
    return "call"


def _is_generator_coroutine(function: object) -> bool:
    """Tell whether it is a generator function that `types.coroutine` made awaitable."""
    while isinstance(function, functools.partial):
        function = function.func
    flags = getattr(getattr(function, "__code__", None), "co_flags", 0)
    return isinstance(flags, int) and bool(flags & inspect.CO_ITERABLE_COROUTINE)


# -- tracing it ------------------------------------------------------------------------------------


def trace_callable(function: Any, plan: Callable[..., CallPlan]) -> Any:
    """Return a callable, or a descriptor that calls one, traced.

    Args:
        function: what is to be traced.
        plan: makes the plan of a function; may be told whether that `takes_self`.

    Raises:
        NotTraceable: there is nothing to call in it.
    """
    kind = type(function)  # not what a proxy says that it is
    if issubclass(kind, classmethod):
        inner = trace_callable(function.__func__, functools.partial(plan, takes_self=True))
        return _remade(function, classmethod, function.__func__, inner)
    if issubclass(kind, staticmethod):
        inner = trace_callable(function.__func__, functools.partial(plan, takes_self=False))
        return _remade(function, staticmethod, function.__func__, inner)
    if issubclass(kind, property):
        if function.fget is None:
            return function
        getter = trace_callable(function.fget, plan)
        rest = (function.fset, function.fdel, function.__doc__)
        return _remade(function, property, function.fget, getter, *rest)
    if issubclass(kind, functools.singledispatchmethod):
        return TracedDispatch(plan(function))
    if kind is MethodType:
        return TracedMethod(plan(function))
    if callable(function):
        binds = hasattr(kind, "__get__")
        return TracedFunction(plan(function)) if binds else TracedObject(plan(function))
    return _traced_within(function, plan)


def _remade(descriptor: object, kind: Any, function: object, traced: object, *rest: Any) -> object:
    """Return a descriptor of the same class with another function in it.

    What a subclass takes to be made is its own affair: it is made as its base class would be.
    """
    remade = kind.__new__(type(descriptor))
    kind.__init__(remade, traced, *rest)
    for name, value in _state(descriptor).items():
        if not hasattr(remade, name) or name not in _COPIED_BY_PYTHON:
            setattr(remade, name, traced if value is function else value)
    return remade


_COPIED_BY_PYTHON = frozenset(functools.WRAPPER_ASSIGNMENTS) | {"__wrapped__"}


def _state(descriptor: object) -> dict[str, object]:
    """Return the attributes of an object's own, in its dict and in slots."""
    state = {}
    for kind in type(descriptor).__mro__:
        if kind.__module__ == "builtins":
            continue
        for name, member in vars(kind).items():
            if isinstance(member, types.MemberDescriptorType) and hasattr(descriptor, name):
                state[name] = getattr(descriptor, name)
    return {**state, **getattr(descriptor, "__dict__", {})}


def _traced_within(descriptor: object, plan: Callable[..., CallPlan]) -> object:
    """Return a copy of a descriptor that is no callable, with the function it calls traced.

    `cached_property` (Python's, Django's), `partialmethod`, pydantic's and SQLAlchemy's own.
    """
    if hasattr(type(descriptor), "__get__"):
        state = _state(descriptor)
        for function in state.values():
            if _is_for_calling(function):
                traced = trace_callable(function, plan)
                remade = copy.copy(descriptor)
                for name, value in state.items():
                    if value is function:
                        setattr(remade, name, traced)
                return remade
    raise NotTraceable


def _is_for_calling(value: object) -> bool:
    return not isinstance(value, type) and (callable(value) or isinstance(value, _HOLDERS))


_HOLDERS = (classmethod, staticmethod, property, functools.partialmethod)


# -- a class ---------------------------------------------------------------------------------------


def trace_class(cls: type, plan: Callable[..., CallPlan]) -> None:
    """Trace the public methods that a class itself defines.

    Args:
        cls: the class.
        plan: makes the plan of a function; must be told the `method`'s name.
    """
    for name, member in list(vars(cls).items()):
        if name.startswith("_") or not _is_method(member):
            continue
        traced = trace_callable(member, functools.partial(plan, method=name))
        setattr(cls, name, traced)
        if isinstance(traced, TracedFunction):
            traced._self_plan.owner = cls


def _is_method(member: object) -> bool:
    """Tell whether a member of a class is a method that is not traced yet."""
    inner = getattr(member, "func", getattr(member, "__func__", member))
    if isinstance(inner, Traced) or isinstance(member, (type, functools.partial)):
        return False
    if isinstance(member, _METHODS):
        return True
    return callable(member) and hasattr(type(member), "__get__")


_METHODS = (classmethod, staticmethod, functools.partialmethod, functools.singledispatchmethod)
