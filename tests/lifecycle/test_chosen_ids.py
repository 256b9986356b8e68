"""A chosen OpenTelemetry trace id: the root gets it, unless it is in use."""

from __future__ import annotations

import contextvars
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import TraceInfo, TraceLocation, TraceState
from mlflow.tracing import provider
from mlflow.tracing.client import TracingClient
from opentelemetry.sdk.trace import Tracer, TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

import spanguard
from spanguard import CustomTraceManager, current_span, trace_id_for, traced_span
from spanguard._base import findings
from spanguard._lifecycle import chosen_ids
from spanguard._mlflow import memory, queue
from spanguard._mlflow import store as _store
from spanguard.exceptions import DuplicateTraceIdWarning
from tests.lifecycle.asked_store import asking, in_thread, locked, named
from tests.store import Store, await_true, status

WANTED = "0123456789abcdef" * 2
WITH_AND_WITHOUT_CLIENT = pytest.mark.parametrize("client", [None, "given"], indirect=True)


@pytest.fixture
def client(request: pytest.FixtureRequest) -> mlflow.MlflowClient | None:
    return mlflow.MlflowClient() if getattr(request, "param", None) else None


@WITH_AND_WITHOUT_CLIENT
def test_a_chosen_id_starts_a_root_also_inside_another_trace(
    store: Store, client: mlflow.MlflowClient | None, caplog: pytest.LogCaptureFixture
) -> None:
    with traced_span("outer") as outer:
        with traced_span("chosen", otel_trace_id=WANTED.upper(), client=client) as chosen:
            with traced_span("child") as child:
                assert child.parent_id == chosen.span_id
        assert current_span() is outer
    assert (chosen.trace_id, chosen.parent_id) == (f"tr-{WANTED}", None)
    assert child.trace_id == chosen.trace_id
    assert "spanguard" not in [record.name for record in caplog.records], "the store answered"
    assert len(named(store)["chosen"].data.spans) == 2
    assert len(named(store)["outer"].data.spans) == 1


@pytest.mark.parametrize("junk", ["0x" + "a" * 30, "1_" * 16, " " + "a" * 31, "٣" * 32, b"a" * 32])
def test_what_is_no_id_is_not_taken_for_one(store: Store, junk: Any) -> None:
    with pytest.warns(spanguard.SpanguardWarning, match="32 hexadecimal digits"):
        with traced_span("root", otel_trace_id=junk):
            pass
    assert status(store.spans()["root"]) == "OK"


def test_a_chosen_id_for_a_span_of_another_trace_is_a_finding(store: Store) -> None:
    with traced_span("root") as root:
        with pytest.warns(spanguard.SpanguardWarning, match="is for a new trace"):
            with traced_span("child", trace_id=root.trace_id, otel_trace_id=WANTED) as child:
                pass
        with pytest.raises(spanguard.InvalidSpanArgumentError):
            with traced_span("x", parent_id=root.span_id, otel_trace_id=WANTED, strict=True):
                pass
    assert child.parent_id == root.span_id


def assert_in_use(wanted: str = WANTED) -> None:
    """Check that the id is refused in strict mode, and replaced by a fresh one otherwise."""
    before = {span.span_id for span in spanguard.open_spans()}
    with pytest.raises(spanguard.DuplicateTraceIdError) as caught:
        with traced_span("strict", otel_trace_id=wanted, strict=True):
            pytest.fail("the block must not run")
    assert (caught.value.span_name, caught.value.trace_id) == ("strict", f"tr-{wanted}")
    assert {span.span_id for span in spanguard.open_spans()} == before
    with pytest.warns(DuplicateTraceIdWarning, match="fresh id"):
        with traced_span("lenient", otel_trace_id=wanted) as span:
            assert span.trace_id != f"tr-{wanted}"
            assert span.parent_id is None


def assert_kept_apart(store: Store, *names: str) -> None:
    traces = named(store)
    assert sorted(traces) == sorted([*names, "lenient"])
    assert all(len(trace.data.spans) == 1 for trace in traces.values())
    assert traces["lenient"].info.tags["spanguard.otel_trace_id"] == WANTED
    (root,) = traces["lenient"].data.spans
    assert root.get_attribute("spanguard.otel_trace_id") == WANTED


def test_an_id_that_is_open_here_is_in_use(store: Store) -> None:
    with traced_span("first", otel_trace_id=WANTED):
        in_thread(assert_in_use)
    assert_kept_apart(store, "first")


def test_an_id_of_any_api_is_in_use(store: Store) -> None:
    with mlflow.start_span("first") as first:
        hex_id = first.trace_id.removeprefix("tr-")
        with pytest.raises(spanguard.DuplicateTraceIdError):
            traced_span("x", otel_trace_id=hex_id, strict=True).__enter__()
    with pytest.raises(spanguard.DuplicateTraceIdError):
        traced_span("x", otel_trace_id=hex_id, strict=True).__enter__()
    assert [span.name for span in store.trace().data.spans] == ["first"]


def test_an_id_that_has_just_ended_here_is_in_use(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS", "60000")
    with traced_span("first", otel_trace_id=WANTED):
        pass
    assert_in_use()
    assert_kept_apart(store, "first")


@pytest.mark.parametrize("lock", ["exclusive", "immediate"])
def test_an_id_on_its_way_to_the_store_is_in_use(
    store: Store, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    """MLflow has forgotten the trace; the store does not answer, or says that it has none."""
    monkeypatch.setattr(chosen_ids, "ARRIVAL_SECONDS", 0.1)
    monkeypatch.setattr(_store, "ASK_SECONDS", 0.2 if lock == "exclusive" else 60.0)
    first = traced_span("first", otel_trace_id=WANTED)
    first.__enter__()

    def end() -> None:
        first.__exit__(None, None, None)
        queue.hand_over()

    with locked(store, lock):
        ending = threading.Thread(target=end)  # which on MLflow 3.10 stores the trace itself
        ending.start()
        if not queue.exports_in_place():
            await_true(lambda: not memory.knows_trace(int(WANTED, 16)))
        hanging = traced_span("hanging", otel_trace_id=os.urandom(16).hex())
        if lock == "exclusive":  # while this one's question hangs no other is put
            hanging.__enter__()
        second = traced_span("lenient", otel_trace_id=WANTED)
        with pytest.warns(DuplicateTraceIdWarning):
            second.__enter__()
    ending.join()
    second.__exit__(None, None, None)
    hanging.__exit__(None, None, None)
    await_true(lambda: not asking())
    assert_kept_apart(store, "first", *(["hanging"] if lock == "exclusive" else []))


def test_an_id_in_the_store_is_in_use(store: Store) -> None:
    with traced_span("first", otel_trace_id=WANTED):
        pass
    assert spanguard.flush(60)
    spanguard._process.listening._ended_traces.clear()
    assert_in_use()
    assert_kept_apart(store, "first")


def test_what_ended_for_another_store_is_not_in_use_in_this_one(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with traced_span("first", otel_trace_id=WANTED):
        pass
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'other.db'}")
    try:
        monkeypatch.setattr(_store, "ASK_SECONDS", 0.0)  # this one does not answer in time
        with traced_span("second", otel_trace_id=WANTED, strict=True) as second:
            assert second.trace_id == f"tr-{WANTED}"
        await_true(lambda: not asking())
        assert spanguard.flush(60)
        assert mlflow.get_trace(f"tr-{WANTED}").data.spans[0].name == "second"
    finally:
        mlflow.set_tracking_uri(store.uri)
    assert [span.name for span in store.trace().data.spans] == ["first"]


def test_an_id_of_a_trace_that_cannot_be_read_is_in_use(store: Store) -> None:
    """Processes that die leave such traces behind: the public get_trace() says None."""
    info = TraceInfo(
        trace_id=f"tr-{WANTED}",
        trace_location=TraceLocation.from_experiment_id("0"),
        request_time=1,
        state=TraceState.OK,
        trace_metadata={"mlflow.trace.sizeStats": '{"num_spans": 2}'},
        tags={"mlflow.trace.spansLocation": "TRACKING_STORE"},
    )
    TracingClient().start_trace(info)
    assert mlflow.get_trace(f"tr-{WANTED}", silent=True) is None
    assert_in_use()


def test_an_id_is_free_again_where_its_trace_was_deleted(store: Store) -> None:
    with traced_span("first", otel_trace_id=WANTED):
        pass
    assert spanguard.flush(60)
    mlflow.MlflowClient().delete_traces(experiment_id="0", trace_ids=[f"tr-{WANTED}"])
    with traced_span("second", otel_trace_id=WANTED, strict=True) as second:
        pass
    assert store.trace().info.trace_id == second.trace_id == f"tr-{WANTED}"


def test_two_threads_never_get_the_same_id(store: Store) -> None:
    barrier = threading.Barrier(8)
    started: list[str] = []

    def start(number: int) -> None:
        barrier.wait()
        with traced_span(f"thread {number}", otel_trace_id=WANTED) as span:
            started.append(span.trace_id)
            barrier.wait()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DuplicateTraceIdWarning)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(start, range(8)))
    assert len(set(started)) == 8
    assert started.count(f"tr-{WANTED}") == 1
    assert len(store.traces()) == 8


def test_a_store_that_does_not_answer_is_not_waited_for(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The id is taken: an outage costs no trace the id that other systems know it by."""
    monkeypatch.setattr(_store, "ASK_SECONDS", 0.2)
    with traced_span("opens the store"):
        pass
    wanted, other = os.urandom(16).hex(), os.urandom(16).hex()  # this process never had them
    with locked(store):
        first = traced_span("first", otel_trace_id=wanted)
        assert first.__enter__().trace_id == f"tr-{wanted}"
        (hanging,) = asking()
        assert "has not answered in 0.2 seconds" in caplog.text
        # While that question hangs no other is put.
        monkeypatch.setattr(_store, "ASK_SECONDS", 3600.0)
        second = traced_span("second", otel_trace_id=other)
        assert second.__enter__().trace_id == f"tr-{other}"
        assert asking() == [hanging]
    await_true(lambda: not asking())
    second.__exit__(None, None, None)
    first.__exit__(None, None, None)
    assert spanguard.flush(60)
    # It answers again, and is asked again.
    assert_in_use(wanted)
    assert len(store.traces()) == 4


def test_a_look_up_that_fails_is_contained(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    findings.reraise_internal = False

    def fail(self: Any) -> Any:
        raise OSError("secret payload")

    wanted = os.urandom(16).hex()  # this process never had it
    with traced_span("opens the store"):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(TracingClient, "store", property(fail))
        with traced_span("first", otel_trace_id=wanted) as first:
            pass
    assert first.trace_id == f"tr-{wanted}"
    (line,) = (record for record in caplog.records if record.name == "spanguard")
    assert "looking up a trace id failed with OSError" in line.getMessage()
    assert "secret" not in line.getMessage()


def test_no_other_trace_takes_the_chosen_id(store: Store) -> None:
    """A client, or a span processor, may start traces of its own inside the same call."""

    class Auditing(mlflow.MlflowClient):
        def start_trace(self, *args: Any, **kwargs: Any) -> Any:
            started = super().start_trace(*args, **kwargs)
            mlflow.start_span_no_context("audit").end()
            return started

    with traced_span("ours", client=Auditing(), otel_trace_id=WANTED) as ours:
        assert ours.trace_id == f"tr-{WANTED}"
    with traced_span("next"):
        pass
    ids = {name: trace.info.trace_id for name, trace in named(store).items()}
    assert set(ids) == {"ours", "audit", "next"}
    assert ids["ours"] == f"tr-{WANTED}"
    assert len(set(ids.values())) == 3


def test_a_context_copied_during_a_start_keeps_no_chosen_id(store: Store) -> None:
    copies: list[contextvars.Context] = []

    class Copying:
        def start_trace(self, **kwargs: Any) -> Any:
            copies.append(contextvars.copy_context())
            raise OSError

    findings.reraise_internal = False
    with traced_span("fails", client=Copying(), otel_trace_id=WANTED):
        pass
    late = copies[0].run(mlflow.start_span_no_context, "late")
    late.end()
    assert late.trace_id != f"tr-{WANTED}"


def test_the_seam_is_looked_at_before_each_start(store: Store) -> None:
    with traced_span("first", otel_trace_id=WANTED):
        pass
    tracer = provider._get_tracer(provider.__name__)
    tracer.id_generator = RandomIdGenerator()
    with traced_span("second", otel_trace_id="f" * 32) as second:
        assert second.trace_id == "tr-" + "f" * 32
    mlflow.set_experiment("other")  # newer versions of MLflow make a new provider
    with traced_span("third", otel_trace_id="e" * 32) as third:
        assert third.trace_id == "tr-" + "e" * 32


def test_where_the_seam_is_missing_the_trace_gets_a_fresh_id(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An SDK whose tracers do not let their generator be replaced."""
    kept = property(lambda self: RandomIdGenerator(), lambda self, value: None)
    for owner in (Tracer, TracerProvider):
        monkeypatch.setattr(owner, "id_generator", kept, raising=False)
    with pytest.warns(spanguard.SpanguardWarning, match="did not take the chosen trace id"):
        with traced_span("lenient", otel_trace_id=WANTED, strict=True) as span:
            assert span.trace_id != f"tr-{WANTED}"
    assert_kept_apart(store)


def test_a_custom_trace_is_found_by_its_tag_where_the_seam_is_missing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = property(lambda self: RandomIdGenerator(), lambda self, value: None)
    for owner in (Tracer, TracerProvider):
        monkeypatch.setattr(owner, "id_generator", kept, raising=False)
    manager = CustomTraceManager()
    with pytest.warns(spanguard.SpanguardWarning):
        with manager.custom_trace("ada", "checkout", custom_trace_id="order-42") as span:
            pass
    assert spanguard.flush(60)
    found = manager.find_trace("order-42")
    assert found is not None
    assert found.info.trace_id == span.trace_id != trace_id_for("order-42")


def test_a_chosen_id_is_not_said_to_be_random(store: Store) -> None:
    if not hasattr(RandomIdGenerator(), "is_trace_id_random"):
        return  # an older OpenTelemetry says that of no id
    with traced_span("chosen", otel_trace_id=WANTED) as chosen:
        with traced_span("fresh", new_trace=True) as fresh:
            pass
    flags = [span._span.get_span_context().trace_flags for span in (chosen, fresh)]
    assert [bool(flag.random_trace_id) for flag in flags] == [False, True]


def test_a_chosen_id_where_tracing_is_off(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_store, "ASK_SECONDS", 0.2)
    mlflow.tracing.disable()
    try:
        with locked(store):
            with traced_span("root", otel_trace_id=WANTED, strict=True) as span:
                assert span.span_id is None
            with traced_span("root", otel_trace_id=WANTED, strict=True):
                pass
        assert "has not answered" not in caplog.text, "the store is not asked"
    finally:
        mlflow.tracing.enable()
