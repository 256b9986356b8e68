"""Whose tracking URI is in force: jobs from processes with different ones take turns."""

from __future__ import annotations

import threading
import uuid
from typing import cast

from spanguard._mlflow import destination
from spanguard._process import registry
from spanguard._propagation.remote_work import HAND_OVER_SECONDS, Captured
from spanguard.exceptions import TraceLostError

__all__ = ["leave_destination", "process_token", "take_destination"]


process_token = uuid.uuid4().hex  # a pid may be the same in the next container


def start_afresh_in_child() -> None:
    """Be another process, in a forked child, with no destination set for others."""
    global _destination, jobs, process_token
    process_token = uuid.uuid4().hex
    _destination, jobs = threading.Condition(), 0


# MLflow has one tracking URI for all threads, and names a new one before it has let go of the old
# provider: jobs from processes with different ones take turns.
_destination = threading.Condition()
jobs = 0  # that count on the URI as it is


def take_destination(context: Captured, may_wait: bool) -> TraceLostError | None:
    """Send traces where they go in the process that a context comes from, until it is left.

    Jobs for another store are waited for, where that may be, 5 seconds at most. A finding, where
    traces go on to another store: a change of the URI would lose every trace that is open here.
    """
    global jobs
    uri = cast("str", context.tracking_uri)
    with _destination:
        if may_wait:
            _destination.wait_for(
                lambda: not jobs or destination.tracking_uri() == uri, HAND_OVER_SECONDS
            )
        if destination.tracking_uri() == uri or not (jobs or registry.open_entries()):
            destination.adopt_destination(uri, context.experiment_id)
            jobs += 1
            return None
    return TraceLostError(
        "A carried call comes from a process with another tracking URI, and spans of this "
        "process are open: its spans go to this process's own store. Give both processes the "
        "same tracking URI.",
        trace_id=context.trace_id,
    )


def leave_destination() -> None:
    global jobs
    with _destination:
        jobs -= 1
        _destination.notify_all()
