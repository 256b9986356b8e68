"""Many items, one trace: a root span for the batch, a child for every item, wherever it runs."""

from __future__ import annotations

import inspect
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast, overload

from spanguard._base.findings import contained, settle
from spanguard._base.site import user_site
from spanguard._base.values import (
    attribute_of,
    is_raised_as,
    is_the_users,
    kind_name,
    text_of,
    truth_of,
    whole_number_of,
)
from spanguard._lifecycle.opening import open_span, traced_span
from spanguard._lifecycle.request import SpanRequest
from spanguard._propagation.carry import carry
from spanguard._record import writing
from spanguard._record.outcome import describe, stack_trace
from spanguard._record.payload import clean_text, safe_repr
from spanguard.exceptions import InvalidSpanArgumentError

__all__ = ["BatchResult", "ItemOutcome", "trace_batch"]

T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

IN_FLIGHT_UNKNOWN = 128
"""Items in flight where an executor does not tell how many workers it has, as Dask's."""

IN_FLIGHT_PER_WORKER = 2


# -- what comes back -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemOutcome(Generic[R_co]):
    """What became of one item of a batch.

    Attributes:
        index: the item's position in the input, from 0; `item_id` of its span.
        result: what the function returned, or None where it raised.
        error: the exception that the item ended with, or None.
        ok: whether the item counts as processed. An `expected` exception does.
    """

    index: int
    result: R_co | None
    error: BaseException | None
    ok: bool


class BatchResult(Sequence[ItemOutcome[R_co]]):
    """The outcomes of a batch, in input order. Holds results and errors, but no inputs.

    >>> import spanguard
    >>> batch = spanguard.trace_batch([4, 0, 2], lambda n: 8 // n, name="divide")
    >>> [outcome.result for outcome in batch]
    [2, None, 4]
    >>> batch.failed[0].index, batch.failed[0].error
    (1, ZeroDivisionError('integer division or modulo by zero'))
    >>> batch.success_rate
    0.6666666666666666
    """

    def __init__(self, outcomes: Iterable[ItemOutcome[R_co]]) -> None:
        self._outcomes = tuple(outcomes)

    @property
    def succeeded(self) -> tuple[ItemOutcome[R_co], ...]:
        """The outcomes of the items that were processed, in input order."""
        return tuple(outcome for outcome in self._outcomes if outcome.ok)

    @property
    def failed(self) -> tuple[ItemOutcome[R_co], ...]:
        """The outcomes of the items that failed, in input order."""
        return tuple(outcome for outcome in self._outcomes if not outcome.ok)

    @property
    def success_rate(self) -> float:
        """The part of the items that were processed, from 0.0 to 1.0; 1.0 without items."""
        return _rate(sum(outcome.ok for outcome in self._outcomes), len(self._outcomes))

    def __iter__(self) -> Iterator[ItemOutcome[R_co]]:
        return iter(self._outcomes)

    def __len__(self) -> int:
        return len(self._outcomes)

    @overload
    def __getitem__(self, index: int) -> ItemOutcome[R_co]: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[ItemOutcome[R_co], ...]: ...

    def __getitem__(self, index: int | slice) -> ItemOutcome[R_co] | tuple[ItemOutcome[R_co], ...]:
        return self._outcomes[index]

    def __repr__(self) -> str:
        ok = sum(outcome.ok for outcome in self._outcomes)
        return f"<BatchResult: {ok} succeeded, {len(self) - ok} failed>"


def _rate(processed: int, total: int) -> float:
    return processed / total if total else 1.0


# -- one item, where it runs -----------------------------------------------------------------------


class _Ended(NamedTuple):
    """How the function ended on an item: a value, so that whatever else comes is the engine's."""

    result: Any = None
    error: BaseException | None = None
    trace: str | None = None  # the traceback, where it stays behind in another process


class _Job:
    """Runs the function on one item in the item's span. Pickles where the function does."""

    __slots__ = ("expected", "function", "has_crossed", "strict")

    def __init__(
        self,
        function: Callable[[Any], Any],
        expected: Any,
        strict: bool | None,
        has_crossed: bool = False,
    ) -> None:
        self.function = function
        self.expected = expected
        self.strict = strict
        self.has_crossed = has_crossed

    def __reduce__(self) -> Any:
        return _Job, (self.function, self.expected, self.strict, True)

    def __call__(self, index: int, name: str, item: Any) -> _Ended:
        try:
            block = traced_span(
                name,
                inputs=item,
                attributes={"item_id": index},
                expected=self.expected,
                strict=self.strict,
            )
            with block._calling(self.function) as span:
                result = self.function(item)
                span.set_outputs(result)
        except BaseException as error:
            return _crossing(error) if self.has_crossed else _Ended(error=error)
        return _Ended(result)


def _crossing(error: BaseException) -> _Ended:
    """Make ready for another process an exception that may not survive the way."""
    trace = stack_trace(error)
    try:
        pickled = pickle.dumps(error)
    except Exception:
        return _Ended(None, error, trace)  # Dask can pickle more than pickle can
    try:
        pickle.loads(pickled)  # our own, from the line above
    except Exception:
        # Its __init__ asks for more than its args. Unpickling it would break the whole pool.
        described = describe(error)
        error = RuntimeError(f"{described['error_type']}: {described['error_message']}")
    return _Ended(None, error, trace)


def _record_loss(index: int, name: str, item: Any, error: BaseException) -> None:
    """Record an item that its engine failed on, in its stead."""
    with contained("recording an item that was lost"):
        request = SpanRequest((name,), inputs=item, attributes={"item_id": index})
        open_span(request, activate=False).close(error)


class _WorkerTraceback(Exception):
    """The cause of an exception from another process: where it was raised there."""

    def __str__(self) -> str:
        return f"in a worker:\n{self.args[0]}"


# -- the batch, where it was called ----------------------------------------------------------------


class _Batch:
    """Pulls items, keeps a bounded number of them in flight, and takes down what they ended as."""

    def __init__(
        self,
        job: _Job,
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
        self._record_loss = carry(_record_loss)
        self._executor = executor
        self._max_in_flight = max_in_flight
        self._stops_at_failure = stops_at_failure
        self._stopped_by: BaseException | None = None
        self._pending: dict[Future[_Ended], tuple[int, str, Any]] = {}
        self._done: SimpleQueue[Future[_Ended]] = SimpleQueue()
        self._advance: Callable[[], object] = lambda: None

    def run(
        self,
        items: Iterable[Any],
        name_of: Callable[[Any], str],
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

    def counts(self) -> dict[str, Any]:
        """Return the root span's outputs."""
        total = len(self._outcomes)
        return {
            "processed_count": self._processed,
            "failed_count": total - self._processed,
            "success_rate": _rate(self._processed, total),
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

    def _begin(self, index: int, name: str, item: Any) -> None:
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
        """Take down one item that is done. False if there is none, or none yet."""
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

    def _note(self, index: int, ended: _Ended) -> None:
        error = ended.error
        if error is not None and ended.trace is not None and error.__cause__ is None:
            error.__cause__ = _WorkerTraceback(ended.trace)
        expected = isinstance(error, Exception) and is_raised_as(error, self._job.expected)
        self._settle(ItemOutcome(index, ended.result, error, error is None or expected))

    def _lose(self, index: int, name: str, item: Any, error: BaseException) -> None:
        """Take down an item that the engine failed on: what its worker recorded is lost."""
        if isinstance(error, BrokenExecutor):
            self.broken = self.broken or error
        self._record_loss(index, name, item, error)
        self._settle(ItemOutcome(index, None, error, False))

    def _settle(self, outcome: ItemOutcome[Any]) -> None:
        self._outcomes[outcome.index] = outcome
        self._processed += outcome.ok
        with contained("showing progress"):
            self._advance()
        error = outcome.error
        if error is None or outcome.ok or self._stopped_by is not None:
            return
        if self._stops_at_failure or not isinstance(error, Exception):
            self._stopped_by = error


# -- the face --------------------------------------------------------------------------------------


def trace_batch(
    items: Iterable[T],
    fn: Callable[[T], R],
    *,
    name: str,
    item_name: str | Callable[[T], str] | None = None,
    executor: Executor | None = None,
    on_error: Literal["record", "raise"] = "record",
    progress: bool = False,
    max_in_flight: int | None = None,
    span_type: str = "UNKNOWN",
    attributes: dict[str, Any] | None = None,
    expected: tuple[type[BaseException], ...] | type[BaseException] = (),
    strict: bool | None = None,
) -> BatchResult[R]:
    """Call `fn` on every item: one trace with a span for the batch and a child for each item.

    The batch's span nests under the ambient span, if there is one. An item's span has the item
    as inputs, what `fn` returned as outputs, and the item's position as attribute `item_id`; an
    item that raises makes it ERROR. The batch's span gets the outputs `processed_count` (items
    that succeeded), `failed_count` and `success_rate`, 1.0 for a batch without items.

    Items are pulled one by one, so `items` may be more than memory holds; the outcomes are kept.
    Without an executor `fn` runs here. With one, at most `max_in_flight` items are out at a time.
    To run in other processes `fn`, items, and results must pickle; the trace stays one.

    `KeyboardInterrupt` and its like stop the batch whatever `on_error` says, and so does an
    exception of `items` itself. However it stops: what has not begun is cancelled, what runs is
    waited for, every span is closed, and the exception passes through unchanged.

    If a pool breaks (a worker was killed), the items in it fail with `BrokenExecutor`, and the
    batch's span is ERROR. Of a collection the rest fails too; an iterator is pulled no further.

    Args:
        items: any iterable.
        fn: a plain function of one item.
        name: the name of the batch's span.
        item_name: the name of the items' spans, or a function from an item to it. The name of
            `fn`, if not given.
        executor: any `concurrent.futures.Executor`: threads, processes, Dask's
            `client.get_executor()`. It is not shut down.
        on_error: "record" goes on after a failing item and leaves the batch's span OK; "raise"
            stops the batch at the first, and raises the item's own exception.
        progress: show a progress bar where stderr is a terminal.
        max_in_flight: items out at a time; if not given, twice the executor's workers, or 128
            where it does not tell how many it has.
        span_type, attributes: of the batch's span.
        expected: exception classes that are no failure of an item: its span is OK with outcome
            `expected`, and it counts as processed.
        strict: overrides `strict()` and the environment for these spans.

    Raises:
        TypeError: `fn` is not callable, or is a coroutine function.
        ValueError: `on_error` or `max_in_flight` is none of what it may be.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> import spanguard
    >>> with ThreadPoolExecutor() as pool:
    ...     batch = spanguard.trace_batch(["a", "", "c"], str.upper, name="shout", executor=pool)
    >>> [outcome.result for outcome in batch]
    ['A', '', 'C']
    """
    _check(fn, on_error, max_in_flight)
    total = _length(items)
    request = SpanRequest(
        (name,),
        span_type=span_type,
        inputs=None if total is None else {"item_count": total},
        attributes=attributes,
        strict=strict,
    )
    kinds = SpanRequest(("expected",), expected=expected).expected
    opened = open_span(request)
    batch = _Batch(
        _Job(fn, kinds, strict),
        executor,
        whole_number_of(max_in_flight) or _default_in_flight(executor),
        stops_at_failure=text_of(on_error) == "raise",
    )
    raised: BaseException | None = None
    try:
        with _progress_bar(progress, opened.name, total) as advance:
            names = _namer(item_name, fn, strict)
            batch.run(items, names, advance, is_sized=total is not None)
    except BaseException as error:
        raised = error
        raise
    finally:
        writing.outputs(opened.live, batch.counts())
        opened.finish(raised or batch.broken)
    return batch.result()


def _check(fn: Any, on_error: Any, max_in_flight: Any) -> None:
    if not callable(fn):
        raise TypeError(f"trace_batch() takes a callable, not a {kind_name(fn)}.")
    if _is_coroutine_function(fn):
        raise TypeError(
            "trace_batch() takes a plain function, and this is a coroutine function. Pass one "
            "that runs it: lambda item: asyncio.run(fn(item))."
        )
    if text_of(on_error) not in ("record", "raise"):
        raise ValueError(f"on_error must be 'record' or 'raise', not {_shown(on_error)}")
    if max_in_flight is None:
        return
    number = whole_number_of(max_in_flight)
    if number is None or number < 1:
        shown = _shown(max_in_flight)
        raise ValueError(f"max_in_flight must be a positive whole number, not {shown}")


def _shown(value: Any) -> str:
    return clean_text(safe_repr(value), 100)


def _is_coroutine_function(fn: Any) -> bool:
    try:
        return inspect.iscoroutinefunction(fn)
    except BaseException as error:
        if is_the_users(error):
            raise
        return False


def _length(items: Any) -> int | None:
    try:
        return len(items)
    except BaseException as error:
        if is_the_users(error):
            raise
        return None


def _default_in_flight(executor: Executor | None) -> int:
    # What the standard library's executors have; there is no public way to ask.
    workers = attribute_of(executor, "_max_workers")
    if type(workers) is int and workers > 0:
        return IN_FLIGHT_PER_WORKER * workers
    return IN_FLIGHT_UNKNOWN


def _namer(item_name: Any, fn: Any, strict: bool | None) -> Callable[[Any], str]:
    default = clean_text(text_of(attribute_of(fn, "__name__")) or "item")
    if not callable(item_name):
        fixed = default if item_name is None else item_name
        return lambda item: fixed

    def named(item: Any) -> str:
        try:
            return cast(str, item_name(item))
        except BaseException as error:
            if is_the_users(error):
                raise
            finding = InvalidSpanArgumentError(
                f"item_name raised {kind_name(error)}; the span was called {default!r}. Give "
                "a function that returns a string for every item.",
                span_name=default,
            )
            settle([finding], strict=strict, raised=None, site=user_site(2))
            return default

    return named


@contextmanager
def _progress_bar(is_wanted: bool, name: str, total: int | None) -> Iterator[Callable[[], object]]:
    """Show a progress bar on a terminal and nothing elsewhere; yield what moves it on by one."""
    if not truth_of(is_wanted) or sys.stderr is None or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(escape(name), total=total)
        yield lambda: bar.advance(task)
