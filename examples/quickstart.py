"""Quickstart: spans around code, an error that is recorded as one, and the trace read back.

    python examples/quickstart.py

Traces go to MLFLOW_TRACKING_URI, or to ./mlflow.db if that is not set.
"""

import os

import mlflow
from rich.console import Console

import spanguard
from spanguard import traced_span
from spanguard.render import TraceTree

PRICES = {"apple": 0.5, "bread": 2.4, "cheese": 7.9}


def price_of(item: str) -> float:
    """Look up a price. A KeyError leaves the span, so the span is an error."""
    with traced_span("price_of", span_type="TOOL", inputs={"item": item}) as span:
        price = PRICES[item]
        span.set_outputs(price)
        return price


def checkout(basket: list[str]) -> float:
    """Add up a basket; what has no price is left out."""
    with traced_span("checkout", inputs=basket, tags={"shop": "corner"}) as span:
        total = 0.0
        for item in basket:
            try:
                total += price_of(item)
            except KeyError:
                span.set_attribute("without_price", item)
        span.set_outputs({"total": total})
        return total


def main() -> None:
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri("sqlite:///mlflow.db")
    print("total:", checkout(["apple", "bread", "caviar"]))

    spanguard.flush()
    trace = mlflow.search_traces(max_results=1, return_type="list")[0]
    Console().print(TraceTree(trace))


if __name__ == "__main__":
    main()
