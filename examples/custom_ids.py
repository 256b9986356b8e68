"""Traces under the ids that other systems know: an order's number, another tracer's trace id.

    python examples/custom_ids.py                 two orders, one of them placed twice
    python examples/custom_ids.py find ORDER      the trace of an order, in a process of its own

The second form is what a support desk has: nothing but the order's number. Traces go to
MLFLOW_TRACKING_URI, or to ./mlflow.db if that is not set.
"""

import os
import secrets
import subprocess
import sys
import threading
import warnings

import mlflow
from rich.console import Console

import spanguard
from spanguard import CustomTraceManager, trace_id_for, traced_span
from spanguard.exceptions import DuplicateTraceIdWarning
from spanguard.render import TraceTree

orders = CustomTraceManager()


# -- a shop: callbacks start and end the traces ------------------------------------------------


def on_placed(order: str, customer: str, amount: int) -> None:
    orders.start_custom_trace(customer, "order", custom_trace_id=order, amount=amount)
    with traced_span("reserve stock"):  # nests under the order that was placed last
        pass


def on_paid(order: str) -> None:
    """End the order's trace, in a thread of the payment service, in whatever order they come."""
    orders.end_custom_trace(order, outputs="paid")


def ship(order: str, otel_trace_id: str) -> None:
    """Record the shipping under the trace id that the carrier's own tracing has for it."""
    with traced_span("ship", otel_trace_id=otel_trace_id, tags={"order": order}):
        pass


def run_shop() -> str:
    day = secrets.token_hex(3)
    first, second = f"order-{day}-1", f"order-{day}-2"
    on_placed(first, "ada", 30)
    on_placed(second, "bob", 45)
    print("open:", ", ".join(orders.active_traces))
    for order in (first, second):
        payment = threading.Thread(target=on_paid, args=(order,))
        payment.start()
        payment.join()

    # The customer presses the button again: a trace of its own, and the first one stays whole.
    with orders.custom_trace("ada", "order", custom_trace_id=first) as again:
        print("placed again as:", again.get_attribute("custom_trace_id"))

    ship(first, otel_trace_id=secrets.token_hex(16))
    spanguard.flush()
    return first


# -- a support desk: another process, which knows the order's number ---------------------------


def find(order: str) -> None:
    trace = orders.find_trace(order)
    if trace is None:
        print(f"there is no trace of {order}")
        return
    print(f"{order} is {trace_id_for(order)}, of {trace.data.spans[0].get_attribute('user_id')}")
    Console().print(TraceTree(trace))


# ----------------------------------------------------------------------------------------------


def main() -> None:
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri("sqlite:///mlflow.db")
    if sys.argv[1:2] == ["find"]:
        find(sys.argv[2])
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DuplicateTraceIdWarning)
        order = run_shop()
    for warning in caught:
        if issubclass(warning.category, DuplicateTraceIdWarning):
            print(f"spanguard noticed: {warning.message}")
    subprocess.run([sys.executable, __file__, "find", order], check=True)


if __name__ == "__main__":
    main()
