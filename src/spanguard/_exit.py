"""The way out: what is open, closing it, and handing everything over in bounded time."""

from __future__ import annotations

import os
import threading

from spanguard import _mlflow, _registry
from spanguard._findings import contained, internal_error, settle
from spanguard._outcome import OK, ORPHANED
from spanguard._proxy import parse_status
from spanguard._registry import OpenSpan
from spanguard._site import user_site

__all__ = ["close_open_spans", "flush", "open_spans"]


def open_spans(older_than: float | None = None) -> list[OpenSpan]:
    """Return the spans that are open in this process, oldest first, whichever API opened them.

    Args:
        older_than: only spans open for longer than this many seconds.

    Spans opened before spanguard was first used in the process are not known to it.

    >>> import spanguard
    >>> spanguard.open_spans()
    []
    """
    reports = [entry.report() for entry in _registry.open_entries() if not entry.ended]
    return [span for span in reports if older_than is None or span.age > older_than]


def close_open_spans(status: str = "ERROR") -> int:
    """End every span that is open in this process, last opened first; return how many.

    In every thread, task and trace, also spans of the raw client and the fluent API. With ERROR
    they get the outcome `orphaned`, with the line that opened them. Meant for the end of a
    worker or a test; a span whose block is left later is not ended again.

    >>> import spanguard
    >>> spanguard.close_open_spans()
    0
    """
    code, _, finding = parse_status(status)
    closed = close_all("close_open_spans", is_error=code == "ERROR")
    if finding is not None:
        settle([finding], strict=None, raised=None, site=user_site(2))
    return closed


def close_all(orphaned_by: str, *, is_error: bool = True) -> int:
    """End every open span, last opened first: children start after their parents."""
    outcome = ORPHANED if is_error else OK
    closed = 0
    for entry in reversed(_registry.open_entries()):
        if _registry.close_orphan(entry, orphaned_by, outcome) is not None:
            closed += 1
    return closed


def flush(timeout: float = 30.0) -> bool:
    """Hand over what has ended to the store, and wait for it, at most `timeout` seconds.

    Returns:
        True when MLflow's queues are empty; False when the time was up or MLflow failed, and
        then the rest is still tried in the background. Never raises.

    >>> import spanguard
    >>> spanguard.flush(timeout=30)
    True
    """
    # A thread of its own: MLflow's flush knows no time limit, and with a dead server takes minutes.
    done: list[bool] = []
    thread = threading.Thread(target=_drain, args=(done,), name="spanguard-flush", daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(done)


def _drain(done: list[bool]) -> None:
    try:
        _mlflow.flush_everything()
        done.append(True)
    except Exception as error:
        internal_error("flushing", error)


# Whether the store did not keep up when it was last waited for.
_is_behind = False


def hand_over(seconds: float) -> None:
    """Put what has ended into MLflow's queue and wait for the store, at most so many seconds.

    A store that did not take it in time is not waited for again before it has caught up: one
    dead server must not cost every job of a worker the same seconds.
    """
    global _is_behind
    _mlflow.hand_over()
    _is_behind = not _mlflow.await_stored(0.0 if _is_behind else seconds)


# -- fork --------------------------------------------------------------------------------------

FORK_SECONDS = 2.0
"""How long a fork waits for MLflow's threads to have nothing left to do."""


def _before_fork() -> None:
    # A thread of MLflow's that holds a lock of its database driver in this moment would hold it
    # for ever in the child. Mostly nothing is pending, and nothing is waited for.
    with contained("preparing a fork"):
        if _mlflow.has_pending():
            _mlflow.hand_over()
            _mlflow.await_stored(FORK_SECONDS)


def _after_fork_in_child() -> None:
    global _is_behind
    _is_behind = False
    with contained("forgetting the parent's spans in a forked child"):
        _registry.forget_all()
    with contained("starting tracing afresh in a forked child"):
        _mlflow.start_afresh_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
