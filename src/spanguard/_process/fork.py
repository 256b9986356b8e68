"""A fork: what it waits for, and what a child begins with."""

from __future__ import annotations

import time

from spanguard._base import locks
from spanguard._base.findings import contained
from spanguard._mlflow import fork, queue
from spanguard._process import exit, flush, listening, outliving
from spanguard._process.flush import HandingOver

__all__ = ["before_fork", "go_on_in_parent"]

FORK_SECONDS = 4.0
"""How long a fork waits, in all, for threads that are at the store or inside an import."""


def before_fork() -> None:
    """Let no thread be at the store or inside an import while the process forks."""
    deadline = time.monotonic() + FORK_SECONDS
    with contained("preparing a fork"):
        # What is stored now does not compete with the child's own for the database. Mostly
        # nothing is pending, and nothing is waited for.
        if fork.has_pending():
            queue.hand_over()
            queue.await_stored(FORK_SECONDS / 2)
        fork.pause_stores(deadline)
    locks.before_fork(deadline)  # last: meanwhile a thread may have begun an import


def go_on_in_parent() -> None:
    """Let the threads of the parent go on to the store."""
    with contained("going on after a fork"):
        fork.resume_stores()


def start_afresh_in_child() -> None:
    """In a forked child: the parent's spans are the parent's to end and to store."""
    flush.handing_over = HandingOver()
    exit.is_behind = exit.is_registered_before_joins = False
    with contained("forgetting the parent's spans in a forked child"):
        outliving.forget_waiting()
        listening.forget_all()
    with contained("starting tracing afresh in a forked child"):
        fork.start_afresh_in_child()
