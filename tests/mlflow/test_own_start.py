"""A trace that we start ourselves is the trace that MLflow's own call starts."""

from __future__ import annotations

from typing import Any

import mlflow
import pytest
from mlflow.entities import LiveSpan, NoOpSpan

import spanguard
from spanguard import traced_span
from spanguard._mlflow import own_start, starting
from spanguard._mlflow.own_start import start_plain_root
from tests.store import Store

pytestmark = pytest.mark.versions


@pytest.fixture(autouse=True)
def _listening(store: Store) -> None:
    with traced_span("first"):
        pass


def test_this_mlflows_start_is_known() -> None:
    """Else each trace's start costs a tenth more: look at what it does, and see to own_start.py."""
    assert own_start._is_known


def facts(span: Any) -> list[object]:
    attributes = dict(span._span.attributes)
    attributes.pop("mlflow.traceRequestId")
    assert spanguard.flush(60)
    info = mlflow.get_trace(span.trace_id).info
    metadata = {k: v for k, v in info.trace_metadata.items() if "size" not in k.lower()}
    tags = {k: v for k, v in info.tags.items() if k != "mlflow.artifactLocation"}  # has its id
    return [
        list(attributes.items()),
        (info.experiment_id, info.state, tags, metadata, info.client_request_id),
        (span.parent_id, type(span), span.name),
    ]


@pytest.mark.parametrize("experiment_id", [None, "0"])
def test_it_is_the_trace_that_mlflow_starts(experiment_id: str | None) -> None:
    found = []
    for start in (mlflow.start_span_no_context, start_plain_root):
        span: Any = start("root", experiment_id=experiment_id)
        span.set_span_type("CHAIN")
        span.end()
        found.append(facts(span))
    assert found[0] == found[1]


def test_tags_and_sessions_go_the_public_way(store: Store) -> None:
    with traced_span("root", tags={"a": "1"}, session_id="s", start_time_ns=1_700_000_000 * 10**9):
        pass
    trace = next(t for t in store.traces() if t.info.tags["mlflow.traceName"] == "root")
    assert trace.info.tags["a"] == "1"
    assert trace.info.trace_metadata["mlflow.trace.session"] == "s"


def test_a_start_in_its_place_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    theirs = mlflow.start_span_no_context

    def start(name: str, **kwargs: Any) -> LiveSpan:
        called.append(name)
        return theirs(name, **kwargs)

    monkeypatch.setattr(mlflow, "start_span_no_context", start)
    with traced_span("root"):
        pass
    assert called == ["root"]


def test_a_start_that_fails_is_a_line_in_mlflows_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As it is with MLflow's own: a span that ignores, and the same words."""
    from mlflow.tracing.processor.base_mlflow import BaseMlflowSpanProcessor

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("refused")

    monkeypatch.setattr(BaseMlflowSpanProcessor, "on_start", refuse)
    said = []
    for start in (mlflow.start_span_no_context, lambda name: start_plain_root(name, None)):
        caplog.clear()
        assert isinstance(start("root"), NoOpSpan)
        said.append([one.getMessage() for one in caplog.records if "mlflow" in one.name])
    assert said[0] == said[1] and "refused" in said[0][0]


def test_one_that_is_sampled_out_keeps_its_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0.0")
    mlflow.tracing.reset()
    with traced_span("root") as root:
        assert starting.is_noop(root.__wrapped__)  # type: ignore[attr-defined]
        with traced_span("child") as child:
            assert starting.is_noop(child.__wrapped__)  # type: ignore[attr-defined]
