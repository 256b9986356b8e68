"""What the other faces cost: managers, batches, guarded clients, carried work, ASGI, recursion.

    python benchmarks/faces.py            # half a minute
    python benchmarks/faces.py --quick    # a few seconds, too short to trust the numbers

Spans are measured as in `record.py`, and by its means: a root and 100 children, the store taken
out, all variants in each round, in an order shuffled anew; a ratio is the median of those within a
round. What is no span by itself (a carried function, a request) is the median of some thousand
calls. The ASGI instrumentation of OpenTelemetry is a row where it is installed
(`pip install opentelemetry-instrumentation-asgi`).
"""

from __future__ import annotations

import record  # first: it sets MLflow's variables before MLflow is imported

# isort: split

import asyncio
import functools
import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import mlflow
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from rich.console import Console
from rich.table import Table

import spanguard
from spanguard import TraceStateManager, carry, guard, trace_batch, traced, traced_span
from spanguard.asgi import TraceMiddleware

FLUENT, BARE = "mlflow.start_span", "raw client, bare spans"

# -- spans ---------------------------------------------------------------------------------------


def pushed_and_popped(children: int) -> None:
    given: dict[str, Any] = {"inputs": record.INPUTS, "attributes": record.ATTRIBUTES}
    manager = TraceStateManager()
    manager.push_trace("root", **given)
    for _ in range(children):
        manager.push_trace("child", **given)
        manager.pop_trace(outputs=record.answer())
    manager.pop_trace(outputs=record.OUTPUTS)


def batched(children: int) -> None:
    trace_batch([record.INPUTS] * children, lambda _: record.answer(), name="root")


def contenders(client: mlflow.MlflowClient) -> dict[str, list[record.Contender]]:
    """Return the rows, by the name of the one that each group is compared to."""
    raw, bare = record.raw_client(client), record.raw_many(client)
    guarded = guard(mlflow.MlflowClient())
    in_use, fluent = record.guarded_block, record.fluent_block
    row = record.Contender
    return {
        record.RAW: [
            row(record.RAW, raw, raw),
            row("push / pop", pushed_and_popped, pushed_and_popped),
            row("trace_batch, per item", batched, batched),
            row("guard(client)", record.raw_client(guarded), record.raw_client(guarded)),
            row("raw client, spanguard in use", raw, in_use),
        ],
        BARE: [
            row(BARE, bare, bare),
            row("traced_span, bare spans", record.guarded_many, record.guarded_many),
            row("guard(client), bare spans", record.raw_many(guarded), record.raw_many(guarded)),
        ],
        FLUENT: [
            row(FLUENT, fluent, fluent),
            row("the same, spanguard in use", fluent, in_use),
        ],
    }


def span_table(groups: dict[str, list[record.Contender]], plan: record.Plan) -> Table:
    rows = [row for group in groups.values() for row in group]
    samples = record.interleaved(rows, plan.children, plan.rounds)
    table = Table(title="Cost of one span", caption=f"{plan.rounds} rounds", title_justify="left")
    table.add_column("variant", no_wrap=True)
    for heading in ("median µs", "p10-p90", "ratio to raw"):
        table.add_column(heading, justify="right", no_wrap=True)
    for base, group in groups.items():
        for row in group:
            values = samples[row.name]
            ratio = f"{record.ratio(samples, row.name, base):.2f}"
            table.add_row(
                row.name, f"{statistics.median(values):.0f}", record.spread(values), ratio
            )
        table.add_section()
    return table


# -- what is no span by itself -------------------------------------------------------------------


def work(x: int) -> int:
    return x


async def application(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


async def fluent_application(scope: Any, receive: Any, send: Any) -> None:
    with mlflow.start_span("GET /items/7"):
        await application(scope, receive, send)


def applications() -> dict[str, Any]:
    found: dict[str, Any] = {
        "ASGI request: the application": application,
        "ASGI request: in mlflow.start_span": fluent_application,
        "ASGI request: TraceMiddleware": TraceMiddleware(application),
    }
    try:
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    except ImportError:
        return found
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(record.DroppingExporter()))
    name = "ASGI request: OpenTelemetry's ASGI"
    found[name] = OpenTelemetryMiddleware(application, tracer_provider=provider)
    return found


def requests(app: Any, count: int) -> float:
    """Return the microseconds that one request takes."""
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/items/7",
        "scheme": "http",
        "query_string": b"",
        "http_version": "1.1",
        "headers": [(b"host", b"example")],
        "server": ("example", 80),
        "client": ("192.0.2.1", 5000),
    }

    async def nowhere(message: Any) -> None:
        pass

    async def serve() -> float:
        started = time.perf_counter_ns()
        for _ in range(count):
            await app(dict(scope), None, nowhere)
        return (time.perf_counter_ns() - started) / count / 1000

    return asyncio.run(serve())


def calls(function: Callable[[], object], count: int) -> float:
    """Return the microseconds that one call takes."""
    started = time.perf_counter_ns()
    for _ in range(count):
        function()
    return (time.perf_counter_ns() - started) / count / 1000


def recursions(function: Callable[[list[int]], object]) -> float:
    """Return the microseconds of one level of a recursion that finds no end."""
    levels = [0]
    started = time.perf_counter_ns()
    try:
        function(levels)
    except RecursionError:
        pass
    return (time.perf_counter_ns() - started) / levels[0] / 1000


def endless_block(levels: list[int]) -> None:
    levels[0] += 1
    with traced_span("endless"):
        endless_block(levels)


@traced(capture_inputs=False)
def endless_function(levels: list[int]) -> None:
    levels[0] += 1
    endless_function(levels)


def memory_of_open_span(count: int) -> float:
    """Return the kilobytes that one open child takes."""
    with traced_span("root"):
        gc.collect()
        tracemalloc.start()
        blocks = [traced_span("child") for _ in range(count)]
        before = tracemalloc.get_traced_memory()[0]
        for block in blocks:
            block.__enter__()
        kept = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        for block in reversed(blocks):
            block.__exit__(None, None, None)
    return kept / count / 1024


def other_table(plan: record.Plan) -> Table:
    many = plan.children * plan.rounds
    table = Table(title="What is no span by itself", title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("median", justify="right", no_wrap=True)
    measures: dict[str, Callable[[], float]] = {
        name: functools.partial(requests, app, 200) for name, app in applications().items()
    }
    measures["a level of endless recursion: traced_span"] = lambda: recursions(endless_block)
    measures["a level of endless recursion: @traced"] = lambda: recursions(endless_function)
    with traced_span("root"):
        carried = carry(work)
        table.add_row("carry(f)", _median(lambda: calls(lambda: carry(work), many), plan))
        table.add_row("a call of it", _median(lambda: calls(lambda: carried(1), many), plan))
    for name, measure in measures.items():
        table.add_row(name, _median(measure, plan))
    table.add_row("memory of an open span", f"{memory_of_open_span(many):.1f} kB")
    return table


def _median(measure: Callable[[], float], plan: record.Plan) -> str:
    measure()
    return f"{statistics.median(measure() for _ in range(min(plan.rounds, 9))):.1f} µs"


def main() -> None:
    plan = record.options()
    console = Console(highlight=False)
    console.print(record.environment())
    spanguard.limits(message_chars=1_000)  # of endless recursion, what a stack trace takes
    with record.store_taken_out() as client:
        mlflow.set_experiment("benchmark")  # else MLflow looks for one at the start of each trace
        groups = contenders(client)
        record.interleaved([row for group in groups.values() for row in group], 20, 1)
        gc.collect()
        gc.freeze()
        console.print(span_table(groups, plan))
        console.print(other_table(plan))


if __name__ == "__main__":
    main()
