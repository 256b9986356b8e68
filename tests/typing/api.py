"""What type checkers see. Never run: mypy --strict and pyright read it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor

import mlflow
from fastapi import FastAPI
from mlflow.entities import LiveSpan, Trace
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from typing_extensions import assert_type

import spanguard
from spanguard import (
    BatchResult,
    CustomTraceManager,
    ItemOutcome,
    OpenSpan,
    TraceStateManager,
    close_open_spans,
    current_span,
    flush,
    guard,
    limits,
    open_spans,
    strict,
    trace_batch,
    trace_id_for,
    traced,
    traced_span,
    watch,
)
from spanguard.asgi import TraceMiddleware

client = mlflow.MlflowClient()

with traced_span("name") as span:
    assert_type(span, LiveSpan)

with traced_span(
    "name",
    trace_id="tr-1",
    parent_id=None,
    client=client,
    span_type="TOOL",
    inputs=object(),
    attributes={"k": 1},
    tags={"k": "v"},
    metadata={"k": "v"},
    experiment_id="0",
    run_id=None,
    session_id="s",
    user="u",
    links=[],
    start_time_ns=1,
    otel_trace_id="0" * 32,
    new_trace=True,
    expected=(ValueError, KeyError),
    strict=True,
):
    pass

with traced_span(client, "name", "tr-1", "0123", inputs=1) as span:
    assert_type(span, LiveSpan)

traced_span(client, "name", None, None)
traced_span(name="name", request_id="tr-1")
traced_span("name", expected=ValueError)

traced_span("name", "TOOL", {"k": 1}, links=[], description="d", log_level="INFO")

traced_span()  # type: ignore[call-overload]  # pyright: ignore
traced_span("name", atributes={})  # type: ignore[call-overload]  # pyright: ignore
traced_span(client, "name", atributes={})  # type: ignore[call-overload]  # pyright: ignore
traced_span("name", parent_id=17)  # type: ignore[call-overload]  # pyright: ignore


async def use() -> None:
    async with traced_span("name") as inside:
        assert_type(inside, LiveSpan)


manager = TraceStateManager(client, scope="process", strict=None)
assert_type(manager.push_trace("a", inputs=1), LiveSpan)
manager.push_trace("a", new_trace=True, expected=ValueError, session_id="s", request_id=None)
manager.push_trace("a", input=1)  # type: ignore[call-arg]  # pyright: ignore
manager.push_trace("a", parent_id=17)  # type: ignore[arg-type]  # pyright: ignore
manager.trace("a", input=1)  # type: ignore[call-arg]  # pyright: ignore
assert_type(manager.pop_trace(outputs=1, attributes={}, status="OK"), LiveSpan | None)
assert_type(manager.current_trace, LiveSpan | None)
assert_type(manager.depth, int)
assert_type(manager.close(), int)
with manager as same:
    assert_type(same, TraceStateManager)
with manager.trace("b") as pushed:
    assert_type(pushed, LiveSpan)
TraceStateManager(scope="galaxy")  # type: ignore[arg-type]  # pyright: ignore

guarded = guard(client, strict=True, ambient=True)
as_the_client: mlflow.MlflowClient = guarded
root = guarded.start_trace("root", "CHAIN", inputs=1, tags={"k": "v"}, new_trace=True)
assert_type(root, LiveSpan)
assert_type(guarded.start_span("child", root.trace_id, root.span_id, span_type="TOOL"), LiveSpan)
assert_type(guarded.start_span("child", request_id=root.trace_id, parent_id=None), LiveSpan)
guarded.end_span(root.trace_id, root.span_id, outputs=1, status="ERROR")
guarded.end_trace(request_id=root.trace_id, outputs=1, attributes={"k": 1})
with guard() as late:
    late.end_trace(late.start_trace("root").trace_id)
guard(17)  # type: ignore[arg-type]  # pyright: ignore
guarded.start_span("child", parent_id=17)  # type: ignore[arg-type]  # pyright: ignore


async def use_guarded() -> None:
    async with guard() as inside:
        inside.start_trace("root")


assert_type(current_span(), LiveSpan | None)
assert_type(open_spans(older_than=1.5), list[OpenSpan])
assert_type(close_open_spans(status="OK"), int)
assert_type(flush(timeout=1), bool)

strict()
strict(False)
with strict():
    pass
with limits(value_chars=1) as caps:
    assert_type(caps.value_chars, int)

watch(300)
watch(None)
with watch(open_longer_than=0.5) as watching:
    assert_type(watching.open_longer_than, float | None)
watch()  # type: ignore[call-arg]  # pyright: ignore

error = spanguard.OrphanedSpanError()
assert_type(error.span_name, str | None)
for orphan in error.spans:
    assert_type(orphan, OpenSpan)


def length(item: str) -> int:
    return len(item)


batch = trace_batch(
    ["a"],
    length,
    name="batch",
    item_name=lambda item: item.upper(),
    executor=ProcessPoolExecutor(),
    on_error="raise",
    progress=True,
    max_in_flight=3,
    span_type="CHAIN",
    attributes={"k": 1},
    expected=ValueError,
    strict=True,
)
assert_type(batch, BatchResult[int])
assert_type(batch[0], ItemOutcome[int])
assert_type(batch.failed, tuple[ItemOutcome[int], ...])
assert_type(batch.success_rate, float)
for outcome in batch:
    assert_type(outcome.result, int | None)
    assert_type(outcome.error, BaseException | None)
trace_batch([1], length, name="batch")  # type: ignore[arg-type]  # pyright: ignore
trace_batch(["a"], length, name="batch", on_error="skip")  # type: ignore[arg-type]  # pyright: ignore

assert_type(trace_id_for("order-42"), str)
orders = CustomTraceManager(client, id_factory=lambda user, operation: "order-42", strict=None)
assert_type(orders.generate_trace_id("ada", "checkout"), str)
assert_type(orders.start_custom_trace("ada", "checkout", amount=3, tags="any name"), LiveSpan)
assert_type(orders.get_active_trace("order-42"), LiveSpan | None)
assert_type(orders.active_traces, Mapping[str, LiveSpan])
assert_type(orders.find_trace("order-42"), Trace | None)
orders.end_custom_trace("order-42", outputs=1, attributes={"k": 1}, status="OK")
with orders.custom_trace("ada", "checkout", custom_trace_id="order-42", amount=3) as order:
    assert_type(order, LiveSpan)
orders.active_traces["order-42"] = order  # type: ignore[index]  # pyright: ignore
CustomTraceManager(id_factory=lambda: "order-42")  # type: ignore[arg-type, misc]  # pyright: ignore


async def use_order() -> None:
    async with orders.custom_trace("ada", "checkout") as inside:
        assert_type(inside, LiveSpan)


async def application(scope: Scope, receive: Receive, send: Send) -> None: ...


traced_application = TraceMiddleware(
    application,
    name=lambda scope: str(scope["path"]),
    exclude=["/health", "/static/*"],
    trust_traceparent=False,
    request_id_header=None,
    capture_headers=("accept",),
    capture_bodies=True,
    strict=True,
)
served: ASGIApp = traced_application
TraceMiddleware(traced_application, exclude="/health")
Starlette(middleware=[Middleware(TraceMiddleware, exclude=["/health"])])
FastAPI().add_middleware(TraceMiddleware, trust_traceparent=False)
FastAPI().add_middleware(TraceMiddleware, exclud=[])  # type: ignore[call-arg]  # pyright: ignore
TraceMiddleware()  # type: ignore[call-arg]  # pyright: ignore


@traced
def plainly_traced(a: int, b: str = "") -> float:
    return float(a)


@traced("name", span_type="TOOL", capture_inputs=["a"], redact=lambda name, value: value)
def traced_with_options(a: int) -> str:
    return str(a)


@traced(name="name", expected=(ValueError,), capture_inputs="a", max_items=3, tags={"k": "v"})
async def traced_coroutine(a: int) -> str:
    return str(a)


assert_type(plainly_traced(1), float)
assert_type(traced_with_options(1), str)
assert_type(traced(length, "name")("a"), int)
assert_type(traced(length, name="name", output_reducer=len, description="d")("a"), int)
assert_type(traced(None, "name")(length)("a"), int)
assert_type(traced(func=length, name="name", sampling_ratio_override=0.1)("a"), int)
plainly_traced("a")  # type: ignore[arg-type]  # pyright: ignore
traced("name", span_typ="TOOL")  # type: ignore[call-overload]  # pyright: ignore
traced(length, capture_input=False)  # type: ignore[call-overload]  # pyright: ignore
traced(max_items="many")  # type: ignore[call-overload]  # pyright: ignore
