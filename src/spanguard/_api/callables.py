"""What a traced callable looks like from outside: the callable itself, of whatever kind it is.

tests/test_callables.py asks every kind all that Python and frameworks ask, traced and plain.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Protocol

import wrapt

from spanguard._propagation.pickling import cloudpickle_asking

if TYPE_CHECKING:
    _FunctionWrapper = wrapt.FunctionWrapper[Any, Any]
    _CallableProxy = wrapt.CallableObjectProxy[Any]
    _ObjectProxy = wrapt.BaseObjectProxy[Any]
else:
    _FunctionWrapper = wrapt.FunctionWrapper
    _CallableProxy = wrapt.CallableObjectProxy
    _ObjectProxy = wrapt.BaseObjectProxy

__all__ = ["CallPlan", "NotTraceable", "kind_of", "name_of", "trace_callable", "trace_class"]

LruCache = type(functools.lru_cache(lambda: None))


class NotTraceable(Exception):
    """Nothing in the object can be called: it is left as it is."""


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


# -- what it is ------------------------------------------------------------------------------------


def name_of(function: Any) -> str | None:
    """Return a callable's own name, None if it has none."""
    while isinstance(function, functools.partial):
        function = function.func
    try:
        name = function.__name__
    except Exception:  # it has none, or is not to be asked
        return None
    return name if isinstance(name, str) else None


def kind_of(function: Any) -> str:
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


def _is_generator_coroutine(function: Any) -> bool:
    """Tell whether it is a generator function that `types.coroutine` made awaitable."""
    while isinstance(function, functools.partial):
        function = function.func
    flags = getattr(getattr(function, "__code__", None), "co_flags", 0)
    return isinstance(flags, int) and bool(flags & inspect.CO_ITERABLE_COROUTINE)


# -- as it is seen ---------------------------------------------------------------------------------


if TYPE_CHECKING:

    class _Wrapping:
        __wrapped__: Any
        __qualname__: str
        _self_plan: CallPlan

        def __init__(self, plan: CallPlan) -> None: ...

else:
    _Wrapping = object  # annotations in a class here would be taken for the callable's own


def _set_annotations(traced: Any, value: Any) -> None:
    traced.__wrapped__.__annotations__ = value


_ANNOTATIONS = property(lambda traced: traced.__wrapped__.__annotations__, _set_annotations)


class _Traced(_Wrapping):
    """What all traced callables answer as what they wrap does."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        # Else whoever looks at the annotations of the class (mock does) makes Python put empty
        # ones there, and they hide those of every callable.
        cls.__annotations__ = _ANNOTATIONS  # type: ignore[assignment]

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore
        # A function to everyone, but cloudpickle would take a function apart and ship what is
        # wrapped: to it, something that knows how it pickles.
        return type(self) if cloudpickle_asking() else self.__wrapped__.__class__

    def __repr__(self) -> str:
        return repr(self.__wrapped__)

    def __copy__(self) -> Any:
        return self._self_over(copy.copy(self.__wrapped__))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._self_over(copy.deepcopy(self.__wrapped__, memo))

    def _self_over(self, function: Any) -> Any:
        # A copy of a function is the function.
        kind: Any = type(self)
        return self if function is self.__wrapped__ else kind(self._self_plan.of(function))

    def __reduce_ex__(self, protocol: Any) -> Any:
        asking = cloudpickle_asking()
        if _is_found_by_name(self) and not (asking and asking.ships(self.__module__)):
            return self.__qualname__  # as functions are, and it is traced there, too
        return type(self), (self._self_plan,)

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)


def _is_found_by_name(function: Any) -> bool:
    """Tell whether another process finds this very object where it says it is."""
    try:
        found: Any = sys.modules[function.__module__]
        for name in function.__qualname__.split("."):
            found = getattr(found, name)
    except Exception:
        return False
    return found is function


class _Call:
    """`obj.__call__` of a traced object: with the signature of the object's own."""

    __slots__ = ("_traced",)

    def __init__(self, traced: Any = None) -> None:
        self._traced = traced

    def __get__(self, traced: Any, owner: Any = None) -> _Call:
        return self if traced is None else _Call(traced)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._traced._self_caller(self._traced.__wrapped__, None, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._traced.__wrapped__.__call__, name)

    @property
    def __wrapped__(self) -> Any:
        return self._traced.__wrapped__.__call__


class _Signature:
    """`obj.__signature__` of a traced object: its own. The class has none."""

    __slots__ = ()

    def __get__(self, traced: Any, owner: Any = None) -> inspect.Signature:
        if traced is None or inspect.isroutine(traced.__wrapped__):
            raise AttributeError("__signature__")
        return inspect.signature(traced.__wrapped__)


class TracedObject(_Traced, _CallableProxy):
    """A callable that is no function of its class, traced: an object, a builtin, a partial."""

    def __init__(self, plan: CallPlan) -> None:
        super().__init__(plan.function)
        self._self_plan = plan
        self._self_caller = plan.caller()

    __call__ = _Call()
    __signature__ = _Signature()


class TracedMethod(TracedObject):
    """A method that was bound before it was traced."""

    def __init__(self, plan: CallPlan, instance: Any = None) -> None:
        if instance is not None:
            # weakref.WeakMethod makes a method again by its type, of a function and an object.
            function: Any = plan
            plan = function._self_plan.of(MethodType(function.__wrapped__, instance))
        super().__init__(plan)
        self._self_function: TracedFunction | None = None

    @property
    def __func__(self) -> Any:
        if self._self_function is None:  # kept: WeakMethod has a weak reference to it
            self._self_function = TracedFunction(self._self_plan.of(self.__wrapped__.__func__))
        return self._self_function


class TracedFunction(_Traced, _FunctionWrapper):
    """A function, traced; and whatever else becomes a method in a class."""

    def __init__(self, plan: CallPlan) -> None:
        super().__init__(plan.function, plan.caller())  # type: ignore[call-arg]
        self._self_plan = plan
        self._self_seeks_owner = plan.asks_owner

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        wrapped = self.__wrapped__
        if type(wrapped) in _BINDING:
            if instance is None:
                return self
            if self._self_seeks_owner and self._self_plan.owner is None:
                self._self_plan.owner = _owner_of(self, owner)
            # Python's own method: it pickles, copies, compares and is held weakly as any.
            return MethodType(self, instance)
        bound = type(wrapped).__get__(wrapped, instance, owner)
        if bound is wrapped:
            return self
        if type(bound) is MethodType and bound.__func__ is wrapped:
            return MethodType(self, bound.__self__)
        return TracedBound(self._self_plan.of(bound), self, instance, owner)

    def __set_name__(self, owner: type, name: str) -> None:
        self._self_plan.named_in(owner, name)
        implicit = _IMPLICIT.get(name)
        if implicit is not None and type(self.__wrapped__) is FunctionType:
            # Python does this to functions before it calls us.
            type.__setattr__(owner, name, implicit(self))
        further = getattr(type(self.__wrapped__), "__set_name__", None)
        if further is not None:
            further(self.__wrapped__, owner, name)


def _owner_of(function: Any, owner: Any) -> type | None:
    """Return the class that a function was put into after it was made, if it was."""
    for cls in getattr(owner, "__mro__", ()):
        if any(member is function for member in list(vars(cls).values())):
            return cls  # type: ignore[no-any-return]
    return None


# What binds as functions do: to a method of Python's own, with the object as its first argument.
_BINDING = frozenset({FunctionType, LruCache, TracedFunction})

_IMPLICIT: dict[str, Callable[[Any], Any]] = {
    "__class_getitem__": classmethod,
    "__init_subclass__": classmethod,
    "__new__": staticmethod,
}


class TracedBound(TracedObject):
    """What a descriptor made for an object, traced: a bound method of its own kind."""

    def __init__(
        self, plan: CallPlan, descriptor: Any = None, instance: Any = None, owner: Any = None
    ) -> None:
        super().__init__(plan)
        self._self_origin = (descriptor, instance, owner)

    def _self_over(self, function: Any) -> Any:
        if function is self.__wrapped__:
            return self
        return TracedBound(self._self_plan.of(function), *self._self_origin)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bind, self._self_origin


def _bind(descriptor: Any, instance: Any, owner: Any) -> Any:
    return descriptor.__get__(instance, owner)


class TracedDispatch(_Traced, _ObjectProxy):
    """A `singledispatchmethod`, traced: whichever implementation is called, now or later."""

    def __init__(self, plan: CallPlan) -> None:
        super().__init__(plan.function)
        self._self_plan = plan

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        descriptor = self.__wrapped__
        bound = type(descriptor).__get__(descriptor, instance, owner)
        plan = self._self_plan.of(descriptor.func.__get__(instance, owner))
        plan.function = bound
        return TracedBound(plan, self, instance, owner)


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


def _remade(descriptor: Any, kind: Any, function: Any, traced: Any, *rest: Any) -> Any:
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


def _state(descriptor: Any) -> dict[str, Any]:
    """Return the attributes of an object's own, in its dict and in slots."""
    state = {}
    for kind in type(descriptor).__mro__:
        if kind.__module__ == "builtins":
            continue
        for name, member in vars(kind).items():
            if isinstance(member, types.MemberDescriptorType) and hasattr(descriptor, name):
                state[name] = getattr(descriptor, name)
    return {**state, **getattr(descriptor, "__dict__", {})}


def _traced_within(descriptor: Any, plan: Callable[..., CallPlan]) -> Any:
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


def _is_for_calling(value: Any) -> bool:
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


def _is_method(member: Any) -> bool:
    """Tell whether a member of a class is a method that is not traced yet."""
    inner = getattr(member, "func", getattr(member, "__func__", member))
    if isinstance(inner, _Traced) or isinstance(member, (type, functools.partial)):
        return False
    if isinstance(member, _METHODS):
        return True
    return callable(member) and hasattr(type(member), "__get__")


_METHODS = (classmethod, staticmethod, functools.partialmethod, functools.singledispatchmethod)
