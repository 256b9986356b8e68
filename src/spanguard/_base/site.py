"""Whose line is this: the innermost frame that belongs to the user."""

from __future__ import annotations

import functools
import linecache
import os
import re
import sys
import sysconfig
from types import CodeType, FrameType
from typing import NamedTuple, cast

__all__ = ["CalledFunction", "Site", "is_machinery", "is_of_library", "opener", "user_site"]


# Their frames stand between a user's line and the span it opens.
_MACHINERY = frozenset(
    {"contextlib", "mlflow", "openinference", "opentelemetry", "spanguard", "traceloop", "wrapt"}
)
# What of that a user calls to open a span by hand. The rest opens spans for users who did not
# ask: autologging, by the library that it watches.
_CALLED_BY_USERS = frozenset(
    {"contextlib", "mlflow", "opentelemetry", "spanguard", "wrapt"}
    | {"mlflow.entities", "mlflow.tracing", "mlflow.tracking", "mlflow.utils"}
    | {"opentelemetry.context", "opentelemetry.sdk", "opentelemetry.trace", "opentelemetry.util"}
)
# Code of ours that opens spans on its own account, as a user would.
_OURS_AS_USERS = frozenset({"spanguard.cli.demo"})

# What a module is, by its name: the user's, machinery, or machinery that opens spans unasked.
# Bounded by the modules there are.
_USERS, _MACHINE, _INSTRUMENTS = 0, 1, 2
_kinds: dict[str, int] = {}


class Site(NamedTuple):
    """A line of code, cheap to take and formatted only when somebody asks."""

    code: CodeType
    line: int

    def __str__(self) -> str:
        return f"{self.code.co_filename}:{self.line} in {self.code.co_name}"


def _classify(module: str) -> int:
    top, _, rest = module.partition(".")
    kind = _USERS
    if top in _MACHINERY and module not in _OURS_AS_USERS:
        second = f"{top}.{rest.partition('.')[0]}" if rest else top
        is_called = top == "spanguard" or second in _CALLED_BY_USERS
        kind = _MACHINE if is_called else _INSTRUMENTS
    _kinds[module] = kind
    return kind


def is_machinery(module: str) -> bool:
    """Tell whether a module, by its name, is none of the user's."""
    known = _kinds.get(module)
    return (_classify(module) if known is None else known) != _USERS


def user_site(depth: int = 1) -> Site:
    """Return the innermost line outside spanguard, MLflow, wrapt and contextlib."""
    return opener(depth + 1)[0]


def opener(depth: int = 1) -> tuple[Site, bool]:
    """Return the line that opens a span, and whether instrumentation does so on its behalf."""
    is_instrumented = False
    # sys._getframe: 0.2 µs, where inspect.stack() takes 500.
    try:
        outermost = frame = sys._getframe(depth)
    except ValueError:  # what a thread, atexit or C calls has so many frames above it and no more
        outermost = frame = sys._getframe()
    walker: FrameType | None = frame
    while walker is not None:
        module = walker.f_globals.get("__name__")
        kind = _kinds.get(module) if type(module) is str else _USERS
        if kind is None:
            kind = _classify(cast("str", module))
        if kind == _USERS:
            return Site(walker.f_code, walker.f_lineno), is_instrumented
        if kind == _INSTRUMENTS:
            is_instrumented = True
        outermost = walker
        walker = walker.f_back
    return Site(outermost.f_code, outermost.f_lineno), is_instrumented


def _is_of_machinery(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__")
    return type(module) is str and is_machinery(module)


# -- where a library calls a user's function ---------------------------------------------------

# They run what they are given on a strand of its own, or from a loop: what stands above them on
# the stack has not called it.
_RUNNERS = frozenset(
    {"asyncio", "concurrent", "multiprocessing", "socketserver", "threading", "wsgiref"}
    | {"anyio", "celery", "gevent", "trio", "twisted", "uvloop", "uvicorn", "gunicorn"}
)
_INSTALLED = re.compile(r"[\\/](?:site|dist)-packages[\\/]")
_STANDARD = os.path.dirname(os.__file__) + os.sep
_SCRIPTS = (sysconfig.get_path("scripts") or os.devnull) + os.sep

# A file's name -> the library it is of, "" for the user's own. Bounded by the files there are.
_libraries: dict[str, str] = {}


def _library_of(filename: str) -> str:
    library = _libraries.get(filename)
    if library is None:
        library = _libraries[filename] = _find_library(filename)
    return library


def _find_library(filename: str) -> str:
    installed = _INSTALLED.split(filename)
    if len(installed) > 1:
        path = installed[-1]
    elif filename.startswith(_STANDARD):
        path = filename.removeprefix(_STANDARD)
    elif filename.startswith(("<frozen ", _SCRIPTS)):
        return filename
    else:
        return ""
    return re.split(r"[\\/.]", path)[0]


def is_of_library(site: Site) -> bool:
    """Tell whether a line is of Python's own library or an installed package."""
    return _library_of(site.code.co_filename) != ""


class CalledFunction:
    """A function whose calls are spans: the user's own, whoever calls it.

    A task, a thread, a pool or a framework calls it from a line of a library. That line is the
    same for all that leaks there, and tells nobody anything (issue 9, 26).
    """

    __slots__ = ("_code", "_package")

    def __init__(self, function: object) -> None:
        self._code = _code_of(function)
        self._package = str(getattr(function, "__module__", "")).partition(".")[0]

    def site(self, innermost: Site) -> Site:
        """Return the line that called: the innermost one if that is the user's.

        Else the next line of the user's that has called, through libraries; else the function's
        own `def`.
        """
        if self._code is None or self._is_users(innermost.code):
            return innermost
        walker: FrameType | None = sys._getframe()
        while walker is not None:
            code = walker.f_code
            if not _is_of_machinery(walker):
                if self._is_users(code):
                    return Site(code, walker.f_lineno)
                if _library_of(code.co_filename) in _RUNNERS:
                    break
            walker = walker.f_back
        return _definition(self._code)

    def _is_users(self, code: CodeType) -> bool:
        library = _library_of(code.co_filename)
        return library == "" or library == self._package


def _code_of(function: object) -> CodeType | None:
    """Return the code of a function, under what is wrapped around it; None if it has none."""
    try:
        for _ in range(20):
            code = getattr(function, "__code__", None)
            if isinstance(code, CodeType):
                return code
            inner = getattr(function, "func", None) or getattr(function, "__func__", None)
            function = inner or type(function).__call__
    except Exception:  # noqa: BLE001 - an object that refuses to be looked at
        pass
    return None


@functools.lru_cache(maxsize=1_000)
def _definition(code: CodeType) -> Site:
    """Return the line of a function's `def`; its code begins at the first of its decorators."""
    named = re.compile(rf"\s*(?:async\s+)?def\s+{re.escape(code.co_name)}\b")
    first = code.co_firstlineno
    for line in range(first, first + 100):
        text = linecache.getline(code.co_filename, line)
        if not text:
            break
        if named.match(text):
            return Site(code, line)
    return Site(code, first)
