"""What `@mlflow.trace` does with generators and classes, and how a span's attributes are stored."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import LiveSpan

from spanguard._mlflow.own_write import write_plain
from tests.store import Store

pytestmark = pytest.mark.versions


def test_what_is_sent_into_a_traced_generator_does_not_arrive() -> None:
    @mlflow.trace
    def echo() -> Generator[Any, Any, None]:
        sent = yield "first"
        yield sent

    steps = echo()
    assert next(steps) == "first"
    assert steps.send("sent") is None


def test_a_traced_class_becomes_a_function() -> None:
    class Plain:
        pass

    traced: Any = mlflow.trace(Plain)
    assert not isinstance(traced, type)


def test_a_traced_generator_that_is_left_never_ends_its_span(store: Store) -> None:
    @mlflow.trace
    def numbers() -> Iterator[int]:
        yield from range(3)

    kept = numbers()
    for _ in kept:
        break
    assert store.what_is_left() == []
    kept.close()


@pytest.mark.parametrize(
    "value", ["text", 'with "quotes"', "näïve ☃", "", 0, -7, 10**30, True, False], ids=repr
)
def test_seam_plain_attributes_are_written_as_mlflow_writes_them(
    client: MlflowClient, value: object
) -> None:
    root: LiveSpan = client.start_trace("root")
    root.set_attribute("by MLflow", value)
    write_plain(root._span, {"by us": value})
    assert root._span.attributes["by us"] == root._span.attributes["by MLflow"]
    client.end_trace(root.trace_id)
