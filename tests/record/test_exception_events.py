"""What MLflow's page paints red, by an event named `exception`, is what failed; and nothing else.

The page itself, in a browser, is looked at in test_page.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import pytest
from mlflow.entities import Span, SpanEvent, SpanStatus, SpanStatusCode

import spanguard
from spanguard import TraceStateManager, guard, traced, traced_span
from spanguard.asgi import TraceMiddleware
from tests.store import Store, status

pytestmark = pytest.mark.versions

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


def reds(span: Span) -> list[SpanEvent]:
    """Return the events by which the page paints a span red."""
    return [event for event in span.events if event.name == "exception"]


def message(span: Span) -> str:
    (event,) = reds(span)
    return str(event.attributes["exception.message"])


def client() -> mlflow.MlflowClient:
    return mlflow.MlflowClient()


class Own(BaseException):
    pass


def stopped(raised: BaseException) -> Callable[[], None]:
    def run() -> None:
        with contextlib.suppress(type(raised)), traced_span("outer"), traced_span("inner"):
            raise raised

    return run


def a_cancelled_task() -> None:
    async def work() -> None:
        async with traced_span("work"):
            await asyncio.sleep(60)

    async def main() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())


def a_span_below_a_block_left_open() -> None:
    with traced_span("root") as root:
        traced_span("left").__enter__()
        client().start_span("raw left", root.trace_id, root.span_id)


def an_abandoned_generator() -> None:
    @traced
    def numbers() -> Any:
        yield 1
        yield 2

    with traced_span("root"):
        generator = numbers()
        generator.send(None)
        del generator
        gc.collect()


def an_abandoned_manager_span() -> None:
    manager = TraceStateManager()
    manager.push_trace("dropped")
    del manager
    gc.collect()


def a_status_by_hand() -> None:
    with traced_span("root") as span:
        span.set_status("ERROR")


def a_status_with_a_description() -> None:
    with traced_span("root") as span:
        span.set_status(SpanStatus(SpanStatusCode.ERROR, "the bank said no"))


def a_status_that_is_none() -> None:
    with traced_span("root") as span:
        span.set_status("FAILED")


def an_end_by_hand() -> None:
    with traced_span("root") as span:
        span.end(status="ERROR")


def pops() -> None:
    manager = TraceStateManager()
    manager.push_trace("root")
    manager.push_trace("child")
    manager.pop_trace(status="ERROR")
    manager.pop_trace(status=SpanStatusCode.ERROR)


def a_manager_that_closes() -> None:
    manager = TraceStateManager()
    manager.push_trace("root")
    manager.push_trace("child")
    manager.close()


def a_business_trace() -> None:
    manager = spanguard.CustomTraceManager()
    span = manager.start_custom_trace("ada", "pay")
    (custom_id,) = manager.active_traces
    manager.end_custom_trace(custom_id, status="ERROR")
    assert span is not None


def a_guarded_client() -> None:
    guarded = guard()
    root = guarded.start_trace("root")
    child = guarded.start_span("child", root.trace_id, root.span_id)
    guarded.end_span(root.trace_id, child.span_id, status="ERROR")
    guarded.end_trace(root.trace_id, status="ERROR")


def a_guarded_client_that_leaves_some_open() -> None:
    with guard() as guarded:
        root = guarded.start_trace("root")
        guarded.start_span("child", root.trace_id, root.span_id)


def the_closing_of_all() -> None:
    with contextlib.ExitStack():
        traced_span("root").__enter__()
        traced_span("child").__enter__()
        spanguard.close_open_spans()


def a_batch() -> None:
    with ThreadPoolExecutor(2) as pool:
        spanguard.trace_batch([1, 0, 2, 0], lambda n: 1 / n, name="batch", executor=pool)


def a_client_of_the_users() -> None:
    class Strange(mlflow.MlflowClient):
        def end_trace(self, trace_id: str, **kwargs: Any) -> None:
            super().end_trace(trace_id, **{**kwargs, "status": "ERROR"})

    with traced_span("root", client=Strange()):
        pass


def an_end_by_the_raw_client() -> None:
    with traced_span("root") as root, traced_span("child") as child:
        client().end_span(root.trace_id, child.span_id, status="ERROR")


def an_end_by_the_span_itself() -> None:
    with traced_span("root") as root:
        root.__wrapped__.end(status="ERROR")


def a_thread_that_failed() -> None:
    def work() -> None:
        traced_span("work").__enter__()
        raise ValueError("in the thread")

    threading.excepthook, before = (lambda args: None), threading.excepthook
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.excepthook = before
    spanguard.close_open_spans()


def a_response_of_500() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body"})

    asyncio.run(call(application))


def no_response() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        pass

    asyncio.run(call(application))


async def call(application: Any) -> None:
    async def send(message: Any) -> None:
        pass

    await TraceMiddleware(application)({"type": "http", "path": "/"}, None, send)


def an_event_that_was_pushed_out() -> None:
    with traced_span("root") as span:
        span.record_exception(ValueError("first"))
        for _ in range(200):
            span.add_event(SpanEvent("tick"))


def recorded_and_raised() -> None:
    with contextlib.suppress(ValueError), traced_span("root") as span:
        error = ValueError("twice")
        span.record_exception(error)
        raise error


FAILURES: list[Callable[[], None]] = [
    a_cancelled_task,
    a_span_below_a_block_left_open,
    an_abandoned_generator,
    an_abandoned_manager_span,
    a_status_by_hand,
    a_status_with_a_description,
    a_status_that_is_none,
    an_end_by_hand,
    pops,
    a_manager_that_closes,
    a_business_trace,
    a_guarded_client,
    a_guarded_client_that_leaves_some_open,
    the_closing_of_all,
    a_batch,
    a_client_of_the_users,
    an_end_by_the_raw_client,
    an_end_by_the_span_itself,
    a_thread_that_failed,
    a_response_of_500,
    no_response,
    an_event_that_was_pushed_out,
    recorded_and_raised,
]
RAISED: list[BaseException] = [
    ValueError("bad"),
    KeyboardInterrupt(),
    SystemExit(3),
    asyncio.CancelledError(),
    BaseExceptionGroup("many", [KeyboardInterrupt(), Own()]),
    Own("own"),
    MemoryError(),
]


@pytest.mark.parametrize(
    "fail",
    [*FAILURES, *(pytest.param(stopped(r), id=type(r).__name__) for r in RAISED)],
)
def test_a_failure_is_red_once_and_what_went_well_is_not(
    store: Store, fail: Callable[[], None]
) -> None:
    """An ERROR span has one event named `exception`, with type and message; an OK span none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fail()
    spans = [span for trace in store.traces() for span in trace.data.spans]
    assert "ERROR" in map(status, spans)
    for span in spans:
        assert len(reds(span)) == (status(span) == "ERROR"), span.name
        for event in reds(span):
            assert event.attributes["exception.type"]
            assert "exception.message" in event.attributes
            assert span.start_time_ns <= event.timestamp <= span.end_time_ns


WELL: dict[str, tuple[type[BaseException], tuple[type[BaseException], ...]]] = {
    "expected": (KeyError, (KeyError,)),
    "expected interrupt": (KeyboardInterrupt, (KeyboardInterrupt,)),
    "closed early": (GeneratorExit, ()),
    "exit with 0": (SystemExit, ()),
}


@pytest.mark.parametrize("way", WELL)
def test_what_is_not_an_error_is_not_red(store: Store, way: str) -> None:
    """A block left by an exception that is no error has no event named `exception`."""
    kind, expected = WELL[way]
    with contextlib.suppress(kind), traced_span("root", expected=expected):
        raise kind
    span = store.spans()["root"]
    assert (status(span), reds(span)) == ("OK", [])


def test_an_expected_exception_is_an_event_of_its_own(store: Store) -> None:
    """What was expected is told by type, message and stack trace, under another name."""
    with contextlib.suppress(KeyError), traced_span("root", expected=KeyError):
        raise KeyError("apple")
    (event,) = store.spans()["root"].events
    assert event.name == "expected_exception"
    assert event.attributes["exception.type"] == "KeyError"
    assert event.attributes["exception.message"] == "'apple'"
    assert __file__ in event.attributes["exception.stacktrace"]


def test_an_orphan_says_which_line_opened_it_and_who_closed_it(store: Store) -> None:
    """The event of an orphan names the opening line and the span that closed it."""
    with pytest.warns(spanguard.exceptions.OrphanedSpanWarning), traced_span("root") as root:
        line = sys._getframe().f_lineno + 1
        traced_span("left").__enter__()
    span = store.spans()["left"]
    assert reds(span)[0].attributes["exception.type"] == "orphaned"
    assert f"{__file__}:{line} in {sys._getframe().f_code.co_name}" in message(span)
    assert f"root ({root.span_id})" in message(span)


def test_an_orphan_that_had_an_error_status_says_both(store: Store) -> None:
    """A status set by hand does not hide from the event who left the span open."""
    with pytest.warns(spanguard.exceptions.OrphanedSpanWarning), traced_span("root"):
        traced_span("left").__enter__().set_status(SpanStatus("ERROR", "no money"))
    span = store.spans()["left"]
    assert "test_exception_events.py" in message(span)
    assert "no money" in span.status.description


def test_a_status_says_its_description(store: Store) -> None:
    """The description of a status that was set by hand is the event's message."""
    a_status_with_a_description()
    assert message(store.spans()["root"]) == "the bank said no"


def test_a_response_of_500_says_its_status(store: Store) -> None:
    """A request that failed without an exception says how in its event."""
    a_response_of_500()
    assert message(store.trace().data.spans[0]) == "HTTP 503"


def test_events_of_the_users_own_stay(store: Store) -> None:
    """Whoever records two exceptions has two events, and no third."""
    with contextlib.suppress(KeyError), traced_span("root") as span:
        span.record_exception(ValueError("one"))
        span.add_event(SpanEvent("exception", attributes={"exception.message": "two"}))
        raise KeyError("three")
    messages = [e.attributes["exception.message"] for e in reds(store.spans()["root"])]
    assert messages == ["one", "two", "'three'"]


def test_other_apis_spans_that_they_end_themselves_are_left_alone(store: Store) -> None:
    """What MLflow's own client opens and ends stays as MLflow records it."""
    with traced_span("root") as root:
        child = client().start_span("raw", root.trace_id, root.span_id)
        client().end_span(root.trace_id, child.span_id, status="ERROR")
    assert store.spans()["raw"].events == []


AT_EXIT = """
import os, signal, sys, time
import spanguard
spanguard.install_signal_handlers()
blocks = [spanguard.traced_span("root"), spanguard.traced_span("child")]
for block in blocks:
    block.__enter__()
if sys.argv[1] == "signal":
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
if sys.argv[1] == "raise":
    raise LookupError("the end")
"""


@pytest.mark.parametrize("way", ["return", "raise", "signal"])
def test_what_the_end_of_the_process_closes_is_red(store: Store, way: str) -> None:
    """Spans that the end of the process closes have one event that says why."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AT_EXIT, way],
        env={**os.environ, "MLFLOW_TRACKING_URI": store.uri},
        stderr=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.returncode == {"return": 0, "raise": 1, "signal": -signal.SIGTERM}[way]
    spans = store.spans()
    assert [status(spans[name]) for name in ("root", "child")] == ["ERROR", "ERROR"]
    for span in spans.values():
        assert ("the end" if way == "raise" else "closed by") in message(span)
