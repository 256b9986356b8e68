"""Methods of classes of every kind, and a class that is traced as a whole."""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
import typing
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import pydantic

from tests.api.kinds.cases import cases_of
from tests.api.kinds.untraced import announced, tells_instance

module = cases_of(__name__)
trace, case = module.trace, module.case


T = TypeVar("T")


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

module.uses |= {
    "a pydantic model's copy": (lambda: Model(b=2).model_copy(deep=True).method(1), "method"),
    "replace": (lambda: dataclasses.replace(Data(2)).method(1), "method"),
    "an Enum's members": (lambda: list(Colour), None),
    "a runtime protocol": (lambda: isinstance(Concrete(), Speaker), None),
    "an abstract class": (lambda: Abstract.__abstractmethods__, None),
}
