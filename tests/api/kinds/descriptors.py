"""Descriptors, and what Python calls by itself."""

from __future__ import annotations

import abc
import asyncio
import functools
import types
from collections.abc import Iterator
from typing import Any

from tests.api.kinds.cases import cases_of

module = cases_of(__name__)
trace = module.trace


class ClassProperty(property):
    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self.fget(owner)  # type: ignore[misc]


class UnitProperty(property):
    """A property with a constructor of its own, and state."""

    def __init__(self, fget: Any, *, unit: str) -> None:
        super().__init__(fget)
        self.unit = unit
        self.scale = len(unit)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        value = super().__get__(instance, owner)
        return value if instance is None else f"{value} {self.unit} {self.scale}"


class DjangosCachedProperty:
    """Django's, without its documentation."""

    name: Any = None

    @staticmethod
    def func(instance: Any) -> Any:
        raise TypeError("Cannot use cached_property instance without calling __set_name__() on it.")

    def __init__(self, func: Any) -> None:
        self.real_func = func
        self.__doc__ = getattr(func, "__doc__", None)

    def __set_name__(self, owner: Any, name: str) -> None:
        if self.name is None:
            self.name = name
            self.func = self.real_func  # type: ignore[method-assign]
        elif name != self.name:
            raise TypeError("Cannot assign the same cached_property to two different names")

    def __get__(self, instance: Any, cls: Any = None) -> Any:
        if instance is None:
            return self
        result = instance.__dict__[self.name] = self.func(instance)
        return result


class SlottedDescriptor:
    __slots__ = ("function",)

    def __init__(self, function: Any) -> None:
        self.function = function

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else self.function(instance)


class HybridMethod:
    """A descriptor that is no callable and gives bound methods, as SQLAlchemy's."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self.function.__get__(owner if instance is None else instance)


class Registered:
    """A callable that wants to know its name."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.name = ""

    def __set_name__(self, owner: Any, name: str) -> None:
        self.name = f"{owner.__name__}.{name}"

    def __call__(self, *args: Any) -> Any:
        return self.name, self.function(*args)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)


class UnitMethod(classmethod):  # type: ignore[type-arg]
    """A classmethod with a constructor of its own."""

    def __init__(self, function: Any, unit: str = "m") -> None:
        super().__init__(function)
        self.unit = unit


class Descriptors:
    b = 1

    @trace
    @property
    def above(self) -> int:
        """Documented."""
        return self.b

    @property
    @trace
    def below(self) -> int:
        return self.b

    @trace
    @property
    def settable(self) -> int:
        return self.b

    @settable.setter
    def settable(self, value: int) -> None:
        self.b = value

    @trace
    @ClassProperty
    def of_class(cls) -> str:
        return cls.__name__  # type: ignore[attr-defined, no-any-return]

    @trace
    @functools.partial(UnitProperty, unit="kg")
    def with_unit(self) -> int:
        return self.b

    @trace
    @functools.cached_property
    def cached(self) -> int:
        """Documented."""
        return self.b

    @functools.cached_property
    @trace
    def cached_below(self) -> int:
        return self.b

    @trace
    @DjangosCachedProperty
    def djangos(self) -> int:
        return self.b

    @trace
    @SlottedDescriptor
    def slotted(self) -> int:
        return self.b

    @trace
    @HybridMethod
    def hybrid(self) -> int:
        return self.b  # type: ignore[attr-defined, no-any-return]

    @trace
    @Registered
    def registered(self) -> int:
        return self.b

    @trace
    @functools.partial(UnitMethod, unit="kg")
    def unit_method(cls) -> str:
        return cls.__name__

    @trace
    @property
    @abc.abstractmethod
    def abstract(self) -> int: ...


class Hooks:
    subclasses: list[str] = []  # noqa: RUF012
    b: int

    @trace
    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Hooks.subclasses.append(cls.__name__)

    @trace
    def __class_getitem__(cls, item: Any) -> Any:
        return cls.__name__, item

    @trace
    def __new__(cls, b: int = 1) -> Any:
        made = super().__new__(cls)
        made.b = b
        return made

    @trace
    def __init__(self, b: int = 1) -> None:
        self.b += b

    @trace
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hooks) and self.b == other.b

    @trace
    def __hash__(self) -> int:
        return self.b

    @trace
    def __len__(self) -> int:
        return self.b

    @trace
    def __iter__(self) -> Iterator[int]:
        yield self.b

    @trace
    def __enter__(self) -> Any:
        return self

    @trace
    def __exit__(self, *exc_info: object) -> None: ...

    @trace
    async def __aenter__(self) -> Any:
        return self

    @trace
    async def __aexit__(self, *exc_info: object) -> None: ...

    @trace
    def __getattr__(self, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name

    @trace
    def __set_name__(self, owner: Any, name: str) -> None:
        self.named = name


@functools.cache
def sub_of_hooks() -> Any:
    """Return a subclass: made when it is asked for, as that is a call of what is traced."""

    class SubOfHooks(Hooks):
        member = Hooks()

    return SubOfHooks


async def entered(manager: Any) -> str:
    async with manager as inside:
        return type(inside).__name__


def entered_here(manager: Any) -> str:
    with manager as inside:
        return type(inside).__name__


def set_and_get(thing: Any) -> int:
    thing.settable = 5
    return int(thing.settable)


module.uses |= {
    "property": (lambda: Descriptors().above, "above"),
    "property below": (lambda: Descriptors().below, "below"),
    "property with a setter": (lambda: set_and_get(Descriptors()), "settable"),
    "property of the class": (lambda: Descriptors.of_class, "of_class"),
    "property of the class, of an object": (lambda: Descriptors().of_class, "of_class"),
    "subclass of property": (lambda: Descriptors().with_unit, "with_unit"),
    "its state": (lambda: vars(Descriptors)["with_unit"].unit, None),
    "cached_property": (lambda: Descriptors().cached, "cached"),
    "cached_property below": (lambda: Descriptors().cached_below, "cached_below"),
    "cached once": (lambda: [(d.cached, d.cached) for d in [Descriptors()]], "cached"),
    "Django's": (lambda: [(d.djangos, d.djangos) for d in [Descriptors()]], "djangos"),
    "slotted descriptor": (lambda: Descriptors().slotted, "slotted"),
    "hybrid method": (lambda: Descriptors().hybrid(), "hybrid"),
    "hybrid method of the class": (lambda: Descriptors.hybrid(), "hybrid"),
    "one that wants its name": (lambda: Descriptors().registered(), "registered"),
    "subclass of classmethod": (lambda: Descriptors.unit_method(), "unit_method"),
    "the state of that": (lambda: vars(Descriptors)["unit_method"].unit, None),
    "abstract property": (lambda: vars(Descriptors)["abstract"].__isabstractmethod__, None),
    "documentation": (lambda: [vars(Descriptors)[n].__doc__ for n in ("above", "cached")], None),
    "types": (
        lambda: {n: type(m).__name__ for n, m in list(vars(Descriptors).items())[1:12]},
        None,
    ),
    "on the class": (lambda: type(Descriptors.cached).__name__, None),
    "__init_subclass__": (lambda: type("New", (Hooks,), {}).subclasses[-1], "__init_subclass__"),
    "__init_subclass__, looked at": (lambda: Hooks.__init_subclass__, None),
    "__class_getitem__": (lambda: sub_of_hooks()[int], "__class_getitem__"),
    "__class_getitem__, looked at": (lambda: Hooks().__class_getitem__, None),
    "__new__": (lambda: Hooks.__new__(Hooks, 3).b, "__new__"),
    "__new__ of an object": (lambda: sub_of_hooks()().__new__(Hooks, 3).b, "__new__"),
    "__init__": (lambda: Hooks(3).b, "__init__"),
    "__eq__": (lambda: Hooks(3) == Hooks(3), "__eq__"),
    "__hash__": (lambda: hash(Hooks(3)), "__hash__"),
    "__len__": (lambda: len(Hooks(3)), "__len__"),
    "__iter__": (lambda: list(Hooks(3)), "__iter__"),
    "with": (lambda: entered_here(Hooks()), "__enter__"),
    "async with": (lambda: asyncio.run(entered(Hooks())), "__aenter__"),
    "__getattr__": (lambda: Hooks().missing, "__getattr__"),
    "__set_name__": (lambda: sub_of_hooks().member.named, None),
}
