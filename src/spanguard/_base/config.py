"""What the user can set: strictness, and the size caps on what is recorded."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass, replace
from typing import Any, cast

from spanguard._base.settings import Mark, Setting, innermost
from spanguard._base.values import kind_name, number_of, truth_of, whole_number_of

__all__ = [
    "LONGEST_WAIT",
    "Limits",
    "MAX_ATTRIBUTES",
    "MAX_MESSAGE_CHARS",
    "MAX_VALUE_CHARS",
    "STRICT_VARIABLE",
    "StrictSetting",
    "current_limits",
    "is_set",
    "is_strict",
    "limits",
    "strict",
    "waiting_time",
]


STRICT_VARIABLE = "SPANGUARD_STRICT"

MAX_VALUE_CHARS = 1_000_000
"""Characters that one payload (inputs, outputs, or the value of one attribute) may hold."""

MAX_MESSAGE_CHARS = 10_000
"""Characters that an exception's message, and its stack trace, may each hold."""

MAX_ATTRIBUTES = 96
"""Attributes on one span. MLflow keeps 128 and drops the oldest, its own trace id first."""

EXIT_SECONDS = 30.0
"""Seconds that the exit of the process, or a handled signal, waits for the store."""

OUTLIVE_SECONDS = 60.0
"""Seconds that a root waits for what runs on under it after its block is left."""

LONGEST_WAIT = threading.TIMEOUT_MAX / 2
"""Seconds that stand for "without a limit": locks and threads take no more than twice as many."""


def waiting_time(seconds: object) -> float | None:
    """Return a number of seconds that locks and threads can wait; None if it is not a number.

    None and infinity are as long as it takes, and what is negative is no time at all.
    """
    if seconds is None:
        return LONGEST_WAIT
    number = number_of(seconds)
    if number is None or number != number:
        return None
    return float(min(max(number, 0.0), LONGEST_WAIT))


# -- strictness ------------------------------------------------------------------------------


class StrictSetting(Setting):
    """What `strict()` returns: in force for the process, or a with-block."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def _apply(self) -> None:
        global _process_setting
        _process_setting = Mark(self, {"enabled": self.enabled}, _process_setting)

    def _withdraw(self) -> None:
        global _process_setting
        if _process_setting is not None:
            _process_setting = _process_setting.without(self)

    def _value(self) -> bool:
        return self.enabled

    def __enter__(self) -> StrictSetting:
        super().__enter__()
        return self


_process_setting: Mark | None = None


def strict(enabled: bool = True) -> StrictSetting:
    """Make broken rules raise, for the whole process or for one block.

    Called plainly it sets strictness for the process. Used as a with-block it holds for that
    block in this context (thread or task) only, from its first instruction to its last, and no
    other thread ever sees it. A `strict=` argument wins over both; the environment variable
    `SPANGUARD_STRICT=1` is the default under both. A strict error is raised after everything is
    closed and recorded, and never in place of an exception of yours.

    >>> import spanguard
    >>> with spanguard.strict():
    ...     pass
    """
    wanted = truth_of(enabled)
    if wanted is None:
        raise ValueError(f"enabled must be True or False, not a {kind_name(enabled)}")
    setting = StrictSetting(wanted)
    setting.called_from(sys._getframe(1))
    return setting


def is_strict(override: bool | None = None) -> bool:
    """Tell whether a broken rule raises here: argument, block, process, environment, in order."""
    if override is not None:
        wanted = truth_of(override)
        if wanted is not None:  # else it does not tell: as if it were not given
            return wanted
    block = innermost(StrictSetting)
    if block is not None:
        return bool(block)
    if _process_setting is not None:
        return bool(_process_setting.values["enabled"])
    return is_set(STRICT_VARIABLE)


def is_set(variable: str) -> bool:
    """Tell whether a variable of the environment switches something on."""
    return os.environ.get(variable, "").strip().lower() in {"1", "true", "yes", "on"}


# -- size caps -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """The caps in force. `limits()` changes them."""

    value_chars: int = MAX_VALUE_CHARS
    message_chars: int = MAX_MESSAGE_CHARS
    attributes: int = MAX_ATTRIBUTES
    exit_seconds: float = EXIT_SECONDS
    outlive_seconds: float = OUTLIVE_SECONDS


class LimitsSetting(Setting):
    """What `limits()` returns: in force for the process, or a with-block."""

    def __init__(self, changes: dict[str, Any]) -> None:
        self._changes = changes
        self.limits = replace(current_limits(), **changes)

    def _apply(self) -> None:
        _set_process_limits(Mark(self, self._changes, _process_limits))

    def _withdraw(self) -> None:
        if _process_limits is not None:
            _set_process_limits(_process_limits.without(self))

    def _value(self) -> Limits:
        global _has_blocks
        _has_blocks = True
        self.limits = replace(current_limits(), **self._changes)
        return self.limits

    def __enter__(self) -> Limits:
        return cast("Limits", super().__enter__())


def _set_process_limits(mark: Mark | None) -> None:
    global _limits, _process_limits
    _process_limits = mark
    _limits = Limits(**(mark.all_values() if mark is not None else {}))


_process_limits: Mark | None = None
_limits = Limits()
# Whether a block was ever entered: who enters none pays nothing for them.
_has_blocks = False


def current_limits() -> Limits:
    """Return the caps in force here."""
    if _has_blocks:
        block = innermost(LimitsSetting)
        if block is not None:
            return cast("Limits", block)
    return _limits


def _number_or_type(value: object) -> str:
    """Return a number, to be shown; of anything else its type: it may have no text."""
    number = number_of(value)
    is_short = number is not None and -1e15 < number < 1e15
    return repr(number) if is_short else f"a {kind_name(value)}"


def limits(
    *,
    value_chars: int | None = None,
    message_chars: int | None = None,
    attributes: int | None = None,
    exit_seconds: float | None = None,
    outlive_seconds: float | None = None,
) -> LimitsSetting:
    """Set the caps of this process; as a with-block, those of this thread or task for its length.

    Args:
        value_chars: characters that one payload may hold; the rest is cut and counted.
        message_chars: characters of an exception's message and of its stack trace.
        attributes: attributes on one span; what is over goes into `spanguard.more_attributes`.
            At most 96: above that MLflow starts to drop its own.
        exit_seconds: seconds that the exit of the process waits for the store; infinity is as
            long as it takes.
        outlive_seconds: seconds that a root waits, after its block is left, for tasks, jobs and
            streams that were begun under it and run on. What is open then is an orphan.

    Raises:
        ValueError: a size is not a positive whole number, `attributes` is above 96, or a number of
            seconds is negative or not a number.

    >>> import spanguard
    >>> with spanguard.limits(value_chars=200) as caps:
    ...     caps.value_chars
    200
    """
    given = {"value_chars": value_chars, "message_chars": message_chars, "attributes": attributes}
    changes: dict[str, Any] = {}
    for name, cap in given.items():
        if cap is not None:
            size = whole_number_of(cap)
            if size is None or size < 1:
                raise ValueError(
                    f"{name} must be a positive whole number, not {_number_or_type(cap)}"
                )
            changes[name] = size
    if changes.get("attributes", 0) > MAX_ATTRIBUTES:
        raise ValueError(
            f"attributes must be at most {MAX_ATTRIBUTES}, not {_number_or_type(attributes)}"
        )
    for name, time in (("exit_seconds", exit_seconds), ("outlive_seconds", outlive_seconds)):
        if time is not None:
            seconds = number_of(time)
            if seconds is None or not seconds >= 0:
                raise ValueError(f"{name} must be a number of seconds, not {_number_or_type(time)}")
            changes[name] = min(seconds, LONGEST_WAIT)
    setting = LimitsSetting(changes)
    setting.called_from(sys._getframe(1))
    return setting
