"""From the raw client to spanguard: the same job twice, and what is in the store afterwards.

    python examples/migrate_from_raw_client.py

The job fetches three pages and gives each of them a moment; the third is too slow, and asyncio
cancels it. `before` is the way MLflow's client is used by hand: try, except, else. It looks
complete, but a CancelledError is no Exception, so nobody ends the span of the third page, and
MLflow then never finishes the trace. `after` is the same job with traced_span.

Both run in a process of their own, which ends like any program does. Then their traces are read
back. They go to MLFLOW_TRACKING_URI, or to ./mlflow.db if that is not set.
"""

import asyncio
import os
import subprocess
import sys
import uuid

import mlflow
from mlflow import MlflowClient
from rich.console import Console

from spanguard import traced_span
from spanguard.render import TraceTree

PAGES = {"index": 0.0, "news": 0.0, "slow": 5.0}


async def fetch(page: str) -> str:
    await asyncio.sleep(PAGES[page])
    return f"<h1>{page}</h1>"


# -- before ------------------------------------------------------------------------------------


async def fetch_before(client: MlflowClient, page: str, trace_id: str, parent_id: str) -> str:
    span = client.start_span(
        name=f"fetch {page}", trace_id=trace_id, parent_id=parent_id, inputs={"page": page}
    )
    try:
        html = await fetch(page)
    except Exception as error:
        client.end_span(trace_id, span.span_id, status="ERROR", attributes={"error": str(error)})
        raise
    else:
        client.end_span(trace_id, span.span_id, outputs=html)
        return html


async def before(client: MlflowClient, label: str) -> None:
    root = client.start_trace("crawl", tags={"label": label})
    for page in PAGES:
        try:
            await asyncio.wait_for(
                fetch_before(client, page, root.trace_id, root.span_id), timeout=0.1
            )
        except asyncio.TimeoutError:
            print(f"before: {page} timed out, the crawl goes on")
    client.end_trace(root.trace_id)


# -- after -------------------------------------------------------------------------------------


async def fetch_after(client: MlflowClient, page: str, trace_id: str, parent_id: str) -> str:
    # The same client and ids as before. Without them the span finds its parent by itself:
    # traced_span(f"fetch {page}", inputs=...).
    with traced_span(client, f"fetch {page}", trace_id, parent_id, inputs={"page": page}) as span:
        html = await fetch(page)
        span.set_outputs(html)
        return html


async def after(client: MlflowClient, label: str) -> None:
    with traced_span(client, "crawl", tags={"label": label}) as root:
        for page in PAGES:
            try:
                await asyncio.wait_for(
                    fetch_after(client, page, root.trace_id, root.span_id), timeout=0.1
                )
            except asyncio.TimeoutError:
                print(f"after: {page} timed out, the crawl goes on")


# -- both, and a look at the store -------------------------------------------------------------


def run_both(run: str) -> None:
    client = MlflowClient()
    asyncio.run(before(client, f"before-{run}"))
    asyncio.run(after(client, f"after-{run}"))


def main() -> None:
    uri = os.environ.setdefault("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    mlflow.set_tracking_uri(uri)
    if len(sys.argv) == 2:
        return run_both(sys.argv[1])

    run = uuid.uuid4().hex[:8]
    subprocess.run([sys.executable, __file__, run], check=True)
    for label in ("before", "after"):
        found = mlflow.search_traces(
            filter_string=f"tag.label = '{label}-{run}'", return_type="list"
        )
        traces = "1 readable trace" if len(found) == 1 else f"{len(found)} readable traces"
        print(f"\n{label}: {traces} in the store")
        for trace in found:
            Console().print(TraceTree(trace))
    return None


if __name__ == "__main__":
    main()
