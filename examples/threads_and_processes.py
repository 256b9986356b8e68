"""One trace across threads, processes and asyncio tasks: `carry` takes the span along.

    python examples/threads_and_processes.py

Wherever the work runs, its spans nest under the span that was current where `carry` was called.
The worker processes need no set-up. Traces go to MLFLOW_TRACKING_URI, or to ./mlflow.db.
"""

import asyncio
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import mlflow
from rich.console import Console

import spanguard
from spanguard import carry, traced, traced_span
from spanguard.render import TraceTree


@traced
def download(page: str) -> str:
    """Wait for others: work for a thread."""
    return f"the text of {page}"


@traced
def count_words(text: str) -> int:
    """Keep a core busy: work for a process."""
    return len(text.split())


@traced
async def announce(total: int) -> str:
    """Wait without a thread: work for a task."""
    await asyncio.sleep(0)
    return f"{total} words"


async def announce_to(readers: int, total: int) -> list[str]:
    return await asyncio.gather(*(carry(announce)(total) for _ in range(readers)))


def main() -> None:
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri("sqlite:///mlflow.db")

    with traced_span("count a site") as root:
        with traced_span("download all"), ThreadPoolExecutor(2) as threads:
            texts = list(threads.map(carry(download), ["index", "news", "about"]))
        with (
            traced_span("count all"),
            ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes,
        ):
            counts = list(processes.map(carry(count_words), texts))
        with traced_span("announce all"):
            asyncio.run(announce_to(2, sum(counts)))
        root.set_outputs(sum(counts))

    spanguard.flush()
    trace = mlflow.get_trace(root.trace_id)
    print(f"{len(trace.data.spans)} spans in one trace")
    Console().print(TraceTree(trace))


if __name__ == "__main__":
    main()
