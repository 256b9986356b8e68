"""What MLflow swallows in the middle of a start or an end: its log line tells."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

__all__ = ["hear_of_swallowed"]


_SWALLOWING = ("mlflow.entities.span", "mlflow.tracing.fluent", "mlflow.tracking.client")


class _Swallowed(logging.Filter):
    """Sees what MLflow swallows: it writes its line while the exception is being handled."""

    def __init__(self, tell: Callable[[BaseException], object]) -> None:
        super().__init__()
        self._tell = tell

    def filter(self, record: logging.LogRecord) -> bool:
        error = sys.exc_info()[1]
        if error is not None:
            self._tell(error)
        return True


def hear_of_swallowed(tell: Callable[[BaseException], object]) -> None:
    """Tell of each exception that MLflow's start or end of a span swallows, in its thread."""
    for name in _SWALLOWING:
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Swallowed) for one in logger.filters):
            logger.addFilter(_Swallowed(tell))
