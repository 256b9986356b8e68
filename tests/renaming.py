"""Another MLflow: one of its names, or OpenTelemetry's, is not what it was."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

_AFTER = "_renamed"


def rename(path: str, patch: pytest.MonkeyPatch) -> None:
    """Rename what a seam's path names, with all code that uses it in the classes around it."""
    place, _, text = path.partition(" says ")
    module_name, _, names = place.partition(":")
    owner: Any = importlib.import_module(module_name)
    *outer, last = names.split(".")
    for name in outer:
        owner = getattr(owner, name)
    if text:
        _change_code(getattr(owner, last), lambda code: _with_constant(code, text), patch)
    elif isinstance(owner, ModuleType):
        patch.setattr(owner, last + _AFTER, getattr(owner, last), raising=False)
        patch.delattr(owner, last)
        for function in _functions_in(owner):
            patch.setattr(function, "__code__", _with_name(function.__code__, last))
    else:
        for base in owner.__mro__[:-1]:
            if last in vars(base):
                patch.setattr(base, last + _AFTER, vars(base)[last], raising=False)
                patch.delattr(base, last)
            patch.delitem(vars(base).get("__annotations__", {}), last, raising=False)
        _change_code(owner, lambda code: _with_name(code, last), patch)


def _change_code(
    owner: type, change: Callable[[CodeType], CodeType], patch: pytest.MonkeyPatch
) -> None:
    for base in owner.__mro__[:-1]:
        for function in _functions(vars(base).values()):
            changed = change(function.__code__)
            if changed is not function.__code__:
                patch.setattr(function, "__code__", changed)


def _functions_in(module: ModuleType) -> Iterator[FunctionType]:
    for member in list(vars(module).values()):
        if getattr(member, "__module__", None) == module.__name__:
            inside = vars(member).values() if isinstance(member, type) else [member]
            yield from _functions(inside)


def _functions(members: Any) -> Iterator[FunctionType]:
    for member in list(members):
        function = getattr(member, "fget", getattr(member, "__func__", member))
        function = getattr(function, "__wrapped__", function)
        if isinstance(function, FunctionType):
            yield function


def _with_name(code: CodeType, name: str) -> CodeType:
    inside = tuple(_with_name(c, name) if isinstance(c, CodeType) else c for c in code.co_consts)
    names = tuple(n + _AFTER if n == name else n for n in code.co_names)
    is_same = names == code.co_names and all(
        a is b for a, b in zip(inside, code.co_consts, strict=True)
    )
    return code if is_same else code.replace(co_names=names, co_consts=inside)


def _with_constant(code: CodeType, text: str) -> CodeType:
    def changed(constant: Any) -> Any:
        if isinstance(constant, CodeType):
            return _with_constant(constant, text)
        is_it = isinstance(constant, str) and text in constant
        return constant.replace(text, "Something else") if is_it else constant

    return code.replace(co_consts=tuple(map(changed, code.co_consts)))
