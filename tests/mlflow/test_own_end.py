"""Our end of a span leaves the record that MLflow's own leaves, and gives way to one not known."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlflow
import pytest
import wrapt
from mlflow.entities import LiveSpan, SpanEvent, SpanStatus, SpanStatusCode
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

import spanguard
from spanguard import traced_span
from spanguard._mlflow import ending, own_end
from spanguard._mlflow.own_end import end_as_mlflow
from spanguard._mlflow.provider import initialized_provider
from tests.store import Store

pytestmark = pytest.mark.versions

HAS_LEVELS = hasattr(mlflow.entities, "SpanLogLevel")
HAS_HINTS = own_end._hints is not None

START, END = 1_700_000_000_000_000_000, 1_700_000_001_000_000_000


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch, store: Store) -> list[ReadableSpan]:
    """What arrives where the store begins, in the order of the ends."""
    spans: list[ReadableSpan] = []

    def export(_: Any, ended: Sequence[ReadableSpan]) -> None:
        spans.extend(ended)

    monkeypatch.setenv("MLFLOW_USE_BATCH_SPAN_PROCESSOR", "false")
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    mlflow.tracing.reset()
    monkeypatch.setattr(MlflowV3SpanExporter, "export", export)
    return spans


@pytest.fixture(autouse=True)
def _configured_anew() -> Iterator[None]:
    yield
    mlflow.tracing.configure(span_processors=[])


def record_of(span: ReadableSpan) -> list[object]:
    """Return all that an ended span tells, but for what is its own: ids."""
    attributes = dict(span.attributes or {})
    attributes.pop("mlflow.traceRequestId")
    return [
        span.name,
        list(attributes.items()),
        [(event.name, dict(event.attributes or {}), event.timestamp) for event in span.events],
        (span.status.status_code, span.status.description),
        (span.start_time, span.end_time),
        (span.kind, len(span.links), span.dropped_attributes, span.dropped_events),
    ]


# -- what a span may be like when it ends --------------------------------------------------------

Change = Callable[[LiveSpan], object]


def nothing(span: LiveSpan) -> None:
    pass


def token_usage(span: LiveSpan) -> None:
    span.set_attribute("mlflow.llm.model", "gpt-4o-mini")
    span.set_attribute("mlflow.chat.tokenUsage", {"input_tokens": 3, "output_tokens": 4})


def written_past_mlflow(span: LiveSpan) -> None:
    """By OpenTelemetry: not as JSON, or not as MLflow would."""
    span._span.set_attribute("mlflow.spanInputs", " null")
    span._span.set_attribute("mlflow.spanOutputs", "no JSON")
    span._span.set_attribute("mlflow.spanLogLevel", "null")


def typed_past_mlflow(span: LiveSpan) -> None:
    span._span.set_attribute("mlflow.spanType", ["LLM"])


PAYLOADS: list[Change] = [
    nothing,
    lambda span: span.set_inputs({"question": "ü", "n": [1, 2.5, None, True]}),
    lambda span: (span.set_inputs("text"), span.set_outputs({"answer": "☃"})),
    lambda span: (span.set_outputs(None), span.set_inputs(None)),
    lambda span: (span.set_inputs({1, 2}), span.set_outputs(object)),
    token_usage,
    written_past_mlflow,
    typed_past_mlflow,
]
if HAS_LEVELS:
    PAYLOADS += [lambda span: span.set_log_level("CRITICAL")]

STATUSES: list[Change] = [
    nothing,
    lambda span: span.set_status("OK"),
    lambda span: span.set_status(SpanStatus(SpanStatusCode.ERROR, "broken")),
    lambda span: (span.set_status("OK"), span.set_status("ERROR")),
]

EVENTS: list[Change] = [
    nothing,
    lambda span: span.add_event(SpanEvent("retry", START, {"attempt": 2})),
    lambda span: span.add_event(SpanEvent("exception", START, {"exception.message": "no"})),
]

TYPES = [
    *("AGENT", "CHAIN", "CHAT_MODEL", "EMBEDDING", "GUARDRAIL", "LLM", "PARSER", "RETRIEVER"),
    *("TASK", "TOOL", "UNKNOWN", "WORKFLOW", "my own ü", 'with "quotes"', "", None),
]


# -- processors that a user may configure --------------------------------------------------------


def mask(span: LiveSpan) -> None:
    span.set_inputs("[masked]")
    span.set_attribute("seen", span.get_attribute("mlflow.spanLogLevel"))


def fail(span: LiveSpan) -> None:
    raise RuntimeError("broken")


def answer(span: LiveSpan) -> str:
    return "ignored"


def change_all(span: LiveSpan) -> None:
    span.set_span_type("LLM")
    span.set_status("ERROR")
    span.set_attribute("mlflow.spanLogLevel", 50)
    span.add_event(SpanEvent("seen", START))


PROCESSORS: list[list[Callable[[LiveSpan], object]]] = [
    [],
    [mask],
    [fail, mask],
    [answer, change_all],
]


@pytest.mark.parametrize("processors", PROCESSORS, ids=lambda those: [p.__name__ for p in those])
@pytest.mark.parametrize("span_type", TYPES, ids=repr)
def test_it_leaves_the_record_that_mlflows_end_leaves(
    span_type: Any,
    processors: list[Callable[[LiveSpan], object]],
    arrived: list[ReadableSpan],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever the type, the payloads, the status, the events and the configured processors."""
    mlflow.tracing.configure(span_processors=processors)
    root = mlflow.start_span_no_context("root")
    ended_here = 0
    for changes in itertools.product(PAYLOADS, STATUSES, EVENTS):
        logged: list[list[str]] = []
        for here in (False, True):
            caplog.clear()
            span = mlflow.start_span_no_context(
                "child", span_type=span_type, parent_span=root, start_time_ns=START
            )
            for change in changes:
                change(span)
            is_ended = here and end_as_mlflow(span, END)
            ended_here += is_ended
            if not is_ended:
                span.end(end_time_ns=END)
            logged.append([record.getMessage() for record in caplog.records])
        theirs, ours = arrived[-2:]
        assert record_of(ours) == record_of(theirs)
        assert logged[1] == logged[0]
    root.end()
    # The better part is ended here, or nothing was compared.
    assert ended_here >= len(STATUSES) * len(EVENTS) * 2


def test_what_fails_in_the_middle_is_a_line_in_mlflows_log(
    arrived: list[ReadableSpan], caplog: pytest.LogCaptureFixture
) -> None:
    """As it is with MLflow's own end: no exception, and the very same words."""

    class Refuses(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            raise ValueError("refused")

    initialized_provider().add_span_processor(Refuses())  # type: ignore[attr-defined]
    texts = []
    for here in (False, True):
        span = mlflow.start_span_no_context("root")
        with caplog.at_level(logging.WARNING, "mlflow"):
            caplog.clear()
            if here:
                assert end_as_mlflow(span, END)
            else:
                span.end(end_time_ns=END)
        (record,) = [one for one in caplog.records if one.name == "mlflow.entities.span"]
        texts.append(record.getMessage().replace(span.span_id, "ID"))
    assert texts[0] == texts[1]


def test_a_span_that_has_ended_is_left_to_mlflow(arrived: list[ReadableSpan]) -> None:
    span = mlflow.start_span_no_context("root")
    assert end_as_mlflow(span, END)
    assert not end_as_mlflow(span, END + 1)
    assert span.end_time_ns == END


@pytest.mark.skipif(not HAS_HINTS, reason="MLflow hints from 3.16 on")
@pytest.mark.parametrize("is_driving", [True, False])
def test_mlflows_hint_is_given_if_an_agent_drives(
    is_driving: bool, arrived: list[ReadableSpan], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.agent import hint

    given: list[str] = []
    monkeypatch.setattr(hint, "_is_agent_driving", lambda: is_driving)
    monkeypatch.setattr(
        hint, "maybe_warn_local_tracking_for_databricks", lambda: given.append("hint")
    )
    assert end_as_mlflow(mlflow.start_span_no_context("root"), None)
    assert given == ["hint"] * is_driving


@pytest.mark.skipif(not HAS_HINTS, reason="MLflow hints from 3.16 on")
@pytest.mark.parametrize("span_type", ["LLM", "TOOL", "RETRIEVER"])
def test_a_span_that_mlflow_may_have_a_hint_on_is_left_to_it(
    span_type: str, arrived: list[ReadableSpan]
) -> None:
    without = mlflow.start_span_no_context("root", span_type=span_type)
    assert not end_as_mlflow(without, None)
    without.end()
    complete = mlflow.start_span_no_context("root", span_type=span_type, inputs=1)
    complete.set_outputs(2)
    assert end_as_mlflow(complete, None)


# -- giving way --------------------------------------------------------------------------------


def test_this_mlflows_end_is_known(arrived: list[ReadableSpan]) -> None:
    """Else each end costs half as much again: look at what it does, and see to own_end.py."""
    assert end_as_mlflow(mlflow.start_span_no_context("root"), None)


def ended_by_block() -> None:
    with traced_span("root"):
        pass


def test_an_end_in_its_place_is_called(
    arrived: list[ReadableSpan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As instrumentation and tests of others put it there, also while we run."""
    ended_by_block()
    theirs, called = LiveSpan.end, []

    def end(self: LiveSpan, *args: Any, **kwargs: Any) -> None:
        called.append(self.name)
        theirs(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LiveSpan, "end", end)
        ended_by_block()
    assert called == ["root"]
    ended_by_block()
    assert called == ["root"] and len(arrived) == 3


def test_an_end_that_wrapt_is_around_is_called(
    arrived: list[ReadableSpan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instrumentation wraps so, and what is wrapped shows its own code."""
    called: list[str] = []

    @wrapt.decorator
    def note(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        called.append(instance.name)
        return wrapped(*args, **kwargs)

    monkeypatch.setattr(LiveSpan, "end", note(LiveSpan.end))
    ended_by_block()
    assert called == ["root"] and len(arrived) == 1


def test_an_end_that_names_anything_else_is_called(
    arrived: list[ReadableSpan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer MLflow that does more at the end of a span switches ours off."""
    span = mlflow.start_span_no_context("root")
    code = LiveSpan.end.__code__
    with monkeypatch.context() as patch:
        more = code.replace(co_names=(*code.co_names, "something_new"))
        patch.setattr(LiveSpan.end, "__code__", more)
        assert not end_as_mlflow(span, None)
        ending.end_live(span, END)
        assert span.end_time_ns == END
    assert end_as_mlflow(mlflow.start_span_no_context("root"), None)


def test_an_end_that_works_out_costs_in_another_way_is_called(
    arrived: list[ReadableSpan], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.tracing.utils

    @functools.wraps(mlflow.tracing.utils.calculate_span_cost)
    def calculate_span_cost(span: LiveSpan) -> dict[str, float]:
        return {"total_cost": 1.0}

    monkeypatch.setattr("mlflow.tracing.utils.calculate_span_cost", calculate_span_cost)
    monkeypatch.setattr(own_end, "_known", own_end._Known())
    assert not end_as_mlflow(mlflow.start_span_no_context("root"), None)


def test_an_end_of_a_subclass_or_of_one_span_is_called(arrived: list[ReadableSpan]) -> None:
    class Own(LiveSpan):
        pass

    span = mlflow.start_span_no_context("root")
    span.__class__ = Own
    assert not end_as_mlflow(span, None)
    other = mlflow.start_span_no_context("root")
    other.end = lambda **_: None  # type: ignore[method-assign]
    assert not end_as_mlflow(other, None)
    assert not end_as_mlflow(object(), None)
    for left in (span, other):
        LiveSpan.end(left)


def test_processors_put_in_place_of_mlflows_are_called(
    arrived: list[ReadableSpan], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[LiveSpan] = []
    monkeypatch.setattr("mlflow.entities.span.apply_span_processors", seen.append)
    ended_by_block()
    assert [span.name for span in seen] == ["root"]


def test_what_a_block_records_is_masked_before_it_is_stored(store: Store) -> None:
    mlflow.tracing.configure(span_processors=[mask])
    with traced_span("root", inputs="a secret", span_type="CHAIN") as span:
        span.set_outputs("fine")
    assert spanguard.flush(60)
    root = store.trace().data.spans[0]
    assert root.inputs == "[masked]" and root.outputs == "fine"
