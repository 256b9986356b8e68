"""Callables of every kind, plain here and traced in traced_callables.py, which runs this source.

They live in modules, so that other processes find them by name.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import dataclasses
import enum
import functools
import types
import typing
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import pydantic
import wrapt

from spanguard import traced

T = TypeVar("T")


def trace(function: Any, **options: Any) -> Any:
    """Trace a callable, in the module of the traced ones; leave it alone in the other."""
    return traced(**options)(function) if __name__ == "tests.api.traced_callables" else function


class Case(NamedTuple):
    """A callable, how to call it, and what is recorded of the call."""

    get: Callable[[], Any]
    args: tuple[Any, ...]
    span: str
    inputs: dict[str, Any]
    kwargs: dict[str, Any] = {}  # noqa: RUF012


CASES: dict[str, Case] = {}


def case(kind: str, get: Callable[[], Any], *args: Any, span: str, **inputs: Any) -> None:
    CASES[kind] = Case(get, args, span, inputs)


# -- functions -------------------------------------------------------------------------------------


@trace
def function(a: int, b: int = 2) -> int:
    """Add.

    >>> function(1)
    3
    """
    return a + b


@trace
async def coroutine(a: int) -> int:
    return a


@trace
def generator(a: int) -> Iterator[int]:
    yield a


@trace
async def async_generator(a: int) -> AsyncIterator[int]:
    yield a


@trace
@types.coroutine
def generator_coroutine(a: int) -> Any:
    yield
    return a


@trace
def every_kind_of_parameter(a: int, /, b: int, *rest: int, c: int = 3, **words: Any) -> Any:
    return a, b, rest, c, words


@trace
def same_name_twice(a: int, /, **kw: int) -> Any:
    return a, kw


def announced(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def unannounced(function: Any) -> Any:
    return lambda *args: function(*args)


@trace
@announced
def wrapped(a: int) -> int:
    """Documented below a decorator.

    >>> wrapped(1)
    1
    """
    return a


@announced
@trace
def wrapped_above(a: int) -> int:
    return a


@trace
@functools.cache
def cached(a: int) -> int:
    return a


@functools.cache
@trace
def cached_above(a: int) -> int:
    return a


@trace
@functools.singledispatch
def dispatched(a: Any) -> str:
    return "any"


@dispatched.register
def _(a: int) -> str:
    return "int"


@trace
@contextlib.contextmanager
def context_manager(a: int) -> Iterator[int]:
    yield a


@wrapt.decorator
def bare_wrapt(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs)


@wrapt.decorator
def tells_instance(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return type(instance).__name__, wrapped(*args, **kwargs)


@trace
@bare_wrapt
def by_wrapt(a: int) -> int:
    return a


def undecorated(a: int, b: int = 2) -> int:
    return a + b


traced_in_place = trace(undecorated)
partial = trace(functools.partial(undecorated, b=5))
partial_of_traced = functools.partial(trace(undecorated), b=5)


async def undecorated_coroutine(a: int) -> int:
    return a


partial_coroutine = trace(functools.partial(undecorated_coroutine, 1))
anonymous = trace(lambda a: a)
twice = trace(trace(undecorated))


def closure(b: int) -> Any:
    @trace
    def inner(a: int) -> int:
        return a + b

    return inner


closed_over = closure(1)

case("function", lambda: function, 1, span="function", a=1, b=2)
case("coroutine", lambda: coroutine, 1, span="coroutine", a=1)
case("generator", lambda: generator, 1, span="generator", a=1)
case("async generator", lambda: async_generator, 1, span="async_generator", a=1)
case("generator coroutine", lambda: generator_coroutine, 1, span="generator_coroutine", a=1)
case(
    "every kind of parameter",
    lambda: every_kind_of_parameter,
    *(1, 2, 3),
    span="every_kind_of_parameter",
    a=1,
    b=2,
    rest=[3],
    c=3,
)
case("wraps below", lambda: wrapped, 1, span="wrapped", a=1)
case("wraps above", lambda: wrapped_above, 1, span="wrapped_above", a=1)
case("lru_cache below", lambda: cached, 1, span="cached", a=1)
case("lru_cache above", lambda: cached_above, 1, span="cached_above", a=1)
case("singledispatch", lambda: dispatched, 1, span="dispatched", a=1)
case("contextmanager", lambda: context_manager, 1, span="context_manager", a=1)
case("wrapt's decorator", lambda: by_wrapt, 1, span="by_wrapt", a=1)
case("traced in place", lambda: traced_in_place, 1, span="undecorated", a=1, b=2)
case("partial", lambda: partial, 1, span="undecorated", a=1, b=5)
case("partial of traced", lambda: partial_of_traced, 1, span="undecorated", a=1, b=5)
case("partial coroutine", lambda: partial_coroutine, span="undecorated_coroutine")
case("lambda", lambda: anonymous, 1, span="<lambda>", a=1)
case("closure", lambda: closed_over, 1, span="inner", a=1)

# -- builtins --------------------------------------------------------------------------------------

length = trace(len)
upper = trace(str.upper)
joined = trace(",".join)
biggest = trace(max)

case("builtin", lambda: length, [1], span="len", obj=[1])
case("method of a builtin type", lambda: upper, "x", span="upper", self="x")
case("bound builtin", lambda: joined, ["x", "y"], span="join", iterable=["x", "y"])
case("builtin without a signature", lambda: biggest, 1, 2, span="max", args=[1, 2])

# -- callable objects ------------------------------------------------------------------------------


class Adder:
    """Add."""

    def __init__(self, b: int) -> None:
        self.b = b

    def __call__(self, a: int) -> int:
        return a + self.b

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adder) and self.b == other.b

    __hash__ = None  # type: ignore[assignment]


class AsyncAdder(Adder):
    async def __call__(self, a: int) -> int:
        return a + self.b


class GeneratingAdder(Adder):
    def __call__(self, a: int) -> Iterator[int]:
        yield a + self.b


class TracedCall:
    @trace
    def __call__(self, a: int) -> int:
        return a


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


adder = trace(Adder(1))
async_adder = trace(AsyncAdder(1))
generating_adder = trace(GeneratingAdder(1))
traced_call = TracedCall()

case("callable object", lambda: adder, 1, span="Adder", a=1)
case("async callable object", lambda: async_adder, 1, span="AsyncAdder", a=1)
case("generating callable object", lambda: generating_adder, 1, span="GeneratingAdder", a=1)
case("__call__", lambda: traced_call, 1, span="__call__", a=1)

# -- methods ---------------------------------------------------------------------------------------


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

# -- methods of classes of all kinds ---------------------------------------------------------------


@dataclasses.dataclass
class Data:
    b: int = 1

    @trace
    def method(self, a: int) -> int:
        return a + self.b


@dataclasses.dataclass(frozen=True, slots=True)
class SlottedData:
    b: int = 1

    @trace
    def method(self, a: int) -> int:
        return a + self.b


class Slotted:
    __slots__ = ()

    @trace
    def method(self, a: int) -> int:
        return a


class Model(pydantic.BaseModel):
    b: int = 1

    @trace
    def method(self, a: int) -> int:
        return a + self.b

    @trace
    @classmethod
    def of(cls, a: int) -> int:
        return a

    @trace
    @functools.cache  # noqa: B019
    def cached(self, a: int) -> int:
        return a + self.b

    def __hash__(self) -> int:
        return hash(self.b)


class Pair(NamedTuple):
    b: int = 1

    @trace
    def method(self, a: int) -> int:
        return a + self.b


class Colour(enum.Enum):
    RED = 1

    @trace
    def method(self, a: int) -> int:
        return int(a + self.value)

    @trace
    @classmethod
    def of(cls, a: int) -> int:
        return a


class Abstract(abc.ABC):
    @trace
    @abc.abstractmethod
    def method(self, a: int) -> int: ...


class Concrete(Abstract):
    @trace
    def method(self, a: int) -> int:
        return a


@typing.runtime_checkable
class Speaker(Protocol):
    @trace
    def method(self, a: int) -> int:
        return a


class Speaking(Speaker):
    pass


class Box(Generic[T]):
    @trace
    def method(self, a: T) -> T:
        return a


class Meta(type):
    @trace
    def method(cls, a: int) -> int:
        return a


class OfMeta(metaclass=Meta):
    pass


for name, owner in {
    "dataclass": Data(),
    "slotted dataclass": SlottedData(),
    "slotted class": Slotted(),
    "pydantic model": Model(),
    "NamedTuple": Pair(),
    "Enum": Colour.RED,
    "ABC": Concrete(),
    "Protocol": Speaking(),
    "Generic": Box[int](),
    "metaclass": OfMeta,
}.items():
    case(f"method of a {name}", functools.partial(getattr, owner, "method"), 1, span="method", a=1)
case("cached method of a pydantic model", lambda: Model().cached, 1, span="cached", a=1)
case("classmethod of a pydantic model", lambda: Model.of, 1, span="of", a=1)
case("classmethod of an Enum", lambda: Colour.of, 1, span="of", a=1)


# -- a traced class --------------------------------------------------------------------------------


@functools.partial(trace, name="Whole")
class Whole:
    def __init__(self, b: int = 1) -> None:
        self.b = b

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.b == other.b  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self.b)

    def method(self, a: int) -> int:
        return a + self.b

    def first_is_called(this, a: int) -> int:
        return a + this.b

    @classmethod
    def of(cls, a: int) -> int:
        return a

    @staticmethod
    def static(a: int) -> int:
        return a

    @functools.cache  # noqa: B019
    def cached(self, a: int) -> int:
        return a + self.b

    @announced
    def wrapped(self, a: int) -> int:
        return a + self.b

    @tells_instance
    def by_wrapt(self, a: int) -> int:
        return a + self.b

    @functools.singledispatchmethod
    def dispatched(self, a: Any) -> str:
        return "any"

    def _base(self, a: int, b: int) -> int:
        return a + b + self.b

    half = functools.partialmethod(_base, 1)


whole = Whole()
for name in (
    *("method", "first_is_called", "of", "static", "cached", "wrapped", "by_wrapt"),
    "dispatched",
):
    case(
        f"{name} of a traced class",
        functools.partial(getattr, whole, name),
        1,
        span=f"Whole.{name}",
        a=1,
    )
case("static of the traced class", lambda: Whole.static, 1, span="Whole.static", a=1)
case("of of the traced class", lambda: Whole.of, 1, span="Whole.of", a=1)
case("method of the traced class", lambda: Whole.method, whole, 1, span="Whole.method", a=1)
case("half of a traced class", lambda: whole.half, 2, span="Whole.half", a=1, b=2)


# -- descriptors, and what Python calls by itself --------------------------------------------------


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


# What is done with them; and the span of it, if it is one of a function that is traced.
USES: dict[str, tuple[Callable[[], Any], str | None]] = {
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
    "a pydantic model's copy": (lambda: Model(b=2).model_copy(deep=True).method(1), "method"),
    "replace": (lambda: dataclasses.replace(Data(2)).method(1), "method"),
    "an Enum's members": (lambda: list(Colour), None),
    "a runtime protocol": (lambda: isinstance(Concrete(), Speaker), None),
    "an abstract class": (lambda: Abstract.__abstractmethods__, None),
    "cache_info": (lambda: (cached.cache_clear(), cached.cache_info()), None),
    "register": (lambda: sorted(k.__name__ for k in dispatched.registry), None),
    "attributes": (lambda: (setattr(function, "mark", 1), vars(function).pop("mark")), None),
    "a name twice": (lambda: same_name_twice(1, a=2), "same_name_twice"),
}
