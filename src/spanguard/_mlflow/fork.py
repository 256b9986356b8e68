"""A forked child: tracing of its own, that no lock of its parent's threads can stop."""

from __future__ import annotations

import atexit
import gc
import sys
import threading
import time
import weakref
from types import FrameType
from typing import Any, cast

from mlflow.tracing import provider as _provider_module
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider

from spanguard._base import locks
from spanguard._mlflow import exporting, provider, remote
from spanguard._mlflow.active import mode
from spanguard._mlflow.ledger import Ledger
from spanguard._mlflow.memory import trace_manager
from spanguard._mlflow.processor import batch_processor, pending_tasks
from spanguard._mlflow.provider import processors_of, provider_in_force
from spanguard._mlflow.remote import remote_holds

__all__ = [
    "has_pending",
    "let_go_of_span",
    "pause_stores",
    "resume_stores",
    "start_afresh_in_child",
]


def has_pending() -> bool:
    """Tell whether MLflow's threads have something to export. For a moment it may be both."""
    if provider.watched is None:
        return False
    tasks = pending_tasks()
    waiting = getattr(batch_processor(), "_queue", None)
    return bool(waiting or (tasks is not None and tasks.unfinished_tasks))


def start_afresh_in_child() -> None:
    """Give a forked child a tracing of its own, that no lock of the parent's threads can stop.

    Nothing of the parent's is called, flushed or joined here: the threads that would answer do
    not exist in the child. `mlflow.tracing.reset()` hangs there with exports pending.
    """
    provider.watched = provider.tracer = None
    exporting.ledger = Ledger()
    provider.watch_lock, remote.remote_lock = threading.RLock(), threading.RLock()
    remote_holds.clear()
    locks.let_go_below(provider_in_force(), provider.recorder)
    _leave_provider_behind()
    if trace_manager is not None:
        trace_manager._instance_lock = threading.RLock()
        trace_manager._instance = None
    mode.runtime.attach(Context())
    _leave_engines_behind()


def let_go_of_span(otel: object) -> None:
    """In a forked child: let code of the parent's write on a span that the parent has open."""
    for holder in (otel, *(getattr(otel, part, None) for part in _PARTS_OF_A_SPAN)):
        locks.let_go_of(getattr(holder, "_lock", None))


_PARTS_OF_A_SPAN = ("_attributes", "_events", "_links")


def _leave_provider_behind() -> None:
    wrapper: Any = _provider_module.provider
    old = provider_in_force()
    for processor in processors_of(old):
        queue = getattr(getattr(processor, "span_exporter", None), "_async_queue", None)
        if queue is not None:
            queue._is_active = False  # so its atexit callback has nothing to wait for
    if mode.isolated:
        handler = getattr(old, "_atexit_handler", None)
        if handler is not None:
            atexit.unregister(handler)
        wrapper._isolated_tracer_provider = None
    elif isinstance(old, TracerProvider):
        # The process's own provider stays; MLflow adds its processors to it again. 3.10 looks
        # for its own in the first place: ours are added after it.
        ours = (provider.listening, provider.follower)
        kept = [p for p in processors_of(old) if not hasattr(p, "span_exporter") and p not in ours]
        cast("Any", old._active_span_processor)._span_processors = tuple(kept)
    for flag in ("_isolated_tracer_provider_once", "_global_provider_init_once"):
        once = getattr(wrapper, flag, None)
        if once is not None:
            setattr(wrapper, flag, type(once)())
    registry: Any = sys.modules.get("mlflow.tracing.processor.base_mlflow")
    if hasattr(registry, "_batch_processor_registry"):
        registry._batch_processor_registry = weakref.WeakSet()
        registry._batch_processor_registry_lock = threading.Lock()


def _leave_engines_behind() -> None:
    """Let the child open connections of its own: SQLite's may not be used across a fork."""
    global _pausing
    _pausing = threading.RLock()
    while _gates:
        _gates.pop().open()
    for engine in _engines():
        locks.let_go_below(engine)
        engine.dispose(close=False)
    for store in _sql_stores():
        if hasattr(store, "_engine_map_lock"):
            store._engine_map_lock = threading.Lock()


def _engines() -> list[Any]:
    return [
        engine
        for store in _sql_stores()
        for engine in list((getattr(store, "_engine_map", None) or {}).values())
    ]


def _sql_stores() -> list[Any]:
    """Return the classes that have engines."""
    modules = [sys.modules.get(f"mlflow.store.{kind}.sqlalchemy_store") for kind in _STORES]
    return [store for store in (getattr(m, "SqlAlchemyStore", None) for m in modules) if store]


_STORES = ("tracking", "model_registry")


class _Gate:
    """Keeps a pool of connections shut: those that are out may come back, and none goes out."""

    def __init__(self, pool: Any, opens_by: float) -> None:
        self._pool = pool
        self._opens_by = opens_by
        self._forking = threading.get_ident()
        self._shut = threading.Lock()
        self._shut.acquire()

    def shut(self) -> None:
        self._pool._do_get = self

    def __call__(self) -> object:
        """Get a connection, as the pool does, when the gate is open again.

        Hooks of somebody else's that ask the store in the middle of a fork are not kept waiting;
        nor, for longer than a fork may take, is a thread that such a hook waits for.
        """
        seconds = self._opens_by - time.monotonic()
        is_kept_waiting = threading.get_ident() != self._forking and seconds > 0
        if is_kept_waiting and self._shut.acquire(timeout=seconds):
            self._shut.release()
        return type(self._pool)._do_get(self._pool)

    def await_empty(self) -> None:
        """Wait until nobody has a connection, and nobody who passed is about to get one."""
        while self._is_passed() or self._pool.checkedout():
            if time.monotonic() > self._opens_by:
                return
            time.sleep(0.001)

    def _is_passed(self) -> bool:
        getting = type(self._pool)._do_get.__code__
        for frame in _frames_of_all_threads():
            within: FrameType | None = frame
            while within is not None:
                if within.f_code is getting:
                    return True
                within = within.f_back
        return False

    def open(self) -> None:
        vars(self._pool).pop("_do_get", None)
        self._shut.release()


def _frames_of_all_threads() -> list[FrameType]:
    # The collector must not run in the middle of this: a finalizer that asks for them again
    # would wait for ever (Python 3.11).
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return list(sys._current_frames().values())
    finally:
        if was_enabled:
            gc.enable()


_gates: list[_Gate] = []
_pausing = threading.RLock()  # held by the thread that forks; two may do so at once


def pause_stores(deadline: float) -> None:
    """Before a fork: wait until no thread is inside SQLite, and let none in until it is over.

    What a thread has locked in SQLite stays locked in the child for ever, and SQLite takes the
    parent's locks on the file for the child's: that one hangs, or damages the database
    (test_fork_locks.py). What is not over by the deadline is not waited for.
    """
    engines = [engine for engine in _engines() if engine.dialect.name == "sqlite"]
    pools = [engine.pool for engine in engines if _can_be_shut(engine.pool)]
    if not pools or not _pausing.acquire(timeout=max(0.0, deadline - time.monotonic())):
        return
    if _gates:  # a hook that forks, in the middle of a fork
        return
    _gates.extend(_Gate(pool, deadline) for pool in pools)
    for gate in _gates:
        gate.shut()
    for gate in _gates:
        gate.await_empty()


def _can_be_shut(pool: object) -> bool:
    return hasattr(pool, "checkedout") and hasattr(pool, "_do_get")


def resume_stores() -> None:
    """In the parent, after a fork: let the other threads go on."""
    while _is_pausing():
        while _gates:
            _gates.pop().open()
        _pausing.release()


def _is_pausing() -> bool:
    """Tell whether it is this thread that pauses the stores."""
    return bool(cast("Any", _pausing)._is_owned())
