"""What must not be done here and now, kept until it may: a queue without a lock.

The garbage collector runs finalizers in the middle of anything: also while this very thread holds
a lock of OpenTelemetry's that closing a span would wait for, for ever (issue 9, A1). So a
finalizer only puts its work aside. Its thread does it when it next opens or ends a span; or who
flushes, or the exit.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType

from spanguard._base.collector import is_collecting
from spanguard._base.findings import contained

__all__ = [
    "all_put_aside",
    "do_put_aside",
    "forget_put_aside",
    "is_inside_tracing",
    "is_put_aside",
    "put_aside",
]


Work = Callable[[], object]

# By the thread that is to do it: another one that ends a root while its thread opens a child
# would cost the trace (test_collector.py). None of a dictionary's steps here takes a lock.
all_put_aside: dict[threading.Thread, deque[Work]] = {}


def put_aside(work: Work, thread: threading.Thread | None = None) -> None:
    """Keep work until the thread that it is of opens, ends or flushes; this one, if not named.

    It may be done twice: what is put aside sees for itself whether it is done.
    """
    whose = threading.current_thread() if thread is None else thread
    while True:
        queue = all_put_aside.setdefault(whose, deque())
        queue.append(work)
        if all_put_aside.get(whose) is queue:
            return  # else it was taken in this very moment, and perhaps before the work was in it


def is_put_aside(work: Work, thread: threading.Thread | None) -> bool:
    """Keep work for its thread if it is the collector that asks for it here; tell whether it is."""
    if not is_collecting():
        return False
    put_aside(work, thread)
    return True


def do_put_aside(*, of_all: bool = False) -> None:
    """Do what was put aside until now: by this thread and by those that are over, or by all.

    What cannot be done yet puts itself aside again.
    """
    here = threading.current_thread()
    for thread in list(all_put_aside):
        if of_all or thread is here or _is_over(thread):
            for work in list(all_put_aside.pop(thread, ())):
                with contained("closing what was dropped while open"):
                    work()


def _is_over(thread: threading.Thread) -> bool:
    # Not by sys._current_frames(): the collector may run in the middle of it, and who asks it
    # again there waits for ever, or crashes the process (Python 3.11, test_collector.py).
    try:
        return not thread.is_alive()
    except (AssertionError, RuntimeError):  # a thread that Python did not start, after a fork
        return True


# In a forked child: what was put aside is open in the parent, and the parent closes it.
forget_put_aside = all_put_aside.clear

# Modules that hold locks while code of theirs runs. Those that call the user's code (MLflow's
# fluent API) hold none meanwhile; nor do we.
_MAY_HOLD_LOCKS = (
    "logging",
    "mlflow.entities.",
    "mlflow.tracing.export.",
    "mlflow.tracing.processor.",
    "mlflow.tracing.trace_manager",
    "opentelemetry.",
    "queue",
    "threading",
)


def is_inside_tracing() -> bool:
    """Tell whether we were called by the collector, or in the middle of MLflow's work."""
    if is_collecting():
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__")
        # The thread's own frames at the bottom of the stack are no work of threading's.
        is_bottom = module == "threading" and frame.f_code.co_name in _BOTTOM
        if not is_bottom and isinstance(module, str) and module.startswith(_MAY_HOLD_LOCKS):
            return True
        frame = frame.f_back
    return False


_BOTTOM = frozenset({"_bootstrap", "_bootstrap_inner", "run"})
