"""`deliver()`: whole traces to the store by one way of ours, for all spans of the process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, overload

from spanguard._base.config import is_set
from spanguard._base.findings import contained, logger, warn_once
from spanguard._base.site import user_site
from spanguard._base.values import kind_name, number_of, whole_number_of
from spanguard._delivery.counts import Delivery
from spanguard._delivery.settings import Settings
from spanguard._delivery.spill import prepare
from spanguard._mlflow import exporting, takeover
from spanguard.exceptions import SpanguardWarning

if TYPE_CHECKING:
    from spanguard._delivery.intake import TraceIntake

__all__ = ["deliver", "delivery"]


class _On:
    """Says that no argument was given."""

    def __repr__(self) -> str:
        return "<on>"


_ON: Final = _On()
_intake: TraceIntake | None = None  # what delivers, while anything does


@overload
def deliver(
    *,
    spill: str | os.PathLike[str] | None = ...,
    durable: bool = ...,
    max_pending_bytes: int = ...,
    batch_traces: int = ...,
    interval_seconds: float = ...,
) -> None: ...
@overload
def deliver(off: None, /) -> None: ...
def deliver(
    off: _On | None = _ON,
    /,
    *,
    spill: str | os.PathLike[str] | None = None,
    durable: bool = False,
    max_pending_bytes: int = 256 * 2**20,
    batch_traces: int = 200,
    interval_seconds: float = 1.0,
) -> None:
    """Deliver whole traces to the store from here on, many at a time, and lose none of a burst.

    One call at the start of the process. From then on every span of the process goes this way,
    whoever opened it: spanguard, MLflow's client, its fluent API, autologging. What arrives is
    what MLflow itself would store. The traced code is never kept waiting. Call it again to change
    the settings; `deliver(None)` goes back to MLflow's own way, and what is pending still arrives.

    It works for SQL stores and tracking servers. Where traces go elsewhere (Databricks, an
    OpenTelemetry endpoint), or this MLflow lacks what it takes, a warning says so, once, and
    MLflow delivers as before. `SPANGUARD_DELIVER=1` in the environment is as good as a call.

    Args:
        off: None goes back to MLflow's own way.
        spill: a folder for traces that cannot wait in memory: the store is down, slow or full, or
            the process ends before it has taken them. They are stored from there when the store
            is back, or by `spanguard replay`. It is made if it is not there.
        durable: have each trace on disk, in `spill`, before its root's end returns: then even a
            process that is killed loses no trace that had ended. It costs a write to the disk.
        max_pending_bytes: what may wait in memory for the store, in bytes. When it is more, the
            oldest traces go to disk; without `spill` they are dropped, and counted.
        batch_traces: how many traces go into one transaction or request at most.
        interval_seconds: how long a trace that has ended waits for others, in seconds.

    Raises:
        ValueError: an argument is no number, or one that makes no sense; or `durable` without
            `spill`.
        OSError: the folder cannot be written to. Nothing has changed then.

    >>> import spanguard
    >>> spanguard.deliver(batch_traces=100)
    >>> spanguard.deliver(None)
    """
    if off is None:
        _stop()
        return
    if durable and spill is None:
        raise ValueError("durable=True needs a folder: deliver(spill=..., durable=True).")
    settings = Settings(
        max_pending_bytes=_whole("max_pending_bytes", max_pending_bytes),
        batch_traces=_whole("batch_traces", batch_traces),
        interval_seconds=_seconds("interval_seconds", interval_seconds),
        spill=None if spill is None else prepare(spill),
        durable=bool(durable),
    )
    _start(settings)


def delivery() -> Delivery:
    """Return what became of the traces that ended in this process, in numbers.

    With `deliver()` they are exact, from the moment of its first call. Without it they are what
    MLflow lets us see: a span that it gives up in silence is not in them.

    >>> import spanguard
    >>> spanguard.delivery().dropped
    0
    """
    if _intake is not None:
        return _intake.report()
    ledger = exporting.ledger
    known = (ledger.stored, ledger.pending, ledger.dropped, ledger.refused_count)
    stored, pending, dropped, refused = known
    return Delivery(
        recorded=sum(known),
        stored=stored,
        pending=pending,
        dropped=dropped,
        refused=refused,
        last_error=ledger.last_error,
    )


def _whole(name: str, value: Any) -> int:
    number = whole_number_of(value)
    if number is None or number < 1:
        raise ValueError(f"{name} must be a positive whole number, not a {kind_name(value)}.")
    return number


def _seconds(name: str, value: Any) -> float:
    number = number_of(value)
    if number is None or not 0 < number <= 3600:
        raise ValueError(f"{name} must be a number of seconds from above 0 to 3600.")
    return number


def _start(settings: Settings) -> None:
    global _intake
    if _intake is None:
        _intake = _new_intake(settings)
    else:
        _intake.change(settings)
    takeover.make_stage = _intake.stage
    takeover.tell_why_not = _tell_why_not
    takeover.waits_for = _intake
    with contained("taking over the delivery of traces"):
        takeover.follow()


def _new_intake(settings: Settings) -> TraceIntake:
    # Here and not at the top: it brings SQLAlchemy and tenacity, which few need.
    from spanguard._delivery.intake import TraceIntake

    return TraceIntake(settings)


def _stop() -> None:
    takeover.make_stage = None
    if _intake is not None:
        _intake.take_over()  # what has ended, and what there is of traces that go on
    takeover.give_back()


def _tell_why_not(reason: str) -> None:
    text = f"spanguard.deliver() leaves the delivery to MLflow: {reason}."
    try:
        warn_once(text, SpanguardWarning, user_site(3))
    except Warning:  # `-W error`: not in the middle of the user's code
        logger.warning("%s", text)


def start_afresh_in_child() -> None:
    """In a forked child: what the parent delivers is the parent's."""
    global _intake
    takeover.forget_parents()
    if _intake is not None:
        settings, was_on = _intake.settings, takeover.make_stage is not None
        _intake = _new_intake(settings)
        takeover.waits_for = _intake
        takeover.make_stage = _intake.stage if was_on else None


def _from_environment() -> None:
    if is_set("SPANGUARD_DELIVER"):
        with contained("reading SPANGUARD_DELIVER"):
            deliver()


_from_environment()
