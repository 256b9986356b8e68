"""Work for other processes. They import it by name: it lives in a module of its own."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow

from spanguard import guard, traced, traced_span
from spanguard.exceptions import SpanguardWarning
from tests.store import await_true


def job(number: int) -> int:
    """Open a span and one more below it, by MLflow's own API; return the process's id."""
    with traced_span("job", inputs=number) as span:
        with mlflow.start_span("step"):
            span.set_attribute("pid", os.getpid())
    return os.getpid()


@traced
def traced_job(number: int) -> int:
    return 2 * number


def at_once(work: Callable[[int], int], numbers: list[int]) -> None:
    """Do jobs in as many threads of this process, which begin together."""
    barrier = threading.Barrier(len(numbers))

    def begin(number: int) -> None:
        barrier.wait(30)
        work(number)

    with ThreadPoolExecutor(len(numbers)) as pool:
        list(pool.map(begin, numbers))


def at_once_each(works: list[Callable[[int], int]], numbers: list[int]) -> None:
    """Do the jobs of several roots in threads that begin together; an unexpected warning fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpanguardWarning)
        with ThreadPoolExecutor(len(works)) as pool:
            list(pool.map(at_once, works, [numbers] * len(works)))


def call_pickled(work: bytes, number: int) -> int:
    return int(pickle.loads(work)(number))


def failing_job(number: int) -> int:
    with traced_span("job", inputs=number):
        raise KeyError(f"no {number}")


def job_at(gate: str) -> int:
    """Do the job once there is a file at this path; say before that it is being waited for."""
    Path(f"{gate}.waiting").touch()
    await_true(Path(gate).exists)
    return job(0)


def leave_after(work: Callable[[int], Any], number: int) -> None:
    """Leave the process without any way out right after some work."""
    work(number)
    os._exit(0)


def killed_mid_job(number: int) -> None:
    with traced_span("killed", inputs=number):
        with traced_span("before the end"):
            pass
        os.kill(os.getpid(), signal.SIGKILL)


def killed_once(number: int, marker: str) -> int:
    """Kill the process of job 5, the first time."""
    if number == 5 and not Path(marker).exists():
        Path(marker).touch()
        killed_mid_job(number)
    return job(number)


def job_by_job(count: int) -> Iterator[int]:
    for number in range(count):
        yield job(number)


def exhaust(generate: Callable[[int], Iterator[int]], count: int) -> list[int]:
    return list(generate(count))


def leaking_job(number: int) -> None:
    """Leave a span open."""
    entered = traced_span("leaked", inputs=number)
    entered.__enter__()
    leaked.append(entered)


leaked: list[Any] = []


def raw_job(number: int) -> None:
    """Do as code for the raw client does, and leave a span open."""
    client = guard(mlflow.MlflowClient())
    root = client.start_trace("raw job", inputs=number)
    client.start_span("leaked", root.trace_id, root.span_id)
    client.end_trace(root.trace_id)
