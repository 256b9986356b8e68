"""What a fork asks of every room of this house, in one order: the lowest layer first."""

from __future__ import annotations

import os

from spanguard._api import active_traces, frames
from spanguard._base import locks
from spanguard._base.findings import contained
from spanguard._delivery import deliver
from spanguard._lifecycle import chosen_ids
from spanguard._mlflow import ids
from spanguard._process import fork, signals, watchdog
from spanguard._propagation import destinations

# Locks first: whatever comes after them may wait for one that a thread of the parent held.
_ROOMS = (
    locks,
    ids,
    deliver,
    fork,
    signals,
    watchdog,
    chosen_ids,
    destinations,
    frames,
    active_traces,
)


def start_afresh_in_child() -> None:
    """In a forked child: let each room forget what is the parent's."""
    for room in _ROOMS:
        with contained(f"starting afresh in a forked child: {room.__name__}"):
            room.start_afresh_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=fork.before_fork,
        after_in_parent=fork.go_on_in_parent,
        after_in_child=start_afresh_in_child,
    )
