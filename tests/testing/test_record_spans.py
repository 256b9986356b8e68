"""`record_spans`: what it hears of, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import pytest
from mlflow.entities import Span
from mlflow.tracing import provider
from mlflow.tracing.trace_manager import InMemoryTraceManager

import spanguard
from spanguard import traced, traced_span
from spanguard.testing import record_spans
from spanguard.testing._leaks import SpansLeftOpenError
from tests.lines import here
from tests.store import Store

HERE = __file__

# -- what is recorded --------------------------------------------------------------------------


def test_spans_of_every_api_are_recorded(client: mlflow.MlflowClient) -> None:
    @traced
    def ours() -> None:
        pass

    @mlflow.trace
    def fluent() -> None:
        ours()

    with record_spans() as spans:
        root = client.start_trace("raw root")
        client.start_span("raw child", root.trace_id, root.span_id).end()
        mlflow.start_span_no_context("imperative", parent_span=root).end()
        client.end_trace(root.trace_id)
        with mlflow.start_span("block"), traced_span("guarded"):
            fluent()
        manager = spanguard.TraceStateManager()
        manager.push_trace("pushed")
        manager.pop_trace()
    assert spans.names == [
        "raw root",
        "raw child",
        "imperative",
        "block",
        "guarded",
        "fluent",
        "ours",
        "pushed",
    ]
    assert [span.name for span in spans.roots] == ["raw root", "block", "pushed"]


def test_a_span_is_mlflows_with_all_it_holds() -> None:
    with record_spans() as spans:
        with pytest.raises(ValueError), traced_span("fails", inputs=[1], attributes={"n": 2}):
            raise ValueError("no")
        with traced_span("works", span_type="TOOL") as span:
            span.set_outputs({"a": 1})
    failed, worked = spans
    assert isinstance(failed, Span)
    assert (failed.inputs, failed.user_attributes["n"]) == ([1], 2)
    assert failed.status.status_code == "ERROR"
    assert failed.outcome == "error"
    assert failed.events[0].name == "exception"
    assert set(failed.user_attributes) == {"n", "error", "error_type", "error_message"}
    assert (worked.outputs, worked.span_type, worked.outcome) == ({"a": 1}, "TOOL", "ok")
    assert worked.end_time_ns is not None


def test_a_fluent_span_that_failed_has_the_outcome_error() -> None:
    with record_spans() as spans, pytest.raises(ValueError), mlflow.start_span("fluent"):
        raise ValueError
    assert spans.one("fluent").outcome == "error"


def test_the_tree() -> None:
    with record_spans() as spans:
        with traced_span("root"):
            with traced_span("left"), traced_span("leaf"):
                pass
            with traced_span("right"):
                pass
    root, left, leaf, right = spans
    assert spans.roots == [root]
    assert spans.children(root) == spans.children("root") == [left, right]
    assert spans.children(leaf) == []
    assert spans.parent(leaf) is spans.parent("leaf") is left
    assert spans.parent(root) is None
    lines = str(spans).splitlines()
    assert lines[0].startswith("trace tr-")
    assert "OK" in lines[0]
    assert [line.split()[-3] for line in lines[1:]] == ["root", "left", "leaf", "right"]
    assert str(spans) == spans.tree()


def test_the_tree_of_several_traces_and_of_none() -> None:
    with record_spans() as spans:
        assert str(spans) == "no spans"
        for name in ("first", "second"):
            with traced_span(name):
                pass
    assert str(spans).count("trace tr-") == 2


def test_children_and_parents_are_of_the_same_trace() -> None:
    with record_spans() as spans:
        for _ in range(2):
            with traced_span("root"), traced_span("child"):
                pass
    for root, child in zip(spans.by_name("root"), spans.by_name("child"), strict=True):
        assert spans.children(root) == [child]
        assert spans.parent(child) is root


def test_one_says_what_there_is_instead() -> None:
    with record_spans() as spans:
        with traced_span("root"):
            with traced_span("twin"):
                pass
            with traced_span("twin"):
                pass
            with pytest.raises(AssertionError, match="2 spans of the name 'twin'"):
                spans.one("twin")
            with pytest.raises(AssertionError, match="no span of the name 'x'") as caught:
                spans.one("x")
    drawn = str(caught.value).splitlines()[1:]
    assert "OPEN" in drawn[1]  # the root, which is still open when it is drawn
    assert "root" in drawn[1]
    assert "twin" in drawn[2]


def test_the_list_fills_while_the_recording_lasts_and_can_be_emptied() -> None:
    with record_spans() as spans:
        with traced_span("prepare"):
            pass
        assert spans.names == ["prepare"]
        spans.clear()
        with traced_span("root"):
            with traced_span("child"):
                pass
            assert spans.names == ["child"]
        assert spans.names == ["root", "child"]
    with traced_span("afterwards"):
        pass
    assert spans.names == ["root", "child"]


def test_spans_of_threads_and_tasks_are_recorded() -> None:
    def work(number: int) -> None:
        with traced_span(f"thread {number}"):
            pass

    async def step(number: int) -> None:
        with mlflow.start_span(f"task {number}"):
            await asyncio.sleep(0)

    async def main() -> None:
        async with traced_span("root"):
            await asyncio.gather(*(step(number) for number in range(5)))

    with record_spans() as spans:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(20)))
        asyncio.run(main())
    assert sorted(span.name for span in spans if span.name.startswith("thread")) == sorted(
        f"thread {number}" for number in range(20)
    )
    assert len(spans.children("root")) == 5


def test_traces_have_their_tags_metadata_and_state() -> None:
    with record_spans() as spans:
        with traced_span("a", tags={"shop": "corner"}, session_id="s", user="ada"):
            assert spans.traces == []
        with pytest.raises(KeyError), traced_span("b"):
            raise KeyError
        with traced_span("c", experiment_id="no such thing"):  # nobody is asked
            pass
    first, second, third = spans.traces
    assert first.info.tags["shop"] == "corner"
    assert first.info.trace_metadata["mlflow.trace.user"] == "ada"
    assert first.info.trace_metadata["mlflow.trace.session"] == "s"
    assert [span.name for span in first.data.spans] == ["a"]
    assert (first.info.state.value, second.info.state.value) == ("OK", "ERROR")
    assert third.info.experiment_id == "no such thing"


def test_a_child_that_ends_after_its_root_is_in_its_trace(client: mlflow.MlflowClient) -> None:
    with record_spans() as spans:
        root = client.start_trace("root")
        child = client.start_span("child", root.trace_id, root.span_id)
        client.end_trace(root.trace_id)
        assert spans.traces == []
        client.end_span(root.trace_id, child.span_id)
    (trace,) = spans.traces
    assert {span.name for span in trace.data.spans} == {"root", "child"}


def test_everything_is_recorded_whatever_the_sampling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0.0")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    with record_spans() as spans, traced_span("sampled"):
        pass
    assert spans.names == ["sampled"]


def test_a_seed_neither_repeats_ids_nor_is_used_up() -> None:
    random.seed(7)
    expected = random.random()
    with record_spans() as spans:
        for _ in range(2):
            random.seed(7)
            with traced_span("root"), traced_span("child"):
                pass
            assert random.random() == expected
    assert len({span.trace_id for span in spans}) == 2
    assert len({span.span_id for span in spans}) == 4


def test_span_processors_of_the_user_apply() -> None:
    def mask(span: Any) -> None:
        span.set_outputs("masked")

    mlflow.tracing.configure(span_processors=[mask])
    try:
        with record_spans() as spans, traced_span("span") as span:
            span.set_outputs("secret")
    finally:
        mlflow.tracing.configure(span_processors=[])
    assert spans.one("span").outputs == "masked"


# -- no store ----------------------------------------------------------------------------------


def test_no_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        mlflow.set_tracking_uri(f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "17")
        with record_spans() as spans:
            client = mlflow.MlflowClient()
            root = client.start_trace("raw")
            client.end_trace(root.trace_id)
            with traced_span("ours", experiment_id="3"), mlflow.start_span("fluent"):
                pass
            assert spanguard.flush(10)
            mlflow.flush_trace_async_logging()
        with pytest.raises(BlockingIOError):
            server.accept()
    assert spans.names == ["raw", "ours", "fluent"]
    assert [trace.info.experiment_id for trace in spans.traces] == ["17", "3"]


def test_nothing_of_a_recording_gets_into_the_store_and_the_rest_does(store: Store) -> None:
    with traced_span("before"):
        pass
    with record_spans(), traced_span("recorded"):
        pass
    with traced_span("after"):
        pass
    assert set(store.spans()) == {"before", "after"}
    assert store.rows() == 2


def test_a_recording_keeps_no_trace_in_mlflows_memory(client: mlflow.MlflowClient) -> None:
    with record_spans():
        client.start_trace("never ended")
        with traced_span("ended"):
            pass
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spanguard.close_open_spans()
    assert not InMemoryTraceManager.get_instance()._traces


def test_a_trace_that_began_outside_stays_readable_and_without_the_recorded_spans(
    store: Store, client: mlflow.MlflowClient
) -> None:
    with traced_span("outside"):
        with record_spans() as spans:
            with traced_span("inside"), mlflow.start_span("fluent"):
                pass
    assert spans.names == ["inside", "fluent"]
    assert [span.name for span in spans.roots] == ["inside"]
    assert set(store.spans()) == {"outside"}


def test_the_end_of_a_span_from_outside_is_no_loss(store: Store) -> None:
    manager = spanguard.TraceStateManager(strict=True)
    manager.push_trace("outside")
    with record_spans() as spans:
        manager.pop_trace()
    assert spans == []
    assert set(store.spans()) == {"outside"}


# -- everything as it was ----------------------------------------------------------------------


def test_the_provider_is_the_same_object_afterwards_and_still_running(store: Store) -> None:
    with traced_span("before"):
        pass
    before = provider.provider.get()
    with record_spans():
        assert provider.provider.get() is not before
    assert provider.provider.get() is before


def test_a_provider_that_was_not_there_is_not_there_afterwards() -> None:
    mlflow.tracing.reset()
    with record_spans(), traced_span("recorded"):
        pass
    assert not provider.provider.once._done


def test_what_the_block_does_to_mlflows_settings_neither_stops_the_recording_nor_stays(
    store: Store, tmp_path: Any
) -> None:
    before = (mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI"))
    with record_spans() as spans:
        mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/other.db")
        with mlflow.start_span("other uri"):
            pass
        mlflow.set_tracking_uri(store.uri)
        mlflow.set_experiment("other")
        with mlflow.start_span("other experiment"):
            pass
        mlflow.tracing.reset()
        with traced_span("reset"):
            pass
        mlflow.tracing.disable()
        with mlflow.start_span("disabled"):
            pass
        mlflow.tracing.enable()
        with mlflow.start_span("enabled"):
            pass
        mlflow.tracing.disable()
    assert spans.names == ["other uri", "other experiment", "reset", "enabled"]
    assert (mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI")) == before
    assert "MLFLOW_EXPERIMENT_ID" not in os.environ
    with mlflow.start_span("afterwards"):
        pass
    assert store.trace().info.experiment_id == "0"


def test_tracing_that_was_off_is_off_afterwards(store: Store) -> None:
    mlflow.tracing.disable()
    with record_spans() as spans, traced_span("recorded"):
        pass
    with traced_span("off"):
        pass
    mlflow.tracing.enable()
    assert spans.names == ["recorded"]
    assert store.rows() == 0


def test_recordings_may_be_nested_and_end_in_any_order(store: Store) -> None:
    outer, inner = record_spans(), record_spans()
    outside = outer.__enter__()
    with traced_span("first"):
        pass
    inside = inner.__enter__()
    with traced_span("second"):
        pass
    outer.__exit__(None, None, None)
    with traced_span("third"):
        pass
    inner.__exit__(None, None, None)
    with traced_span("fourth"):
        pass
    assert outside.names == ["first", "second"]
    assert inside.names == ["second", "third"]
    assert set(store.spans()) == {"fourth"}


def test_an_exception_of_the_block_ends_the_recording(store: Store) -> None:
    error = ValueError()
    with pytest.raises(ValueError) as caught, record_spans() as spans, traced_span("failing"):
        raise error
    assert caught.value is error
    assert spans.one("failing").outcome == "error"
    with traced_span("afterwards"):
        pass
    assert set(store.spans()) == {"afterwards"}


GLOBAL_MODE = """
import mlflow, spanguard
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from spanguard.testing import record_spans

mlflow.set_tracking_uri("http://127.0.0.1:9")
theirs, exporter = TracerProvider(), InMemorySpanExporter()
theirs.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(theirs)
with record_spans() as spans:
    with trace.get_tracer("library").start_as_current_span("otel"):
        with mlflow.start_span("fluent"), spanguard.traced_span("ours"):
            pass
assert spans.names == ["otel", "fluent", "ours"], spans.names
assert [span.name for span in spans.children("fluent")] == ["ours"]
assert trace.get_tracer_provider() is theirs
with trace.get_tracer("library").start_as_current_span("afterwards"):
    pass
assert [span.name for span in exporter.get_finished_spans()] == ["afterwards"]
print("fine")
"""


def test_the_global_provider_mode() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", GLOBAL_MODE],
        env={
            **os.environ,
            "MLFLOW_USE_DEFAULT_TRACER_PROVIDER": "false",
            "PYTHONPATH": os.path.dirname(os.path.dirname(spanguard.__file__)),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.stdout.strip() == "fine", finished.stderr


# -- what a recording finds left open ----------------------------------------------------------


def test_what_a_recording_leaves_open_is_closed_and_warned_of(
    client: mlflow.MlflowClient,
) -> None:
    with pytest.warns(spanguard.OrphanedSpanWarning) as caught, record_spans() as spans:
        fluent = mlflow.start_span("fluent")
        fluent.__enter__()
        line = here() - 1
    assert spans.one("fluent").outcome == "orphaned"
    assert spans.one("fluent").get_attribute("spanguard.opened_at").startswith(f"{HERE}:{line} in")
    assert (caught[0].filename, caught[0].lineno) == (HERE, line)
    assert mlflow.get_current_active_span() is None
    assert spanguard.open_spans() == []


def test_in_strict_mode_a_recording_raises_for_what_it_leaves_open(
    client: mlflow.MlflowClient, store: Store
) -> None:
    with spanguard.strict(), pytest.raises(SpansLeftOpenError, match="'raw'"):
        with record_spans() as spans:
            client.start_trace("raw")
    assert spans.one("raw").outcome == "orphaned"
    with traced_span("afterwards"):
        pass
    assert set(store.spans()) == {"afterwards"}
