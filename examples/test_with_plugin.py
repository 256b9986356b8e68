"""Testing with the plugin: assert on spans without a server; fail a test that leaves one open.

    pytest examples/test_with_plugin.py --spanguard-strict

Neither needs a conftest.py: the plugin comes with spanguard.
"""

import mlflow
import pytest

from spanguard import TraceStateManager, traced, traced_span
from spanguard.testing._recorded import RecordedSpans

PRICES = {"apple": 0.5, "bread": 2.4}


# -- the application ---------------------------------------------------------------------------


@traced(span_type="TOOL")
def price_of(item: str) -> float:
    return PRICES[item]


def checkout(basket: list[str]) -> float:
    with traced_span("checkout", tags={"shop": "corner"}) as span:
        total = sum(price_of(item) for item in basket)
        span.set_outputs({"total": total})
        return total


def read_prices(lines: list[str]) -> dict[str, float]:
    """Raw client code. Without the `finally`, a broken line would leave its span open."""
    client = mlflow.MlflowClient()
    root = client.start_trace("read prices")
    try:
        return {item: float(price) for item, _, price in (line.partition("=") for line in lines)}
    finally:
        client.end_trace(root.trace_id)


sessions = TraceStateManager(scope="process")


def greet(user: str) -> str:
    """Open a session, which some later request will close."""
    sessions.push_trace("session", user=user)
    with sessions.trace("greeting"):
        return f"Hello {user}!"


# -- its tests ---------------------------------------------------------------------------------


def test_checkout_records_the_total_and_each_price(spans: RecordedSpans) -> None:
    assert checkout(["apple", "bread"]) == 2.9

    assert spans.names == ["checkout", "price_of", "price_of"]
    assert spans.one("checkout").outputs == {"total": 2.9}
    apple, bread = spans.children("checkout")
    assert (apple.inputs, apple.outputs) == ({"item": "apple"}, 0.5)
    assert bread.span_type == "TOOL"
    assert spans.traces[0].info.tags["shop"] == "corner"


def test_an_unknown_item_is_an_error_on_both_spans(spans: RecordedSpans) -> None:
    with pytest.raises(KeyError):
        checkout(["caviar"])

    assert {span.name: span.outcome for span in spans} == {
        "checkout": "error",
        "price_of": "error",
    }
    assert spans.one("price_of").user_attributes["error_type"] == "KeyError"


def test_a_broken_line_leaves_no_span_open(spans: RecordedSpans) -> None:
    assert read_prices(["cheese=7.9"]) == {"cheese": 7.9}
    with pytest.raises(ValueError):
        read_prices(["caviar=expensive"])
    # --spanguard-strict looks at the end of each test whether that is so, and names the line.


@pytest.mark.spanguard_allow_open_spans(reason="a session outlives the request that opens it")
def test_a_session_stays_open(spans: RecordedSpans) -> None:
    greet("ada")
    assert spans.names == ["greeting"]  # the session has not ended
