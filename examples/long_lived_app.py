"""Push and pop in an app that lives on callbacks, where no with-block fits.

    python examples/long_lived_app.py

Two apps, one for each scope of TraceStateManager:

- A chat server. Each session is an asyncio task of its own, and its callbacks run there:
  scope "context" gives every session its own stack, so that sessions do not mix.
- A nightly batch. Stages begin in the main thread and finish in whatever thread did the work:
  scope "process" is one stack that all threads share.

Traces go to MLFLOW_TRACKING_URI, or to ./mlflow.db if that is not set.
"""

import asyncio
import os
import threading
import warnings

import mlflow
from rich.console import Console

import spanguard
from spanguard import OrphanedSpanWarning, TraceStateManager, traced_span
from spanguard.render import TraceTree

# -- a chat server: one stack for each session -------------------------------------------------

sessions = TraceStateManager()


class ChatSession:
    """Callbacks as a server would call them: the one that starts a span does not end it."""

    def __init__(self, user: str) -> None:
        self.user = user

    def on_open(self) -> None:
        self.span = sessions.push_trace("chat session", new_trace=True, user=self.user)

    def on_message(self, text: str) -> None:
        sessions.push_trace("message", inputs=text)
        with traced_span("moderate"):  # nests under what was pushed
            self.is_clean = "spam" not in text

    def on_reply(self, text: str) -> None:
        sessions.pop_trace(outputs=text, attributes={"clean": self.is_clean})

    def on_close(self) -> None:
        # By handle: whatever is still open in the session is closed first, as an orphan.
        sessions.pop_trace(self.span)


async def serve(user: str, *, hangs_up: bool = False) -> None:
    """Deliver the events of one session."""
    session = ChatSession(user)
    session.on_open()
    for text in ("hello", "more, please"):
        session.on_message(text)
        await asyncio.sleep(0.01)  # here the other sessions run
        if hangs_up and text != "hello":
            break  # the user is gone: on_reply never comes
        session.on_reply(f"{user}: {text}!")
    session.on_close()


async def serve_all() -> None:
    await asyncio.gather(serve("ada"), serve("bob", hangs_up=True), serve("cy"))


# -- a nightly batch: one stack for the process ------------------------------------------------

batch = TraceStateManager(scope="process")


def start_stage(name: str, work: threading.Thread) -> None:
    batch.push_trace(name, span_type="TASK")
    work.start()


def stage_done(result: str) -> None:
    """End the stage on top of the stack; called in the thread that did the work."""
    batch.pop_trace(outputs=result, attributes={"by": threading.current_thread().name})


def run_batch() -> None:
    batch.push_trace("nightly batch", tags={"app": "batch"})
    for name in ("extract", "load"):
        work = threading.Thread(target=stage_done, args=(f"{name}: 3 rows",), name=f"{name}-1")
        start_stage(name, work)
        work.join()
    batch.pop_trace()


# ----------------------------------------------------------------------------------------------


def main() -> None:
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri("sqlite:///mlflow.db")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", OrphanedSpanWarning)
        asyncio.run(serve_all())
        run_batch()
    for warning in caught:
        if issubclass(warning.category, OrphanedSpanWarning):
            print(f"spanguard noticed: {warning.message}\n")

    spanguard.flush()
    for trace in reversed(mlflow.search_traces(max_results=4, return_type="list")):
        Console().print(TraceTree(trace))


if __name__ == "__main__":
    main()
