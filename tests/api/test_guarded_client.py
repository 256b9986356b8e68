"""The guarded client sees each call once, and behaves as the client that it guards."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import LiveSpan, NoOpSpan

import spanguard
from spanguard import TraceStateManager, current_span, guard, traced_span
from spanguard._api import destination
from spanguard._base import findings
from spanguard.exceptions import (
    InvalidSpanArgumentWarning,
    SpanAlreadyEndedWarning,
    UnknownSpanWarning,
)
from tests.api.raw_code import EACH_ONCE, ELSEWHERE, Hostile, Recording
from tests.lines import here
from tests.store import Store

# -- the client that is guarded ----------------------------------------------------------------


def test_a_given_client_sees_every_start_and_end(store: Store) -> None:
    client = Recording()
    guarded = guard(client)
    root = guarded.start_trace("root", inputs=1, tags={"t": 1})
    child = guarded.start_span("child", root.trace_id, root.span_id, attributes={"a": 1})
    line = here() - 1
    assert spanguard.open_spans()[1].opened_at.startswith(f"{__file__}:{line} in ")
    guarded.end_span(root.trace_id, child.span_id, outputs=2, attributes={"b": 2})
    guarded.end_trace(root.trace_id, outputs=3, end_time_ns=child.end_time_ns + 1)
    assert client.names == EACH_ONCE
    given = [kwargs for _, kwargs in client.calls]
    assert (given[0]["inputs"], given[0]["tags"]) == (1, {"t": "1"})
    assert given[1]["attributes"] == {"a": 1}
    assert (given[2]["outputs"], given[2]["attributes"]) == (2, {"b": 2})
    assert (given[3]["outputs"], given[3]["end_time_ns"]) == (3, child.end_time_ns + 1)
    spans = store.spans()
    assert (spans["root"].outputs, spans["child"].outputs) == (3, 2)


def test_a_client_that_takes_secrets_out_is_not_got_round(store: Store) -> None:
    class Redacting(MlflowClient):
        def end_trace(self, trace_id: str, outputs: Any = None, **kwargs: Any) -> None:
            super().end_trace(trace_id, outputs="[redacted]", **kwargs)

    client = guard(Redacting())
    client.end_trace(client.start_trace("root").trace_id, outputs="a secret word")
    manager = TraceStateManager(client)
    manager.push_trace("pushed")
    manager.pop_trace(outputs="a secret word")
    assert [t.data.spans[0].outputs for t in store.traces()] == ["[redacted]"] * 2
    assert b"a secret word" not in store.path.read_bytes()


def test_a_client_whose_end_fails_loses_no_trace(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(MlflowClient):
        def end_span(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("a secret word")

        end_trace = end_span

    findings.reraise_internal = False
    client = guard(Failing())
    root = client.start_trace("root")
    child = client.start_span("child", root.trace_id, root.span_id)
    client.end_span(root.trace_id, child.span_id)
    client.end_trace(root.trace_id)
    assert len(store.trace().data.spans) == 2
    assert "OSError" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("failing", ["start_trace", "start_span"])
def test_a_client_whose_start_fails_leaves_the_code_running(store: Store, failing: str) -> None:
    """And is not told in strict mode that it broke a rule: it did not."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError

    findings.reraise_internal = False
    client = guard(type("Failing", (MlflowClient,), {failing: fail})(), strict=True)
    root = client.start_trace("root")
    child = client.start_span("child", root.trace_id, root.span_id)
    client.end_span(root.trace_id, child.span_id)
    client.end_trace(root.trace_id)
    assert isinstance(child, NoOpSpan)
    if failing == "start_trace":
        assert isinstance(root, NoOpSpan)
    else:
        assert [span.name for span in store.trace().data.spans] == ["root"]


class Double:
    """Stands in for a client in a user's tests: no MLflow behind it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def start_trace(self, **kwargs: Any) -> Any:
        self.calls.append(("start_trace", kwargs["name"]))
        return DoubleSpan(kwargs["name"], None)

    def start_span(self, **kwargs: Any) -> Any:
        self.calls.append(("start_span", kwargs["name"]))
        return DoubleSpan(kwargs["name"], kwargs["parent_id"])

    def end_span(self, **kwargs: Any) -> None:
        self.calls.append(("end_span", kwargs["span_id"]))

    def end_trace(self, **kwargs: Any) -> None:
        self.calls.append(("end_trace", kwargs["trace_id"]))


class DoubleSpan:
    trace_id, status, end_time_ns = "trace", None, None

    def __init__(self, name: str, parent_id: str | None) -> None:
        self.name = name
        self.span_id = f"id of {name}"
        self.parent_id = parent_id


def test_a_double_sees_every_start_and_end() -> None:
    double = Double()
    client = guard(double)  # type: ignore[arg-type]
    root = client.start_trace("root")
    child = client.start_span("child", root.trace_id, root.span_id)
    assert child.parent_id == "id of root"
    client.end_span(root.trace_id, child.span_id)
    client.end_trace(root.trace_id)
    assert double.calls == [
        ("start_trace", "root"),
        ("start_span", "child"),
        ("end_span", "id of child"),
        ("end_trace", "trace"),
    ]
    assert not client._self_home.open
    with pytest.warns(SpanAlreadyEndedWarning):
        client.end_span(root.trace_id, child.span_id)


def test_a_block_closes_the_spans_of_a_double() -> None:
    double = Double()
    with guard(double) as client:  # type: ignore[arg-type]
        root = client.start_trace("root")
        client.start_span("child", root.trace_id, root.span_id)
    assert [call for call, _ in double.calls] == EACH_ONCE


# -- how it behaves as an object ---------------------------------------------------------------


def test_it_is_the_client_for_everything_else(store: Store) -> None:
    client = MlflowClient()
    guarded = guard(client)
    assert isinstance(guarded, MlflowClient)
    assert guarded.__wrapped__ is client
    assert guarded.tracking_uri == store.uri
    root = guarded.start_trace("root")
    guarded.set_trace_tag(root.trace_id, "k", "v")
    guarded.end_trace(root.trace_id)
    assert spanguard.flush(60)
    assert guarded.get_trace(root.trace_id).info.tags["k"] == "v"
    experiment = guarded.create_experiment("other")
    assert guarded.get_experiment(experiment).name == "other"
    assert isinstance(guard(Recording()), Recording)


def test_the_four_calls_take_what_mlflows_take() -> None:
    for name in EACH_ONCE:
        theirs = list(inspect.signature(getattr(MlflowClient, name)).parameters)
        ours = list(inspect.signature(getattr(guard(), name)).parameters)
        theirs = [parameter for parameter in theirs[1:] if parameter != "request_id"]
        assert ours[: len(theirs)] == theirs


def test_spans_come_through_the_safe_proxy(store: Store, either: MlflowClient) -> None:
    root: Any = either.start_trace("root")
    assert isinstance(root, LiveSpan)
    assert type(root.trace_id) is str
    assert root.request_id is root.trace_id
    assert root.trace_id == root.__wrapped__.trace_id
    root.set_outputs(Hostile())
    root.end()
    assert store.trace().info.trace_id == root.trace_id


def test_guarding_twice_is_guarding_once(store: Store) -> None:
    client = Recording()
    twice = guard(guard(client, strict=True, ambient=True))
    assert twice.__wrapped__ is client
    root = twice.start_trace("root")
    assert current_span() is root
    with pytest.raises(spanguard.UnknownSpanError):
        twice.end_trace("tr-unknown")
    twice.end_trace(root.trace_id)
    assert client.names == ["start_trace", "end_trace"]
    guard(guard(strict=True), strict=False)
    lenient = guard(twice, strict=False)
    with pytest.warns(UnknownSpanWarning):
        lenient.end_trace("tr-unknown")
    late = guard(guard())
    late.end_trace(late.start_trace("late").trace_id)
    assert late.tracking_uri == store.uri


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_refuses_to_be_pickled(either: MlflowClient, protocol: int) -> None:
    with pytest.raises(TypeError, match=r"cannot be pickled: .*\. Make one where it is used"):
        pickle.dumps({"client": either}, protocol)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_is_another_guard_of_a_copy(store: Store, either: Any, how: Any) -> None:
    root = either.start_trace("root")
    with how(either) as other:
        assert isinstance(other, spanguard._api.guarded_client.GuardedClient)
        assert other.tracking_uri == store.uri
        child = other.start_span("child", root.trace_id, root.span_id)
        other.end_span(root.trace_id, child.span_id)
    assert root.end_time_ns is None, "the copy answers for what it opened itself"
    either.end_trace(root.trace_id)
    assert how(guard(strict=True))._self_home.strict is True


def test_a_broken_store_does_not_show_where_the_client_is_made(tmp_path: Path) -> None:
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"this is no database" * 100)
    mlflow.set_tracking_uri(f"sqlite:///{broken}")
    findings.reraise_internal = False
    ran = []
    with guard() as client:
        assert isinstance(client, MlflowClient)
        root = client.start_trace("root")
        child = client.start_span("child", root.trace_id, root.span_id)
        client.end_span(root.trace_id, child.span_id, outputs=1)
        client.end_trace(root.trace_id)
        ran.append(root)
        # What asks the store says what MLflow says, each time.
        for _ in range(2):
            with pytest.raises(Exception, match="not a database"):
                client.search_experiments()
    assert len(ran) == 1


def test_a_client_made_late_is_made_once_and_by_then(store: Store, tmp_path: Path) -> None:
    client = guard()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert client.tracking_uri == store.uri
    tracing = client._tracing_client
    assert client._tracing_client is tracing
    assert not hasattr(client, "no_such_thing")
    assert client.search_experiments()
    with pytest.raises(AttributeError, match="no_such_thing"):
        client.no_such_thing  # type: ignore[attr-defined]


def test_tracing_that_is_off(store: Store, either: MlflowClient) -> None:
    mlflow.tracing.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            root = either.start_trace("root")
            child = either.start_span("child", root.trace_id, root.span_id)
            either.end_span(child.trace_id, child.span_id, outputs=1)
            either.end_trace(root.trace_id)
            with traced_span("block", trace_id=root.trace_id):
                pass
    finally:
        mlflow.tracing.enable()
    assert isinstance(root, NoOpSpan)
    assert store.rows() == 0


def test_an_ambient_guard_leaves_nothing_active_where_tracing_is_off(store: Store) -> None:
    client = guard(ambient=True)
    mlflow.tracing.disable()
    root = client.start_trace("root")
    mlflow.tracing.enable()
    assert current_span() is None
    client.end_trace(root.trace_id)


# -- the tracking URI --------------------------------------------------------------------------


def test_a_client_for_another_store_is_told_once(store: Store) -> None:
    client = guard(MlflowClient(tracking_uri=ELSEWHERE))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3):
            root = client.start_trace(f"trace {number}")
            client.end_trace(root.trace_id)
    assert [w.category for w in caught] == [InvalidSpanArgumentWarning]
    assert "elsewhere:5000" in str(caught[0].message)
    assert "set_tracking_uri" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert len(store.traces()) == 3


def test_a_client_from_before_the_tracking_uri_changed(store: Store, tmp_path: Path) -> None:
    client = guard(MlflowClient())
    client.end_trace(client.start_trace("before").trace_id)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.warns(InvalidSpanArgumentWarning, match=r"other\.db"):
        root = client.start_trace("after")
    client.end_trace(root.trace_id)
    assert spanguard.flush(60)
    mlflow.set_tracking_uri(store.uri)
    assert store.trace().data.spans[0].name == "before"


def test_a_client_for_another_store_is_refused_in_strict_mode(store: Store) -> None:
    client = guard(MlflowClient(tracking_uri=ELSEWHERE), strict=True)
    for _ in range(2):
        with pytest.raises(spanguard.InvalidSpanArgumentError, match="elsewhere:5000"):
            client.start_trace("trace")
    assert spanguard.open_spans() == []
    assert store.rows() == 0


def test_the_same_store_written_differently_is_no_alarm(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.path.parent)
    client = guard(MlflowClient(tracking_uri=f"sqlite:///{store.path.name}"), strict=True)
    client.end_trace(client.start_trace("trace").trace_id)
    assert len(store.traces()) == 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("http://localhost:5000", "http://127.0.0.1:5000/", True),
        ("http://Host", "http://host:80/", True),
        ("https://user:pw@host/mlflow/", "https://host/mlflow", True),
        ("http://host:5000", "http://host:5001", False),
        ("http://host", "https://host", False),
        ("http://host/a", "http://host/b", False),
        ("postgresql+psycopg2://u:p@db/ml", "postgresql://db/ml", True),
        ("postgresql://db/ml", "postgresql://db/other", False),
        ("sqlite:///x.db", "sqlite:///./x.db", True),
        ("sqlite:///x.db", "sqlite:///y.db", False),
        ("sqlite://", "sqlite:///x.db", False),
        ("./mlruns", "mlruns", True),
        ("databricks", "databricks/", True),
        ("databricks", "databricks://profile", False),
        ("http://host:port", "http://host", False),
        ("", "sqlite:///x.db", False),
    ],
)
def test_which_uris_are_the_same_store(one: str, other: str, same: bool) -> None:
    assert destination.is_same_store(one, other) is same
    assert destination.is_same_store(other, one) is same


def test_paths_are_the_same_store_in_every_form(tmp_path: Path) -> None:
    path = tmp_path / "with space"
    assert destination.is_same_store(path.as_uri(), str(path))
    assert destination.is_same_store(f"sqlite:///{path}", f"sqlite:///{path.parent}/./with space")


def test_no_password_gets_into_the_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        tracking_uri = "https://ada:hunter2@host:5000/x?token=hunter2"

    finding = destination.elsewhere(Client(), "span")
    assert finding is not None
    assert "https://host:5000/x" in str(finding)
    assert "hunter2" not in str(finding)
