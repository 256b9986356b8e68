"""A FastAPI service with a trace for each request.

    python examples/fastapi_app.py

One line traces the service: TraceMiddleware around it, or app.add_middleware(TraceMiddleware).
It is asked here for an answer that is streamed, for one whose reader leaves early, for one that
it does not have, and for one where it meets a bug. What an endpoint opens nests under its request,
also in a thread of the pool and in a background task.

Traces go to MLFLOW_TRACKING_URI, or to ./mlflow.db if that is not set.
"""

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection

import mlflow
import uvicorn
from fastapi import BackgroundTasks, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from rich.console import Console

import spanguard
from spanguard import traced, traced_span
from spanguard.asgi import TraceMiddleware
from spanguard.render import TraceTree

ANSWERS = {"tea": "pour hot water on the leaves and wait", "rain": "again " * 10_000}

app = FastAPI()
# Around the whole app, the 500 of an unhandled exception has the request id as well.
service = TraceMiddleware(app, exclude=["/health"], capture_headers=["user-agent"])


@app.get("/health")
async def health() -> str:
    return "fine"


@traced(span_type="LLM", max_items=3)
async def generate(text: str) -> AsyncIterator[str]:
    for word in text.split():
        yield f"{word} "
        await asyncio.sleep(0.001)


@app.get("/answers/{topic}")
async def answer(topic: str, tasks: BackgroundTasks) -> StreamingResponse:
    """Stream an answer. The request's span ends with its last word."""
    with traced_span("look up", span_type="RETRIEVER", inputs=topic):
        text = ANSWERS.get(topic)
    if text is None:
        raise HTTPException(404)
    tasks.add_task(note, topic)
    return StreamingResponse(generate(text), background=tasks)


def note(topic: str) -> None:
    """Write down what was asked, after the response."""
    with traced_span("note", inputs=topic):
        pass


@app.get("/ratio/{whole}/{part}")
def ratio(whole: int, part: int) -> float:
    """Divide. No coroutine: it runs in a thread of the pool, under the request's span."""
    with traced_span("divide", inputs=[whole, part]):
        return whole / part


# ----------------------------------------------------------------------------------------------


@contextmanager
def serving() -> Iterator[int]:
    """Serve on a free port of this machine until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(service, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def get(port: int, path: str, *, leave_early: bool = False) -> None:
    """Ask the service, and print what it said and under which request id."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"User-Agent": "example"})
    response = connection.getresponse()
    body = response.read(20 if leave_early else None).decode()
    request_id = response.headers["x-request-id"]
    print(f"{response.status} {path}: {body!r}, request {request_id}")
    response.close()
    connection.close()


def main() -> None:
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri("sqlite:///mlflow.db")

    with serving() as port:
        get(port, "/health")
        get(port, "/answers/tea")
        get(port, "/answers/rain", leave_early=True)
        get(port, "/answers/nothing")
        get(port, "/ratio/1/0")

    spanguard.flush()
    for trace in reversed(mlflow.search_traces(max_results=4, return_type="list")):
        Console().print(TraceTree(trace))


if __name__ == "__main__":
    main()
