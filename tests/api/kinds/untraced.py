"""What is not traced itself: plain callables, and decorators as libraries have them."""

from __future__ import annotations

import functools
from typing import Any

import wrapt


def announced(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def unannounced(function: Any) -> Any:
    return lambda *args: function(*args)


@wrapt.decorator
def bare_wrapt(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs)


@wrapt.decorator
def tells_instance(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return type(instance).__name__, wrapped(*args, **kwargs)


def undecorated(a: int, b: int = 2) -> int:
    return a + b


async def undecorated_coroutine(a: int) -> int:
    return a


class Adder:
    """Add."""

    def __init__(self, b: int) -> None:
        self.b = b

    def __call__(self, a: int) -> int:
        return a + self.b

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adder) and self.b == other.b

    __hash__ = None  # type: ignore[assignment]
