"""Whether the garbage collector is what has called us."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable

__all__ = ["is_collecting"]


# Who collects at this moment. None of these is a function of ours: an interrupt that comes during a
# collection would be raised in it, and lost. Each is called with "start" or "stop", and with a
# dictionary that no other collection has.
_phases: OrderedDict[str, None] = OrderedDict(start=None, stop=None)  # the last phase is last
_latest: dict[str, object] = {}
_of_thread = threading.local()
_notes: list[Callable[..., object]] = [
    _phases.move_to_end,
    _latest.__setitem__,
    _of_thread.__setattr__,
]
gc.callbacks += _notes


def is_collecting() -> bool:
    """Tell whether the collector runs in this thread: then it has called us, by a finalizer.

    Nothing may be closed there and then. Nor may a context variable be set: until Python 3.11 the
    collector may be in the middle of setting another one, and the process crashes
    (test_collector.py).
    """
    try:
        if next(reversed(_phases)) == "stop":
            return False
    except RuntimeError:  # a collection has begun or ended between the two steps
        return is_collecting()
    return getattr(_of_thread, "start", None) is _latest["start"]
