"""What one recorded span costs, and whether that grows with the trace.

    python benchmarks/record.py            # about a minute
    python benchmarks/record.py --quick    # a few seconds, too short to trust the numbers

**The work.** A root and 100 children. Every span gets one dict of inputs, four attributes and one
dict of outputs. Each variant does it in its own words: the raw client with the try/except/else of
MLflow's documentation, `traced_span`, MLflow's fluent API, the bare OpenTelemetry SDK.

**The seam.** The store is taken out at one place, `MlflowV3SpanExporter.export`. It is replaced by
`drop_spans`, which counts the spans and, when a root comes, forgets its trace in MLflow's buffer.
That is where recording ends and storing begins, the same place for every way of using MLflow, in
MLflow 3.10 as in the newest. All before it is real: processors, buffer, serialisation. MLflow's
batch processor and its threads are switched off by their environment variables, so that a variant
is not billed for another's export. The bare SDK ends in the same `SimpleSpanProcessor`, with an
exporter that drops.

**Fairness.** All in one process; every round runs all variants, in an order shuffled anew. Each
sample starts with a new tracer provider (`mlflow.tracing.reset`), because spanguard listens to the
provider it has met and the raw client must not pay for that; what it pays in a process that uses
both is a row of its own. Each sample is warmed up by a small trace of its own variant and preceded
by `gc.collect()`. The collector stays on, as in any program; `gc.freeze()` after the warm-up keeps
it from walking the 300,000 objects that importing MLflow leaves behind, which would fall on
whichever variant happens to be running. A ratio is the median of the ratios within a round: what
slows the machine down for a second slows both sides of it.
"""

from __future__ import annotations

import os

# Before mlflow is imported: nothing but the recording, and no noise.
os.environ["MLFLOW_USE_BATCH_SPAN_PROCESSOR"] = "false"
os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
os.environ["MLFLOW_DISABLE_AGENT_HINT"] = "true"
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

import argparse
import gc
import json
import logging
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import mlflow
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from mlflow.tracing.trace_manager import InMemoryTraceManager
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from rich.console import Console
from rich.table import Table

import spanguard
from spanguard import traced_span

INPUTS = {"question": "What does one span cost?", "limit": 5, "sources": ["wiki", "docs"]}
ATTRIBUTES = {"model": "small-1", "temperature": 0.2, "attempt": 1, "cached": False}
OUTPUTS = {"answer": "Less than the call it is about.", "score": 0.93}

Variant = Callable[[int], None]
"""Records one trace: a root and so many children."""

RAW = "raw client"


def answer() -> dict[str, Any]:
    """Do the work that is traced: none, so that all the time is the tracing's."""
    return OUTPUTS


# -- the seam ----------------------------------------------------------------------------------


class Seam:
    """Counts the spans that arrive where the store would begin."""

    recorded = 0


def drop_spans(_exporter: Any, spans: Sequence[ReadableSpan]) -> None:
    """Stand in for `MlflowV3SpanExporter.export`: count, forget ended traces, store nothing."""
    manager = InMemoryTraceManager.get_instance()
    for span in spans:
        Seam.recorded += 1
        if span.parent is None:
            with manager._lock:
                trace_id = manager._otel_id_to_mlflow_trace_id.pop(span.context.trace_id, None)
                manager._traces.pop(trace_id, None)


class DroppingExporter(SpanExporter):
    """The same for the bare OpenTelemetry SDK."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        Seam.recorded += len(spans)
        return SpanExportResult.SUCCESS


# -- the variants: a root and its children, in the words of each API -----------------------------


def raw_client(client: mlflow.MlflowClient) -> Variant:
    def child(trace_id: str, parent_id: str) -> None:
        span = client.start_span(
            "child", trace_id=trace_id, parent_id=parent_id, inputs=INPUTS, attributes=ATTRIBUTES
        )
        try:
            result = answer()
        except Exception as error:
            client.end_span(
                trace_id=trace_id,
                span_id=span.span_id,
                status="ERROR",
                attributes={"error": str(error)},
            )
            raise
        else:
            client.end_span(trace_id=trace_id, span_id=span.span_id, outputs=result, status="OK")

    def run(children: int) -> None:
        root = client.start_trace("root", inputs=INPUTS, attributes=ATTRIBUTES)
        try:
            for _ in range(children):
                child(root.trace_id, root.span_id)
        except Exception as error:
            client.end_trace(root.trace_id, status="ERROR", attributes={"error": str(error)})
            raise
        else:
            client.end_trace(root.trace_id, outputs=OUTPUTS, status="OK")

    return run


def guarded_block(children: int) -> None:
    def child() -> None:
        with traced_span("child", inputs=INPUTS, attributes=ATTRIBUTES) as span:
            span.set_outputs(answer())

    with traced_span("root", inputs=INPUTS, attributes=ATTRIBUTES) as root:
        for _ in range(children):
            child()
        root.set_outputs(OUTPUTS)


def fluent_block(children: int) -> None:
    def child() -> None:
        with mlflow.start_span("child", attributes=ATTRIBUTES) as span:
            span.set_inputs(INPUTS)
            span.set_outputs(answer())

    with mlflow.start_span("root", attributes=ATTRIBUTES) as root:
        root.set_inputs(INPUTS)
        for _ in range(children):
            child()
        root.set_outputs(OUTPUTS)


def decorated(decorate: Callable[..., Any]) -> Variant:
    """Make a variant of a decorator: its arguments are the inputs, its result the outputs."""

    @decorate(name="child", attributes=ATTRIBUTES)
    def child(question: str, limit: int, sources: list[str]) -> dict[str, Any]:
        return answer()

    @decorate(name="root", attributes=ATTRIBUTES)
    def root(question: str, limit: int, children: int) -> dict[str, Any]:
        for _ in range(children):
            child(**INPUTS)
        return OUTPUTS

    return lambda children: root(INPUTS["question"], INPUTS["limit"], children=children)


def bare_opentelemetry() -> Variant:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(DroppingExporter()))
    tracer = provider.get_tracer("benchmark")

    def child() -> None:
        with tracer.start_as_current_span("child", attributes=ATTRIBUTES) as span:
            span.set_attribute("inputs", json.dumps(INPUTS))
            span.set_attribute("outputs", json.dumps(answer()))

    def run(children: int) -> None:
        with tracer.start_as_current_span("root", attributes=ATTRIBUTES) as root:
            root.set_attribute("inputs", json.dumps(INPUTS))
            for _ in range(children):
                child()
            root.set_attribute("outputs", json.dumps(OUTPUTS))

    return run


@dataclass(frozen=True)
class Contender:
    """A row of the first table. `warm_up` runs first, on the provider that is then measured."""

    name: str
    run: Variant
    warm_up: Variant


def contenders(client: mlflow.MlflowClient) -> list[Contender]:
    raw = raw_client(client)
    variants = {
        RAW: raw,
        "traced_span": guarded_block,
        "mlflow.start_span": fluent_block,
        "@mlflow.trace": decorated(mlflow.trace),
        "OpenTelemetry SDK": bare_opentelemetry(),
    }
    traced = getattr(spanguard, "traced", None)
    if traced is not None:
        variants["@traced"] = decorated(traced)
    rows = [Contender(name, run, warm_up=run) for name, run in variants.items()]
    # After a span of spanguard's on the same provider: what code that stays raw pays for it.
    rows.append(Contender("raw client, spanguard in use", raw, warm_up=guarded_block))
    return rows


# -- growth: bare spans, for the payloads cost the same in any trace -----------------------------


def raw_many(client: mlflow.MlflowClient) -> Variant:
    def run(children: int) -> None:
        root = client.start_trace("root")
        for _ in range(children):
            span = client.start_span("child", root.trace_id, root.span_id)
            client.end_span(root.trace_id, span.span_id)
        client.end_trace(root.trace_id)

    return run


def guarded_many(children: int) -> None:
    with traced_span("root"):
        for _ in range(children):
            with traced_span("child"):
                pass


def raw_at_once(client: mlflow.MlflowClient) -> Variant:
    def run(children: int) -> None:
        root = client.start_trace("root")
        spans = [client.start_span("child", root.trace_id, root.span_id) for _ in range(children)]
        for span in spans:
            client.end_span(root.trace_id, span.span_id)
        client.end_trace(root.trace_id)

    return run


def guarded_at_once(children: int) -> None:
    """Open all children beside one another, and close the first opened first."""
    with traced_span("root") as root:
        place = {"trace_id": root.trace_id, "parent_id": root.span_id}
        blocks = [traced_span("child", **place) for _ in range(children)]
        for block in blocks:
            block.__enter__()
        for block in blocks:
            block.__exit__(None, None, None)


# -- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How much is measured: sizes of one trace, and how often each is run."""

    rounds: int
    children: int
    growth: tuple[tuple[int, int], ...]  # children of one root, rounds
    at_once: tuple[int, int]  # children open at once, rounds


FULL = Plan(
    rounds=25, children=100, growth=((100, 25), (10_000, 3), (100_000, 1)), at_once=(1_000, 9)
)
QUICK = Plan(rounds=3, children=100, growth=((100, 3), (1_000, 1)), at_once=(200, 1))


def sample(run: Variant, warm_up: Variant, children: int) -> float:
    """Return the microseconds per recorded span of one trace."""
    mlflow.tracing.reset()
    warm_up(3)
    run(3)
    gc.collect()
    Seam.recorded = 0
    started = time.perf_counter_ns()
    run(children)
    elapsed = time.perf_counter_ns() - started
    if Seam.recorded != children + 1:
        raise RuntimeError(f"{Seam.recorded} spans were recorded instead of {children + 1}")
    return elapsed / (children + 1) / 1000


Samples = dict[str, list[float]]


def interleaved(rows: Sequence[Contender], children: int, rounds: int) -> Samples:
    """Return the samples of each row, one a round, the rows of a round in random order."""
    shuffled = random.Random(children)
    samples: Samples = {row.name: [] for row in rows}
    for _ in range(rounds):
        for row in shuffled.sample(rows, len(rows)):
            samples[row.name].append(sample(row.run, row.warm_up, children))
    return samples


def ratio(samples: Samples, name: str, to: str) -> float:
    """Return the median over the rounds of one row's cost to another's."""
    return statistics.median(a / b for a, b in zip(samples[name], samples[to], strict=True))


def spread(values: Sequence[float]) -> str:
    """Return the tenth and ninetieth percentile."""
    ordered = sorted(values)
    low = ordered[round(0.1 * (len(ordered) - 1))]
    high = ordered[round(0.9 * (len(ordered) - 1))]
    return f"{low:.0f}-{high:.0f}"


@contextmanager
def store_taken_out() -> Iterator[mlflow.MlflowClient]:
    """Trace into nothing: a store that is never written to, in a directory that goes away."""
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as directory:
        mlflow.set_tracking_uri(f"sqlite:///{Path(directory, 'mlflow.db')}")
        with mock.patch.object(MlflowV3SpanExporter, "export", drop_spans):
            yield mlflow.MlflowClient()


# -- what it prints --------------------------------------------------------------------------------


def environment() -> str:
    packages = ("mlflow", "opentelemetry-sdk")
    versions = [f"python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]
    return ", ".join([*versions, f"spanguard {spanguard.__version__}", f"{os.cpu_count()} cores"])


def cost_table(rows: Sequence[Contender], samples: Samples, plan: Plan) -> Table:
    title = f"Cost of one recorded span: {plan.children} children and their root"
    table = Table(title=title, caption=f"{plan.rounds} rounds", title_justify="left")
    table.add_column("variant", no_wrap=True)
    for heading in ("median µs", "p10-p90", "ratio to raw"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        values = samples[row.name]
        table.add_row(
            row.name,
            f"{statistics.median(values):.0f}",
            spread(values),
            f"{ratio(samples, row.name, RAW):.2f}",
        )
    return table


def growth_samples(client: mlflow.MlflowClient, plan: Plan) -> dict[str, Samples]:
    """Return raw and guarded samples for each size of a trace."""
    many = _pair(raw_many(client), guarded_many)
    at_once = _pair(raw_at_once(client), guarded_at_once)
    found = {f"{size:,} children": interleaved(many, size, n) for size, n in plan.growth}
    size, rounds = plan.at_once
    found[f"{size:,} open at once"] = interleaved(at_once, size, rounds)
    return found


def _pair(raw: Variant, guarded: Variant) -> list[Contender]:
    return [Contender(RAW, raw, raw), Contender("traced_span", guarded, guarded)]


def growth_table(found: dict[str, Samples]) -> Table:
    smallest = next(iter(found.values()))
    first = {name: statistics.median(values) for name, values in smallest.items()}
    table = Table(title="Growth: cost of one bare span, by size of its trace", title_justify="left")
    table.add_column("one root", no_wrap=True)
    headings = ("traced_span µs", "growth", "raw client µs", "growth", "ratio to raw")
    for heading in headings:
        table.add_column(heading, justify="right")
    for size, samples in found.items():
        cells = []
        for name in ("traced_span", RAW):
            median = statistics.median(samples[name])
            cells += [f"{median:.0f}", f"{median / first[name]:.2f}"]
        table.add_row(size, *cells, f"{ratio(samples, 'traced_span', RAW):.2f}")
    return table


def options() -> Plan:
    parser = argparse.ArgumentParser(description="Measure what recording one span costs.")
    parser.add_argument("--quick", action="store_true", help="a few seconds, rough numbers")
    return QUICK if parser.parse_args().quick else FULL


def main() -> None:
    plan = options()
    console = Console(highlight=False)
    console.print(environment())
    with store_taken_out() as client:
        rows = contenders(client)
        interleaved(rows, 20, 1)  # imports, caches, the first use of everything
        gc.collect()
        gc.freeze()
        console.print(cost_table(rows, interleaved(rows, plan.children, plan.rounds), plan))
        console.print(
            "Read the last column: at most 1.00 means that a span which always closes costs no "
            "more than the hand-written one.\n"
        )
        console.print(growth_table(growth_samples(client, plan)))
        console.print(
            "Read 'growth': it stays as flat as the raw client's, because the end of a span looks "
            "at its own open children, never at the whole trace."
        )


if __name__ == "__main__":
    main()
