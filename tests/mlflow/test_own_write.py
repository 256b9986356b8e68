"""Attributes that we write past MLflow's setters are what its setters would have written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities import LiveSpan
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.trace import SpanLimits

from spanguard._mlflow import own_write
from spanguard._mlflow.own_write import encode_plain, write_encoded, write_plain
from tests.store import await_true

pytestmark = pytest.mark.versions


@pytest.fixture(name="span")
def _span() -> Iterator[LiveSpan]:
    span = mlflow.start_span_no_context("root")
    yield span
    if span.end_time_ns is None:
        span.end()


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text()
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON)
def test_plain_values_are_encoded_as_mlflow_encodes_them(value: Any) -> None:
    from mlflow.tracing.utils import dump_span_attribute_value

    assert encode_plain(value) == dump_span_attribute_value(value)


@pytest.mark.parametrize("value", [math.nan, -0.0, 1e300, 2**62, "\x00\u2028\U0001f600", {"": ""}])
def test_so_are_those_at_the_edges(value: Any, span: LiveSpan) -> None:
    span.set_attribute("theirs", value)
    write_plain(span._span, {"ours": value})
    assert span._span.attributes["ours"] == span._span.attributes["theirs"]


def test_the_order_is_mlflows(span: LiveSpan) -> None:
    """What is written again comes last."""
    for key in ("a", "b", "a"):
        span.set_attribute(f"theirs {key}", 1)
        write_plain(span._span, {f"ours {key}": 1})
    keys = list(span._span.attributes)
    for whose in ("ours", "theirs"):
        assert [key for key in keys if key.startswith(whose)] == [f"{whose} b", f"{whose} a"]


def test_nothing_is_written_after_the_end(span: LiveSpan) -> None:
    span.end()
    write_plain(span._span, {"late": 1})
    assert "late" not in span._span.attributes


def test_a_span_that_cuts_its_values_cuts_them_itself(
    span: LiveSpan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT holds, and so does the number of attributes."""
    limits = SpanLimits(max_span_attribute_length=5, max_span_attributes=2)
    cut = BoundedAttributes(
        limits.max_span_attributes, immutable=False, max_value_len=limits.max_span_attribute_length
    )
    monkeypatch.setattr(span._span, "_attributes", cut)
    write_plain(span._span, {"a": "123456789"})
    assert dict(cut) == {"a": '"1234'}
    full = BoundedAttributes(2, immutable=False)
    monkeypatch.setattr(span._span, "_attributes", full)
    write_plain(span._span, {"a": 1, "b": 2})
    write_plain(span._span, {"c": 3})
    assert list(full) == ["b", "c"] and full.dropped == 1
    monkeypatch.undo()


def test_an_opentelemetry_that_does_more_writes_itself(
    span: LiveSpan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_write, "_writes_as_known", False)
    seen: list[Any] = []
    monkeypatch.setattr(span._span, "set_attributes", seen.append)
    write_encoded(span._span, {"a": "1"})
    assert seen == [{"a": "1"}]


def test_this_opentelemetrys_writes_are_known() -> None:
    """Else each write costs twice as much: look at what it does, and see to own_write.py."""
    assert own_write._writes_as_known


def test_it_waits_for_whoever_writes_at_the_moment(span: LiveSpan) -> None:
    """Under OpenTelemetry's own lock: nothing is written past an end in another thread."""
    import threading

    writer = threading.Thread(target=write_plain, args=(span._span, {"a": 1}))
    with span._span._lock:
        writer.start()
        assert "a" not in span._span._attributes._dict
    writer.join()
    await_true(lambda: "a" in span._span.attributes)
