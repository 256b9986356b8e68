"""The watchdog: tells of spans that stay open for too long, and where they were opened."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from spanguard._base.config import LONGEST_WAIT
from spanguard._base.findings import contained, logger, warn_once
from spanguard._base.settings import Mark, Setting, SettingBlock, context_settings, innermost
from spanguard._base.values import number_of
from spanguard._process import exit as _exit
from spanguard._process import registry
from spanguard._process.dropped import put_aside
from spanguard._process.registry import Entry
from spanguard._record.text import clean_text, safe_repr
from spanguard.exceptions import SpanOpenTooLongWarning

__all__ = ["watch"]


# It looks again when the next span is due, but waits at least this part of the limit: where
# spans become due one after another, they are told of together.
_MIN_PAUSE = 0.05

_SHOWN = 5


class Watchdog:
    """A daemon thread that sleeps until the oldest span that was not told of is due."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spanguard-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._pause()):
            with contained("looking for spans that are open too long"):
                if any(block.is_dropped for block in _blocks):
                    with _lock:
                        _start_or_stop()
                    continue
                _tell_of(_due(self.seconds), self.seconds)

    def _pause(self) -> float:
        # A span that is not open yet cannot be due before the whole limit has passed.
        now = time.monotonic()
        waiting = [entry.started for entry in registry.open_entries() if _is_news(entry)]
        due = min(waiting, default=now) + self.seconds - now
        return min(max(due, _MIN_PAUSE * self.seconds), threading.TIMEOUT_MAX)


_lock = threading.RLock()
_watchdog: Watchdog | None = None
# Spans that were opened until then have been told of, once and for all.
_told_until = -math.inf


def _is_news(entry: Entry) -> bool:
    return entry.started > _told_until and not entry.ended


def _due(seconds: float) -> list[Entry]:
    """Return the spans that are open for so long, each once in the life of the process."""
    global _told_until
    with _lock:
        until = time.monotonic() - seconds
        due = [e for e in registry.open_entries() if _is_news(e) and e.started <= until]
        _told_until = max(_told_until, until)
    return due


def _tell_of(due: Sequence[Entry], seconds: float) -> None:
    """Write one line to the log for all of them, and warn once per line that opened one."""
    if not due:
        return
    logger.warning(
        "%d spans are open for longer than %g s: %s%s.",
        len(due),
        seconds,
        "; ".join(str(entry.report()) for entry in due[:_SHOWN]),
        f"; and {len(due) - _SHOWN} more" if len(due) > _SHOWN else "",
    )
    for entry in due:
        text = (
            f"Span {entry.report()}, is open for longer than {seconds:g} s. End it where its "
            "work ends; open_spans(older_than=...) lists all that are open."
        )
        try:
            warn_once(text, SpanOpenTooLongWarning, entry.site)
        except Warning:  # `-W error`: nobody could catch it here, and the log has it
            pass


class WatchSetting(Setting):
    """What `watch()` returns: in force for the process, or a with-block."""

    _can_wait = False  # it starts and stops a thread

    def __init__(self, seconds: float | None) -> None:
        self.open_longer_than = seconds

    def _apply(self) -> None:
        global _process_setting
        with _lock:
            _process_setting = Mark(self, {"seconds": self.open_longer_than}, _process_setting)
            _start_or_stop()

    def _withdraw(self) -> None:
        global _process_setting
        with _lock:
            if _process_setting is not None:
                _process_setting = _process_setting.without(self)

    def _value(self) -> _Limit:
        return _Limit(self.open_longer_than, innermost(WatchSetting))

    def __enter__(self) -> WatchSetting:
        super().__enter__()
        with _lock:
            _blocks.append(self._blocks[-1])
            _start_or_stop()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        left = self._blocks[-1:]
        with _lock:
            _blocks[:] = [block for block in _blocks if block not in left]
            _start_or_stop()
        super().__exit__(exc_type, exc, traceback)  # last: an interrupt finds what is to be dropped

    def __del__(self) -> None:
        super().__del__()
        if self._blocks:  # dropped: whoever opens a span next looks at what is in force
            put_aside(_look_again)


def _look_again() -> None:
    with _lock:
        _start_or_stop()


class _Limit:
    """What a block puts in force: its limit, in place of that of the block around it."""

    __slots__ = ("outer", "seconds")

    def __init__(self, seconds: float | None, outer: _Limit | None) -> None:
        self.seconds = seconds
        self.outer = outer


_process_setting: Mark | None = None
_blocks: list[SettingBlock] = []  # entered and not left, in all threads and tasks


def _limit_in_force() -> float | None:
    """Return the shortest limit of the innermost blocks; the process's where there are none."""
    _blocks[:] = [block for block in _blocks if not block.is_dropped]
    if not _blocks:
        return _process_setting.values["seconds"] if _process_setting is not None else None
    outer = [id(block.value.outer) for block in _blocks]
    limits = [block.value.seconds for block in _blocks if id(block.value) not in outer]
    return min((limit for limit in limits if limit is not None), default=None)


def _start_or_stop() -> None:
    """Let one watchdog run, with the limit in force, or none. Call it with the lock held."""
    global _watchdog
    seconds = _limit_in_force()
    former = _watchdog
    if (former.seconds if former is not None else None) == seconds:
        return
    if former is not None:
        former.stop()
    _watchdog = None
    if seconds is not None:
        with contained("starting the watchdog"):
            _watchdog = Watchdog(seconds)


def watch(open_longer_than: float | None) -> WatchSetting:
    """Warn of every span of this process that is open for longer than so many seconds.

    Off by default. Spans of all threads and tasks are watched, whichever API opened them. Each
    is told of once: a line in the log of the logger `spanguard`, with the line of code that
    opened it, and a `SpanOpenTooLongWarning` at that line, once per line. The spans stay open.
    `watch(None)` turns it off. As a with-block it is in force for the length of the block; where
    several threads or tasks are in such blocks, the shortest of their limits is. A daemon
    thread sleeps until a span is due: it costs the spans nothing and never delays the exit. A
    forked child watches its own spans.

    Args:
        open_longer_than: seconds, or None.

    Raises:
        ValueError: not a positive number of seconds.

    >>> import spanguard
    >>> with spanguard.watch(open_longer_than=300.0):
    ...     pass
    """
    if open_longer_than is not None:
        seconds = number_of(open_longer_than)
        if seconds is None or not 0 < seconds < math.inf:
            raise ValueError(
                "open_longer_than must be a positive number of seconds, not "
                f"{clean_text(safe_repr(open_longer_than), 100)}"
            )
        open_longer_than = min(seconds, threading.TIMEOUT_MAX)
        with contained("starting to hear of spans"):
            _exit.listen()
        open_longer_than = min(open_longer_than, LONGEST_WAIT)
    setting = WatchSetting(open_longer_than)
    setting.called_from(sys._getframe(1))
    return setting


def start_afresh_in_child() -> None:
    """Give a forked child a watchdog of its own: threads do not survive a fork."""
    global _lock, _told_until, _watchdog
    _lock = threading.RLock()  # another thread of the parent may have held it
    _told_until = -math.inf
    # Blocks of the parent's other threads are nobody's to leave here.
    _blocks[:] = [block for block in _blocks if block in context_settings.get()]
    _watchdog = None
    _start_or_stop()
