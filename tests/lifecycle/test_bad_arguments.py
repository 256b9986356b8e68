"""A bad argument of a block is mended with a warning, or raises before anything opens."""

from __future__ import annotations

from typing import Any

import pytest

import spanguard
from spanguard import traced_span
from tests.store import Store, status

pytestmark = pytest.mark.versions

BAD_ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "name None": ((None,), {}),
    "name int": ((17,), {}),
    "name empty": (("",), {}),
    "name object": ((object(),), {}),
    "start time text": (("s",), {"start_time_ns": "now"}),
    "start time nan": (("s",), {"start_time_ns": float("nan")}),
    "start time negative": (("s",), {"start_time_ns": -5}),
    "parent id int": (("s",), {"parent_id": 17}),
    "trace id bytes": (("s",), {"trace_id": b"tr-1"}),
    "span type object": (("s",), {"span_type": object()}),
    "expected no class": (("s",), {"expected": ("ValueError",)}),
    "otel id short": (("s",), {"otel_trace_id": "abc"}),
    "otel id no hex": (("s",), {"otel_trace_id": "z" * 32}),
    "otel id zero": (("s",), {"otel_trace_id": "0" * 32}),
    "attributes text": (("s",), {"attributes": "abc"}),
    "attributes pairs": (("s",), {"attributes": [("a", 1)]}),
    "reserved key": (("s",), {"attributes": {"mlflow.traceRequestId": "x"}}),
    "reserved inputs": (("s",), {"attributes": {"mlflow.spanInputs": "x"}}),
    "unknown argument": (("s",), {"atributes": {}}),
    "unknown experiment": (("s",), {"experiment_id": "987654"}),
    "experiment int": (("s",), {"experiment_id": 0}),
    "unknown parent": (("s",), {"parent_id": "0123456789abcdef"}),
    "unknown trace": (("s",), {"trace_id": "tr-" + "0" * 32}),
    "too many": ((None, "s", None, None, "what"), {}),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument_is_mended_with_a_warning(store: Store, case: str) -> None:
    args, kwargs = BAD_ARGUMENTS[case]
    with pytest.warns(spanguard.SpanguardWarning):
        with traced_span(*args, **kwargs) as span:
            assert span.trace_id.startswith("tr-")
    (stored,) = store.trace().data.spans
    assert status(stored) == "OK"


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument_raises_in_strict_mode_before_anything_opens(
    store: Store, case: str
) -> None:
    args, kwargs = BAD_ARGUMENTS[case]
    expected = (spanguard.InvalidSpanArgumentError, spanguard.InvalidParentError)
    with pytest.raises(expected) as caught:
        with traced_span(*args, strict=True, **kwargs):
            pytest.fail("the block must not run")
    assert str(caught.value)
    assert spanguard.open_spans() == []
    assert store.traces() == []


def test_trace_arguments_on_a_child_are_a_finding(store: Store) -> None:
    with traced_span("root", tags={"a": "root"}):
        with pytest.warns(spanguard.SpanguardWarning, match="belong to a trace"):
            with traced_span("child", tags={"a": "child", "b": "child"}, session_id="s"):
                pass
        with pytest.raises(spanguard.InvalidSpanArgumentError):
            with traced_span("child2", user="u", strict=True):
                pass
    info = store.trace().info
    assert (info.tags["a"], info.tags["b"]) == ("root", "child")
    assert info.trace_metadata["mlflow.trace.session"] == "s"


def test_a_parent_that_ended_falls_back_to_the_root(store: Store) -> None:
    with traced_span("root") as root:
        with traced_span("gone") as gone:
            pass
        with pytest.warns(spanguard.SpanguardWarning, match="has ended"):
            with traced_span("late", trace_id=root.trace_id, parent_id=gone.span_id):
                pass
        with pytest.raises(spanguard.InvalidParentError) as caught:
            with traced_span("x", trace_id=root.trace_id, parent_id=gone.span_id, strict=True):
                pass
    assert caught.value.span_id == gone.span_id
    assert caught.value.trace_id == root.trace_id
    late = store.spans()["late"]
    assert late.parent_id == root.span_id
    assert late.get_attribute("spanguard.lost_parent") == f"{root.trace_id}/{gone.span_id}"


def test_a_parent_of_another_trace_falls_back_to_the_root(store: Store) -> None:
    with traced_span("one") as one:
        with traced_span("two", new_trace=True) as two:
            with pytest.warns(spanguard.SpanguardWarning, match="another trace"):
                with traced_span("leaf", trace_id=one.trace_id, parent_id=two.span_id):
                    pass
    assert store.spans()["leaf"].parent_id == one.span_id


def test_a_trace_that_is_over_gets_no_late_span(store: Store) -> None:
    with traced_span("over") as over:
        pass
    with pytest.warns(spanguard.SpanguardWarning, match="a new trace"):
        with traced_span("late", trace_id=over.trace_id):
            pass
    traces = store.traces()
    assert sorted(len(trace.data.spans) for trace in traces) == [1, 1]
