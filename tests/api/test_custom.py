"""Traces under ids of the user's choice carry them everywhere, and are never merged."""

from __future__ import annotations

import hashlib
import random
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import CustomTraceManager, TraceStateManager, trace_id_for, traced_span
from spanguard._api import business_ids
from spanguard.exceptions import DuplicateTraceIdWarning
from tests.lifecycle.asked_store import named
from tests.store import Store, own_attributes, status

WITH_AND_WITHOUT_CLIENT = pytest.mark.parametrize("client", [None, "given"], indirect=True)


@pytest.fixture
def client(request: pytest.FixtureRequest) -> mlflow.MlflowClient | None:
    return mlflow.MlflowClient() if getattr(request, "param", None) else None


# -- the derived id ----------------------------------------------------------------------------


def test_the_derived_id_can_be_computed_anywhere() -> None:
    for custom_id in ("order-42", "Zürich 日本 🦉", 'it\'s "quoted"\n', "x" * 10_000, ""):
        text = f"spanguard:custom_trace_id:{custom_id}"
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        assert trace_id_for(custom_id) == "tr-" + digest[:32]
    # By `printf 'spanguard:custom_trace_id:%s' order-42 | sha256sum | cut -c1-32`.
    assert trace_id_for("order-42") == "tr-a1d82f31dc228e1635c54d7eac5425d0"


def test_ids_that_no_store_takes_derive_from_what_is_written_for_them() -> None:
    assert trace_id_for("a\udc80") == trace_id_for("a\\udc80")
    assert trace_id_for("a\x00") == trace_id_for("a\\x00")
    assert trace_id_for(42) == trace_id_for("42")  # type: ignore[arg-type]


# -- session and user --------------------------------------------------------------------------


@WITH_AND_WITHOUT_CLIENT
def test_session_and_user_of_an_imperative_start(
    store: Store, client: mlflow.MlflowClient | None
) -> None:
    manager = TraceStateManager(client)
    manager.push_trace("pushed", session_id="s1", user="ada", new_trace=True)
    manager.pop_trace()
    custom = CustomTraceManager(client)
    custom.start_custom_trace("bob", "chat", custom_trace_id="custom", session_id="s2")
    custom.end_custom_trace("custom")
    found = {}
    for name, trace in named(store).items():
        metadata = trace.info.trace_metadata
        found[name] = (metadata["mlflow.trace.session"], metadata["mlflow.trace.user"])
    assert found == {"pushed": ("s1", "ada"), "custom": ("s2", "bob")}


@WITH_AND_WITHOUT_CLIENT
@pytest.mark.parametrize("key", ["session", "user"])
def test_a_long_session_or_user_costs_no_trace(
    store: Store, client: mlflow.MlflowClient | None, key: str
) -> None:
    argument = "session_id" if key == "session" else key
    for name in ("a", "b"):
        with traced_span(name, client=client, **{argument: "x" * 300 + name}):
            pass
    with traced_span("c", client=client, metadata={f"mlflow.trace.{key}": "x" * 300 + "a"}):
        pass
    traces = named(store)
    values = [traces[name].info.trace_metadata[f"mlflow.trace.{key}"] for name in "abc"]
    assert values[0] == values[2] != values[1], "different ones stay different"
    assert all(len(value) <= 250 and value.startswith("x" * 200) for value in values)


# -- what a custom trace is --------------------------------------------------------------------


@WITH_AND_WITHOUT_CLIENT
@pytest.mark.parametrize("how", ["block", "start"])
def test_a_custom_trace_carries_its_id_everywhere(
    store: Store, client: mlflow.MlflowClient | None, how: str
) -> None:
    manager = CustomTraceManager(client)
    if how == "block":
        with manager.custom_trace("ada", "checkout", custom_trace_id="order-42", rows=3) as s:
            s.set_outputs("paid")
    else:
        manager.start_custom_trace("ada", "checkout", custom_trace_id="order-42", rows=3)
        manager.end_custom_trace("order-42", outputs="paid")
    trace = store.trace()
    (root,) = trace.data.spans
    assert root.name == trace.info.tags["mlflow.traceName"] == "order-42"
    assert trace.info.tags["custom_trace_id"] == "order-42"
    assert trace.info.client_request_id == "order-42"
    assert trace.info.trace_id == trace_id_for("order-42")
    assert trace.info.trace_metadata["mlflow.trace.user"] == "ada"
    assert (status(root), root.outputs) == ("OK", "paid")
    assert own_attributes(root) == {
        "custom_trace_id": "order-42",
        "user_id": "ada",
        "operation": "checkout",
        "rows": 3,
    }
    for filter_string in (
        "tags.custom_trace_id = 'order-42'",
        "client_request_id = 'order-42'",
        "trace.name = 'order-42'",
    ):
        (found,) = mlflow.MlflowClient().search_traces(locations=["0"], filter_string=filter_string)
        assert found.info.trace_id == trace.info.trace_id


def test_generated_ids() -> None:
    manager = CustomTraceManager()
    made = {manager.generate_trace_id("ada", "checkout") for _ in range(100)}
    assert len(made) == 100
    assert all(re.fullmatch(r"ada_checkout_\d{14}_[0-9a-f]{8}", one) for one in made)
    random.seed(7)
    first = manager.generate_trace_id("ada", "checkout")
    random.seed(7)
    assert manager.generate_trace_id("ada", "checkout")[-8:] != first[-8:]


class Hostile:
    def __str__(self) -> str:
        raise ValueError("secret")


@pytest.mark.parametrize("value", ["", None, 7, "a'b\"c\n", "\ud800", "x" * 10_000, Hostile()])
def test_user_id_and_operation_may_be_anything(store: Store, value: Any) -> None:
    manager = CustomTraceManager(strict=True)
    with manager.custom_trace(value, value) as span:
        custom_id = span.get_attribute("custom_trace_id")
    assert spanguard.flush(60)
    found = manager.find_trace(custom_id)
    assert found is not None
    assert found.data.spans[0].get_attribute("custom_trace_id") == custom_id


def test_an_id_factory_makes_the_ids(store: Store) -> None:
    manager = CustomTraceManager(id_factory=lambda user, operation: f"{operation}/{user}")
    assert manager.generate_trace_id("ada", "checkout") == "checkout/ada"
    with manager.custom_trace("ada", "checkout"):
        assert list(manager.active_traces) == ["checkout/ada"]
    assert store.trace().info.trace_id == trace_id_for("checkout/ada")


def raising(user_id: Any, operation: Any) -> str:
    raise KeyError("secret")


FACTORIES: dict[str, tuple[Any, str]] = {
    "raises": (raising, r"ada_x_\d{14}_[0-9a-f]{8}"),
    "none": (lambda *_: None, r"ada_x_\d{14}_[0-9a-f]{8}"),
    "empty": (lambda *_: "", r"ada_x_\d{14}_[0-9a-f]{8}"),
    "number": (lambda *_: 17, "17"),
    "takes nothing": (lambda: "id", r"ada_x_\d{14}_[0-9a-f]{8}"),
    "no function": (17, r"ada_x_\d{14}_[0-9a-f]{8}"),
}


@pytest.mark.parametrize("case", FACTORIES)
def test_an_id_factory_that_fails(store: Store, case: str) -> None:
    factory, expected = FACTORIES[case]
    manager = CustomTraceManager(id_factory=factory)
    with pytest.warns(spanguard.SpanguardWarning) as caught:
        made = manager.generate_trace_id("ada", "x")
    assert re.fullmatch(expected, made)
    assert "secret" not in str(caught[0].message)
    with pytest.warns(spanguard.SpanguardWarning):
        with manager.custom_trace("ada", "x") as span:
            assert re.fullmatch(expected, span.name)
    strict = CustomTraceManager(id_factory=factory, strict=True)
    with pytest.raises(spanguard.InvalidSpanArgumentError):
        strict.generate_trace_id("ada", "x")
    with pytest.raises(spanguard.InvalidSpanArgumentError):
        strict.start_custom_trace("ada", "x")
    assert spanguard.open_spans() == []


def test_a_factory_that_is_interrupted_interrupts() -> None:
    def interrupted(user_id: Any, operation: Any) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CustomTraceManager(id_factory=interrupted).start_custom_trace("ada", "x")


@pytest.mark.parametrize("given_id", ["", 17, b"x"])
def test_a_custom_id_that_is_no_text(store: Store, given_id: Any) -> None:
    manager = CustomTraceManager()
    with pytest.warns(spanguard.SpanguardWarning, match="no text"):
        with manager.custom_trace("ada", "x", custom_trace_id=given_id) as span:
            assert span.name
    with pytest.raises(spanguard.InvalidSpanArgumentError):
        CustomTraceManager(strict=True).start_custom_trace("ada", "x", custom_trace_id=given_id)
    assert spanguard.open_spans() == []
    assert len(store.traces()) == 1


# -- an id in use ------------------------------------------------------------------------------


def test_an_id_in_use_gets_a_suffix(store: Store) -> None:
    manager, other = CustomTraceManager(), CustomTraceManager()
    with manager.custom_trace("ada", "x", custom_trace_id="order") as first:
        with pytest.warns(DuplicateTraceIdWarning, match="the trace is 'order_[0-9a-f]{8}'"):
            second = manager.start_custom_trace("ada", "x", custom_trace_id="order")
        assert second.get_attribute("custom_trace_id") == second.name
        assert re.fullmatch("order_[0-9a-f]{8}", second.name)
        assert dict(manager.active_traces) == {"order": first, second.name: second}
        with pytest.warns(DuplicateTraceIdWarning):
            third = other.start_custom_trace("ada", "x", custom_trace_id="order")
        assert list(other.active_traces) == [third.name]
        manager.end_custom_trace(second.name)
        other.end_custom_trace(third.name)
    traces = named(store)
    assert set(traces) == {"order", second.name, third.name}
    for name, trace in traces.items():
        assert len(trace.data.spans) == 1
        assert trace.info.trace_id == trace_id_for(name)
        assert trace.info.tags["custom_trace_id"] == trace.info.client_request_id == name


def test_an_id_in_use_raises_in_strict_mode_before_anything_opens(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    with manager.custom_trace("ada", "x", custom_trace_id="order"):
        with pytest.raises(spanguard.DuplicateTraceIdError, match="nothing was started") as caught:
            manager.start_custom_trace("ada", "x", custom_trace_id="order")
        with pytest.raises(spanguard.DuplicateTraceIdError):
            with CustomTraceManager(strict=True).custom_trace("a", "x", custom_trace_id="order"):
                pytest.fail("the block must not run")
        assert [span.name for span in spanguard.open_spans()] == ["order"]
        assert list(manager.active_traces) == ["order"]
    assert (caught.value.span_name, caught.value.trace_id) == ("order", trace_id_for("order"))
    with pytest.raises(spanguard.DuplicateTraceIdError):  # ended, and on its way to the store
        manager.start_custom_trace("ada", "x", custom_trace_id="order")
    assert len(store.trace().data.spans) == 1


def test_an_id_that_is_used_again_and_again(store: Store) -> None:
    manager = CustomTraceManager()
    names = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DuplicateTraceIdWarning)
        for _ in range(4):
            with manager.custom_trace("ada", "x", custom_trace_id="order") as span:
                names.append(span.name)
    assert names[0] == "order"
    assert all(re.fullmatch("order_[0-9a-f]{8}", name) for name in names[1:])
    assert len(store.traces()) == len(set(names)) == 4


def test_a_suffix_that_is_in_use_as_well_merges_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(business_ids, "random_digits", lambda: "00000000")
    manager = CustomTraceManager()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DuplicateTraceIdWarning)
        for _ in range(3):
            with manager.custom_trace("ada", "x", custom_trace_id="order"):
                pass
    found = [(trace.info.tags["custom_trace_id"], trace.info.trace_id) for trace in store.traces()]
    assert sorted(custom_id for custom_id, _ in found) == [
        "order",
        "order_00000000",
        "order_00000000",
    ]
    assert len({trace_id for _, trace_id in found}) == 3


def test_two_threads_that_start_one_custom_id(store: Store) -> None:
    manager = CustomTraceManager()
    barrier = threading.Barrier(8)

    def start(number: int) -> None:
        barrier.wait()
        with manager.custom_trace("ada", "x", custom_trace_id="order"):
            barrier.wait()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DuplicateTraceIdWarning)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(start, range(8)))
    traces = named(store)
    assert len(traces) == 8
    assert "order" in traces
    assert all(len(trace.data.spans) == 1 for trace in traces.values())
