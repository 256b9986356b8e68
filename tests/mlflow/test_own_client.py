"""A client is called where anybody could see it; MLflow's own, as it is, need not be."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import wrapt
from mlflow import MlflowClient

from spanguard import guard, traced_span
from spanguard._mlflow import own_client
from spanguard._mlflow.known_code import names_of_function
from spanguard._mlflow.own_client import is_plain_client
from tests.store import Store, parents

pytestmark = pytest.mark.versions


def test_this_mlflows_client_is_known() -> None:
    """Else `guard()` costs twice as much: look at what it does, and see to own_client.py."""
    assert is_plain_client(MlflowClient())


def test_a_subclass_and_a_double_are_called() -> None:
    class Own(MlflowClient):
        pass

    assert not is_plain_client(Own())
    assert not is_plain_client(object())


@pytest.mark.parametrize("name", ["start_trace", "start_span", "end_span", "end_trace"])
def test_one_with_a_call_in_place_of_its_own_is_called(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether on the class or on the one client."""
    client, other = MlflowClient(), MlflowClient()
    monkeypatch.setattr(client, name, lambda *_: None)
    assert not is_plain_client(client) and is_plain_client(other)
    monkeypatch.setattr(MlflowClient, name, lambda *_: None)
    assert not is_plain_client(other)


def test_calls_that_were_wrapped_before_us_are_not_known(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they are wrapped by: what is inside of it is not all that is done."""

    @wrapt.decorator
    def by_wrapt(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return wrapped(*args, **kwargs)

    def by_functools(call: Any) -> Any:
        return functools.wraps(call)(lambda *args, **kwargs: call(*args, **kwargs))

    for name, call in own_client._calls.items():
        assert names_of_function(call) in own_client._KNOWN[name]
        assert names_of_function(by_wrapt(call)) == names_of_function(by_functools(call)) == ""


@pytest.mark.parametrize("face", ["guard", "block"])
def test_a_patched_client_sees_the_calls_of_each_face(
    face: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for name in own_client._KNOWN:
        monkeypatch.setattr(MlflowClient, name, spy(getattr(MlflowClient, name), name, seen))
    client = MlflowClient()
    if face == "guard":
        guarded = guard(client)
        root = guarded.start_trace("root")
        child = guarded.start_span("child", root.trace_id, root.span_id)
        guarded.end_span(root.trace_id, child.span_id)
        guarded.end_trace(root.trace_id)
    else:
        with traced_span("root", client=client), traced_span("child", client=client):
            pass
    assert seen == ["start_trace", "start_span", "end_span", "end_trace"]
    assert parents(store) == {"root": None, "child": "root"}


def spy(call: Any, name: str, seen: list[str]) -> Any:
    def called(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return call(*args, **kwargs)

    return called


def test_what_the_plain_client_is_given_is_stored(store: Store) -> None:
    client = guard(MlflowClient())
    root = client.start_trace("root", inputs=1, attributes={"a": 1}, tags={"t": "1"})
    client.end_trace(root.trace_id, outputs=2, attributes={"b": 2}, status="ERROR")
    trace = store.trace()
    (span,) = trace.data.spans
    assert (span.inputs, span.outputs) == (1, 2)
    assert span.attributes["a"] == 1 and span.attributes["b"] == 2
    assert trace.info.tags["t"] == "1" and span.status.status_code.value == "ERROR"


MIXED = {"a": 1, "b": {3}, "c": "text", "d": object, "e": [1.5, None]}


@pytest.mark.parametrize("inputs", [{"q": 1}, {1, 2}, None], ids=["plain", "not plain", "none"])
def test_the_record_is_that_of_the_client_itself(inputs: Any, store: Store) -> None:
    """The same attributes, in the same order."""
    for name, client in (("theirs", MlflowClient()), ("ours", guard(MlflowClient()))):
        given = {"inputs": inputs, "attributes": MIXED}
        root = client.start_trace(name, "CHAIN", **given)
        child = client.start_span(f"{name} child", root.trace_id, root.span_id, "PARSER", **given)
        last = {"outputs": "out", "attributes": {"f": {4}, "g": 2}, "status": "OK"}
        client.end_span(root.trace_id, child.span_id, **last)
        client.end_trace(root.trace_id, **last)
    spans = store.spans()
    for name in ("", " child"):
        theirs, ours = (dict(spans[f"{whose}{name}"].attributes) for whose in ("theirs", "ours"))
        del theirs["mlflow.traceRequestId"], ours["mlflow.traceRequestId"]
        assert list(ours.items()) == list(theirs.items())
