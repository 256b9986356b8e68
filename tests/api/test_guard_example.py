"""The documented batch that leaks a child, run on a guarded client."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

import spanguard
from spanguard import guard, traced_span
from spanguard.exceptions import (
    OrphanedSpanWarning,
)
from tests.store import Store, outcome, own_attributes, status


def validate(item: dict[str, Any]) -> None:
    if item["value"] < 0:
        raise ValueError(f"negative value in item {item['id']}")


def process_batch(client: MlflowClient, items: list[dict[str, Any]]) -> dict[str, int]:
    """As the documented example has it: the validation span leaks when validation raises."""
    root = client.start_trace(name="batch", inputs={"count": len(items)}, tags={"kind": "nightly"})
    trace_id = root.request_id
    processed = failed = 0
    for item in items:
        item_span = client.start_span(
            name=f"item_{item['id']}", request_id=trace_id, parent_id=root.span_id, inputs=item
        )
        try:
            validation = client.start_span(
                name=f"validate_{item['id']}", request_id=trace_id, parent_id=item_span.span_id
            )
            validate(item)
            client.end_span(request_id=trace_id, span_id=validation.span_id)
            client.end_span(trace_id, item_span.span_id, outputs={"value": item["value"] * 2})
            processed += 1
        except Exception as error:
            client.end_span(
                request_id=trace_id,
                span_id=item_span.span_id,
                status="ERROR",
                attributes={"error": str(error)},
            )
            failed += 1
    client.end_trace(request_id=trace_id, outputs={"processed": processed, "failed": failed})
    return {"processed": processed, "failed": failed}


LEAKING_LINE = next(
    number
    for number, line in enumerate(Path(__file__).read_text().splitlines(), 1)
    if "validation = client.start_span(" in line
)
ITEMS = [{"id": n, "value": -1 if n == 1 else n} for n in range(3)]


def test_the_documented_batch_that_leaks_a_child(store: Store, either: MlflowClient) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert process_batch(either, ITEMS) == {"processed": 2, "failed": 1}
    ours = [w for w in caught if issubclass(w.category, spanguard.SpanguardWarning)]
    assert [(w.category, w.filename) for w in ours] == [(OrphanedSpanWarning, __file__)]
    assert not [w for w in caught if issubclass(w.category, FutureWarning)]

    trace = store.trace()
    spans = {span.name: span for span in trace.data.spans}
    assert trace.info.state.value == "OK"
    assert trace.info.tags["kind"] == "nightly"
    assert len(spans) == 7
    assert spans["batch"].outputs == {"processed": 2, "failed": 1}
    leaked = spans["validate_1"]
    assert (status(leaked), outcome(leaked)) == ("ERROR", "orphaned")
    site, _, function = str(leaked.get_attribute("spanguard.opened_at")).partition(" in ")
    assert function == "process_batch"
    assert site.startswith(__file__)
    assert LEAKING_LINE <= int(site.rpartition(":")[2]) <= LEAKING_LINE + 2
    item = spans["item_1"]
    assert leaked.get_attribute("spanguard.orphaned_by") == f"item_1 ({item.span_id})"
    assert (status(item), outcome(item)) == ("ERROR", "ok")
    assert own_attributes(item) == {"error": "negative value in item 1"}
    assert [status(spans[f"item_{n}"]) for n in (0, 2)] == ["OK", "OK"]
    assert [status(spans[f"validate_{n}"]) for n in (0, 2)] == ["OK", "OK"]


def test_the_same_batch_inside_a_traced_request(store: Store, guarded: MlflowClient) -> None:
    """Nested it is a branch of the trace around it, which goes on after its end_trace."""
    with pytest.warns(OrphanedSpanWarning):
        with traced_span("request") as request:
            process_batch(guarded, ITEMS)
            process_batch(guarded, ITEMS[:1])
            assert request.end_time_ns is None
    trace = store.trace()
    roots = [span for span in trace.data.spans if span.parent_id is None]
    batches = [span for span in trace.data.spans if span.name == "batch"]
    assert [span.name for span in roots] == ["request"]
    assert [span.parent_id for span in batches] == [request.span_id] * 2
    assert [span.outputs["processed"] for span in batches] == [2, 1]
    assert [status(span) for span in (*roots, *batches)] == ["OK"] * 3
    assert trace.info.tags["kind"] == "nightly"


def test_the_same_batch_in_strict_mode(store: Store) -> None:
    """The leak is found while the ValueError is handled, and raised when that is over."""
    with pytest.raises(spanguard.OrphanedSpanError) as caught:
        process_batch(guard(strict=True), ITEMS)
    assert [span.name for span in caught.value.spans] == ["validate_1"]
    spans = store.spans()
    assert len(spans) == 7
    assert outcome(spans["validate_1"]) == "orphaned"
    assert spans["batch"].outputs == {"processed": 2, "failed": 1}
