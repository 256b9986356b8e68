"""A streaming answer, traced: one reader takes it all, the other hangs up early.

    python examples/async_streaming.py

The span of a traced generator is open from its first step to its last, and is the current span
only while the generator itself runs, never in its reader. To hang up is no error: such a span is
OK, with the outcome `closed_early`. Traces go to MLFLOW_TRACKING_URI, or to ./mlflow.db.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing

import mlflow

import spanguard
from spanguard import traced, traced_span

ANSWER = ["Spans", "always", "close", ",", "once", ",", "in", "order", "."]


@traced(output_reducer=" ".join)
async def answer(question: str) -> AsyncIterator[str]:
    """Stream an answer word by word, as a language model does."""
    for word in ANSWER:
        await asyncio.sleep(0)
        yield word


async def read_all() -> None:
    with traced_span("patient reader"):
        async for _ in answer("What does spanguard do?"):
            pass


async def hang_up_after(words: int) -> None:
    with traced_span("impatient reader"):
        # aclosing() tells the generator at once that its reader has gone.
        async with aclosing(answer("What does spanguard do?")) as stream:
            async for _ in stream:
                words -= 1
                if not words:
                    break


async def serve_both() -> str:
    with traced_span("serve") as root:
        await asyncio.gather(read_all(), hang_up_after(3))
        return root.trace_id


def main() -> None:
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri("sqlite:///mlflow.db")
    trace_id = asyncio.run(serve_both())

    spanguard.flush()
    spans = mlflow.get_trace(trace_id).data.spans
    reader = {span.span_id: span.name for span in spans}
    for span in spans:
        if span.name == "answer":
            outcome = span.get_attribute("spanguard.outcome") or "ok"
            status = span.status.status_code.value
            print(f"{reader[span.parent_id]}: {status}, {outcome}, {span.outputs!r}")


if __name__ == "__main__":
    main()
