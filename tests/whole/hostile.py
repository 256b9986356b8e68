"""Values that no argument was made for: each of their methods may raise, and anything at all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pandas


class Refused(BaseException):
    """What a hostile method raises: it is no Exception, so `except Exception` lets it pass."""


# What our code, MLflow's, or the standard library may call on a value, on purpose or not.
METHODS = (
    "__bool__",
    "__call__",
    "__contains__",
    "__eq__",
    "__float__",
    "__format__",
    "__getattr__",
    "__getitem__",
    "__hash__",
    "__index__",
    "__int__",
    "__iter__",
    "__len__",
    "__lt__",
    "__next__",
    "__repr__",
    "__str__",
    "isascii",
    "items",
    "keys",
    "strip",
)

_BASES: dict[str, tuple[type, tuple[Any, ...]]] = {
    "object": (object, ()),
    "str": (str, ("OK",)),
    "int": (int, (7,)),
    "float": (float, (1.5,)),
    "dict": (dict, ({"a": 1},)),
    "list": (list, ([1],)),
    "tuple": (tuple, ((1,),)),
    "exception": (ValueError, ("bad",)),
}


def refusing(
    *methods: str, base: str = "object", error: type[BaseException] = Refused
) -> Callable[[], Any]:
    """Return what makes an object of which the given methods raise."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise error("refused")

    kind, args = _BASES[base]
    body: dict[str, Any] = dict.fromkeys(methods, refuse)
    if "__eq__" in body:
        body.setdefault("__hash__", kind.__hash__)
    if "__class__" in methods:
        body["__class__"] = property(refuse)
    hostile = type(f"Hostile{base.title()}", (kind,), body)
    return lambda: hostile(*args)


class _RefusingKind(type):
    """A metaclass: its classes cannot be compared, asked or shown."""

    def _refuse(cls, *args: Any) -> Any:
        raise Refused

    __eq__ = __instancecheck__ = __subclasscheck__ = __repr__ = __bool__ = _refuse
    __hash__ = type.__hash__


class RefusingClass(metaclass=_RefusingKind):
    """A class that cannot be compared, asked or shown."""


class RefusingError(Exception, metaclass=_RefusingKind):
    """An exception class that cannot be compared, asked or shown."""


class Lying:
    """An object that says it is a string."""

    __class__ = str  # type: ignore[assignment]


class Endless:
    """An iterable without an end."""

    def __iter__(self) -> Iterator[Any]:
        return iter(itertools.count())


def circular() -> Any:
    value: dict[str, Any] = {}
    value["self"] = [value]
    return value


def _values() -> dict[str, Callable[[], Any]]:
    values: dict[str, Callable[[], Any]] = {
        "numpy array": lambda: numpy.array([1, 2]),
        "numpy array of one": lambda: numpy.array(["OK"]),
        "numpy array of none": lambda: numpy.array([]),
        "numpy pairs": lambda: numpy.array([[1, 2], [3, 4]]),
        "numpy string": lambda: numpy.str_("OK"),
        "numpy bool": lambda: numpy.True_,
        "numpy int": lambda: numpy.int64(3),
        "numpy nan": lambda: numpy.float32("nan"),
        "pandas series": lambda: pandas.Series([1, 2], index=["a", "b"]),
        "pandas frame": lambda: pandas.DataFrame({"a": [1, 2]}),
        "pandas na": lambda: pandas.NA,
        "surrogate": lambda: "a\ud800b",
        "nul": lambda: "a\x00b",
        "empty": lambda: "",
        "quotes": lambda: 'it\'s "so" \\ `and` so\n',
        "long": lambda: "x" * 20_000,
        "huge int": lambda: 10**5000,
        "huge negative int": lambda: -(10**5000),
        "int of 65 bits": lambda: 2**64,
        "zero": lambda: 0,
        "true": lambda: True,
        "false": lambda: False,
        "nan": lambda: float("nan"),
        "infinity": lambda: float("inf"),
        "bytes": lambda: b"\xff\x00",
        "circular": circular,
        "mapping of surrogates": lambda: {"\ud800": "\udc00", "a\x00": ["\ud800", {"\udfff": 1}]},
        "mapping of junk": lambda: {None: object(), 1: 10**400, "": "", (1, 2): float("nan")},
        "mapping of hostiles": lambda: {"k": refusing(*METHODS)(), refusing("__str__")(): 1},
        "list of hostiles": lambda: [refusing(*METHODS)(), "\ud800"],
        "endless": Endless,
        "generator": lambda: (n for n in range(3)),
        "refusing class": lambda: RefusingClass,
        "refusing exception class": lambda: RefusingError,
        "refusing exception": lambda: RefusingError("\ud800"),
        "class": lambda: int,
        "function": lambda: refusing,
        "lying": Lying,
        "not implemented": lambda: NotImplemented,
    }
    for method in (*METHODS, "__getattribute__", "__class__"):
        values[f"object refusing {method}"] = refusing(method)
    for base in _BASES:
        values[f"{base} refusing all"] = refusing(*METHODS, base=base)
        values[f"{base} refusing all by Exception"] = refusing(
            *METHODS, base=base, error=RuntimeError
        )
    values["object refusing even its class"] = refusing(*METHODS, "__getattribute__", "__class__")
    values["object refusing by GeneratorExit"] = refusing(*METHODS, error=GeneratorExit)
    values["object refusing by SystemExit"] = refusing(*METHODS, error=SystemExit)
    return values


HOSTILE = _values()
