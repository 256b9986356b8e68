"""The seams that `spanguard._mlflow` stands on."""

from __future__ import annotations

import contextvars
import inspect
import json
import random
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import LiveSpan, NoOpSpan
from mlflow.tracing import provider
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import TraceJSONEncoder
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from packaging.version import Version

from tests.mlflow.contract.raw_client import (
    BATCHING,
    RETIRES,
    VERSION,
    by_root,
    child_of,
    end,
    is_open,
    state_of,
)
from tests.store import Store

pytestmark = pytest.mark.versions


def test_seam_a_client_span_can_be_made_the_active_one(store: Store, client: MlflowClient) -> None:
    assert list(inspect.signature(provider.set_span_in_context).parameters) == ["span"]
    root = client.start_trace("root")
    token = provider.set_span_in_context(root)
    try:
        assert mlflow.get_current_active_span() is root
        assert otel.get_current_span(provider.get_current_context()) is root._span
        with mlflow.start_span("fluent"):
            mlflow.trace(lambda: None, name="decorated")()
    finally:
        provider.detach_span_from_context(token)
    assert mlflow.get_current_active_span() is None
    client.end_trace(root.trace_id)
    spans = store.spans()
    assert spans["fluent"].parent_id == root.span_id
    assert spans["decorated"].parent_id == spans["fluent"].span_id
    assert len(store.traces()) == 1


def test_seam_only_the_otel_span_is_read_when_a_span_is_made_active(client: MlflowClient) -> None:
    class Stand:
        def __init__(self, span: LiveSpan) -> None:
            self._span = span._span

    root = client.start_trace("root")
    token = provider.set_span_in_context(Stand(root))
    assert mlflow.get_current_active_span() is root
    provider.detach_span_from_context(token)


def test_seam_what_was_active_is_restored_by_attach_from_another_context(
    client: MlflowClient,
) -> None:
    """A token is bound to its context; the context's value is not."""
    runtime = provider.mlflow_runtime_context
    outer, inner = client.start_trace("outer"), client.start_trace("inner")
    before = runtime.get_current()
    provider.set_span_in_context(outer)
    previous = runtime.get_current()
    token = provider.set_span_in_context(inner)

    def elsewhere() -> Any:
        assert mlflow.get_current_active_span() is inner
        with pytest.raises(ValueError, match="different Context"):
            runtime.detach(token if not isinstance(token, tuple) else token[0])
        runtime.attach(previous)
        return mlflow.get_current_active_span()

    assert contextvars.copy_context().run(elsewhere) is outer
    assert mlflow.get_current_active_span() is inner
    runtime.attach(before)
    assert mlflow.get_current_active_span() is None


@pytest.mark.skipif(
    not hasattr(provider, "MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT"),
    reason="this MLflow never touches OpenTelemetry's own context",
)
def test_seam_the_active_span_reaches_opentelemetrys_context_only_on_request(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why spanguard restores two contexts where this is switched on."""
    root = client.start_trace("root")
    seen = []
    for wish in ("false", "true"):
        monkeypatch.setenv("MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT", wish)
        token = provider.set_span_in_context(root)
        seen.append(otel.get_current_span() is root._span)
        provider.detach_span_from_context(token)
        assert otel.get_current_span() is otel.INVALID_SPAN
    assert seen == [False, True]


def test_seam_hiding_the_active_span_lets_a_new_trace_start(
    store: Store, client: MlflowClient
) -> None:
    with mlflow.start_span("fluent"):
        token = provider.set_span_in_context(NoOpSpan())
        inner = client.start_trace("inner")
        provider.detach_span_from_context(token)
        client.end_trace(inner.trace_id)
    assert sorted(by_root(store)) == ["fluent", "inner"]


def test_seam_without_a_parent_a_span_nests_under_the_active_one(store: Store) -> None:
    with mlflow.start_span("active") as active:
        mlflow.start_span_no_context("nested").end()
    assert store.spans()["nested"].parent_id == active.span_id


def test_seam_start_span_no_context_takes_what_we_pass() -> None:
    wanted = {"name", "span_type", "parent_span", "start_time_ns"}
    wanted |= {"tags", "metadata", "experiment_id"}
    assert wanted <= set(inspect.signature(mlflow.start_span_no_context).parameters)


def test_seam_a_span_processor_hears_of_every_span_whichever_api_opens_it(
    client: MlflowClient,
) -> None:
    heard: list[tuple[str, str]] = []

    class Ears(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            heard.append(("start", span.name))
            trace_id = InMemoryTraceManager.get_instance().get_mlflow_trace_id_from_otel_id(
                span.get_span_context().trace_id
            )
            assert trace_id is not None, "MLflow's own processor comes first"

        def on_end(self, span: ReadableSpan) -> None:
            heard.append(("end", span.name))

    provider._get_tracer(__name__)  # initialises the provider
    current = provider.provider.get()
    assert isinstance(current, TracerProvider)
    ears = Ears()
    current.add_span_processor(ears)
    assert current._active_span_processor._span_processors[1:] == (ears,)

    root = client.start_trace("client")
    child = child_of(root)
    mlflow.trace(lambda: None, name="decorated")()
    with mlflow.start_span("fluent"):
        pass
    end(child)
    client.end_trace(root.trace_id)
    assert [name for what, name in heard if what == "start"] == [
        "client",
        "child",
        "decorated",
        "fluent",
    ]
    assert [name for what, name in heard if what == "end"] == [
        "decorated",
        "fluent",
        "child",
        "client",
    ]


def test_seam_a_replaced_provider_is_another_object(client: MlflowClient) -> None:
    client.start_trace("root")
    before = provider.provider.get()
    child_of(client.start_trace("other"))
    assert provider.provider.get() is before
    mlflow.tracing.disable()
    mlflow.tracing.enable()
    client.start_trace("after")
    assert provider.provider.get() is not before


def test_seam_a_hidden_provider_is_told_from_a_replaced_one(client: MlflowClient) -> None:
    client.start_trace("root")
    before = provider.provider.get()

    @provider.trace_disabled
    def meanwhile() -> tuple[Any, Any]:
        state = getattr(provider, "_trace_disabled_state", None)
        return provider.provider.get(), state and dict(state)

    hidden_behind, state = meanwhile()
    assert hidden_behind is not before
    client.start_trace("after")
    if RETIRES:
        assert (state["depth"], state["saved_provider"]) == (1, before)
        assert provider.provider.get() is before
    else:  # hiding is replacing
        assert state is None
        assert provider.provider.get() is not before


def test_seam_the_trace_manager_finds_live_spans_and_roots(client: MlflowClient) -> None:
    manager = InMemoryTraceManager.get_instance()
    root = client.start_trace("root")
    child = child_of(root)
    assert manager.get_span_from_id(root.trace_id, child.span_id) is child
    assert manager.get_root_span_id(root.trace_id) == root.span_id
    assert manager.get_root_span_id("tr-unknown") is None
    assert root.trace_id in manager._traces
    with manager.get_trace(root.trace_id) as trace:
        assert list(trace.span_dict.values()) == [root, child]
        trace.info.tags["late"] = "tag"
        trace.info.trace_metadata["late"] = "metadata"
    with manager.get_trace("tr-unknown") as unknown:
        assert unknown is None


def test_seam_tags_and_metadata_written_in_memory_are_stored(
    store: Store, client: MlflowClient
) -> None:
    root = client.start_trace("root")
    with InMemoryTraceManager.get_instance().get_trace(root.trace_id) as trace:
        trace.info.tags["late"] = "tag"
        trace.info.trace_metadata["late"] = "metadata"
    client.end_trace(root.trace_id)
    info = store.trace().info
    assert (info.tags["late"], info.trace_metadata["late"]) == ("tag", "metadata")


def test_seam_a_trace_id_can_be_chosen_through_the_tracers_generator(
    store: Store, client: MlflowClient
) -> None:
    chosen = int("ab" * 16, 16)

    class Chosen(IdGenerator):
        def generate_span_id(self) -> int:
            return random.getrandbits(64)

        def generate_trace_id(self) -> int:
            return chosen

        def is_trace_id_random(self) -> bool:
            return False

    tracer = provider._get_tracer(provider.__name__)
    assert provider._get_tracer(provider.__name__) is tracer, "the SDK caches tracers"
    tracer.id_generator, before = Chosen(), tracer.id_generator
    try:
        root = client.start_trace("root")
    finally:
        tracer.id_generator = before
    assert root.trace_id == "tr-" + "ab" * 16
    client.end_trace(root.trace_id)
    trace = store.trace()
    assert (trace.info.trace_id, state_of(trace)) == (root.trace_id, "OK")


def test_seam_the_span_under_a_live_span_shows_status_attributes_and_end(
    client: MlflowClient,
) -> None:
    root = client.start_trace("root", attributes={"key": "value"})
    inner = root._span
    assert isinstance(inner, otel.Span) and isinstance(inner, ReadableSpan)
    assert inner.get_span_context().is_valid
    assert inner._attributes["key"] == '"value"'
    assert len(inner._attributes) == 3
    assert inner._status.status_code is otel.StatusCode.UNSET
    assert inner.end_time is None
    root.end()
    assert inner.end_time == root.end_time_ns is not None


def test_seam_a_span_can_be_ended_past_mlflow_but_then_no_span_processor_of_the_user_runs(
    store: Store, client: MlflowClient
) -> None:
    """Why spanguard ends bare only where the full end failed: a mask for private data is one."""

    def mask(span: LiveSpan) -> None:
        span.set_outputs("masked")

    with mlflow.tracing.configure(span_processors=[mask]):
        root = client.start_trace("root")
        full, bare = child_of(root, "full"), child_of(root, "bare")
        for span in (full, bare):
            span.set_outputs("secret")
        full.end()
        bare._span.end()
        assert not is_open(bare)
        client.end_trace(root.trace_id)
    spans = store.spans()
    assert (spans["full"].outputs, spans["bare"].outputs) == ("masked", "secret")


def test_seam_noop_spans_come_from_disabled_or_sampled_out_tracing(
    store: Store, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow.tracing.disable()
    try:
        disabled = client.start_trace("disabled")
    finally:
        mlflow.tracing.enable()
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0")
    mlflow.tracing.reset()
    sampled_out = client.start_trace("sampled out")
    for span in (disabled, sampled_out):
        assert isinstance(span, NoOpSpan)
        assert isinstance(child_of(span), NoOpSpan)
        assert isinstance(mlflow.start_span_no_context("child", parent_span=span), NoOpSpan)
        client.end_trace(span.trace_id)
    assert store.rows() == 0
    # Only the newer keeps what was decided with the span, for its children to share.
    decision = sampled_out._span.get_span_context()
    assert (decision is not None and decision.is_valid) is (Version("3.11") <= VERSION)
    assert NoOpSpan()._span.get_span_context() is None


def test_seam_pending_exports_are_in_a_queue_that_can_be_joined(client: MlflowClient) -> None:
    root = client.start_trace("root")
    client.end_trace(root.trace_id)
    exporter = provider._get_trace_exporter()
    assert hasattr(exporter, "_async_queue") is BATCHING
    if BATCHING:
        assert provider.provider.get().force_flush()
        exporter._async_queue._queue.join()
    assert mlflow.get_trace(root.trace_id) is not None


def test_seam_the_payload_encoder_falls_back_to_text_and_attachments_are_known() -> None:
    assert issubclass(TraceJSONEncoder, json.JSONEncoder)
    assert TraceJSONEncoder().encode({"value": object}) == TraceJSONEncoder().encode(
        {"value": str(object)}
    )
    try:
        from mlflow.tracing.attachments import Attachment
    except ImportError:
        assert not BATCHING
    else:
        assert inspect.isclass(Attachment)
