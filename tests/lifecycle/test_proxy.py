"""What is written through the span of a block is recorded, or a warning: never an error."""

from __future__ import annotations

from typing import Any

import mlflow
import pytest
from mlflow.entities import SpanEvent, SpanStatus, SpanStatusCode

import spanguard
from spanguard import traced_span
from tests.store import Store, own_attributes, status

pytestmark = pytest.mark.versions


def test_record_exception_stays_an_error(store: Store) -> None:
    with traced_span("span") as span:
        span.record_exception(ValueError("bad"))
        span.set_status("OK")
    stored = store.spans()["span"]
    assert status(stored) == "ERROR"
    assert stored.get_attribute("error_type") == "ValueError"
    assert [event.name for event in stored.events] == ["exception"]


@pytest.mark.parametrize("exception", [KeyboardInterrupt("stop"), "a message", 17])
def test_record_exception_takes_anything(store: Store, exception: Any) -> None:
    with traced_span("span") as span:
        span.record_exception(exception)
    assert status(store.spans()["span"]) == "ERROR"


def test_an_exception_recorded_and_reraised_is_one_event(store: Store) -> None:
    with pytest.raises(ValueError), traced_span("span") as span:
        try:
            raise ValueError("bad")
        except ValueError as error:
            span.record_exception(error)
            raise
    stored = store.spans()["span"]
    assert len(stored.events) == 1
    assert "exception.stacktrace" in stored.events[0].attributes


def test_an_error_after_an_explicit_ok_is_an_error(store: Store) -> None:
    with pytest.raises(ValueError), traced_span("span") as span:
        span.set_status("OK")
        raise ValueError("late")
    assert status(store.spans()["span"]) == "ERROR"


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("OK", "OK"),
        ("ok", "OK"),
        ("Error", "ERROR"),
        (SpanStatusCode.ERROR, "ERROR"),
        (SpanStatus(SpanStatusCode.ERROR, "why"), "ERROR"),
        ("UNSET", "OK"),
    ],
)
def test_a_status_in_any_form(store: Store, given: Any, stored: str) -> None:
    with traced_span("span") as span:
        span.set_status(given)
    assert status(store.spans()["span"]) == stored


@pytest.mark.parametrize("bogus", ["BOGUS", "FAILED", 1, object(), b"OK"])
def test_an_unreadable_status_is_a_warning_and_an_error_on_the_span(
    store: Store, bogus: Any
) -> None:
    with traced_span("span") as span:
        with pytest.warns(spanguard.SpanguardWarning, match="not one of OK, ERROR"):
            span.set_status(bogus)
    assert status(store.spans()["span"]) == "ERROR"


def test_a_status_description_is_kept(store: Store) -> None:
    with traced_span("span") as span:
        span.set_status(SpanStatus(SpanStatusCode.ERROR, "disk full"))
    assert store.spans()["span"].status.description == "disk full"


def test_end_inside_the_block_ends_it_and_closes_descendants(store: Store) -> None:
    with pytest.warns(spanguard.SpanguardWarning):
        with traced_span("root") as root:
            child = mlflow.MlflowClient().start_span("child", root.trace_id, root.span_id)
            root.end(outputs=5, status="ERROR", attributes={"k": 1})
            assert child.end_time_ns is not None
            assert mlflow.get_current_active_span() is None
    stored = store.spans()["root"]
    assert (status(stored), stored.outputs, own_attributes(stored)) == ("ERROR", 5, {"k": 1})


def test_writing_after_the_end_is_a_warning_and_never_an_error(store: Store) -> None:
    with traced_span("span") as span:
        pass
    with spanguard.strict():
        with pytest.warns(spanguard.SpanguardWarning, match="has ended"):
            span.set_outputs(1)
    span.set_status("ERROR")
    span.add_event(SpanEvent("x"))
    assert status(store.spans()["span"]) == "OK"


def test_the_other_setters_pass_through(store: Store) -> None:
    with traced_span("span") as span:
        span.set_span_type("TOOL")
        span.add_event(SpanEvent("tick", attributes={"n": 1}))
        span.set_attributes({"a": 1, "b": [2]})
        span.set_attribute("c", None)
    stored = store.spans()["span"]
    assert stored.span_type == "TOOL"
    assert stored.events[0].name == "tick"
    assert stored.get_attribute("b") == [2]


def test_a_setter_given_rubbish_is_a_warning(store: Store) -> None:
    with traced_span("span") as span:
        with pytest.warns(spanguard.SpanguardWarning, match="add_event"):
            span.add_event(17)  # type: ignore[arg-type]
    assert status(store.spans()["span"]) == "OK"
