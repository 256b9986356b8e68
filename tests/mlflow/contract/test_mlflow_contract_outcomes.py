"""What MLflow records of statuses and exceptions."""

from __future__ import annotations

import asyncio
import builtins
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient, MlflowException
from mlflow.entities import SpanEvent, SpanStatus, SpanStatusCode
from opentelemetry import trace as otel

from tests.mlflow.contract.raw_client import (
    LOG_LEVELS,
    child_of,
    end,
    is_open,
    left_at_exit,
    names,
    of_waiting_roots,
    state_of,
    stored_spans,
)
from tests.store import Store, status

pytestmark = pytest.mark.versions

BASE_EXCEPTIONS: list[type[BaseException]] = [
    KeyboardInterrupt,
    SystemExit,
    GeneratorExit,
    asyncio.CancelledError,
]


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no str")


def test_fluent_spans_record_an_interrupt_as_ok_and_without_an_event(store: Store) -> None:
    errors = [kind() for kind in BASE_EXCEPTIONS]
    group = getattr(builtins, "BaseExceptionGroup", None)  # Python 3.11
    if group is not None:
        errors.append(group("group", [KeyboardInterrupt()]))
    for error in errors:
        kind = type(error)

        def fail(error: BaseException = error) -> None:
            raise error

        with pytest.raises(kind):
            with mlflow.start_span(f"{kind.__name__} root"):
                with mlflow.start_span(f"{kind.__name__} child"):
                    fail()
        with pytest.raises(kind):
            mlflow.trace(fail, name=f"{kind.__name__} function")()
    spans = store.spans()
    assert len(spans) == 3 * len(errors)
    assert {status(span) for span in spans.values()} == {"OK"}
    assert not any(span.events for span in spans.values())


def test_the_documented_recipe_never_ends_the_span_of_an_interrupt(
    store: Store, client: MlflowClient
) -> None:
    left = []
    for kind in BASE_EXCEPTIONS:
        root = client.start_trace("root")
        span = child_of(root)
        with pytest.raises(kind):
            try:
                try:
                    raise kind
                except Exception as error:
                    end(span, status="ERROR", attributes={"error": str(error)})
                    raise
            finally:
                client.end_trace(root.trace_id)
        left.append(span)
    assert all(is_open(span) for span in left)
    assert names(left_at_exit(store)) == of_waiting_roots(len(BASE_EXCEPTIONS))
    assert stored_spans(store.path) == ["root"] * len(BASE_EXCEPTIONS)


def test_record_exception_refuses_what_is_no_exception_but_an_event_takes_it(
    store: Store, client: MlflowClient
) -> None:
    root = client.start_trace("root")
    for kind in BASE_EXCEPTIONS:
        with pytest.raises(MlflowException, match="must be an Exception instance"):
            root.record_exception(kind())
        root.add_event(SpanEvent.from_exception(kind()))
    client.end_trace(root.trace_id)
    events = store.spans()["root"].events
    assert [event.attributes["exception.type"] for event in events] == [
        kind.__name__ for kind in BASE_EXCEPTIONS
    ]


def test_end_span_overwrites_the_recorded_error(store: Store, client: MlflowClient) -> None:
    root = client.start_trace("root")

    def failed(name: str) -> Any:
        span = child_of(root, name)
        span.record_exception(ValueError("boom"))
        assert (status(span), span.status.description) == ("ERROR", "ValueError: boom")
        return span

    end(failed("by default"))
    end(failed("ERROR"), status="ERROR")
    end(failed("None"), status=None)
    failed("LiveSpan.end").end()
    client.end_trace(root.trace_id)
    spans = store.spans()
    found = {name: (status(span), span.status.description) for name, span in spans.items()}
    assert found == {
        "root": ("OK", ""),
        "by default": ("OK", ""),
        "ERROR": ("ERROR", ""),
        "None": ("ERROR", "ValueError: boom"),
        "LiveSpan.end": ("ERROR", "ValueError: boom"),
    }
    assert state_of(store.trace()) == "OK"


def test_ok_is_final_for_opentelemetry(store: Store, client: MlflowClient) -> None:
    """Why spanguard writes `_status` itself where ERROR follows OK."""
    root = client.start_trace("root")
    root.set_status("OK")
    root.set_status(SpanStatus(SpanStatusCode.ERROR, "too late"))
    root.record_exception(ValueError("too late"))
    assert status(root) == "OK"
    client.end_trace(root.trace_id, status="ERROR")
    assert status(store.spans()["root"]) == "OK"

    other = client.start_trace("other")
    other.set_status("OK")
    other._span._status = otel.Status(otel.StatusCode.ERROR, "in time")
    other.end()
    assert status(store.spans()["other"]) == "ERROR"


def test_an_invalid_status_leaves_the_span_open_and_loses_the_trace(
    store: Store, client: MlflowClient
) -> None:
    for wrong in ("FAILED", "ok", 1):
        root = client.start_trace("root")
        child = child_of(root)
        end(child, status=wrong)
        assert is_open(child)
        with pytest.raises((MlflowException, AttributeError)):
            child.set_status(wrong)
        client.end_trace(root.trace_id)
    root = client.start_trace("root with it")
    client.end_trace(root.trace_id, status="FAILED")
    assert is_open(root)
    assert names(left_at_exit(store)) == of_waiting_roots(3)
    assert stored_spans(store.path) == ["root"] * 3


def test_an_exception_that_cannot_be_printed_is_replaced(
    store: Store, client: MlflowClient
) -> None:
    with pytest.raises(RuntimeError, match="no str"):
        with mlflow.start_span("fluent"):
            raise UnprintableError
    root = client.start_trace("raw")
    with pytest.raises(RuntimeError, match="no str"):
        root.record_exception(UnprintableError())
    client.end_trace(root.trace_id)
    spans = store.spans()
    assert {name: status(span) for name, span in spans.items()} == {"fluent": "OK", "raw": "OK"}
    assert not any(span.events for span in spans.values())


def test_a_long_message_is_stored_whole_and_twice(store: Store, client: MlflowClient) -> None:
    root = client.start_trace("root")
    root.record_exception(ValueError("x" * 100_000))
    root.end()
    (event,) = store.spans()["root"].events
    assert event.attributes["exception.message"].count("x") == 100_000
    assert event.attributes["exception.stacktrace"].count("x") >= 100_000


@pytest.mark.skipif(not LOG_LEVELS, reason="spans have no log level in this MLflow")
def test_an_exception_event_raises_the_log_level_but_not_through_opentelemetry(
    store: Store, client: MlflowClient
) -> None:
    loud, quiet = client.start_trace("loud"), client.start_trace("quiet")
    event = SpanEvent.from_exception(ValueError("boom"))
    loud.add_event(event)
    quiet._span.add_event(event.name, event.attributes, event.timestamp)
    loud.end()
    quiet.end()
    spans = store.spans()
    levels = {name: span.get_attribute("mlflow.spanLogLevel") for name, span in spans.items()}
    assert levels["loud"] > levels["quiet"]
    assert {len(span.events) for span in spans.values()} == {1}


def test_more_than_128_events_push_out_the_oldest(store: Store, client: MlflowClient) -> None:
    root = client.start_trace("root")
    for number in range(130):
        root.add_event(SpanEvent(f"event {number}"))
    client.end_trace(root.trace_id)
    events = store.spans()["root"].events
    assert len(events) == 128
    assert events[0].name == "event 2"
