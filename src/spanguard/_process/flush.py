"""Handing everything over to the store, in bounded time, and telling what was not stored."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from spanguard._base.config import waiting_time
from spanguard._base.findings import contained, internal_error, logger, settle
from spanguard._base.site import user_site
from spanguard._base.values import kind_name
from spanguard._mlflow import exporting, queue, reasons
from spanguard._mlflow.ledger import Loss
from spanguard._mlflow.seam_check import flush_is_blind
from spanguard._process import outliving
from spanguard._process.dropped import do_put_aside
from spanguard.exceptions import InvalidSpanArgumentError, SpanguardError, TraceLostError

__all__ = [
    "HandingOver",
    "bounded",
    "flush",
    "handing_over",
    "has_arrived",
    "is_handed_over",
    "store_or_say",
    "what_is_lost",
]


def flush(timeout: float | None = 30.0) -> bool:
    """Hand over what has ended to the store, and wait for it, at most `timeout` seconds.

    Args:
        timeout: seconds; None, or infinity, is as long as it takes.

    Returns:
        True only if every trace that ended before is in the store. False when the time was up,
        and the rest is still tried in the background; when the store did not take a trace, or
        one could not be started; or when this MLflow lacks what would tell, as a line in the
        log has said. Else a warning says how many, and MLflow's reason. Each
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
        is_handed_over(time.monotonic())
    return Delivery(False, outliving.what_is_waited_for())


def _deliver(seconds: float) -> Delivery:
    """Hand over what has ended, wait for the store, and look at what became of it."""
    deadline = time.monotonic() + seconds
    ledger = exporting.ledger
    ended = ledger.on_their_way()
    if not has_arrived(deadline):
        missing = ledger.still(ended)
        return Delivery(
            False,
            f"The store has not taken all spans in {seconds:g} seconds"
            + (f"; {missing} traces are still on their way" if missing else "")
            + ". MLflow goes on trying in the background: call flush() again, with more time.",
        )
    loss = what_is_lost(ended)
    if not loss:
        return Delivery(ledger.has_recovered() and not flush_is_blind())
    return Delivery(
        False,
        f"{loss.traces} traces are not in the store, or not whole: {loss.reason}. See the log of "
        "MLflow, and the tracking URI and the store behind it.",
    )


def what_is_lost(ended: Iterable[Hashable]) -> Loss:
    """Return what is lost of these traces, each once: nothing is on its way any more.

    Where MLflow lacks what would tell of them, only what is known to be refused: that nothing
    was heard of the others says nothing.
    """
    return exporting.ledger.settle(() if flush_is_blind() else ended, reasons.GONE)


def has_arrived(deadline: float) -> bool:
    with contained("waiting for the store"):
        return is_handed_over(deadline) and queue.await_stored(deadline - time.monotonic())
    return False


def is_handed_over(deadline: float) -> bool:
    return queue.exports_in_place() or handing_over.ask(deadline - time.monotonic())


class HandingOver:
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
            queue.hand_over_everything()
            is_done = True
        except Exception as error:  # noqa: BLE001
            with suppress(Exception):  # our own test suite has it raised again
                internal_error("handing over", error, quoted=True)
        with self._turn:
            self._tried = number
            if is_done:
                self._done = number
            self._turn.notify_all()


handing_over = HandingOver()


def bounded(work: Callable[[], object], seconds: float, doing: str) -> bool:
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
