"""A batch under way: items begun, taken down, and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from queue import Empty, SimpleQueue
from typing import Any

from spanguard._api.batch_job import Ended, Job, WorkerTraceback, record_loss
from spanguard._api.batch_result import BatchResult, ItemOutcome, rate
from spanguard._base.findings import contained
from spanguard._base.values import is_raised_as
from spanguard._propagation.carry import carry

__all__ = ["Batch"]


class Batch:
    """Pulls items, keeps a bounded number of them in flight, and notes what they ended as."""

    def __init__(
        self,
        job: Job,
        executor: Executor | None,
        max_in_flight: int,
        *,
        stops_at_failure: bool,
    ) -> None:
        self.broken: BaseException | None = None
        self._outcomes: dict[int, ItemOutcome[Any]] = {}
        self._processed = 0
        self._job = job
        # Under the batch's span, ambient now, also where `items` holds a span open as it yields.
        self._call = carry(job)
        self._record_loss = carry(record_loss)
        self._executor = executor
        self._max_in_flight = max_in_flight
        self._stops_at_failure = stops_at_failure
        self._stopped_by: BaseException | None = None
        self._pending: dict[Future[Ended], tuple[int, str, Any]] = {}
        self._done: SimpleQueue[Future[Ended]] = SimpleQueue()
        self._advance: Callable[[], object] = lambda: None

    def run(
        self,
        items: Iterable[Any],
        name_of: Callable[[object], str],
        advance: Callable[[], object],
        *,
        is_sized: bool,
    ) -> None:
        """Run every item. At an exception, leave nothing running, and pass it through."""
        self._advance = advance
        try:
            for index, item in enumerate(items):
                self._begin(index, name_of(item), item)
                while self._take(wait=len(self._pending) >= self._max_in_flight):
                    pass
                self._raise_if_stopped()
                if self.broken is not None and not is_sized:
                    break  # nothing can run any more, and the iterator may never end
            while self._take(wait=True):
                self._raise_if_stopped()
            self._raise_if_stopped()
        except BaseException:
            self._stop()
            raise

    def result(self) -> BatchResult[Any]:
        """Return the outcomes in input order."""
        return BatchResult(self._outcomes[index] for index in sorted(self._outcomes))

    def counts(self) -> dict[str, object]:
        """Return the root span's outputs."""
        total = len(self._outcomes)
        return {
            "processed_count": self._processed,
            "failed_count": total - self._processed,
            "success_rate": rate(self._processed, total),
        }

    def _raise_if_stopped(self) -> None:
        if self._stopped_by is not None:
            raise self._stopped_by

    def _stop(self) -> None:
        """Cancel what has not begun, and wait for what runs: its span is still to end."""
        for future in list(self._pending):
            if future.cancel():
                del self._pending[future]
        while self._take(wait=True):
            pass

    def _begin(self, index: int, name: str, item: object) -> None:
        if self._executor is None:
            self._note(index, self._call(index, name, item))
            return
        try:
            future = self._executor.submit(self._call, index, name, item)
        except Exception as error:
            if isinstance(error, RuntimeError) and not isinstance(error, BrokenExecutor):
                raise  # it has been shut down: a mistake in the call, not a failure of the item
            self._lose(index, name, item, error)
            return
        self._pending[future] = index, name, item
        # Not concurrent.futures.wait: that never returns for a future of Dask's we cancelled.
        future.add_done_callback(self._done.put)

    def _take(self, *, wait: bool) -> bool:
        """Note one item that is done. False if there is none, or none yet."""
        if not self._pending:
            return False
        try:
            future = self._done.get(block=wait)
        except Empty:
            return False
        if future not in self._pending:
            return True  # cancelled by us: it never began
        index, name, item = self._pending.pop(future)
        error = CancelledError() if future.cancelled() else future.exception()
        if error is None:
            self._note(index, future.result())
        else:
            self._lose(index, name, item, error)
        return True

    def _note(self, index: int, ended: Ended) -> None:
        error = ended.error
        if error is not None and ended.trace is not None and error.__cause__ is None:
            error.__cause__ = WorkerTraceback(ended.trace)
        expected = isinstance(error, Exception) and is_raised_as(error, self._job.expected)
        self._settle(ItemOutcome(index, ended.result, error, error is None or expected))

    def _lose(self, index: int, name: str, item: object, error: BaseException) -> None:
        """Note an item that the engine failed on: what its worker recorded is lost."""
        if isinstance(error, BrokenExecutor):
            self.broken = self.broken or error
        self._record_loss(index, name, item, error)
        self._settle(ItemOutcome(index, None, error, False))

    def _settle(self, outcome: ItemOutcome[object]) -> None:
        self._outcomes[outcome.index] = outcome
        self._processed += outcome.ok
        with contained("showing progress"):
            self._advance()
        error = outcome.error
        if error is None or outcome.ok or self._stopped_by is not None:
            return
        if self._stops_at_failure or not isinstance(error, Exception):
            self._stopped_by = error
