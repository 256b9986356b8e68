"""The way out: what is open, closing it, and handing everything over in bounded time."""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from spanguard._base.config import current_limits
from spanguard._base.findings import contained, logger
from spanguard._base.interrupts import hold_back_the_users
from spanguard._mlflow import exporting, queue, swallowed, takeover
from spanguard._process import listening, orphans
from spanguard._process.flush import bounded, has_arrived, is_handed_over, what_is_lost
from spanguard._process.reports import close_all

__all__ = ["hand_over", "is_behind", "is_registered_before_joins", "listen"]


# Whether the store did not keep up when it was last waited for.
is_behind = False


def hand_over(seconds: float) -> None:
    """Put what has ended into MLflow's queue and wait for the store, at most so many seconds.

    A store that did not take it in time is not waited for again before it has caught up: one
    dead server must not cost every job of a worker the same seconds.
    """
    global is_behind
    deadline = time.monotonic() + seconds
    is_stored = is_handed_over(deadline) and queue.await_stored(
        0.0 if is_behind else deadline - time.monotonic()
    )
    is_behind = not is_stored


def listen() -> None:
    """Hear of every span from here on, and be there when the process ends."""
    if listening.listen():
        # Anew for each provider: the hook that is registered last runs first, and MLflow's
        # own, which waits for its queue, must come after the spans are closed.
        atexit.unregister(_at_exit)
        atexit.register(_at_exit)
        swallowed.hear_of_swallowed(hold_back_the_users)
        with contained("starting MLflow's export threads"):
            queue.start_export_threads()
        _register_before_threads_are_joined()
        _register_in_multiprocessing_child()
        _register_in_billiard_child()
        _register_for_failing_threads()


is_registered_before_joins = False


def _register_before_threads_are_joined() -> None:
    global is_registered_before_joins
    # Private in threading, and used by concurrent.futures itself; without it the exit waits
    # for a dead server as long as MLflow retries.
    register = getattr(threading, "_register_atexit", None)
    if register is not None and not is_registered_before_joins:
        is_registered_before_joins = True
        try:
            register(_before_threads_are_joined)
        except RuntimeError:  # the main thread has ended: that moment has passed (test_exit.py)
            _before_threads_are_joined()


def _before_threads_are_joined() -> None:
    with contained("preparing the end of the process"):
        queue.do_not_join_workers()


def _register_in_multiprocessing_child() -> None:
    # A child of multiprocessing leaves by os._exit, past every atexit hook.
    module = sys.modules.get("multiprocessing.process")
    if module is not None and module.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, _at_exit, exitpriority=-100)


def _register_in_billiard_child() -> None:
    # Celery's own multiprocessing. What its pool forks leaves by os._exit past the finalizers
    # too, when it has done its number of tasks; but it tells before it does (test_exit.py).
    module = sys.modules.get("billiard.process")
    process: object = module.current_process() if module is not None else None
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

    def __call__(self, *arguments: object) -> None:
        try:
            if self._before is not None:
                self._before(*arguments)
        finally:
            _at_exit()


_threads_hook_before: Callable[[threading.ExceptHookArgs], object] | None = None


def _register_for_failing_threads() -> None:
    global _threads_hook_before
    if _threads_hook_before is None:
        _threads_hook_before = threading.excepthook
        threading.excepthook = _on_failed_thread


def _on_failed_thread(args: threading.ExceptHookArgs) -> None:
    with contained("noting the exception that ended a thread"):
        if args.exc_value is not None and args.thread is not None:
            orphans.note_failure(args.thread, args.exc_value)
    if _threads_hook_before is not None:
        _threads_hook_before(args)


def _at_exit() -> None:
    close_and_flush("exit", current_limits().exit_seconds, _unhandled())
    with contained("preparing for spans of later exit hooks"):
        # Hooks that were registered before ours still run. MLflow's own would shut tracing down
        # for them, and has nothing left to store.
        queue.let_go_at_exit()
        exporting.at_end_of_trace = _deliver_now


def _deliver_now() -> None:
    """Store what has just ended: no hook of ours or of MLflow's will run any more."""
    with contained("storing a trace at the very end"):
        hand_over(current_limits().exit_seconds)


def _at_the_very_end() -> None:
    """Do the same where the first span was opened by an exit hook: too late to register one."""
    if exporting.at_end_of_trace is None:
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
        in_place = queue.exports_in_place()
    if in_place:
        # Each end waits for the store (MLflow 3.10): out of the way, so that the bound holds.
        bounded(lambda: close_all(orphaned_by, raised=raised), seconds, "closing")
    else:
        with contained("closing what is open at the end"):
            close_all(orphaned_by, raised=raised)
    if time.monotonic() < deadline if in_place else has_arrived(deadline):
        loss = what_is_lost(exporting.ledger.on_their_way())
        if loss:
            logger.warning("%d traces are not in the store: %s.", loss.traces, loss.reason)
        with contained("letting go of what is on disk"):
            takeover.finish(is_stored=True)
        return
    on_disk = 0
    with contained("putting on disk what is not stored"):
        on_disk = takeover.finish(is_stored=False)
    logger.warning(
        "The store did not take all spans within the %g seconds that the exit waits for it; %s. "
        "limits(exit_seconds=...) sets that time.",
        seconds,
        f"{on_disk} traces are on disk, for `spanguard replay`" if on_disk else "the rest is lost",
    )
    with contained("letting go of what is not stored"):
        queue.let_go_at_exit()
