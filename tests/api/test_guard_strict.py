"""A guarded client in strict mode raises what else it would warn of."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
from mlflow import MlflowClient

import spanguard
from spanguard import guard
from spanguard.exceptions import (
    UnknownSpanWarning,
)
from tests.store import Store, outcome, status


def test_a_leak_raises_after_all_is_recorded(store: Store) -> None:
    client = guard(strict=True)
    root = client.start_trace("root")
    client.start_span("leaked", root.trace_id, root.span_id)
    with pytest.raises(spanguard.OrphanedSpanError) as caught:
        client.end_trace(root.trace_id, outputs=1)
    assert [span.name for span in caught.value.spans] == ["leaked"]
    assert (caught.value.span_name, caught.value.span_id) == ("root", root.span_id)
    spans = store.spans()
    assert (spans["root"].outputs, outcome(spans["leaked"])) == (1, "orphaned")


def test_broken_rules_raise_by_name(store: Store) -> None:
    with spanguard.strict():
        client = guard(MlflowClient())
        root = client.start_trace("root")
        child = client.start_span("child", root.trace_id, root.span_id)
        with pytest.raises(spanguard.InvalidParentError) as parent:
            client.start_span("x", root.trace_id, "0" * 16)
        assert (parent.value.span_name, parent.value.trace_id) == ("x", root.trace_id)
        with pytest.raises(spanguard.UnknownSpanError) as unknown:
            client.end_span(root.trace_id, "0" * 16)
        assert unknown.value.span_id == "0" * 16
        with pytest.raises(spanguard.UnknownSpanError) as unknown:
            client.end_trace("tr-unknown")
        assert unknown.value.trace_id == "tr-unknown"
        with pytest.raises(spanguard.InvalidSpanArgumentError, match="FAILED"):
            client.end_span(root.trace_id, child.span_id, status="FAILED")
        with pytest.raises(spanguard.SpanAlreadyEndedError) as again:
            client.end_span(root.trace_id, child.span_id)
        assert (again.value.span_name, again.value.span_id) == ("child", child.span_id)
        with pytest.raises(spanguard.InvalidParentError):
            client.start_span("x", root.trace_id, child.span_id)
        client.end_trace(root.trace_id)
        with pytest.raises(spanguard.SpanAlreadyEndedError) as again:
            client.end_trace(root.trace_id)
        assert again.value.trace_id == root.trace_id
    assert {s.name: status(s) for s in store.trace().data.spans} == {"root": "OK", "child": "ERROR"}
    assert spanguard.open_spans() == []


def test_the_late_end_of_an_orphan_raises_in_strict_mode(store: Store) -> None:
    client = guard(strict=True)
    root = client.start_trace("root")
    child = client.start_span("child", root.trace_id, root.span_id)
    with pytest.raises(spanguard.OrphanedSpanError):
        client.end_trace(root.trace_id)
    with pytest.raises(spanguard.SpanAlreadyEndedError, match="orphan of root"):
        client.end_span(root.trace_id, child.span_id)


def test_a_users_exception_wins_in_strict_mode(store: Store) -> None:
    client = guard(strict=True)
    error = ValueError("users")
    root = client.start_trace("root")
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ValueError) as raised:
        warnings.simplefilter("always")
        try:
            client.start_span("leaked", root.trace_id, root.span_id)
            raise error
        finally:
            client.end_trace(root.trace_id)
    assert raised.value is error
    if sys.version_info >= (3, 11):
        assert "OrphanedSpanError" in error.__notes__[0]
    else:
        assert any("leaked" in str(warning.message) for warning in caught)
    assert outcome(store.spans()["leaked"]) == "orphaned"


@pytest.mark.parametrize("by_hand", [True, False], ids=["span.end", "end_span"])
def test_what_is_found_in_an_except_clause_is_told_when_that_is_over(
    store: Store, by_hand: bool
) -> None:
    client = guard(strict=True)

    def job(is_handled: bool) -> None:
        root = client.start_trace("root")
        try:
            step: Any = client.start_span("step", root.trace_id, root.span_id)
            client.start_span("leaked", root.trace_id, step.span_id)
            try:
                raise error
            except ValueError:
                if by_hand:
                    step.end()
                else:
                    client.end_span(root.trace_id, step.span_id)
                if not is_handled:
                    raise
        finally:
            client.end_trace(root.trace_id)

    error = ValueError("handled")
    with pytest.raises(spanguard.OrphanedSpanError, match=r"'step'.*'leaked'"):
        job(is_handled=True)
    error = ValueError("users")
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ValueError) as raised:
        warnings.simplefilter("always")
        job(is_handled=False)
    assert raised.value is error
    if sys.version_info >= (3, 11):
        (note,) = error.__notes__
        assert "'leaked'" in note
    else:
        assert any("'leaked'" in str(warning.message) for warning in caught)


def test_nothing_is_raised_where_nothing_is_wrong(store: Store, either: MlflowClient) -> None:
    with spanguard.strict(), warnings.catch_warnings():
        warnings.simplefilter("error")
        root = either.start_trace("root", tags={"a": "b"})
        child = either.start_span("child", trace_id=root.trace_id, parent_id=root.span_id)
        either.end_span(trace_id=child.trace_id, span_id=child.span_id)
        either.end_trace(trace_id=root.trace_id)
    assert len(store.trace().data.spans) == 2


def test_one_warning_per_line(store: Store, either: MlflowClient) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(20):
            either.end_trace("tr-unknown")
    assert [w.category for w in caught] == [UnknownSpanWarning]
    assert caught[0].filename == __file__
