"""Looking for the seams: among what is imported at the first span, among all on request."""

from __future__ import annotations

import dis
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import CodeType, FunctionType

import mlflow

from spanguard._base.findings import contained, logger
from spanguard._mlflow.seam import Seam
from spanguard._mlflow.seams import SEAMS

__all__ = [
    "MISSING",
    "NOT_IN_THIS_VERSION",
    "OK",
    "flush_is_blind",
    "is_missing",
    "look_once",
    "state_of",
]


OK, MISSING, NOT_IN_THIS_VERSION = "ok", "missing", "not in this version"

_UNKNOWN = object()  # stands for a module that nobody has imported yet


def state_of(seam: Seam, *, importing: bool = True) -> str:
    """Look for a seam in the MLflow that is installed: OK, MISSING or NOT_IN_THIS_VERSION.

    Args:
        seam: what to look for.
        importing: import what it is in. Else a module that is not imported counts as in order:
            at run time a look must not cost anybody a store that they do not use.
    """
    if not _is_meant(seam, mlflow.__version__):
        return NOT_IN_THIS_VERSION
    return OK if _is_there(seam.path, importing) else MISSING


def missing_seams(seams: Iterable[Seam] = SEAMS, *, importing: bool = False) -> list[Seam]:
    """Return the seams that this MLflow should have and lacks."""
    return [seam for seam in seams if state_of(seam, importing=importing) == MISSING]


# -- at run time -------------------------------------------------------------------------------

_FOR_FLUSH = tuple(seam for seam in SEAMS if seam.flush_needs)

_has_looked = False
_missing: dict[str, Seam] = {}  # by path: what was found missing, and told of


def look_once() -> None:
    """Look for what is missing before the first span, and say so in one line of the log."""
    global _has_looked
    if not _has_looked:
        _has_looked = True
        with contained("looking for MLflow's seams"):
            _tell_of(missing_seams())


def is_missing(path: str) -> bool:
    """Tell whether a seam was missing when the first span was opened."""
    return path in _missing


def flush_is_blind() -> bool:
    """Tell whether MLflow lacks what tells of a trace that it is stored."""
    missing = missing_seams(_FOR_FLUSH)
    if missing:
        _tell_of(missing)
    return bool(missing)


def _tell_of(missing: list[Seam]) -> None:
    # In the log and no warning: it is no fault of the caller's, no line of theirs is to blame,
    # and with `-W error` a warning would be an exception.
    new = [seam for seam in missing if seam.path not in _missing]
    _missing.update((seam.path, seam) for seam in new)
    if new:
        logger.warning(
            "MLflow %s lacks what spanguard relies on: %s. The traced code runs on. `spanguard "
            "check` says more. Logged once.",
            mlflow.__version__,
            "; ".join(f"{seam.path} ({seam.without.removesuffix('.')})" for seam in new),
        )


# -- looking -----------------------------------------------------------------------------------


def _is_meant(seam: Seam, version: str) -> bool:
    minor = _minor(version)
    return _minor(seam.since) <= minor and (seam.until is None or minor <= _minor(seam.until))


def _minor(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (sys.maxsize, 0)  # unknown: the newest


def _is_there(path: str, importing: bool) -> bool:
    place, _, text = path.partition(" says ")
    module, _, names = place.partition(":")
    owner = _module(module, importing)
    if owner is _UNKNOWN or owner is None:
        return owner is _UNKNOWN
    *outer, last = names.split(".")
    for name in outer:
        owner = getattr(owner, name, None)
    if text:
        return _says(getattr(owner, last, None), text)
    return hasattr(owner, last) or (isinstance(owner, type) and _sets(owner, last))


def _module(name: str, importing: bool) -> object:
    """Return a module, None if there is none, `_UNKNOWN` if it is not to be imported."""
    if name in sys.modules:
        return sys.modules[name]
    try:
        if importing:
            return importlib.import_module(name)
        # To find one whose package is not there would import that.
        is_within_reach = name.rpartition(".")[0] in sys.modules
        return _UNKNOWN if not is_within_reach or importlib.util.find_spec(name) else None
    except Exception:  # noqa: BLE001 - a module may fail in any way while it is imported
        return None


def _sets(owner: type, name: str) -> bool:
    """Tell whether instances of a class have an attribute that the class itself has not."""
    return any(name in vars(base).get("__annotations__", ()) for base in owner.__mro__) or any(
        name in code.co_names and name in _stored_names(code) for code in _codes_of(owner)
    )


def _says(owner: object, text: str) -> bool:
    return isinstance(owner, type) and any(
        isinstance(constant, str) and text in constant
        for code in _codes_of(owner)
        for constant in _constants(code)
    )


def _codes_of(owner: type) -> Iterator[CodeType]:
    for base in owner.__mro__:
        for member in list(vars(base).values()):
            function = getattr(member, "fget", member)
            if isinstance(function, FunctionType):
                yield function.__code__


def _constants(code: CodeType) -> Iterator[object]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _constants(constant)
        else:
            yield constant


@lru_cache(maxsize=256)
def _stored_names(code: CodeType) -> frozenset[str]:
    return frozenset(
        step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"
    )
