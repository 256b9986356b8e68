"""How the callables of a module are called, and what is recorded of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from spanguard import traced


class Case(NamedTuple):
    """A callable, how to call it, and what is recorded of the call."""

    get: Callable[[], Any]
    args: tuple[Any, ...]
    span: str
    inputs: dict[str, Any]
    kwargs: dict[str, Any] = {}  # noqa: RUF012


class Cases:
    """The callables of one module: how each is called, and what else is done with them."""

    def __init__(self, module: str) -> None:
        self.is_traced = module == "tests.api.traced_callables"
        self.cases: dict[str, Case] = {}
        # What is done; and the span of it, if it is one of a function that is traced.
        self.uses: dict[str, tuple[Callable[[], Any], str | None]] = {}

    def trace(self, function: Any, **options: Any) -> Any:
        """Trace a callable, in the module of the traced ones; leave it alone in the other."""
        return traced(**options)(function) if self.is_traced else function

    def case(
        self, kind: str, get: Callable[[], Any], /, *args: Any, span: str, **inputs: Any
    ) -> None:
        self.cases[kind] = Case(get, args, span, inputs)


@functools.cache
def cases_of(module: str) -> Cases:
    return Cases(module)
