"""Attributes over the cap: they share one, so that MLflow keeps its own."""

from __future__ import annotations

import weakref

from spanguard._base.config import current_limits
from spanguard._base.findings import contained
from spanguard._mlflow import spans, writing
from spanguard._mlflow.shapes import MlflowSpan
from spanguard._record.payload import clean

__all__ = ["have_been", "set_or_fold", "write_folded"]


MORE_ATTRIBUTES = "spanguard.more_attributes"

_NOT_THE_USERS = ("mlflow.", "spanguard.")


def set_or_fold(span: MlflowSpan, name: str, value: object) -> None:
    """Set one attribute; where a span has no room for it, among those that share one."""
    with contained("recording an attribute"):
        cap = current_limits().attributes
        if writing.attribute_count(span) >= cap and _is_over(span, name, cap):
            _fold(span, name, value)
        else:
            span.set_attribute(name, clean(value))


def _is_over(span: MlflowSpan, name: str, cap: int) -> bool:
    names = spans.attribute_names(span)
    return name not in names and sum(not key.startswith(_NOT_THE_USERS) for key in names) >= cap


# Attributes over the cap. MLflow would make room for them by dropping its own trace id, which
# makes the trace unreadable; so they share one attribute. Keyed by the span, dropped with it.
_folded: weakref.WeakKeyDictionary[MlflowSpan, dict[str, object]] = weakref.WeakKeyDictionary()

# Not empty once there were some: it is asked at each end.
have_been: list[bool] = []


def _fold(span: MlflowSpan, name: str, value: object) -> None:
    more = _folded.setdefault(span, {})
    have_been[:] = [True]
    more[name] = clean(value)
    if len(more).bit_count() == 1:
        # Written at 1, 2, 4, 8 ... and at the end: each write encodes all of them.
        _write(span, more)


def write_folded(span: MlflowSpan) -> None:
    """Write what is still to be written of a span's attributes over the cap, at its end."""
    if span in _folded:
        with contained("recording attributes over the cap"):
            _write(span, _folded.pop(span))


def _write(span: MlflowSpan, more: dict[str, object]) -> None:
    span.set_attribute(MORE_ATTRIBUTES, clean(more))
