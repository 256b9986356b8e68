"""One generator's span, step by step: whichever task or thread takes the next one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from spanguard._base.findings import contained
from spanguard._process.bodies import BodyContext
from spanguard._record.items import Items
from spanguard._record.outcome import ABANDONED, CLOSED_EARLY, Outcome

__all__ = ["Drive", "Recorder", "Turn"]


class Scope(Protocol):
    """What is open while a generator's body runs: its span, or an attached trace context."""

    def finish(self, raised: BaseException | None) -> None: ...

    def finish_as(self, outcome: Outcome) -> None: ...


class Recorder:
    """How a generator's span is opened, and what is recorded of its items."""

    __slots__ = ("_items", "_open", "_write")

    def __init__(
        self,
        open_: Callable[[], Scope],
        items: Items | None = None,
        write: Callable[[Any, Items], None] | None = None,
    ) -> None:
        self._open: Callable[[], Scope] | None = open_
        self._items = items
        self._write = write

    def open(self) -> Scope:
        """Open the span. It is let go of how: that holds the arguments of the call."""
        open_, self._open = self._open, None
        assert open_ is not None, "a span is opened once"
        return open_()

    def keep(self, item: object) -> None:
        """Take of an item what is to be recorded."""
        if self._items is not None:
            with contained("recording an item of a generator"):
                self._items.take(item)

    def write(self, scope: Scope) -> None:
        items, self._items = self._items, None
        if items is not None and self._write is not None:
            with contained("recording the items of a generator"):
                self._write(scope, items)


# How long a step waits for another thread that is opening or ending the span of the generator.
_CONCURRENT_STEP_SECONDS = 1.0


class Turn:
    """One call's claim on the generator: a `next`, `send`, `throw` or `close` from end to end."""

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread = threading.get_ident()


class Drive:
    """The state of one traced generator, sync or async: its span, and its body's context."""

    __slots__ = ("__weakref__", "_turns", "body", "done", "iterated", "recorder", "scope")

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.body = BodyContext()
        self.scope: Scope | None = None
        self.iterated = False
        self.done = False
        self._turns: dict[str, Turn] = {}

    def take(self, turn: Turn, is_running: Callable[[], bool]) -> bool:
        """Take a turn; False where it is another call's: then nothing here is to be touched.

        Python lets one call at a time into a generator, and says so itself to all others. Only
        what we do before and after, which it does not know of, is waited for (issue 9, 23).
        """
        deadline: float | None = None
        # Atomic without a lock, and undone by `give_back` wherever an interrupt strikes.
        while (holder := self._turns.setdefault("now", turn)) is not turn:
            if holder.thread == turn.thread or is_running():
                return False
            now = time.monotonic()
            deadline = deadline or now + _CONCURRENT_STEP_SECONDS
            if now > deadline:
                return False
            time.sleep(0)
        return True

    def give_back(self, turn: Turn) -> None:
        """End a turn; nothing, if it never was this call's."""
        if self._turns.get("now") is turn:
            del self._turns["now"]

    @property
    def has_begun(self) -> bool:
        return self.scope is not None or self.done

    @property
    def is_open(self) -> bool:
        return self.scope is not None and not self.done

    def begin(self) -> None:
        """Open the span at the first step, inside the body's context."""
        if self.scope is None and not self.done:
            self.scope = self.recorder.open()

    def finish(self, raised: BaseException | None, outcome: Outcome | None = None) -> None:
        """Close the span. Called inside the body's context."""
        scope = self.scope
        self.body.work.is_over = True
        if self.done or scope is None:
            self.done = True
            return
        self.done = True
        self.recorder.write(scope)
        if outcome is None:
            scope.finish(raised)
        else:
            scope.finish_as(outcome)

    def finish_unless(self, is_suspended: bool, raised: BaseException) -> None:
        """Close the span for what a step raised, unless the body did not raise it and goes on.

        It does where Python itself refused the call: `throw` of what is no exception.
        """
        if self.scope is None or not is_suspended:
            self.finish(raised)

    def dropped_as(self) -> Outcome:
        """Tell what it means that nobody holds the generator any more.

        A loop that was left by `break` drops it: closed early. One that was stepped by hand and
        forgotten is abandoned.
        """
        return CLOSED_EARLY if self.iterated else ABANDONED
