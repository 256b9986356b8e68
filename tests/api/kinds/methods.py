"""Methods of every kind, and those that are put into a class or an object later."""

from __future__ import annotations

import functools
import types
from collections.abc import AsyncIterator, Iterator
from typing import Any

from tests.api.kinds.cases import cases_of
from tests.api.kinds.untraced import Adder, announced, tells_instance, unannounced, undecorated

module = cases_of(__name__)
trace, case = module.trace, module.case


class Binding:
    """A decorator class that binds as functions do."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)


class BindingByPartial(Binding):
    """Another that makes a partial."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self.function, instance)


class Methods:
    """Methods of all kinds."""

    def __init__(self, b: int = 1) -> None:
        self.b = b

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.b == other.b  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self.b)

    @trace
    def method(self, a: int) -> int:
        """Add.

        >>> Methods().method(1)
        2
        """
        return a + self.b

    @trace
    async def coroutine(self, a: int) -> int:
        return a + self.b

    @trace
    def generator(self, a: int) -> Iterator[int]:
        yield a + self.b

    @trace
    async def async_generator(self, a: int) -> AsyncIterator[int]:
        yield a + self.b

    @trace
    def first_is_called(this, a: int) -> int:
        return a + this.b

    @trace
    @classmethod
    def above_class(cls, a: int) -> int:
        """Add.

        >>> Methods.above_class(1)
        1
        """
        return a

    @classmethod
    @trace
    def below_class(cls, a: int) -> int:
        return a

    @trace
    @classmethod
    async def class_coroutine(cls, a: int) -> int:
        return a

    @trace
    @staticmethod
    def above_static(a: int) -> int:
        """Add.

        >>> Methods.above_static(1)
        1
        """
        return a

    @staticmethod
    @trace
    def below_static(a: int) -> int:
        return a

    @trace
    @staticmethod
    def static_generator(a: int) -> Iterator[int]:
        yield a

    @trace
    @functools.cache  # noqa: B019
    def cached(self, a: int) -> int:
        return a + self.b

    @functools.cache  # noqa: B019
    @trace
    def cached_above(self, a: int) -> int:
        return a + self.b

    @trace
    @announced
    def wrapped(self, a: int) -> int:
        return a + self.b

    @trace
    @unannounced
    def unannounced(self, a: int) -> int:
        return a + self.b

    @trace
    @tells_instance
    def by_wrapt(self, a: int) -> int:
        return a + self.b

    @tells_instance
    @trace
    def wrapt_above(self, a: int) -> int:
        return a + self.b

    @trace
    @Binding
    def binding(self, a: int) -> int:
        return a + self.b

    @trace
    @BindingByPartial
    def binding_by_partial(self, a: int) -> int:
        return a + self.b

    def _base(self, a: int, b: int = 0) -> int:
        return a + b + self.b

    half = trace(functools.partialmethod(_base, 1))
    half_of_traced = functools.partialmethod(trace(_base), 1)
    stored_partial = trace(functools.partial(undecorated, 1))
    stored_builtin = trace(len)
    stored_object = trace(Adder(1))

    @trace
    @functools.singledispatchmethod
    def dispatched(self, a: Any) -> str:
        return "any"

    @dispatched.register
    def _(self, a: int) -> str:
        return f"int {self.b}"

    @trace
    @functools.singledispatchmethod
    @classmethod
    def class_dispatched(cls, a: Any) -> str:
        return "any"

    @class_dispatched.register
    @classmethod
    def _(cls, a: int) -> str:
        return f"int {cls.__name__}"

    class Nested:
        @trace
        def method(self, a: int) -> int:
            return a

    def __mangled(self, a: int) -> int:
        return a

    mangled = trace(__mangled)

    @trace
    def self(self, a: int) -> int:  # its name is that of its first parameter
        return a


class Sub(Methods):
    def method(self, a: int) -> int:
        return super().method(a) + 1  # type: ignore[no-any-return]


methods = Methods()
case("method", lambda: methods.method, 1, span="method", a=1)
case("method of the class", lambda: Methods.method, methods, 1, span="method", a=1)
case("inherited method", lambda: Sub().above_class, 1, span="above_class", a=1)
case("overridden method", lambda: Sub().method, 1, span="method", a=1)
case("coroutine method", lambda: methods.coroutine, 1, span="coroutine", a=1)
case("generator method", lambda: methods.generator, 1, span="generator", a=1)
case("async generator method", lambda: methods.async_generator, 1, span="async_generator", a=1)
case("method without self", lambda: methods.first_is_called, 1, span="first_is_called", a=1)
case(
    "method of the class without self",
    lambda: Methods.first_is_called,
    methods,
    1,
    span="first_is_called",
    a=1,
)
for name in ("above_class", "below_class", "class_coroutine"):
    case(f"{name} of the class", functools.partial(getattr, Methods, name), 1, span=name, a=1)
    case(f"{name} of an object", functools.partial(getattr, methods, name), 1, span=name, a=1)
for name in ("above_static", "below_static", "static_generator"):
    case(f"{name} of the class", functools.partial(getattr, Methods, name), 1, span=name, a=1)
    case(f"{name} of an object", functools.partial(getattr, methods, name), 1, span=name, a=1)
for name in (
    *("cached", "cached_above", "wrapped", "by_wrapt", "wrapt_above"),
    *("dispatched", "class_dispatched", "self"),
):
    case(f"{name} method", functools.partial(getattr, methods, name), 1, span=name, a=1)
case("cached method of the class", lambda: Methods.cached, methods, 1, span="cached", a=1)
case("unannounced method", lambda: methods.unannounced, 1, span="<lambda>", args=[1])
case("binding object", lambda: methods.binding, 1, span="binding", args=[1])
case("binding by partial", lambda: methods.binding_by_partial, 1, span="binding_by_partial", a=1)
case("partialmethod", lambda: methods.half, 2, span="_base", a=1, b=2)
case("partialmethod of traced", lambda: methods.half_of_traced, 2, span="_base", a=1, b=2)
case("partial in a class", lambda: methods.stored_partial, 2, span="undecorated", b=2)
case("builtin in a class", lambda: methods.stored_builtin, [1], span="len", obj=[1])
case("object in a class", lambda: methods.stored_object, 1, span="Adder", a=1)
case("nested class", lambda: Methods.Nested().method, 1, span="method", a=1)
case("mangled method", lambda: methods.mangled, 1, span="__mangled", a=1)

bound = trace(methods._base)
case("traced bound method", lambda: bound, 1, span="_base", a=1, b=0)


class Monkey:
    b = 1


def patched_in(this: Any, a: int) -> int:
    return int(a + this.b)


Monkey.method = trace(patched_in)  # type: ignore[attr-defined]
monkey = Monkey()
case("patched in later", lambda: monkey.method, 1, span="patched_in", a=1)  # type: ignore[attr-defined]
monkey.own = trace(types.MethodType(patched_in, monkey))  # type: ignore[attr-defined]
case("patched into the object", lambda: monkey.own, 1, span="patched_in", a=1)  # type: ignore[attr-defined]
