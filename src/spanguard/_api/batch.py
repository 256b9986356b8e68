"""Many items, one trace: a root span for the batch, a child for every item, wherever it runs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, Literal

from spanguard._api.batch_job import Job
from spanguard._api.batch_result import BatchResult, R, T
from spanguard._api.running_batch import Batch
from spanguard._base.findings import settle
from spanguard._base.interrupts import is_the_users
from spanguard._base.site import user_site
from spanguard._base.values import attribute_of, kind_name, text_of, truth_of, whole_number_of
from spanguard._lifecycle.opening import open_handle
from spanguard._lifecycle.request import SpanRequest
from spanguard._record import writing
from spanguard._record.text import clean_text, safe_repr
from spanguard.exceptions import InvalidSpanArgumentError

__all__ = ["trace_batch"]


IN_FLIGHT_UNKNOWN = 128
"""Items in flight where an executor does not tell how many workers it has, as Dask's."""

IN_FLIGHT_PER_WORKER = 2


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
    handle = open_handle(request)
    batch = Batch(
        Job(fn, kinds, strict),
        executor,
        whole_number_of(max_in_flight) or _default_in_flight(executor),
        stops_at_failure=text_of(on_error) == "raise",
    )
    raised: BaseException | None = None
    try:
        with _progress_bar(progress, handle.name, total) as advance:
            names = _namer(item_name, fn, strict)
            batch.run(items, names, advance, is_sized=total is not None)
    except BaseException as error:
        raised = error
        raise
    finally:
        writing.outputs(handle.live, batch.counts())
        handle.finish(raised or batch.broken)
    return batch.result()


def _check(fn: object, on_error: object, max_in_flight: object) -> None:
    if not callable(fn):
        raise TypeError(f"trace_batch() takes a callable, not a {kind_name(fn)}.")
    if _is_coroutine_function(fn):
        raise TypeError(
            "trace_batch() takes a plain function, and this is a coroutine function. Pass one "
            "that runs it: lambda item: asyncio.run(fn(item))."
        )
    if text_of(on_error) not in ("record", "raise"):
        given = clean_text(safe_repr(on_error), 100)
        raise ValueError(f"on_error must be 'record' or 'raise', not {given}")
    if max_in_flight is None:
        return
    number = whole_number_of(max_in_flight)
    if number is None or number < 1:
        given = clean_text(safe_repr(max_in_flight), 100)
        raise ValueError(f"max_in_flight must be a positive whole number, not {given}")


def _is_coroutine_function(fn: object) -> bool:
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


def _namer(
    item_name: str | Callable[[Any], str] | None, fn: object, strict: bool | None
) -> Callable[[Any], str]:
    default = clean_text(text_of(attribute_of(fn, "__name__")) or "item")
    if not callable(item_name):
        fixed = default if item_name is None else item_name
        return lambda item: fixed

    def named(item: object) -> str:
        try:
            return item_name(item)
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
