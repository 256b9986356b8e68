"""Signals that end the process: close and store first, then let what was there before decide."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType

from spanguard._base.config import current_limits
from spanguard._base.findings import contained, internal_error, settle
from spanguard._base.site import user_site
from spanguard._base.values import items_of, whole_number_of
from spanguard._process import flush, reports
from spanguard._record.text import clean_text, safe_repr
from spanguard.exceptions import InvalidSpanArgumentError

__all__ = ["install_signal_handlers"]


# How long the interrupted code may hold a lock that closing needs before it gets to go on.
_LOCKED_SECONDS = 1.0


def install_signal_handlers(signals: Iterable[int] = (signal.SIGTERM,)) -> bool:
    """On each of the signals: close open spans as ERROR, store, then do what was done before.

    The spans get the outcome `orphaned`, by the name of the signal. The store is waited for as
    long as `limits(exit_seconds=...)` says. Then the handler that was installed before is called
    or, where there was none, the signal's default action is taken: the exit code stays right.
    Calling it twice changes nothing. A signal that is ignored stays ignored. A server that
    installs handlers of its own afterwards (uvicorn, gunicorn, Celery) is in charge, and hands
    the signal on or not.

    Returns:
        True when every signal is handled now. False, with a warning, when one is not: only the
        main thread may install handlers, and some signals cannot be handled.

    >>> import spanguard
    >>> spanguard.install_signal_handlers()
    True
    """
    refused = [number for number in items_of(signals, _MOST) if not _install(number)]
    if refused:
        finding = InvalidSpanArgumentError(
            f"No handler was installed for {', '.join(map(_name, refused))}. Call "
            "install_signal_handlers in the main thread, with signals that can be handled."
        )
        settle([finding], strict=None, raised=None, site=user_site(2))
    return not refused


_MOST = 1_000  # of an iterable that may have no end


def _name(given: object) -> str:
    number = whole_number_of(given)
    try:
        return signal.Signals(number or 0).name
    except ValueError:
        return f"signal {clean_text(safe_repr(given), 100)}"


def _install(given: object) -> bool:
    number = whole_number_of(given)
    if number is None or threading.current_thread() is not threading.main_thread():
        return False
    try:
        before = signal.getsignal(number)
        if isinstance(before, _Handler) or before is signal.SIG_IGN:
            return True
        if before is None:  # installed by foreign code that is not Python: not ours to replace
            return False
        signal.signal(number, _Handler(number, before))
        return True
    except (OSError, OverflowError, ValueError, TypeError):
        return False


class _Handler:
    """Handles one signal: once it has closed and stored, it hands on to what was there before."""

    def __init__(self, number: int, before: object) -> None:
        self._number = number
        self._before = before
        self._closing: threading.Thread | None = None
        self._has_closed = threading.Event()
        self._raise_again = False
        self._turn = threading.RLock()  # the next signal may come in the middle of a handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        closing = self._closing
        if closing is None:
            closing = self._start_closing()
        if closing is not None:
            # The code that the signal interrupted may hold a lock that closing needs, and goes
            # on only when this handler returns. Then the signal is raised again when all is done.
            closing.join(_LOCKED_SECONDS)
            with self._turn:
                if not self._has_closed.is_set():
                    self._raise_again = True
                    return
            closing.join(current_limits().exit_seconds + _LOCKED_SECONDS)
        self._closing = None
        self._hand_on(frame)

    def _start_closing(self) -> threading.Thread | None:
        self._has_closed = threading.Event()
        self._raise_again = False
        thread = threading.Thread(target=self._close, name="spanguard-signal", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the interpreter is on its way out: atexit closes
            internal_error("handling a signal", error)
            return None
        self._closing = thread
        return thread

    def _close(self) -> None:
        with contained("closing spans on a signal"):
            reports.close_all(_name(self._number))
        with self._turn:
            self._has_closed.set()
            raise_again = self._raise_again
        flush.store_or_say(current_limits().exit_seconds)
        if raise_again:
            os.kill(os.getpid(), self._number)

    def start_afresh(self) -> None:
        """In a forked child: be as if no signal had come. The threads that closed are not here."""
        self._closing = None
        self._turn = threading.RLock()

    def _hand_on(self, frame: FrameType | None) -> None:
        if callable(self._before):
            self._before(self._number, frame)
            return
        signal.signal(self._number, signal.SIG_DFL)
        os.kill(os.getpid(), self._number)


def start_afresh_in_child() -> None:
    """Let no handler of ours in a forked child wait for a thread of the parent."""
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if isinstance(handler, _Handler):
            handler.start_afresh()
