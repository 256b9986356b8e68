"""The low-level examples that people copy, run on spanguard: error handling, a batch with nested
spans, the traced_span recipe, the push/pop manager. What they lose raw, they keep here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import TraceStateManager, traced_span
from tests.store import Store, own_attributes, status


def test_error_handling(store: Store, client: mlflow.MlflowClient) -> None:
    """Start, try, end with ERROR and details on failure: in one block."""

    def risky(value: int) -> float:
        with traced_span(client, "risky_operation", None, None, inputs={"value": value}) as span:
            result = 10 / value
            span.set_outputs({"result": result})
            return result

    assert risky(5) == 2
    with pytest.raises(ZeroDivisionError):
        risky(0)
    good, bad = store.traces()
    assert good.info.state.value == "OK"
    assert good.data.spans[0].outputs == {"result": 2.0}
    assert bad.info.state.value == "ERROR"
    assert own_attributes(bad.data.spans[0]) == {
        "spanguard.outcome": "error",
        "error": "division by zero",
        "error_type": "ZeroDivisionError",
        "error_message": "division by zero",
    }


def test_a_batch_with_nested_spans(store: Store, client: mlflow.MlflowClient) -> None:
    """Every item has a span, validation and processing spans under it; failures are recorded."""

    def validate(item: dict[str, Any]) -> None:
        if item["value"] < 0:
            raise ValueError(f"negative value in item {item['id']}")

    def process(items: list[dict[str, Any]]) -> dict[str, Any]:
        with traced_span("batch", client=client, inputs={"count": len(items)}) as batch:
            processed = failed = 0
            for item in items:
                try:
                    with traced_span(f"item_{item['id']}", attributes={"item_id": item["id"]}):
                        with traced_span(f"validate_{item['id']}"):
                            validate(item)
                        with traced_span(f"process_{item['id']}") as work:
                            work.set_outputs(item["value"] * 2)
                    processed += 1
                except ValueError:
                    failed += 1
            outputs = {"processed": processed, "failed": failed}
            batch.set_outputs(outputs)
            return outputs

    items = [{"id": n, "value": -1 if n == 2 else n} for n in range(4)]
    assert process(items) == {"processed": 3, "failed": 1}
    trace = store.trace()
    spans = {span.name: span for span in trace.data.spans}
    assert trace.info.state.value == "OK"
    assert len(spans) == 1 + 3 * 3 + 2
    assert [status(spans[f"item_{n}"]) for n in range(4)] == ["OK", "OK", "ERROR", "OK"]
    assert status(spans["validate_2"]) == "ERROR"
    assert "process_2" not in spans
    assert spans["process_3"].parent_id == spans["item_3"].span_id


def test_a_batch_that_leaks_a_child_when_validation_raises(
    store: Store, client: mlflow.MlflowClient
) -> None:
    """The same batch with raw children: the leaked one is closed, and the trace is there."""

    def process(items: list[int]) -> None:
        with traced_span("batch") as batch:
            for item in items:
                try:
                    child = client.start_span(f"item_{item}", batch.trace_id, batch.span_id)
                    if item < 0:
                        raise ValueError(item)
                    client.end_span(batch.trace_id, child.span_id)
                except ValueError:
                    pass  # and the child stays open

    with pytest.warns(spanguard.OrphanedSpanWarning, match="item_-1"):
        process([1, -1, 2])
    spans = store.spans()
    assert {name: status(span) for name, span in spans.items()} == {
        "batch": "OK",
        "item_1": "OK",
        "item_-1": "ERROR",
        "item_2": "OK",
    }


def test_the_recipe(store: Store, client: mlflow.MlflowClient) -> None:
    """`with traced_span(client, name, request_id, parent_id, **kwargs)`, as the recipe has it."""
    root = client.start_trace("my_trace")
    request_id, parent_id = root.request_id, root.span_id
    with traced_span(client, "my_operation", request_id, parent_id, attributes={"k": 1}) as span:
        assert span.parent_id == parent_id
        span.set_attribute("result", "ok")
    with pytest.raises(RuntimeError):
        with traced_span(client, "failing", request_id, parent_id):
            raise RuntimeError("failed")
    client.end_trace(request_id)
    spans = store.spans()
    assert own_attributes(spans["my_operation"]) == {"k": 1, "result": "ok"}
    assert status(spans["failing"]) == "ERROR"
    assert spans["failing"].get_attribute("error") == "failed"


def test_the_recipe_without_a_trace_starts_one(store: Store, client: mlflow.MlflowClient) -> None:
    with traced_span(client, "root", None) as root:
        with traced_span(client, "child", root.trace_id, root.span_id):
            pass
    assert len(store.trace().data.spans) == 2


def test_the_push_and_pop_manager(store: Store, client: mlflow.MlflowClient) -> None:
    """Work that starts in one callback and ends in another."""

    class Service:
        def __init__(self) -> None:
            self.traces = TraceStateManager(client)

        def on_request(self, name: str) -> None:
            self.traces.push_trace(name, inputs={"at": time.time()})

        def on_step(self, name: str, work: Callable[[], Any]) -> Any:
            with self.traces.trace(name) as span:
                result = work()
                span.set_outputs(result)
                return result

        def on_response(self, body: Any) -> None:
            self.traces.pop_trace(outputs=body)

        def on_shutdown(self) -> int:
            return self.traces.close()

    service = Service()
    service.on_request("GET /a")
    assert service.on_step("query", lambda: 41) == 41
    service.on_response({"status": 200})
    service.on_request("GET /b")
    with pytest.raises(ZeroDivisionError):
        service.on_step("query b", lambda: 1 / 0)
    assert service.on_shutdown() == 1

    answered, cut_off = store.traces()
    assert answered.info.state.value == "OK"
    assert answered.data.spans[0].outputs == {"status": 200}
    assert cut_off.info.state.value == "ERROR"
    assert [status(span) for span in cut_off.data.spans] == ["ERROR", "ERROR"]
