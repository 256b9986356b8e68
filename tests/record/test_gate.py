"""One gate before the store: nothing that a span is given can lose it, or its neighbours."""

from __future__ import annotations

import math
from typing import Any

import mlflow
import pytest
from mlflow.entities import SpanEvent
from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey, TraceTagKey

import spanguard
from spanguard import current_span, guard, traced_span
from tests.store import Store

pytestmark = [
    pytest.mark.versions,
    pytest.mark.filterwarnings("ignore::spanguard.SpanguardWarning"),
]

UNCLEAN = "a\ud800b\x00c"
CLEAN = "a\\ud800b\\x00c"

GOOD = 20


def record_good_traces() -> None:
    for number in range(GOOD):
        with traced_span(f"good {number}", inputs=number):
            with traced_span("child"):
                pass


def good_traces(store: Store) -> int:
    names = [trace.info.tags["mlflow.traceName"] for trace in store.traces()]
    return sum(name.startswith("good") for name in names)


# -- strings -----------------------------------------------------------------------------------


def link(**fields: Any) -> Any:
    Link = pytest.importorskip("mlflow.entities.link").Link
    return Link(**{"trace_id": "tr-" + "1" * 32, "span_id": "1" * 16, **fields})


PLACES: dict[str, Any] = {
    "span type": lambda span: span.set_span_type(UNCLEAN),
    "event name": lambda span: span.add_event(SpanEvent(UNCLEAN)),
    "event key": lambda span: span.add_event(SpanEvent("e", attributes={UNCLEAN: 1})),
    "event value": lambda span: span.add_event(SpanEvent("e", attributes={"k": UNCLEAN})),
    "event values": lambda span: span.add_event(SpanEvent("e", attributes={"k": [UNCLEAN]})),
    "event of ours": lambda span: span.add_event(UNCLEAN, {UNCLEAN: UNCLEAN}),
    "link key": lambda span: span.add_link(link(attributes={UNCLEAN: 1})),
    "link value": lambda span: span.add_link(link(attributes={"k": UNCLEAN})),
    "link id": lambda span: span.add_link(link(span_id=UNCLEAN)),
    "description": lambda span: span.set_description(UNCLEAN),
    "status": lambda span: span.set_status("ERROR", UNCLEAN),
    "log level": lambda span: span.set_log_level(UNCLEAN),
    "attribute": lambda span: span.set_attribute(UNCLEAN, {UNCLEAN: UNCLEAN}),
    "exception": lambda span: span.record_exception(ValueError(UNCLEAN)),
    "outputs": lambda span: span.set_outputs([UNCLEAN]),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_unclean_string_costs_nobody_a_trace(store: Store, place: str) -> None:
    """A lone surrogate is written out, wherever it is, and twenty good traces stay beside it."""
    with traced_span("unclean") as span:
        PLACES[place](span)
    with mlflow.start_span("unclean too"):
        PLACES[place](current_span())
    record_good_traces()
    assert good_traces(store) == GOOD
    assert len(store.traces()) == GOOD + 2


@pytest.mark.parametrize("opener", [traced_span, guard().start_trace], ids=["block", "guard"])
def test_a_span_starts_with_clean_strings(store: Store, opener: Any) -> None:
    """Type, name, tags and attributes that a span starts with are made clean as well."""
    given = {"span_type": UNCLEAN, "attributes": {UNCLEAN: UNCLEAN}, "tags": {UNCLEAN: UNCLEAN}}
    opened = opener(UNCLEAN, **given)
    if opener is traced_span:
        with opened:
            pass
    else:
        opened.end()
    record_good_traces()
    assert good_traces(store) == GOOD
    (trace,) = [t for t in store.traces() if not t.info.tags["mlflow.traceName"].startswith("good")]
    (span,) = trace.data.spans
    assert (span.name, span.span_type) == (CLEAN, CLEAN)
    assert span.get_attribute(CLEAN) == "a\\ud800b\x00c"  # as JSON, which has a way to write NUL
    assert trace.info.tags[CLEAN] == CLEAN


def test_an_event_is_recorded_as_it_was_meant(store: Store) -> None:
    """Scalars and lists of them stay what they are; the rest is JSON text."""
    facts = {"s": "x", "i": 1, "f": 1.5, "b": True, "l": [1, 2], "m": {"a": [1]}, "x": [1, "a"]}
    with traced_span("span") as span:
        span.add_event(SpanEvent("event", attributes={**facts, "big": 2**70}))  # type: ignore[arg-type]
    (event,) = store.spans()["span"].events
    attributes = {k: list(v) if isinstance(v, tuple) else v for k, v in event.attributes.items()}
    assert attributes == {**facts, "m": '{"a": [1]}', "x": '[1, "a"]', "big": str(2**70)}


# -- numbers -----------------------------------------------------------------------------------

TIMES = ["now", None, math.nan, math.inf, -1, 0, 2**63, 10**400, "1", b"1", [1], True]


@pytest.mark.parametrize("time_ns", TIMES, ids=lambda value: str(value)[:9])
def test_a_time_that_is_none_is_now(store: Store, time_ns: Any) -> None:
    """A trace whose event, start or end has a time that is no time can be read."""
    with traced_span("start", start_time_ns=time_ns):
        pass
    with traced_span("event") as span:
        span.add_event(SpanEvent("e", timestamp=time_ns))
        span.add_event("e", {}, time_ns)
    with traced_span("end") as span:
        span.end(end_time_ns=time_ns)
    record_good_traces()
    spans = [span for trace in store.traces() for span in trace.data.spans]
    assert len(spans) == 3 + 2 * GOOD
    for span in spans:
        year = 365 * 86_400 * 10**9
        assert all(50 * year < event.timestamp < 90 * year for event in span.events)
        assert 50 * year < span.start_time_ns <= (span.end_time_ns or 0) < 90 * year


AGGREGATED = [
    "mlflow.chat.tokenUsage",
    "mlflow.llm.cost",
    "mlflow.llm.model",
    "mlflow.llm.provider",
]
JUNK = [
    "text",
    7,
    [1],
    {},
    {"input_tokens": "a"},
    {"total_cost": math.nan},
    {"input_cost": 10**400},
]


@pytest.mark.parametrize("key", AGGREGATED)
def test_what_mlflow_sums_up_is_a_number(store: Store, key: str) -> None:
    """Usage, cost and model that MLflow could not read are attributes of the user's."""
    for junk in [*JUNK, {"input_tokens": None}, {"input_tokens": [2], "output_tokens": 3}]:
        with traced_span("junk", attributes={key: junk}) as root:
            root.set_attribute(key, junk)
            with traced_span("child", attributes={key: junk}):
                pass
    record_good_traces()
    assert len(store.traces()) == GOOD + len(JUNK) + 2


def test_what_mlflow_sums_up_is_summed_up(store: Store) -> None:
    """Usage that MLflow can read arrives where it shows it."""
    usage = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}
    with traced_span("llm", span_type="LLM", attributes={"mlflow.chat.tokenUsage": usage}) as span:
        span.set_attribute("mlflow.llm.model", "gpt-4o")
    trace = store.trace()
    assert trace.info.token_usage == usage
    assert trace.data.spans[0].get_attribute("mlflow.llm.model") == "gpt-4o"


# -- what belongs to a trace -------------------------------------------------------------------

METADATA = sorted(v for k, v in vars(TraceMetadataKey).items() if k.isupper())
TAGS = sorted(v for k, v in vars(TraceTagKey).items() if k.isupper())


@pytest.mark.parametrize("junk", ["", "junk", UNCLEAN, 7, None, {"a": 1}, "x" * 20_000], ids=str)
def test_labels_under_mlflows_own_keys(store: Store, junk: Any) -> None:
    """Tags and metadata under the keys that MLflow reads cannot lose the trace."""
    for key in METADATA:
        with traced_span(f"metadata {key}", metadata={key: junk}):
            pass
    for key in TAGS:
        with traced_span(f"tag {key}", tags={key: junk}):
            pass
    for key in ("", " ", "a/b", "../..", "a" * 5_000, "ü", "a:b=c\n"):
        with traced_span(f"key {key!r}", tags={key: junk}, metadata={key: junk}):
            pass
    record_good_traces()
    assert good_traces(store) == GOOD
    assert len(store.traces()) == GOOD + len(METADATA) + len(TAGS) + 7


def test_reserved_attributes_do_not_lose_the_trace(store: Store) -> None:
    """No attribute key that MLflow reads takes junk as it is."""
    keys = sorted(v for k, v in vars(SpanAttributeKey).items() if k.isupper() and type(v) is str)
    for key in keys:
        with traced_span("root", attributes={key: "junk"}) as span:
            span.set_attribute(key, [UNCLEAN])
    record_good_traces()
    assert len(store.traces()) == GOOD + len(keys)
    assert spanguard.open_spans() == []
