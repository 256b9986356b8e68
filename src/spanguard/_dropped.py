"""What must not be done here and now, kept until it may: a queue without a lock.

The garbage collector runs finalizers in the middle of anything: also while this very thread holds
a lock of OpenTelemetry's that closing a span would wait for, for ever (issue 9, A1). So a
finalizer only puts its work aside. Whoever next opens, ends or flushes does it, or the exit.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from types import FrameType

from spanguard._findings import contained

__all__ = [
    "do_put_aside",
    "forget_put_aside",
    "is_anything_put_aside",
    "is_inside_tracing",
    "put_aside",
]

_put_aside: deque[Callable[[], object]] = deque()

# Takes work to be done later. Atomic, and safe in finalizers and in signal handlers.
put_aside = _put_aside.append

is_anything_put_aside = _put_aside.__len__


def do_put_aside() -> None:
    """Do what was put aside until now. What cannot be done yet puts itself aside again."""
    for _ in range(len(_put_aside)):
        try:
            work = _put_aside.popleft()
        except IndexError:  # another thread was quicker
            return
        with contained("closing what was dropped while open"):
            work()


# In a forked child: what was put aside is open in the parent, and the parent closes it.
forget_put_aside = _put_aside.clear


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
    """Tell whether we were called in the middle of MLflow or OpenTelemetry: by the collector."""
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
