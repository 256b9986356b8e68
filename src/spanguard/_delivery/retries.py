"""Which failures pass, and how long after one the store is asked again."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any

import requests
from sqlalchemy import exc as sql
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential
from tenacity.wait import wait_base

from spanguard._mlflow.outgoing import Outgoing
from spanguard._mlflow.rest_delivery import StoreError

__all__ = ["Verdict", "retrying", "store_by_halves", "verdict_on"]


class Verdict(Enum):
    """What a failure to store something says."""

    LATER = "the store is away for a while: ask again, for as long as it takes"
    UNSURE = "the store failed: ask again, a few times"
    NEVER = "the store does not take one of these"
    BARRED = "the store takes nothing from us"


# Of one batch, before it counts as one that the store does not take.
_TRIES_IF_UNSURE = 3
_FIRST_SECONDS, _LONGEST_SECONDS = 0.2, 10.0


class _Jitter(wait_base):
    """Keeps processes from asking all at the same moment; draws nothing from the user's `random`.

    As tenacity's own jitter does, from the writer's thread (test_ids.py).
    """

    _random = random.SystemRandom()

    def __call__(self, retry_state: RetryCallState) -> float:
        return self._random.uniform(0, _FIRST_SECONDS)


_PASSING_STATUS = (408, 425, 429, 502, 503, 504)
_BARRED_STATUS = (401, 403)
_BUSY = ("locked", "busy", "deadlock", "too many clients", "connection", "shutting down")


def verdict_on(error: BaseException) -> Verdict:
    """Tell what a failure to store something says: by its kind, never by what was sent."""
    for cause in _causes(error):
        if isinstance(cause, StoreError):
            return _verdict_on_status(cause.status)
        if isinstance(cause, (requests.ConnectionError, requests.Timeout, ConnectionError)):
            return Verdict.LATER
        if isinstance(cause, (sql.OperationalError, sql.InterfaceError, sqlite3.OperationalError)):
            return Verdict.LATER if _is_busy(cause) else Verdict.UNSURE
        if isinstance(cause, sql.IntegrityError):  # another process was quicker with the trace
            return Verdict.UNSURE
        if isinstance(cause, sql.TimeoutError):  # no connection is free
            return Verdict.LATER
    return Verdict.NEVER


def _verdict_on_status(status: int) -> Verdict:
    if status in _PASSING_STATUS:
        return Verdict.LATER
    if status in _BARRED_STATUS:
        return Verdict.BARRED
    return Verdict.UNSURE if status >= 500 else Verdict.NEVER


def _is_busy(error: BaseException) -> bool:
    is_gone = bool(getattr(error, "connection_invalidated", False))
    said = str(getattr(error, "orig", error)).lower()
    return is_gone or any(word in said for word in _BUSY)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def retrying(hurry: threading.Event, is_over: Callable[[], bool]) -> Retrying:
    """Return what asks again after a failure that may pass, until it succeeds or all is over.

    Args:
        hurry: ends a pause when it is set.
        is_over: no more is to be asked.
    """

    def stop(state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome is not None else None
        is_unsure = error is not None and verdict_on(error) is Verdict.UNSURE
        return is_over() or (is_unsure and state.attempt_number >= _TRIES_IF_UNSURE)

    return Retrying(
        retry=retry_if_exception(_may_pass),
        wait=wait_exponential(_FIRST_SECONDS, max=_LONGEST_SECONDS) + _Jitter(),
        stop=stop,
        sleep=lambda seconds: _pause(hurry, seconds),
        reraise=True,
    )


def store_by_halves(
    send: Callable[[Sequence[Outgoing]], object],
    batch: Sequence[Outgoing],
    give_up: Callable[[Sequence[Outgoing], Exception], object],
) -> None:
    """Store a batch; by halves, if the store does not take something in it.

    Args:
        send: stores things, or raises.
        batch: the things.
        give_up: told of what was not stored, and why: one thing; or all that was sent together,
            where the store is away, or takes nothing from us.
    """
    try:
        send(batch)
    except Exception as error:  # noqa: BLE001
        if len(batch) == 1 or verdict_on(error) in (Verdict.LATER, Verdict.BARRED):
            give_up(batch, error)
            return
        middle = len(batch) // 2
        store_by_halves(send, batch[:middle], give_up)
        store_by_halves(send, batch[middle:], give_up)


def _may_pass(error: BaseException) -> bool:
    return verdict_on(error) in (Verdict.LATER, Verdict.UNSURE)


def _pause(hurry: threading.Event, seconds: Any) -> None:
    hurry.wait(seconds)
