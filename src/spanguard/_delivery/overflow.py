"""What cannot wait in memory: it goes to disk, where there is a place for it, or is dropped."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Protocol

from opentelemetry.sdk.trace import ReadableSpan

from spanguard._base.findings import contained, logger
from spanguard._delivery.counts import Counts
from spanguard._delivery.spill import SpillFile
from spanguard._delivery.writer import Writer
from spanguard._mlflow.on_disk import open_trace_data
from spanguard._mlflow.outgoing import Destination, Outgoing
from spanguard._mlflow.reasons import reason_of

__all__ = ["Overflow"]


# A store that has taken nothing for so long is down: what waits for it goes to disk.
_DOWN_SECONDS = 1.0
_MAX_OPEN = 10_000
_TOO_MUCH = "more than max_pending_bytes waited for the store"


class Pending(Protocol):
    """What is pending in memory, and how much may be."""

    counts: Counts
    settings: Any

    @property
    def writers(self) -> list[Writer]: ...
    def writer_to(self, destination: Destination) -> Writer: ...


class Overflow:
    """Keeps what is pending in bounds."""

    def __init__(self, pending: Pending) -> None:
        self._pending = pending
        self._counts = pending.counts
        self._file: SpillFile | None = None
        self._noted: OrderedDict[str, set[str]] = OrderedDict()  # open traces: what is on disk
        self._has_told = False
        self._tending = threading.RLock()  # what one thread has in hand, the exit waits for

    @property
    def _spill(self) -> SpillFile | None:
        folder = self._pending.settings.spill
        if self._file is None and folder is not None:
            self._file = SpillFile(folder)
        return self._file

    @property
    def is_waiting(self) -> bool:
        """Tell whether something waits on disk."""
        return self._file is not None and self._file.is_waiting

    # -- now and then ----------------------------------------------------------------------------

    def tend(self) -> None:
        """Give up what is too much, and take back what can be stored again."""
        with self._tending:
            self._tend()

    def _tend(self) -> None:
        if self._spill is not None:
            for writer in self._pending.writers:
                if writer.is_down(_DOWN_SECONDS):
                    self._give_up(writer.oldest(None))
            self._take_back()
        limit = self._pending.settings.max_pending_bytes
        # On disk in good time: the store is slow, and memory is for what is quick.
        limit //= 1 if self._spill is None else 2
        while self._counts.bytes > limit:
            oldest = [item for writer in self._pending.writers for item in writer.oldest(1)]
            if not oldest:
                return
            self._give_up(oldest)

    def _take_back(self) -> None:
        spill = self._file
        if spill is None or not spill.is_waiting:
            return
        if any(writer.failing_since is not None for writer in self._pending.writers):
            return
        if all(writer.wants_more for writer in self._pending.writers):
            for item in spill.take(self._pending.settings.batch_traces):
                if item.trace is None:
                    self._counts.begin_part(item, item.size)
                else:
                    self._counts.unspill(item.trace_id, item.size)
                self._pending.writer_to(item.destination).put(item)

    def _give_up(self, items: Iterable[Outgoing]) -> None:
        """Put things on disk; drop them where that cannot be."""
        for item in items:
            reason = self._spilled(item)
            if item.trace is None:
                self._counts.end_part(item)
            if reason is not None:
                self._counts.drop(item.trace_id, reason)
                self._tell_once(reason)
            elif item.trace is not None:
                self._counts.spill(item.trace_id)

    def _spilled(self, item: Outgoing) -> str | None:
        """Put one thing on disk; return why not."""
        spill = self._spill
        if spill is None:
            return _TOO_MUCH
        try:
            if item.key in spill:
                spill.put_back(item.key)
            else:
                spill.write(item)
        except Exception as error:  # noqa: BLE001 - the disk, or a payload that is no JSON
            return f"it could not be put on disk: {reason_of(error)}"
        return None

    def _tell_once(self, reason: str) -> None:
        if not self._has_told:
            self._has_told = True
            logger.warning(
                "A trace was dropped: %s. delivery() counts them; deliver(spill=...) keeps them "
                "on disk. Logged once.",
                reason,
            )

    # -- durable ---------------------------------------------------------------------------------

    def put_on_disk(self, item: Outgoing) -> None:
        """Put on disk a trace that has ended and is on its way."""
        self._noted.pop(item.trace_id, None)
        if self._spill is not None:
            with contained("putting a trace on disk"):
                self._spill.write(item, is_durable=True, is_out=True)

    def note_open(self, destination: Destination, span: ReadableSpan) -> None:
        """Put on disk an ended span of a trace that goes on, and what is open above it."""
        if self._spill is None:
            return
        data = open_trace_data(destination, span, self._noted)
        while len(self._noted) > _MAX_OPEN:
            self._noted.popitem(last=False)
        if data is not None:
            self._spill.note(data)

    # -- the end ---------------------------------------------------------------------------------

    def forget(self, keys: list[str]) -> None:
        """Take note that things are stored, or refused."""
        if self._file is not None:
            with contained("taking note on disk of what is stored"):
                self._file.forget(keys)

    def close(self, *, give_up: bool) -> int:
        """Let go of the file; put on disk what is left, if it is given up. Returns how many."""
        with self._tending:
            if give_up and self._spill is not None:
                self._give_up([item for writer in self._pending.writers for item in writer.stop()])
            if self._file is not None and not self._file.is_waiting:
                self._file.close()
            return self._counts.spilled if give_up else 0
