"""Traced callables as objects: functions, methods, and what dispatches among them."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from spanguard._base.proxies import CallableProxy, FunctionWrapper, ObjectProxy
from spanguard._propagation.pickling import cloudpickle_asking

if TYPE_CHECKING:

    class _Wrapping:
        __wrapped__: Any
        __qualname__: str
        _self_plan: CallPlan

        def __init__(self, plan: CallPlan) -> None: ...

else:
    _Wrapping = object  # annotations in a class here would be taken for the callable's own
from spanguard._api.call_plan import ANNOTATIONS, CallPlan, LruCache

__all__ = ["Traced", "TracedDispatch", "TracedFunction", "TracedMethod", "TracedObject"]


class Traced(_Wrapping):
    """What all traced callables answer as what they wrap does."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        # Else whoever looks at the annotations of the class (mock does) makes Python put empty
        # ones there, and they hide those of every callable.
        cls.__annotations__ = ANNOTATIONS  # type: ignore[assignment]

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # pyright: ignore
        # A function to everyone, but cloudpickle would take a function apart and ship what is
        # wrapped: to it, something that knows how it pickles.
        return type(self) if cloudpickle_asking() else self.__wrapped__.__class__

    def __repr__(self) -> str:
        return repr(self.__wrapped__)

    def __copy__(self) -> object:
        return self._self_over(copy.copy(self.__wrapped__))

    def __deepcopy__(self, memo: dict[int, Any]) -> object:
        return self._self_over(copy.deepcopy(self.__wrapped__, memo))

    def _self_over(self, function: object) -> object:
        # A copy of a function is the function.
        kind: Any = type(self)
        return self if function is self.__wrapped__ else kind(self._self_plan.of(function))

    def __reduce_ex__(self, protocol: object) -> str | tuple[object, ...]:
        asking = cloudpickle_asking()
        if _is_found_by_name(self) and not (asking and asking.ships(self.__module__)):
            return self.__qualname__  # as functions are, and it is traced there, too
        return type(self), (self._self_plan,)

    def __reduce__(self) -> str | tuple[object, ...]:
        return self.__reduce_ex__(2)


def _is_found_by_name(function: Any) -> bool:
    """Tell whether another process finds this very object where it says it is."""
    try:
        found: Any = sys.modules[function.__module__]
        for name in function.__qualname__.split("."):
            found = getattr(found, name)
    except Exception:  # noqa: BLE001
        return False
    return found is function


class _Call:
    """`obj.__call__` of a traced object: with the signature of the object's own."""

    __slots__ = ("_traced",)

    def __init__(self, traced: Any = None) -> None:
        self._traced = traced

    def __get__(self, traced: Any, owner: object = None) -> _Call:
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

    def __get__(self, traced: Any, owner: object = None) -> inspect.Signature:
        if traced is None or inspect.isroutine(traced.__wrapped__):
            raise AttributeError("__signature__")
        return inspect.signature(traced.__wrapped__)


class TracedObject(Traced, CallableProxy):
    """A callable that is no function of its class, traced: an object, a builtin, a partial."""

    def __init__(self, plan: CallPlan) -> None:
        super().__init__(plan.function)
        self._self_plan = plan
        self._self_caller = plan.caller()

    __call__ = _Call()
    __signature__ = _Signature()


class TracedMethod(TracedObject):
    """A method that was bound before it was traced."""

    def __init__(self, plan: CallPlan, instance: object = None) -> None:
        if instance is not None:
            # weakref.WeakMethod makes a method again by its type, of a function and an object.
            function: Any = plan
            plan = function._self_plan.of(MethodType(function.__wrapped__, instance))
        super().__init__(plan)
        self._self_function: TracedFunction | None = None

    @property
    def __func__(self) -> TracedFunction:
        if self._self_function is None:  # kept: WeakMethod has a weak reference to it
            self._self_function = TracedFunction(self._self_plan.of(self.__wrapped__.__func__))
        return self._self_function


class TracedFunction(Traced, FunctionWrapper):
    """A function, traced; and whatever else becomes a method in a class."""

    def __init__(self, plan: CallPlan) -> None:
        super().__init__(plan.function, plan.caller())  # type: ignore[call-arg]
        self._self_plan = plan
        self._self_seeks_owner = plan.asks_owner

    def __get__(self, instance: object, owner: type | None = None) -> Any:
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


def _owner_of(function: object, owner: object) -> type | None:
    """Return the class that a function was put into after it was made, if it was."""
    for cls in getattr(owner, "__mro__", ()):
        if any(member is function for member in list(vars(cls).values())):
            return cls  # type: ignore[no-any-return]
    return None


# What binds as functions do: to a method of Python's own, with the object as its first argument.
_BINDING = frozenset({FunctionType, LruCache, TracedFunction})

_IMPLICIT: dict[str, Callable[[Any], object]] = {
    "__class_getitem__": classmethod,
    "__init_subclass__": classmethod,
    "__new__": staticmethod,
}


class TracedBound(TracedObject):
    """What a descriptor made for an object, traced: a bound method of its own kind."""

    def __init__(
        self,
        plan: CallPlan,
        descriptor: object = None,
        instance: object = None,
        owner: object = None,
    ) -> None:
        super().__init__(plan)
        self._self_origin = (descriptor, instance, owner)

    def _self_over(self, function: object) -> object:
        if function is self.__wrapped__:
            return self
        return TracedBound(self._self_plan.of(function), *self._self_origin)

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return _bind, self._self_origin


def _bind(descriptor: Any, instance: object, owner: object) -> object:
    return descriptor.__get__(instance, owner)


class TracedDispatch(Traced, ObjectProxy):
    """A `singledispatchmethod`, traced: whichever implementation is called, now or later."""

    def __init__(self, plan: CallPlan) -> None:
        super().__init__(plan.function)
        self._self_plan = plan

    def __get__(self, instance: object, owner: type | None = None) -> TracedBound:
        descriptor = self.__wrapped__
        bound = type(descriptor).__get__(descriptor, instance, owner)
        plan = self._self_plan.of(descriptor.func.__get__(instance, owner))
        plan.function = bound
        return TracedBound(plan, self, instance, owner)
