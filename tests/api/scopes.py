"""Push and pop in both scopes, and in another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

BOTH_SCOPES = pytest.mark.parametrize("scope", ["context", "process"])


def in_thread(work: Callable[[], Any]) -> Any:
    """Run in another thread and return what it returned."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]
