"""The way out: what is open, closing it, and handing everything over in bounded time."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from spanguard import _mlflow
from spanguard._base import locks
from spanguard._base.config import current_limits, waiting_time
from spanguard._base.findings import (
    contained,
    hold_back_the_users,
    internal_error,
    logger,
    settle,
)
from spanguard._base.site import user_site
from spanguard._base.values import kind_name, number_of
from spanguard._lifecycle.proxy import parse_status
from spanguard._process import outliving
from spanguard._process import registry as _registry
from spanguard._process.dropped import do_put_aside
from spanguard._process.registry import OpenSpan
from spanguard._record.outcome import OK, ORPHANED
from spanguard.exceptions import InvalidSpanArgumentError, SpanguardError, TraceLostError

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
    do_put_aside(of_all=True)
    reports = [entry.report() for entry in _registry.open_entries() if entry.is_open]
    if older_than is None:
        return reports
    seconds = number_of(older_than)
    if seconds is None:
        finding = InvalidSpanArgumentError(
            f"older_than of open_spans() is a {kind_name(older_than)} that is no number; all open "
            "spans were returned. Pass a number of seconds, or None."
        )
        settle([finding], strict=None, raised=None, site=user_site(2))
        return reports
    return [span for span in reports if span.age > seconds]


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
    with contained("looking for spans that were not heard of"):
        _hear_of_all()
    closed = close_all("close_open_spans", is_error=code == "ERROR")
    if finding is not None:
        settle([finding], strict=None, raised=None, site=user_site(2))
    return closed


def close_all(
    orphaned_by: str, *, is_error: bool = True, raised: BaseException | None = None
) -> int:
    """End every open span, last opened first: children start after their parents."""
    do_put_aside(of_all=True)
    outcome = ORPHANED if is_error else OK
    closed = 0
    for entry in reversed(_registry.open_entries()):
        if _registry.close_orphan(entry, orphaned_by, outcome, raised) is not None:
            closed += 1
    return closed


def _hear_of_all() -> None:
    """Take note of what was opened before we listened, or whose start was interrupted."""
    for span in _mlflow.all_open_spans():
        if _registry.entry_of(_mlflow.otel_span(span)) is None:
            _registry.hear_of(span.trace_id)


def flush(timeout: float | None = 30.0) -> bool:
    """Hand over what has ended to the store, and wait for it, at most `timeout` seconds.

    Args:
        timeout: seconds; None, or infinity, is as long as it takes.

    Returns:
        True only if every trace that ended before is in the store. False when the time was up,
        and the rest is still tried in the background; or when the store did not take a trace,
        or one could not be started. Then a warning says how many, and MLflow's reason. Each
        loss is told of once, and the answer stays False until the store has taken another
        trace. A trace whose loss was told of at its end, by a `TraceLostWarning`, is not told
        of again. Never raises.

    >>> import spanguard
    >>> spanguard.flush(timeout=30)
    True
    """
    seconds = waiting_time(timeout)
    findings: list[SpanguardError] = []
    if seconds is None:
        findings.append(
            InvalidSpanArgumentError(
                f"The timeout of flush() is a {kind_name(timeout)} that is no number; 30 "
                "seconds were waited at most. Pass a number of seconds, or None."
            )
        )
    do_put_aside(of_all=True)
    deadline = time.monotonic() + (30.0 if seconds is None else seconds)
    delivery = _deliver_all_by(deadline)
    if delivery.complaint is not None:
        findings.append(TraceLostError(delivery.complaint))
    # Never an error: what became of traces is no broken rule of the caller's.
    settle(findings, strict=False, raised=None, site=user_site(2))
    return delivery.is_stored


def store_or_say(seconds: float) -> None:
    """Do what `flush` does where no line of the user's could be warned at: the log says it."""
    complaint = _deliver(seconds).complaint
    if complaint is not None:
        logger.warning("%s", complaint)


@dataclass(frozen=True)
class Delivery:
    """Whether everything that had ended is stored; if not, what to say about it, once."""

    is_stored: bool
    complaint: str | None = None


def _deliver_all_by(deadline: float) -> Delivery:
    """Wait for roots that wait for what runs on under them, and deliver."""
    if outliving.await_descendants(deadline - time.monotonic()):
        return _deliver(max(deadline - time.monotonic(), 0.0))
    with contained("handing over"):
        _is_handed_over(time.monotonic())
    return Delivery(False, outliving.what_is_waited_for())


def _deliver(seconds: float) -> Delivery:
    """Hand over what has ended, wait for the store, and look at what became of it."""
    deadline = time.monotonic() + seconds
    ledger = _mlflow.ledger
    ended = ledger.on_their_way()
    if not _has_arrived(deadline):
        missing = ledger.still(ended)
        return Delivery(
            False,
            f"The store has not taken all spans in {seconds:g} seconds"
            + (f"; {missing} traces are still on their way" if missing else "")
            + ". MLflow goes on trying in the background: call flush() again, with more time.",
        )
    loss = ledger.settle(ended, _mlflow.GONE)
    if not loss:
        return Delivery(ledger.has_recovered())
    return Delivery(
        False,
        f"{loss.traces} traces are not in the store, or not whole: {loss.reason}. See the log of "
        "MLflow, and the tracking URI and the store behind it.",
    )


def _has_arrived(deadline: float) -> bool:
    with contained("waiting for the store"):
        return _is_handed_over(deadline) and _mlflow.await_stored(deadline - time.monotonic())
    return False


def _is_handed_over(deadline: float) -> bool:
    return _mlflow.exports_in_place() or _handing_over.ask(deadline - time.monotonic())


class _HandingOver:
    """Hands over in a thread of its own, which is one however many wait and however long it takes.

    A turn serves all who asked before it began: who asks in the middle of one gets the next.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._asked = self._tried = self._done = 0
        self._is_running = False

    def ask(self, seconds: float) -> bool:
        """Wait for a turn that begins now or later, at most so long; tell whether it succeeded."""
        with self._turn:
            self._asked += 1
            mine = self._asked
            if not self._is_running:
                self._is_running = self._start()
            self._turn.wait_for(lambda: self._tried >= mine, max(seconds, 0.0))
            return self._done >= mine

    def _start(self) -> bool:
        thread = threading.Thread(target=self._run, name="spanguard-handing-over", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # Python 3.12.1 starts no threads any more at exit
            self._try(self._asked)
            return False
        return True

    def _run(self) -> None:
        while True:
            with self._turn:
                number = self._asked
                if self._tried >= number:
                    self._is_running = False
                    return
            self._try(number)

    def _try(self, number: int) -> None:
        is_done = False
        try:
            _mlflow.hand_over_everything()
            is_done = True
        except Exception as error:
            with suppress(Exception):  # our own test suite has it raised again
                internal_error("handing over", error, quoted=True)
        with self._turn:
            self._tried = number
            if is_done:
                self._done = number
            self._turn.notify_all()


_handing_over = _HandingOver()


def _bounded(work: Callable[[], object], seconds: float, doing: str) -> bool:
    """Do what knows no time limit in a thread of its own; tell whether it was done in time."""
    done: list[bool] = []

    def run() -> None:
        with contained(doing):
            work()
            done.append(True)

    thread = threading.Thread(target=run, name=f"spanguard-{doing}", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # Python 3.12.1 starts no threads any more at exit
        run()
    else:
        thread.join(max(seconds, 0.0))
    return bool(done)


# Whether the store did not keep up when it was last waited for.
_is_behind = False


def hand_over(seconds: float) -> None:
    """Put what has ended into MLflow's queue and wait for the store, at most so many seconds.

    A store that did not take it in time is not waited for again before it has caught up: one
    dead server must not cost every job of a worker the same seconds.
    """
    global _is_behind
    deadline = time.monotonic() + seconds
    is_stored = _is_handed_over(deadline) and _mlflow.await_stored(
        0.0 if _is_behind else deadline - time.monotonic()
    )
    _is_behind = not is_stored


# -- the end of the process --------------------------------------------------------------------


def listen() -> None:
    """Hear of every span from here on, and be there when the process ends."""
    if _registry.watch():
        # Anew for each provider: the hook that is registered last runs first, and MLflow's
        # own, which waits for its queue, must come after the spans are closed.
        atexit.unregister(_at_exit)
        atexit.register(_at_exit)
        _mlflow.hear_of_swallowed(hold_back_the_users)
        with contained("starting MLflow's export threads"):
            _mlflow.start_export_threads()
        _be_there_before_threads_are_joined()
        _be_there_in_a_multiprocessing_child()
        _be_there_in_a_billiard_child()
        _be_there_when_a_thread_fails()


_is_there_before_threads_are_joined = False


def _be_there_before_threads_are_joined() -> None:
    global _is_there_before_threads_are_joined
    # Private in threading, and used by concurrent.futures itself; without it the exit waits
    # for a dead server as long as MLflow retries.
    register = getattr(threading, "_register_atexit", None)
    if register is not None and not _is_there_before_threads_are_joined:
        _is_there_before_threads_are_joined = True
        try:
            register(_before_threads_are_joined)
        except RuntimeError:  # the main thread has ended: that moment has passed (test_exit.py)
            _before_threads_are_joined()


def _before_threads_are_joined() -> None:
    with contained("preparing the end of the process"):
        _mlflow.do_not_join_workers()


def _be_there_in_a_multiprocessing_child() -> None:
    # A child of multiprocessing leaves by os._exit, past every atexit hook.
    module = sys.modules.get("multiprocessing.process")
    if module is not None and module.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, _at_exit, exitpriority=-100)


def _be_there_in_a_billiard_child() -> None:
    # Celery's own multiprocessing. What its pool forks leaves by os._exit past the finalizers
    # too, when it has done its number of tasks; but it tells before it does (test_exit.py).
    module = sys.modules.get("billiard.process")
    process: Any = module.current_process() if module is not None else None
    if getattr(process, "_parent_pid", None) is None:
        return
    worker: Any = getattr(process, "_target", None)
    if not hasattr(worker, "on_exit"):
        from billiard.util import Finalize  # pyright: ignore[reportMissingImports]

        Finalize(None, _at_exit, exitpriority=-100)
    elif not isinstance(worker.on_exit, _AfterAll):
        worker.on_exit = _AfterAll(worker.on_exit)


class _AfterAll:
    """Stores what has ended when all others have been told that a worker leaves."""

    def __init__(self, before: Callable[..., object] | None) -> None:
        self._before = before

    def __call__(self, *arguments: Any) -> None:
        try:
            if self._before is not None:
                self._before(*arguments)
        finally:
            _at_exit()


_threads_hook_before: Callable[[Any], object] | None = None


def _be_there_when_a_thread_fails() -> None:
    global _threads_hook_before
    if _threads_hook_before is None:
        _threads_hook_before = threading.excepthook
        threading.excepthook = _on_failed_thread


def _on_failed_thread(args: Any) -> None:
    with contained("noting the exception that ended a thread"):
        if args.exc_value is not None and args.thread is not None:
            _registry.note_failure(args.thread, args.exc_value)
    if _threads_hook_before is not None:
        _threads_hook_before(args)


def _at_exit() -> None:
    close_and_flush("exit", current_limits().exit_seconds, _unhandled())
    with contained("preparing for spans of later exit hooks"):
        # Hooks that were registered before ours still run. MLflow's own would shut tracing down
        # for them, and has nothing left to store.
        _mlflow.let_go_at_exit()
        _mlflow.at_end_of_trace = _deliver_now


def _deliver_now() -> None:
    """Store what has just ended: no hook of ours or of MLflow's will run any more."""
    with contained("storing a trace at the very end"):
        hand_over(current_limits().exit_seconds)


def _at_the_very_end() -> None:
    """Do the same where the first span was opened by an exit hook: too late to register one."""
    if _mlflow.at_end_of_trace is None:
        _at_exit()
    else:
        with contained("closing what exit hooks left open"):
            close_all("exit")


atexit.register(_at_the_very_end)


def _unhandled() -> BaseException | None:
    """Return the exception that ends the process, if one does."""
    if hasattr(sys, "ps1"):  # an interactive session: it may be an old one
        return None
    raised = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    return raised if isinstance(raised, BaseException) else None


def close_and_flush(orphaned_by: str, seconds: float, raised: BaseException | None = None) -> None:
    """End every open span, and hand everything to the store, in bounded time. Never raises."""
    deadline = time.monotonic() + seconds
    in_place = False
    with contained("looking at how MLflow exports"):
        in_place = _mlflow.exports_in_place()
    if in_place:
        # Each end waits for the store (MLflow 3.10): out of the way, so that the bound holds.
        _bounded(lambda: close_all(orphaned_by, raised=raised), seconds, "closing")
    else:
        with contained("closing what is open at the end"):
            close_all(orphaned_by, raised=raised)
    if time.monotonic() < deadline if in_place else _has_arrived(deadline):
        loss = _mlflow.ledger.settle(_mlflow.ledger.on_their_way(), _mlflow.GONE)
        if loss:
            logger.warning("%d traces are not in the store: %s.", loss.traces, loss.reason)
        return
    logger.warning(
        "The store did not take all spans within the %g seconds that the exit waits for it; "
        "the rest is lost. limits(exit_seconds=...) sets that time.",
        seconds,
    )
    with contained("letting go of what is not stored"):
        _mlflow.let_go_at_exit()


# -- fork --------------------------------------------------------------------------------------

FORK_SECONDS = 4.0
"""How long a fork waits, in all, for threads that are at the store or inside an import."""


def _before_fork() -> None:
    deadline = time.monotonic() + FORK_SECONDS
    with contained("preparing a fork"):
        # What is stored now does not compete with the child's own for the database. Mostly
        # nothing is pending, and nothing is waited for.
        if _mlflow.has_pending():
            _mlflow.hand_over()
            _mlflow.await_stored(FORK_SECONDS / 2)
        _mlflow.pause_stores(deadline)
    locks.before_fork(deadline)  # last: meanwhile a thread may have begun an import


def _after_fork_in_parent() -> None:
    with contained("going on after a fork"):
        _mlflow.resume_stores()


def _after_fork_in_child() -> None:
    global _handing_over, _is_behind, _is_there_before_threads_are_joined
    _handing_over = _HandingOver()
    _is_behind = _is_there_before_threads_are_joined = False
    with contained("forgetting the parent's spans in a forked child"):
        outliving.forget_waiting()
        _registry.forget_all()
    with contained("starting tracing afresh in a forked child"):
        _mlflow.start_afresh_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
