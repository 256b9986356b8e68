"""Functions of every kind, and those that decorators make of them."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import AsyncIterator, Iterator
from typing import Any

from tests.api.kinds.cases import cases_of
from tests.api.kinds.untraced import announced, bare_wrapt, undecorated, undecorated_coroutine

module = cases_of(__name__)
trace, case = module.trace, module.case


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


@trace
@bare_wrapt
def by_wrapt(a: int) -> int:
    return a


traced_in_place = trace(undecorated)
partial = trace(functools.partial(undecorated, b=5))
partial_of_traced = functools.partial(trace(undecorated), b=5)


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


module.uses |= {
    "cache_info": (lambda: (cached.cache_clear(), cached.cache_info()), None),
    "register": (lambda: sorted(k.__name__ for k in dispatched.registry), None),
    "attributes": (lambda: (setattr(function, "mark", 1), vars(function).pop("mark")), None),
    "a name twice": (lambda: same_name_twice(1, a=2), "same_name_twice"),
}
