"""A store that others ask or keep locked, and its traces by name."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tests.store import Store


def in_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def named(store: Store) -> dict[str, Any]:
    return {trace.info.tags["mlflow.traceName"]: trace for trace in store.traces()}


@contextmanager
def locked(store: Store, lock: str = "exclusive") -> Iterator[None]:
    """Keep the store from answering, or from writing (`immediate`): another connection has it."""
    connection = sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
    try:
        connection.execute(f"begin {lock}")
        yield
    finally:
        connection.close()


def asking() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "spanguard-ask"]
