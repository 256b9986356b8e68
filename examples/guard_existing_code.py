"""Existing code on the raw client, made safe by the one line where its client is made.

    python examples/guard_existing_code.py

The batch below is written as MLflow's documentation writes one: start_trace, start_span, end_span,
end_trace. It has a bug that is easy to miss. When an order is not valid, the span of its validation
is never ended, and MLflow then never finishes the trace. `process` is run twice, unchanged: with
MLflow's client, and with `guard()`. Then it runs inside a traced request, where its trace is a
branch of the request's.

The runs are in a process of their own, which ends like any program does. Then their traces are
read back. They go to MLFLOW_TRACKING_URI, or to ./mlflow.db if that is not set.
"""

import os
import subprocess
import sys
import uuid
import warnings

import mlflow
from mlflow import MlflowClient
from rich.console import Console

from spanguard import OrphanedSpanWarning, guard, traced_span
from spanguard.render import TraceTree

ORDERS = [
    {"id": "A1", "quantity": 2, "price": 3.5},
    {"id": "A2", "quantity": -1, "price": 9.9},
    {"id": "A3", "quantity": 1, "price": 4.0},
]

# -- the existing code -------------------------------------------------------------------------


def validate(order: dict) -> None:
    if order["quantity"] < 1:
        raise ValueError(f"order {order['id']} has quantity {order['quantity']}")


def process(client: MlflowClient, label: str) -> float:
    root = client.start_trace("orders", inputs={"count": len(ORDERS)}, tags={"label": label})
    trace_id = root.trace_id
    total = 0.0
    try:
        for order in ORDERS:
            span = client.start_span(
                f"order {order['id']}", trace_id=trace_id, parent_id=root.span_id, inputs=order
            )
            try:
                check = client.start_span("validate", trace_id=trace_id, parent_id=span.span_id)
                validate(order)  # raises, and nobody ends `check`
                client.end_span(trace_id, check.span_id)
                amount = order["quantity"] * order["price"]
                client.end_span(trace_id, span.span_id, outputs=amount)
                total += amount
            except Exception as error:
                client.end_span(
                    trace_id, span.span_id, status="ERROR", attributes={"error": str(error)}
                )
    finally:
        client.end_trace(trace_id, outputs={"total": total})
    return total


# -- run three times, and a look at the store --------------------------------------------------


def run_all(run: str) -> None:
    process(MlflowClient(), f"raw-{run}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", OrphanedSpanWarning)
        process(guard(), f"guarded-{run}")
    print("told:", *(warning.message for warning in caught))
    with traced_span("request", tags={"label": f"nested-{run}"}):
        process(guard(), "not this one: the request has one already")


def main() -> None:
    uri = os.environ.setdefault("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    mlflow.set_tracking_uri(uri)
    if len(sys.argv) == 2:
        return run_all(sys.argv[1])

    run = uuid.uuid4().hex[:8]
    subprocess.run([sys.executable, __file__, run], check=True)
    for label in ("raw", "guarded", "nested"):
        found = mlflow.search_traces(
            filter_string=f"tag.label = '{label}-{run}'", return_type="list"
        )
        traces = "1 readable trace" if len(found) == 1 else f"{len(found)} readable traces"
        print(f"\n{label}: {traces} in the store")
        for trace in found:
            Console().print(TraceTree(trace))
    return None


if __name__ == "__main__":
    main()
