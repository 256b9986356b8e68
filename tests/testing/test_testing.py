"""`record_spans` and `no_open_spans`: what they hear of, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
import subprocess
import sys
import threading
import unittest
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
from spanguard.testing import no_open_spans, record_spans
from spanguard.testing._leaks import SpansLeftOpenError, other_threads
from tests.store import Store, await_true, outcome

HERE = __file__


def here() -> int:
    return sys._getframe(1).f_lineno


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


# -- no_open_spans -----------------------------------------------------------------------------


def let_go(block: Any) -> None:
    """Leave a block of MLflow's now: when it is collected it sets what is active, wherever."""
    if hasattr(block, "gen"):
        block.__exit__(None, None, None)


def leak_raw(client: mlflow.MlflowClient) -> Any:
    return client.start_trace("leaked")


def leak_fluent(client: mlflow.MlflowClient) -> Any:
    block = mlflow.start_span("leaked")
    block.__enter__()
    return block


def leak_block(client: mlflow.MlflowClient) -> Any:
    block = traced_span("leaked")
    return block, block.__enter__()


def leak_push(client: mlflow.MlflowClient) -> Any:
    manager = spanguard.TraceStateManager()
    manager.push_trace("leaked")
    return manager


def leak_imperative(client: mlflow.MlflowClient) -> Any:
    return mlflow.start_span_no_context("leaked")


# Each, and which of its lines opens the span.
LEAKS = [
    pytest.param(leak_raw, 1, id="raw"),
    pytest.param(leak_fluent, 2, id="fluent"),
    pytest.param(leak_block, 2, id="block"),
    pytest.param(leak_push, 2, id="push"),
    pytest.param(leak_imperative, 1, id="imperative"),
]


@pytest.mark.parametrize(("leak", "opening_line"), LEAKS)
@pytest.mark.parametrize("before", [False, True], ids=["unused", "used"])
def test_a_span_left_open_is_told_with_its_line_and_closed(
    store: Store, client: mlflow.MlflowClient, leak: Any, opening_line: int, before: bool
) -> None:
    if before:
        with traced_span("before"):
            pass
    with pytest.raises(SpansLeftOpenError) as caught, no_open_spans():
        held = leak(client)
    assert held is not None
    error = caught.value
    assert isinstance(error, AssertionError)
    assert isinstance(error, spanguard.OrphanedSpanError)
    (left,) = error.spans
    assert left.name == "leaked"
    line = leak.__code__.co_firstlineno + opening_line
    assert left.opened_at == f"{HERE}:{line} in {leak.__name__}"
    assert f"Span 'leaked' ({left.span_id}) was left open, opened at {left.opened_at}" in str(error)
    assert spanguard.open_spans() == []
    assert mlflow.get_current_active_span() is None
    assert outcome(store.spans()["leaked"]) == "orphaned"
    let_go(held)


def test_nothing_is_raised_where_all_is_closed(client: mlflow.MlflowClient) -> None:
    outside = client.start_trace("outside")
    with no_open_spans():
        with traced_span("ours"), mlflow.start_span("fluent"):
            pass
        client.end_trace(outside.trace_id)


def test_what_was_open_before_may_stay_open(client: mlflow.MlflowClient) -> None:
    outside = client.start_trace("outside")
    with no_open_spans():
        pass
    assert outside.end_time_ns is None
    client.end_trace(outside.trace_id)


def test_leaks_close_last_opened_first(store: Store, client: mlflow.MlflowClient) -> None:
    with pytest.raises(SpansLeftOpenError) as caught, no_open_spans():
        root = client.start_trace("root")
        child = client.start_span("child", root.trace_id, root.span_id)
        client.start_span("grandchild", root.trace_id, child.span_id)
    assert [span.name for span in caught.value.spans] == ["root", "child", "grandchild"]
    spans = store.spans()
    ends = [spans[name].end_time_ns for name in ("grandchild", "child", "root")]
    assert ends == sorted(ends)


def test_spans_are_heard_of_after_mlflow_has_replaced_its_provider(store: Store) -> None:
    with pytest.raises(SpansLeftOpenError), no_open_spans():
        mlflow.set_experiment("other")
        held = mlflow.start_span_no_context("leaked")
    assert held.end_time_ns is not None


def test_a_users_exception_wins_and_carries_the_finding(client: mlflow.MlflowClient) -> None:
    error = ValueError("users")
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ValueError) as raised:
        warnings.simplefilter("always")
        with no_open_spans():
            client.start_trace("leaked")
            raise error
    assert raised.value is error
    told = getattr(error, "__notes__", None) or [str(warning.message) for warning in caught]
    assert any("'leaked'" in text and HERE in text for text in told)
    assert spanguard.open_spans() == []


@pytest.mark.filterwarnings("ignore::spanguard.exceptions.SpanguardWarning")
def test_a_span_that_was_garbage_collected_while_open_counts() -> None:
    with pytest.raises(SpansLeftOpenError, match="garbage-collected") as caught, no_open_spans():
        traced_span("dropped").__enter__()
        gc.collect()
    (dropped,) = caught.value.spans
    assert (dropped.name, dropped.opened_at.startswith(HERE)) == ("dropped", True)


@pytest.mark.filterwarnings("ignore::spanguard.exceptions.SpanguardWarning")  # Python 3.10
def test_a_leak_that_strict_mode_could_only_note_on_an_exception_counts(
    client: mlflow.MlflowClient,
) -> None:
    with pytest.raises(SpansLeftOpenError, match="'leaked'") as caught, no_open_spans():
        with pytest.raises(ValueError), traced_span("root", strict=True) as root:
            client.start_span("leaked", root.trace_id, root.span_id)
            raise ValueError
    assert [span.name for span in caught.value.spans] == ["leaked"]


def test_a_strict_error_that_the_block_caught_does_not_count(client: mlflow.MlflowClient) -> None:
    with no_open_spans(), pytest.raises(spanguard.OrphanedSpanError):
        with traced_span("root", strict=True) as root:
            client.start_span("leaked", root.trace_id, root.span_id)


def test_a_span_that_ended_but_was_left_active_counts(store: Store) -> None:
    with pytest.raises(SpansLeftOpenError, match=r"'fluent' .* has ended but was") as e:
        with no_open_spans():
            block = mlflow.start_span("fluent")
            block.__enter__().end()
            line = here() - 1
    assert f"{HERE}:{line} in test_a_span_that_ended" in str(e.value)
    assert e.value.spans == []
    with mlflow.start_span("next"):
        pass
    assert store.spans()["next"].parent_id is None
    let_go(block)


def test_an_outer_span_that_is_not_active_any_more_counts() -> None:
    with traced_span("outer") as outer:
        with pytest.raises(SpansLeftOpenError, match="active span was changed"), no_open_spans():
            provider.set_span_in_context(mlflow.entities.NoOpSpan())
        assert mlflow.get_current_active_span().span_id == outer.span_id


def test_a_block_that_ends_what_was_active_before_it_changes_nothing() -> None:
    block = mlflow.start_span("fluent")
    block.__enter__()
    with no_open_spans():
        block.__exit__(None, None, None)
    assert mlflow.get_current_active_span() is None


def test_a_span_that_another_thread_is_about_to_end_is_waited_for() -> None:
    opened, let_go = threading.Event(), threading.Event()

    class AtTheEnd:
        """Lets the thread go when the check looks at the threads that there are."""

        def __call__(self, frame: Any, event: str, arg: Any) -> None:
            if frame.f_code is other_threads.__code__:
                let_go.set()

    def work() -> None:
        with traced_span("in flight"):
            opened.set()
            let_go.wait(30)

    with no_open_spans():
        thread = threading.Thread(target=work)
        thread.start()
        opened.wait(30)
        sys.setprofile(AtTheEnd())
    sys.setprofile(None)
    thread.join()


def test_a_span_that_a_thread_left_open_counts() -> None:
    held: list[Any] = []

    def work() -> None:
        held.append(mlflow.start_span_no_context("in a thread"))

    with pytest.raises(SpansLeftOpenError, match="'in a thread'"), no_open_spans():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    await_true(lambda: held[0].end_time_ns is not None)


def test_a_block_inside_a_block_reports_a_leak_once() -> None:
    with no_open_spans(), pytest.raises(SpansLeftOpenError), no_open_spans():
        held = mlflow.start_span_no_context("leaked")
    assert held.end_time_ns is not None


def test_both_together(client: mlflow.MlflowClient) -> None:
    with record_spans() as spans, pytest.raises(SpansLeftOpenError), no_open_spans():
        client.start_trace("leaked")
    assert spans.one("leaked").outcome == "orphaned"


def test_as_a_decorator_of_a_unittest() -> None:
    class Case(unittest.TestCase):
        @no_open_spans()
        def test_leaks(self) -> None:
            mlflow.start_span_no_context("leaked")

        @no_open_spans()
        def test_closes(self) -> None:
            with traced_span("closed"):
                pass

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    assert result.testsRun == 2
    assert result.errors == []
    ((case, text),) = result.failures  # a failure and not an error: it is an AssertionError
    assert case._testMethodName == "test_leaks"
    assert "'leaked'" in text


def test_nothing_listens_any_more_afterwards() -> None:
    from spanguard._base import findings
    from spanguard._process import listening

    with record_spans(), no_open_spans():
        assert listening.heard
        assert findings.unraised
    assert listening.heard == []
    assert findings.unraised == []
