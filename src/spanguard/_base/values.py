"""Look at what a user gives without trusting it.

Its type is asked first, and its real one: `__class__` may raise, or lie. It is never compared,
counted, hashed or shown blindly: an array has no truth value, and any method may raise anything.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from itertools import islice
from typing import Any, cast

from spanguard._base.interrupts import is_the_users

__all__ = [
    "attribute_of",
    "is_a",
    "is_mapping",
    "is_raised_as",
    "is_same",
    "items_of",
    "kind_name",
    "number_of",
    "text_of",
    "truth_of",
    "whole_number_of",
]


def is_a(value: object, kinds: type | tuple[type, ...]) -> bool:
    """Do what `isinstance` does, by the real type."""
    return issubclass(type(value), kinds)


def is_mapping(value: object) -> bool:
    """Tell whether a value is a mapping; its class may be one that cannot be asked."""
    try:
        return is_a(value, Mapping)
    except BaseException as error:
        if is_the_users(error):
            raise
        return False


def is_raised_as(exception: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    """Tell whether an except clause with these classes would take an exception.

    It asks no metaclass, as `isinstance` does.
    """
    kind = type(exception)
    return any(type.__subclasscheck__(caught, kind) for caught in kinds)


def kind_name(value: object) -> str:
    """Return the name of a value's class, to be shown."""
    return str(attribute_of(type(value), "__name__", "object"))


def attribute_of(value: object, name: str, default: object = None) -> Any:
    """Do what `getattr` does, also where that raises."""
    try:
        return getattr(value, name, default)
    except BaseException as error:
        if is_the_users(error):
            raise
        return default


def text_of(value: object) -> str | None:
    """Return a string itself, of a subclass its characters; None if it is no string."""
    if type(value) is str:
        return value
    return str.__str__(cast("str", value)) if is_a(value, str) else None


def truth_of(value: object) -> bool | None:
    """Return whether a value is true; None if it does not tell."""
    if value is True or value is False:
        return value
    try:
        return bool(value)
    except BaseException as error:
        if is_the_users(error):
            raise
        return None


def number_of(value: Any) -> int | float | None:
    """Return a number itself, also numpy's; None if it is none, as a bool or a text is."""
    if value is True or value is False:
        return None
    if is_a(value, int):
        return int.__add__(value, 0)
    if is_a(value, float):
        return float.__add__(value, 0.0)
    for read in (operator.index, float):
        try:
            return None if is_a(value, (str, bytes, bytearray)) else read(value)
        except BaseException as error:
            if is_the_users(error):
                raise
    return None


def whole_number_of(value: object) -> int | None:
    """Return a whole number itself, numpy's too; None if it is none."""
    number = number_of(value)
    return number if isinstance(number, int) else None


def items_of(value: Any, most: int) -> list[Any]:
    """Return the items of a collection, so many at most; anything else as the only one."""
    if is_a(value, (str, bytes)):
        return [value]
    try:
        return list(islice(iter(value), most))
    except BaseException as error:
        if is_the_users(error):
            raise
        return [value]


def is_same(one: object, other: object) -> bool:
    """Tell whether two ids are the same. They are strings, but a double's may be anything."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    try:
        return bool(one == other)
    except BaseException as error:
        if is_the_users(error):
            raise
        return False
