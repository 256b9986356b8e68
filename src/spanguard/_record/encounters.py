"""Which exceptions a trace has met, and in which of its spans.

An exception is recorded once on each span that it passes through, with its stack trace on the
innermost of each trace. So what passes is told apart from what has passed before: as an object,
since equal exceptions are different ones.

Nothing is written on the exception, which is the user's and crosses pickles. Its `id()` is soon
another exception's. A reference to it would keep the frames of its traceback alive, with all the
files, tensors and open generators in them, for as long as the trace is open. What is kept stands
for one exception alone and holds no frame: a weak reference; or, as builtin exceptions take none,
the exception's `__dict__`, since no other object has that very dict for as long as we hold it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

__all__ = ["Encounters", "Meets", "meet"]


# Of each trace the last so many: it matters what passes through the spans that are open now.
_MAX_REMEMBERED = 128

Encounters = deque[tuple[object, int]]
"""What stands for an exception, and the id of the span that has met it."""


class _Place(Protocol):
    """A span in the registry, as far as it is needed here."""

    span_id: int
    met: Encounters | None

    @property
    def parent(self) -> _Place | None: ...


Meets = _Place | None


def meet(place: Meets, raised: BaseException) -> set[int]:
    """Note that a span meets an exception; return the spans of its trace that have met it before.

    Without a place nothing is known, and nothing noted.
    """
    if place is None:
        return set()
    top = place
    while top.parent is not None:
        top = top.parent
    if top.met is None:
        top.met = deque(maxlen=_MAX_REMEMBERED)
    token = _token(raised)
    before = {span_id for known, span_id in top.met.copy() if known is token}
    top.met.append((token, place.span_id))
    return before


# Not vars(): the exception's class may have its own idea of `__dict__`.
_dict_of: Callable[[BaseException], object] = vars(BaseException)["__dict__"].__get__


def _token(raised: BaseException) -> object:
    """Return what is the same object for the same exception, and for no other."""
    try:
        return weakref.ref(raised)  # without a callback there is but one of each object
    except TypeError:
        return _dict_of(raised)
