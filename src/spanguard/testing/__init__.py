"""Spans in tests: what was recorded, without a server, and whether all of it was closed.

The pytest plugin offers both as the fixture `spans` and the option `--spanguard-strict`; this
is the same for any other test runner.

>>> import spanguard
>>> from spanguard.testing import no_open_spans, record_spans
>>> with record_spans() as spans, no_open_spans():
...     with spanguard.traced_span("checkout"):
...         with spanguard.traced_span("price", inputs={"item": "apple"}) as span:
...             span.set_outputs(0.5)
>>> spans.names
['checkout', 'price']
>>> spans.one("price").outputs
0.5
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from spanguard._base import findings
from spanguard._mlflow import recording
from spanguard.testing._leaks import SpansLeftOpenError, checked
from spanguard.testing._recorded import Filling, RecordedSpan, RecordedSpans

__all__ = [
    "RecordedSpan",
    "RecordedSpans",
    "SpansLeftOpenError",
    "forget_warnings",
    "no_open_spans",
    "record_spans",
]


@contextmanager
def record_spans() -> Iterator[RecordedSpans]:
    """Record the spans of a with-block in a list, and send them to no store.

    The spans are those of every API of MLflow's and of ours, from all threads and tasks of this
    process. Neither the tracking server nor the experiment is asked: it takes milliseconds, and
    works without any. Recordings may be nested; each hears of all spans in its own block.

    At the end everything is as it was: the tracing provider and its destination, the tracking
    URI and the experiment, also where the block has changed them. What the block left open is
    closed as ERROR, `orphaned`, with an `OrphanedSpanWarning` that names the line, and the
    ambient span is restored. In strict mode that raises `SpansLeftOpenError`, unless an exception
    of yours is on its way.

    A line that leaks is warned of once in each recording, whatever was warned of before.

    Traces are not in a store, so `mlflow.get_trace` does not find them; `spans.traces` has them.
    Other processes started from the block do not record here.

    >>> import mlflow
    >>> import spanguard
    >>> from spanguard.testing import record_spans
    >>> with record_spans() as spans:
    ...     with mlflow.start_span("answer"), spanguard.traced_span("search"):
    ...         pass
    >>> [span.name for span in spans.children("answer")]
    ['search']
    """
    spans = RecordedSpans()
    filling = Filling(spans)
    recording.start_recording(filling)
    try:
        with findings.afresh(), checked("the end of the recording", strict=None):
            yield spans
    finally:
        recording.stop_recording(filling)


def forget_warnings() -> None:
    """Let every line warn again, and every failure be logged again: it is else once per process.

    For tests of code that leaves spans open. `record_spans`, the fixture `spans`, and records of
    warnings such as `pytest.warns` start afresh by themselves.

    >>> from spanguard.testing import forget_warnings
    >>> forget_warnings()
    """
    findings.forget_sites()


@contextmanager
def no_open_spans() -> Iterator[None]:
    """Assert that a with-block closes every span it opens, whatever API opened it.

    Spans count in every thread and task. Those that another thread is just about to end are
    waited for, at most a second. What is left open is closed as ERROR, `orphaned`, and the
    ambient span is restored, so that nothing leaks into the next test.

    Raises:
        SpansLeftOpenError: a span was left open, or was garbage-collected while open, or the
            ambient span was changed. It names the lines that opened the spans. It never takes
            the place of an exception of yours, but becomes a note on it.

    >>> import mlflow
    >>> from spanguard.testing import no_open_spans
    >>> with no_open_spans():
    ...     root = mlflow.MlflowClient().start_trace("forgotten")
    ... # doctest: +ELLIPSIS
    Traceback (most recent call last):
    spanguard.testing._leaks.SpansLeftOpenError: Span 'forgotten' (...) was left open, opened at ...
    """
    with checked("the end of no_open_spans", strict=True, unraised=True):
        yield
