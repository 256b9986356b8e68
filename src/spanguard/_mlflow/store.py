"""Asking the store from user code: contained, and never for long."""

from __future__ import annotations

import contextvars
import re
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import mlflow
from mlflow.entities import Trace
from mlflow.tracking import MlflowClient

from spanguard._base.findings import internal_error, logger
from spanguard._mlflow import destination, recording

__all__ = ["ask", "find_by_tag", "get_trace", "read"]


T = TypeVar("T")

# A dead server keeps MLflow's client retrying for minutes; code that starts a span waits for an
# answer this long, and code that asks for a stored trace somewhat longer.
ASK_SECONDS = 2.0
READ_SECONDS = 30.0

# The question that got no answer in time, by tracking URI.
_unanswered: dict[str, threading.Thread] = {}


def ask(what: str, question: Callable[[], T]) -> T | None:
    """Return the store's answer on the way to a span; None if it fails or takes 2 seconds.

    While a question is still without an answer the same store is asked no other, and None comes
    back at once: a dead server costs one start in minutes the wait, and the process one thread.
    """
    if recording.is_recording():  # a test without a store
        return None
    uri = destination.tracking_uri()
    earlier = _unanswered.get(uri)
    if earlier is not None and earlier.is_alive():
        return None
    _unanswered.pop(uri, None)
    answers, thread = _put(what, question, ASK_SECONDS)
    if thread.is_alive():
        _unanswered[uri] = thread
    return answers[0] if answers else None


def read(what: str, question: Callable[[], T]) -> T | None:
    """Return what is read from the store; None if that fails or takes 30 seconds."""
    answers, _ = _put(what, question, READ_SECONDS)
    return answers[0] if answers else None


def _put(what: str, question: Callable[[], T], seconds: float) -> tuple[list[T], threading.Thread]:
    """Put a question in a thread of its own; return the answer, if there is one in time."""
    answers: list[T] = []

    def answer() -> None:
        try:
            answers.append(question())
        except Exception as error:  # noqa: BLE001
            internal_error(what, error, quoted=True)

    # In a copy of the context: MLflow keeps the workspace that it asks for in it.
    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=(answer,), name="spanguard-ask", daemon=True)
    try:
        thread.start()
        thread.join(seconds)
    except RuntimeError as error:  # the interpreter is on its way out
        internal_error(what, error, quoted=True)
    if thread.is_alive() and not answers:
        logger.warning(
            "%s: the store has not answered in %g seconds; it is not waited for.", what, seconds
        )
    return answers, thread


# -- stored traces: call these within `read` ---------------------------------------------------


def get_trace(trace_id: str) -> Trace | None:
    """Return a trace by its id, None if the store has none that can be read."""
    return cast("Trace | None", mlflow.get_trace(trace_id, silent=True))


def find_by_tag(key: str, value: str) -> Trace | None:
    """Return the newest readable trace, of all experiments, that has exactly this tag."""
    traces = (get_trace(trace_id) for trace_id in _ids_by_tag(key, value))
    return next((trace for trace in traces if trace is not None), None)


_EXPERIMENTS_AT_A_TIME = 100
_MAX_PAGES = 20


def _ids_by_tag(key: str, value: str) -> Iterator[str]:
    client = MlflowClient()
    experiments = [found.experiment_id for found in mlflow.search_experiments()]
    for start in range(0, len(experiments), _EXPERIMENTS_AT_A_TIME):
        token: str | None = None
        for _ in range(_MAX_PAGES):
            page = client.search_traces(
                locations=experiments[start : start + _EXPERIMENTS_AT_A_TIME],
                filter_string=_tag_filter(key, value),
                include_spans=False,
                page_token=token,
            )
            yield from (t.info.trace_id for t in page if t.info.tags.get(key) == value)
            token = page.token
            if not token:
                break


_SAFE_TEXT = re.compile(r"[\w .,:;/@+=#~|(){}\[\]<>!?$&*^%-]*")
_UNSAFE_IN_PATTERN = re.compile(r"[^\w .:/@-]")


def _tag_filter(key: str, value: str) -> str:
    """Return a filter string that finds the traces with this tag, and perhaps some others.

    MLflow's filters know no escapes: what stands between the quotes is taken as it is. Where the
    value holds a quote or anything else that its parser or a database could misread, any one
    character is searched for in its place, and the caller compares what is found.
    """
    if _SAFE_TEXT.fullmatch(value):
        return f"tags.`{key}` = '{value}'"
    return f"tags.`{key}` LIKE '{_UNSAFE_IN_PATTERN.sub('_', value)}'"
