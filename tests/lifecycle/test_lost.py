"""Traces that MLflow will lose: noticed when a span ends, never in silence.

Where MLflow's buffer is left alone it evicts open traces: with a timeout set. Without one they are
kept (test_buffer.py).
"""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
from mlflow.tracing.trace_manager import InMemoryTraceManager
from packaging.version import Version

import spanguard
from spanguard import traced_span
from spanguard.exceptions import TraceLostWarning
from tests.store import Store

pytestmark = pytest.mark.versions

# Until then a provider that set_experiment() replaces goes on writing.
RETIRES_PROVIDERS = Version(mlflow.__version__) >= Version("3.15")


def small_buffer(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_TIMEOUT_SECONDS", "3600")
    monkeypatch.setenv("MLFLOW_TRACE_BUFFER_MAX_SIZE", str(size))
    InMemoryTraceManager.reset()


def crowd_out(count: int) -> None:
    """Start and end so many other traces that an open one is evicted."""
    blocks = [traced_span(f"crowd {n}", new_trace=True) for n in range(count)]
    for block in blocks:
        block.__enter__()
    for block in reversed(blocks):
        block.__exit__(None, None, None)


def test_an_evicted_trace_is_a_warning(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    small_buffer(monkeypatch, 3)
    with pytest.warns(TraceLostWarning, match="evicted it from its buffer") as caught:
        block = traced_span("root")
        root = block.__enter__()
        crowd_out(5)
        block.__exit__(None, None, None)
    (message,) = (str(w.message) for w in caught if root.trace_id in str(w.message))
    assert "MLFLOW_TRACE_BUFFER_MAX_SIZE" in message
    assert mlflow.get_current_active_span() is None


def test_where_traces_are_evicted_a_warning_comes_before_the_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_buffer(monkeypatch, 3)
    with pytest.warns(TraceLostWarning) as caught:
        with traced_span("root"):
            pass
        with traced_span("next"):
            pass
    (warning,) = caught
    assert "MLFLOW_TRACE_TIMEOUT_SECONDS is set to 3600" in str(warning.message)
    assert "more than 3 are open" in str(warning.message)
    assert warning.filename == __file__
    assert len(store.traces()) == 2


def test_an_evicted_trace_raises_in_strict_mode(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_buffer(monkeypatch, 3)
    with pytest.raises(spanguard.TraceLostError) as caught, pytest.warns(TraceLostWarning):
        with traced_span("root", strict=True) as root:
            crowd_out(5)
    assert (caught.value.span_name, caught.value.trace_id) == ("root", root.trace_id)
    assert spanguard.open_spans() == []


def test_code_goes_on_under_an_evicted_trace(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    small_buffer(monkeypatch, 3)
    ran = []
    with pytest.warns(TraceLostWarning):
        with traced_span("root"):
            crowd_out(5)
            with traced_span("child") as child:
                child.set_outputs(1)
                ran.append(True)
    assert ran == [True]
    with traced_span("next"):
        pass
    left = store.what_is_left()
    assert "next" in [trace.info.tags.get("mlflow.traceName") for trace in left]


def test_a_users_exception_wins_over_a_lost_trace(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_buffer(monkeypatch, 3)
    error = ValueError("users")
    with pytest.raises(ValueError) as caught, pytest.warns(TraceLostWarning):
        with traced_span("root", strict=True):
            crowd_out(5)
            raise error
    assert caught.value is error


def test_another_tracking_uri_while_a_trace_is_open(store: Store, tmp_path: Path) -> None:
    with pytest.warns(TraceLostWarning, match="tracking URI changed"):
        with traced_span("root"):
            mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(spanguard.TraceLostError):
        with traced_span("root", strict=True):
            mlflow.set_tracking_uri(store.uri)


@pytest.mark.skipif(not RETIRES_PROVIDERS, reason="harmless on this MLflow")
def test_set_experiment_while_a_trace_is_open(store: Store) -> None:
    with pytest.warns(TraceLostWarning, match="experiment"):
        with traced_span("root"):
            mlflow.set_experiment("other")
    with traced_span("next"):
        pass
    assert [trace.data.spans[0].name for trace in store.traces()] == ["next"]


@pytest.mark.skipif(RETIRES_PROVIDERS, reason="this MLflow loses the trace")
def test_set_experiment_while_a_trace_is_open_is_harmless(store: Store) -> None:
    with traced_span("root", strict=True):
        mlflow.set_experiment("other")
    # The queue of the replaced provider is MLflow's to empty: until then flush() says False.
    mlflow.flush_trace_async_logging()
    assert [trace.data.spans[0].name for trace in store.what_is_left()] == ["root"]


def test_tracing_disabled_while_a_trace_is_open(store: Store) -> None:
    with pytest.warns(TraceLostWarning):
        with traced_span("root"):
            mlflow.tracing.disable()
            with traced_span("child"):
                pass
    mlflow.tracing.enable()


def test_tracing_hidden_for_a_call_of_mlflows_is_no_loss(store: Store) -> None:
    from mlflow.tracing import provider

    if not hasattr(provider, "_trace_disabled_state"):
        pytest.skip("this MLflow rebuilds its provider instead of hiding it")

    @provider.trace_disabled
    def inside(block: traced_span) -> None:
        block.__exit__(None, None, None)

    block = traced_span("root", strict=True)
    block.__enter__()
    inside(block)
    assert store.trace().data.spans[0].name == "root"


def test_an_experiment_that_does_not_exist_does_not_lose_the_trace(store: Store) -> None:
    with pytest.warns(spanguard.SpanguardWarning, match="no experiment"):
        with traced_span("root", experiment_id="424242"):
            pass
    assert store.trace().info.experiment_id == "0"
