"""Locks that threads of the parent held when it forked: the child must not wait for them.

A thread that holds a lock in the moment of a fork is not there in the child, and never lets go.
So the child does it in that thread's stead, before anything else of ours runs in it: of the
import system's locks, and of those of the packages that a span goes through on its way to the
store. Locks of the user's are left alone: only the user knows what they guard.
"""

from __future__ import annotations

import gc
import importlib
import sys
import threading
import time
from collections.abc import Iterable
from functools import cached_property
from types import CellType, FunctionType, ModuleType
from typing import Any

from spanguard._base.findings import contained

__all__ = ["before_fork", "let_go_below", "let_go_of"]


_Lock, _RLock = type(threading.Lock()), type(threading.RLock())


# -- the import system's -----------------------------------------------------------------------

# One lock for each module that is being imported, by name. Private; where a Python does it
# differently, it stays as Python leaves it after a fork.
_bootstrap: Any = getattr(importlib, "_bootstrap", None)


def _module_locks() -> list[tuple[str, Any]]:
    references = getattr(_bootstrap, "_module_locks", {})
    found = [(name, reference()) for name, reference in list(references.items())]
    return [(name, lock) for name, lock in found if hasattr(lock, "owner")]


def _let_go_of_imports() -> None:
    """Let the child import what threads of the parent were importing."""
    me = threading.get_ident()
    for name, lock in _module_locks():
        if lock.owner != me:
            _bootstrap._module_locks.pop(name, None)  # the next import makes a new one
        else:  # the child is inside this import itself; another thread waited for it
            let_go_of(lock.lock)
            let_go_of(lock.wakeup)
            lock.waiters = type(lock.waiters)()
    blocked: Any = getattr(_bootstrap, "_blocking_on", None)
    blocked = getattr(blocked, "data", blocked)  # Python 3.12 and later: a weak dictionary
    for thread in [other for other in blocked or () if other != me]:
        del blocked[thread]


def _named_in(module: Any) -> dict[str, object]:
    """Return what a module names, without loading one that is lazy."""
    if not issubclass(type(module), ModuleType):
        return {}
    named: dict[str, Any] = ModuleType.__getattribute__(module, "__dict__")
    return named


_not_waited_for: set[str] = set()


def _await_half_imported(deadline: float) -> None:
    """Wait until no other thread is half-way through a module: the child gets it as it is now.

    A module that does not get done in that time may be a program that never does: it is not
    waited for again.
    """
    while names := _half_imported() - _not_waited_for:
        if time.monotonic() > deadline:
            _not_waited_for.update(names)
            return
        time.sleep(0.001)


def _half_imported() -> set[str]:
    nobody_else = (None, threading.get_ident())
    others = [name for name, lock in _module_locks() if lock.owner not in nobody_else]
    specs = {name: _named_in(sys.modules.get(name)).get("__spec__") for name in others}
    return {name for name, spec in specs.items() if getattr(spec, "_initializing", False)}


# -- those of the packages that a span goes through --------------------------------------------

_PACKAGES = frozenset(
    {"alembic", "mlflow", "opentelemetry", "pydantic"}
    | {"requests", "spanguard", "sqlalchemy", "urllib3"}
    | {"_strptime", "asyncio", "tempfile"}  # of Python's own, which renews most of its own itself
)
_HOLDERS = _PACKAGES | {"functools", "queue", "threading"}

# How many steps a lock may be away: from what a module names, and from an object.
_STEPS_FROM_MODULE, _STEPS_FROM_OBJECT = 3, 6

_searched: set[str] = set()
_found: list[object] = []


def _search_new_modules() -> None:
    """Find the locks of modules that were imported since the last fork.

    In the parent, and once: a search takes 50 ms, and would copy in each child what it looks at.
    """
    named: list[object] = []
    for name, module in list(sys.modules.items()):
        if name in _searched:
            continue
        _searched.add(name)
        if _package(name) in _PACKAGES:
            named += _named_in(module).values()
        elif _CACHED_PROPERTIES_LOCK:
            named += _cached_properties(list(_named_in(module).values()))
    _found.extend(_locks_among(named, _STEPS_FROM_MODULE))


# Until Python 3.11 each has a lock, and any class of any library may be on a span's way.
_CACHED_PROPERTIES_LOCK = sys.version_info < (3, 12)


def _cached_properties(values: list[object]) -> list[object]:
    # Not by `isinstance`, which asks proxies what they stand for.
    classes = [value for value in values if issubclass(type(value), type)]
    held = (one for kind in classes for one in list(vars(kind).values()))
    return [one for one in held if type(one) is cached_property]


def _locks_among(values: Iterable[object], steps: int) -> list[object]:
    """Return the locks among values, and among what these hold, so many steps further on."""
    found: dict[int, object] = {}
    looked_at: set[int] = set()
    for _ in range(steps + 1):
        further: list[object] = []
        for value in values:
            kind = type(value)
            if kind is _Lock or kind is _RLock:
                found[id(value)] = value
            elif id(value) not in looked_at:
                held = _held_by(value, kind)
                if held:
                    looked_at.add(id(value))
                    further += held
        values = further
    return list(found.values())


def _held_by(value: Any, kind: type) -> Iterable[object] | None:
    """Return what an object keeps in itself, as far as it may be a lock or lead to one."""
    if kind is tuple or kind is CellType:
        return gc.get_referents(value)
    if kind is FunctionType:
        ours = _package(value.__globals__.get("__name__")) in _HOLDERS
        return value.__closure__ if ours else ()
    if issubclass(kind, type):
        return vars(value).values() if _package(value.__module__) in _PACKAGES else ()
    if _package(kind.__module__) not in _HOLDERS:
        return ()
    # Not by its attributes: they may run code, or be in slots.
    held: list[object] = []
    for one in gc.get_referents(value):
        held += one.values() if type(one) is dict else (one,)
    return [one for one in held if one is not kind]


def _package(module: object) -> str:
    return module.partition(".")[0] if type(module) is str else ""


def let_go_of(lock: Any) -> None:
    """In a forked child: make a lock free that a thread of the parent holds, or may hold."""
    kind = type(lock)
    if kind is _RLock:
        if not lock._is_owned():
            lock._at_fork_reinit()
    elif kind is _Lock and lock.locked():
        lock._at_fork_reinit()


def let_go_below(*values: object) -> None:
    """In a forked child: make the locks free that objects hold, and what they hold."""
    for lock in _locks_among(values, _STEPS_FROM_OBJECT):
        let_go_of(lock)


# -- fork --------------------------------------------------------------------------------------


def before_fork(deadline: float) -> None:
    """Get ready for a fork: let imports get done, and look where locks may be."""
    with contained("waiting for imports before a fork"):
        _await_half_imported(deadline)
    with contained("looking for locks before a fork"):
        _search_new_modules()


def start_afresh_in_child() -> None:
    """Let go, in a forked child, of each lock that a thread of the parent held."""
    with contained("letting go of the import system's locks in a forked child"):
        _let_go_of_imports()
    with contained("letting go of locks in a forked child"):
        for lock in _found:
            let_go_of(lock)
