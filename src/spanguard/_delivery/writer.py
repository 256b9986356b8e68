"""The thread that stores: many things at a time, again after failures that pass."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from spanguard._base.findings import internal_error, logger
from spanguard._delivery.counts import Counts
from spanguard._delivery.retries import Verdict, retrying, store_by_halves, verdict_on
from spanguard._mlflow.outgoing import Destination, Outgoing
from spanguard._mlflow.reasons import reason_of
from spanguard._mlflow.sending import Sender, sender_to, unobserved

__all__ = ["Writer"]


MAX_BATCH_BYTES = 32 * 2**20
"""So much goes into one transaction or request at most, and at least one trace."""

_IDLE_SECONDS = 60.0  # a writer that has had nothing to do for so long ends its thread


class Writer:
    """Stores what goes to one destination, in a thread of its own that is started when needed.

    Each destination has one: a server that is down must not keep the traces of another waiting.
    """

    def __init__(
        self,
        destination: Destination,
        counts: Counts,
        batch_traces: int,
        on_settled: Callable[[list[str]], object],
    ) -> None:
        self.destination = destination
        self.batch_traces = batch_traces
        self._counts = counts
        self._on_settled = on_settled  # told of the keys of what is stored, or refused
        self._sender: Sender | None = None
        self._waiting: deque[Outgoing] = deque()
        self._turn = threading.Condition()
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        self._in_hand: list[Outgoing] = []
        self._is_over = False
        # How long a trace waits for others: where each comes by itself (deliver(durable=True)).
        self.linger_seconds = 0.0
        self.failing_since: float | None = None

    def put(self, item: Outgoing) -> None:
        """Let something wait for its turn."""
        with self._turn:
            self._waiting.append(item)
            self._turn.notify()
        self.start()

    def start(self) -> None:
        """See to it that the thread runs."""
        with self._turn:
            if self._is_over or (self._thread is not None and self._thread.is_alive()):
                return
            self._thread = threading.Thread(
                target=self._run, name="spanguard-delivery-writer", daemon=True
            )
            try:
                self._thread.start()
            except RuntimeError:  # Python 3.12.1 starts no threads any more at exit
                self._thread = None

    def hurry(self) -> None:
        """Store what waits now, and not when a pause is over."""
        self._hurry.set()
        with self._turn:
            self._turn.notify_all()

    def oldest(self, count: int | None) -> list[Outgoing]:
        """Take out the oldest that wait, or all; what is being stored at this moment stays."""
        with self._turn:
            number = len(self._waiting) if count is None else min(count, len(self._waiting))
            return [self._waiting.popleft() for _ in range(number)]

    def stop(self) -> list[Outgoing]:
        """Store no more; return all that is not stored, with what may be just now."""
        self._is_over = True
        self._hurry.set()
        with self._turn:
            left = [*self._in_hand, *self._waiting]
            self._waiting.clear()
            self._turn.notify_all()
        return left

    @property
    def wants_more(self) -> bool:
        """Tell whether the store takes traces, and less than a batch is waiting."""
        return self.failing_since is None and len(self._waiting) < self.batch_traces

    def is_down(self, seconds: float) -> bool:
        """Tell whether the store has taken nothing for so long."""
        since = self.failing_since
        return since is not None and time.monotonic() - since > seconds

    # -- in the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        with unobserved():
            self._store_what_comes()

    def _store_what_comes(self) -> None:
        while True:
            with self._turn:
                if not self._waiting and not self._is_over:
                    self._turn.wait(_IDLE_SECONDS)
                if self._is_over or not self._waiting:
                    self._thread = None
                    return
                self._linger()
                self._in_hand = self._next_batch()
            try:
                store_by_halves(self._try, self._in_hand, self._give_up)
            except Exception as error:  # noqa: BLE001
                internal_error("delivering traces", error, quoted=True)
                self._refuse(self._in_hand, error)
            self._in_hand = []

    def _linger(self) -> None:
        """Wait for more, until it is a batch, or somebody waits for the store."""
        if self.linger_seconds and not self._hurry.is_set():
            self._turn.wait_for(
                lambda: (
                    self._is_over or self._hurry.is_set() or len(self._waiting) >= self.batch_traces
                ),
                self.linger_seconds,
            )

    def _next_batch(self) -> list[Outgoing]:
        batch: list[Outgoing] = []
        size = 0
        while self._waiting and len(batch) < self.batch_traces:
            size += self._waiting[0].size
            if batch and size > MAX_BATCH_BYTES:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _try(self, batch: Sequence[Outgoing]) -> None:
        if not self._is_over:
            retrying(self._hurry, lambda: self._is_over)(self._send, batch)

    def _give_up(self, batch: Sequence[Outgoing], error: BaseException) -> None:
        if not self._is_over:  # else whoever stopped it has what is left
            self._refuse(batch, error)

    def _send(self, batch: Sequence[Outgoing]) -> None:
        self._hurry.clear()
        try:
            if self._sender is None:
                self._sender = sender_to(self.destination)
            self._sender.send(batch)
        except Exception as error:
            self._note_failure(error)
            raise
        if self.failing_since is not None:
            logger.info("The store takes traces again.")
            self.failing_since = None
        for item in batch:
            if item.trace is None:
                self._counts.end_part(item)
        self._counts.take([item.trace_id for item in batch if item.trace is not None])
        self._on_settled([item.key for item in batch])

    def _note_failure(self, error: Exception) -> None:
        self._counts.last_error = reason_of(error)
        if self.failing_since is None:
            self.failing_since = time.monotonic()
            if verdict_on(error) is Verdict.LATER:
                logger.warning(
                    "The store does not take traces at the moment: %s. They wait, and it is "
                    "asked again.",
                    reason_of(error),
                )

    def _refuse(self, batch: Sequence[Outgoing], error: BaseException) -> None:
        reason = reason_of(error)
        for item in batch:
            if item.trace is None:
                self._counts.end_part(item)
                self._counts.refuse_part(item.trace_id, reason)
            else:
                self._counts.refuse(item.trace_id, reason)
        self._on_settled([item.key for item in batch])
