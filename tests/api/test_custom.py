"""Traces under ids of the user's choice: found by them, and never merged, lost or mixed up."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import hashlib
import os
import random
import re
import sqlite3
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mlflow.entities import TraceInfo, TraceLocation, TraceState
from mlflow.tracing import provider
from mlflow.tracing.client import TracingClient
from opentelemetry.sdk.trace import Tracer, TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

import spanguard
from spanguard import CustomTraceManager, TraceStateManager, current_span, trace_id_for, traced_span
from spanguard._api import business_ids
from spanguard._base import findings
from spanguard._lifecycle import chosen_ids
from spanguard._mlflow import memory, queue
from spanguard._mlflow import store as _store
from spanguard._process.ambient import StandIn
from spanguard.exceptions import DuplicateTraceIdWarning, UnknownSpanWarning
from tests.store import Store, await_true, outcome, own_attributes, status

WANTED = "0123456789abcdef" * 2

WITH_AND_WITHOUT_CLIENT = pytest.mark.parametrize("client", [None, "given"], indirect=True)


@pytest.fixture
def client(request: pytest.FixtureRequest) -> mlflow.MlflowClient | None:
    return mlflow.MlflowClient() if getattr(request, "param", None) else None


def in_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def named(store: Store) -> dict[str, Any]:
    return {trace.info.tags["mlflow.traceName"]: trace for trace in store.traces()}


@contextmanager
def locked(store: Store, lock: str = "exclusive") -> Iterator[None]:
    """Keep the store from answering, or from writing (`immediate`): another connection has it."""
    connection = sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
    try:
        connection.execute(f"begin {lock}")
        yield
    finally:
        connection.close()


def asking() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "spanguard-ask"]


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


# -- a chosen OpenTelemetry trace id -----------------------------------------------------------


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


# -- starting and ending -----------------------------------------------------------------------


def test_a_started_trace_is_ambient_until_it_ends(store: Store) -> None:
    manager = CustomTraceManager()
    with traced_span("outside") as outside:
        order = manager.start_custom_trace("ada", "checkout", custom_trace_id="order")
        assert current_span() is order
        with traced_span("ours"), mlflow.start_span("fluent"):
            pass
        manager.end_custom_trace("order", attributes={"k": 1}, status="error")
        assert current_span() is outside
    traces = named(store)
    by_name = {span.name: span for span in traces["order"].data.spans}
    assert by_name["ours"].parent_id == order.span_id
    assert by_name["fluent"].parent_id == by_name["ours"].span_id
    assert (status(by_name["order"]), by_name["order"].get_attribute("k")) == ("ERROR", 1)
    assert len(traces["outside"].data.spans) == 1


def test_traces_may_overlap(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    first = manager.start_custom_trace("ada", "x", custom_trace_id="first")
    second = manager.start_custom_trace("bob", "x", custom_trace_id="second")
    assert list(manager.active_traces) == ["first", "second"]
    manager.end_custom_trace("first")
    assert current_span() is second
    with traced_span("under second") as child:
        assert child.parent_id == second.span_id
    third = manager.start_custom_trace("cy", "x", custom_trace_id="third")
    manager.end_custom_trace("third")
    assert current_span() is second
    manager.end_custom_trace("second")
    assert current_span() is None
    assert mlflow.get_current_active_span() is None
    assert {status(span) for span in store.spans().values()} == {"OK"}
    assert first.trace_id != second.trace_id != third.trace_id


def test_an_end_in_a_block_leaves_the_block_active(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    manager.start_custom_trace("ada", "x", custom_trace_id="order")
    with traced_span("block", new_trace=True) as block:
        manager.end_custom_trace("order")
        assert current_span() is block
    assert current_span() is None
    assert {status(span) for span in store.spans().values()} == {"OK"}


def test_traces_that_always_overlap_leave_nothing_behind(store: Store) -> None:
    """As a server does that is never without a request: the context must not grow."""
    manager = CustomTraceManager()
    held = ["0", "1", "2"]
    for custom_id in held:
        manager.start_custom_trace("ada", "x", custom_trace_id=custom_id)
    for number in range(3, 40):
        manager.start_custom_trace("ada", "x", custom_trace_id=str(number))
        manager.end_custom_trace(held.pop(0))
        held.append(str(number))
    gc.collect()
    assert sum(type(one) is StandIn for one in gc.get_objects()) < 12
    for custom_id in held:
        manager.end_custom_trace(custom_id)
    assert manager._traces == {}
    assert current_span() is None
    assert len(store.traces()) == 40


@pytest.mark.parametrize("where", ["thread", "task", "context"])
def test_ending_elsewhere_poisons_no_context(store: Store, where: str) -> None:
    manager = CustomTraceManager(strict=True)

    def end() -> None:
        assert manager.get_active_trace("order") is not None
        manager.end_custom_trace("order", outputs=where)
        assert current_span() is None

    async def main() -> None:
        manager.start_custom_trace("ada", "x", custom_trace_id="order")

        async def callback() -> None:
            end()

        await asyncio.create_task(callback())
        check()

    def check() -> None:
        assert current_span() is None
        with mlflow.start_span("later") as later:
            assert later.parent_id is None
        with traced_span("next") as following:
            assert following.parent_id is None

    if where == "task":
        asyncio.run(main())
    else:
        manager.start_custom_trace("ada", "x", custom_trace_id="order")
        if where == "thread":
            in_thread(end)
        else:
            contextvars.copy_context().run(end)
        check()
    traces = named(store)
    assert traces["order"].data.spans[0].outputs == where
    assert {name: len(trace.data.spans) for name, trace in traces.items()} == {
        "order": 1,
        "later": 1,
        "next": 1,
    }


def test_tasks_have_ambient_traces_of_their_own(store: Store) -> None:
    manager = CustomTraceManager(strict=True)

    async def serve(number: int) -> None:
        span = manager.start_custom_trace("ada", "x", custom_trace_id=f"order {number}")
        await asyncio.sleep(0.001)
        with traced_span("step") as step:
            assert step.parent_id == span.span_id
        manager.end_custom_trace(f"order {number}")
        assert current_span() is None

    async def main() -> None:
        await asyncio.gather(*(serve(number) for number in range(10)))

    asyncio.run(main())
    assert [len(trace.data.spans) for trace in store.traces()] == [2] * 10


ENDINGS: dict[str, Callable[[CustomTraceManager, Any], Any]] = {
    "end_custom_trace": lambda manager, span: manager.end_custom_trace("order"),
    "span.end": lambda manager, span: span.end(),
    "raw client": lambda manager, span: mlflow.MlflowClient().end_trace(span.trace_id),
    "MLflow's own span": lambda manager, span: span.__wrapped__.end(),
    "close_open_spans": lambda manager, span: spanguard.close_open_spans(),
    "in a thread": lambda manager, span: in_thread(span.end),
}


@pytest.mark.parametrize("how", ENDINGS)
def test_a_trace_that_ended_is_not_active_however_it_ended(store: Store, how: str) -> None:
    manager = CustomTraceManager()
    span = manager.start_custom_trace("ada", "x", custom_trace_id="order")
    assert dict(manager.active_traces) == {"order": span}
    assert manager.get_active_trace("order") is span
    ENDINGS[how](manager, span)
    assert dict(manager.active_traces) == {}
    assert manager.get_active_trace("order") is None
    assert current_span() is None
    with pytest.warns(UnknownSpanWarning, match="has ended, or was not started here"):
        manager.end_custom_trace("order")
    with traced_span("next") as following:
        assert following.parent_id is None
    assert named(store)["order"].info.tags["custom_trace_id"] == "order"


def test_ending_an_unknown_id(store: Store) -> None:
    manager = CustomTraceManager()
    other = CustomTraceManager(strict=True)
    manager.start_custom_trace("ada", "x", custom_trace_id="order")
    with pytest.warns(UnknownSpanWarning, match="'nope'"):
        manager.end_custom_trace("nope")
    with pytest.raises(spanguard.UnknownSpanError) as caught:
        other.end_custom_trace("order")
    assert (caught.value.span_name, caught.value.trace_id) == ("order", trace_id_for("order"))
    assert list(manager.active_traces) == ["order"]
    manager.end_custom_trace("order")


def test_the_users_exception_wins_over_an_unknown_id() -> None:
    manager = CustomTraceManager(strict=True)
    error = ValueError("users")
    with pytest.raises(ValueError) as caught:
        try:
            raise error
        finally:
            manager.end_custom_trace("nope")
    assert caught.value is error


def test_two_threads_end_a_trace_once(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    manager.start_custom_trace("ada", "x", custom_trace_id="order")
    barrier = threading.Barrier(4)

    def end(number: int) -> bool:
        barrier.wait()
        try:
            manager.end_custom_trace("order", outputs=number)
        except spanguard.UnknownSpanError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        ended = list(pool.map(end, range(4)))
    assert ended.count(True) == 1
    assert store.trace().data.spans[0].outputs == ended.index(True)
    current_span()


def test_what_is_open_below_is_closed_first(store: Store, client: Any) -> None:
    manager = CustomTraceManager(strict=True)
    span = manager.start_custom_trace("ada", "x", custom_trace_id="order")
    pushed = TraceStateManager()
    pushed.push_trace("pushed")
    mlflow.MlflowClient().start_span("raw", span.trace_id, span.span_id)
    with pytest.raises(spanguard.OrphanedSpanError) as caught:
        manager.end_custom_trace("order")
    assert {orphan.name for orphan in caught.value.spans} == {"pushed", "raw"}
    assert current_span() is None
    assert pushed.depth == 0
    spans = store.spans()
    assert [outcome(spans[name]) for name in ("order", "pushed", "raw")] == [
        "ok",
        "orphaned",
        "orphaned",
    ]


def test_a_status_that_is_none_of_mlflows(store: Store) -> None:
    manager = CustomTraceManager()
    manager.start_custom_trace("ada", "x", custom_trace_id="order")
    with pytest.warns(spanguard.SpanguardWarning, match="not one of OK"):
        manager.end_custom_trace("order", status="FAILED")
    assert status(store.spans()["order"]) == "ERROR"


def test_the_block_takes_its_status_from_the_exception(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    error = ValueError("bad")
    with pytest.raises(ValueError) as caught:
        with manager.custom_trace("ada", "x", custom_trace_id="order") as span:
            assert current_span() is span is manager.active_traces["order"]
            raise error
    assert caught.value is error
    assert (dict(manager.active_traces), current_span()) == ({}, None)
    assert manager._traces == {}, "nor does it keep the payload of the one that ended last"
    root = store.spans()["order"]
    assert (status(root), outcome(root)) == ("ERROR", "error")
    assert root.get_attribute("error_type") == "ValueError"


def test_the_block_works_async_and_once(store: Store) -> None:
    manager = CustomTraceManager()

    async def main() -> None:
        async with manager.custom_trace("ada", "x", custom_trace_id="order"):
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            async with manager.custom_trace("ada", "x", custom_trace_id="cancelled"):
                raise asyncio.CancelledError

    asyncio.run(main())
    block = manager.custom_trace("ada", "x", custom_trace_id="twice")
    with block:
        pass
    with pytest.raises(RuntimeError, match="new one"), block:
        pass
    spans = store.spans()
    assert [outcome(spans[name]) for name in ("order", "cancelled")] == ["ok", "cancelled"]


def test_a_block_whose_trace_is_ended_inside_it(store: Store) -> None:
    manager = CustomTraceManager()
    with pytest.warns(spanguard.SpanguardWarning, match="already ended"):
        with manager.custom_trace("ada", "x", custom_trace_id="order"):
            manager.end_custom_trace("order", outputs="early")
            assert current_span() is None
    assert store.spans()["order"].outputs == "early"


def test_a_trace_left_open_in_a_block_stays_open(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    with manager.custom_trace("ada", "x", custom_trace_id="block"):
        left = manager.start_custom_trace("ada", "x", custom_trace_id="left")
    assert current_span() is None, "the block leaves the context as it was found"
    assert dict(manager.active_traces) == {"left": left}
    manager.end_custom_trace("left")
    assert {status(span) for span in store.spans().values()} == {"OK"}


def test_a_manager_does_not_keep_what_another_api_has_ended(store: Store) -> None:
    manager = CustomTraceManager()
    for number in range(5):
        manager.start_custom_trace("ada", "x", custom_trace_id=str(number)).end()
        assert len(manager._traces) == 1


def test_a_trace_that_is_dropped_with_its_manager_is_abandoned(store: Store) -> None:
    manager: CustomTraceManager | None = CustomTraceManager()
    assert manager is not None
    manager.start_custom_trace("ada", "x", custom_trace_id="order")
    with pytest.warns(spanguard.OrphanedSpanWarning, match="'order'.*garbage-collected"):
        manager = None
        gc.collect()
        assert spanguard.open_spans() == []
    assert outcome(store.spans()["order"]) == "abandoned"


def test_active_traces_cannot_be_written() -> None:
    manager = CustomTraceManager()
    with pytest.raises(TypeError):
        manager.active_traces["x"] = None  # type: ignore[index]


def test_custom_traces_where_tracing_is_off(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    mlflow.tracing.disable()
    try:
        span = manager.start_custom_trace("ada", "x", custom_trace_id="order")
        assert list(manager.active_traces) == ["order"]
        with pytest.raises(spanguard.DuplicateTraceIdError):
            manager.start_custom_trace("ada", "x", custom_trace_id="order")
        manager.end_custom_trace("order")
        span = manager.start_custom_trace("ada", "x", custom_trace_id="order")
        span.end()
        with manager.custom_trace("ada", "x", custom_trace_id="order"):
            pass
    finally:
        mlflow.tracing.enable()
    assert store.traces() == []


def test_a_span_that_spanguard_would_refuse_takes_no_id_with_it(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    with pytest.raises(spanguard.InvalidSpanArgumentError):
        manager.start_custom_trace(
            "ada", "x", custom_trace_id="order", **{"mlflow.spanInputs": "evil"}
        )
    assert spanguard.open_spans() == []
    with manager.custom_trace("ada", "x", custom_trace_id="order"):
        pass
    assert store.trace().info.trace_id == trace_id_for("order")


def test_a_warning_that_is_an_error_leaves_nothing_open(store: Store) -> None:
    manager = CustomTraceManager()
    with manager.custom_trace("ada", "x", custom_trace_id="order"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", DuplicateTraceIdWarning)
            with pytest.raises(DuplicateTraceIdWarning):
                manager.start_custom_trace("ada", "x", custom_trace_id="order")
        assert list(manager.active_traces) == ["order"]
        assert [span.name for span in spanguard.open_spans()] == ["order"]
    assert len(store.traces()) == 2


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


# -- finding -----------------------------------------------------------------------------------


def test_a_trace_is_found_once_it_has_ended(store: Store) -> None:
    manager = CustomTraceManager()
    assert manager.find_trace("order") is None
    manager.start_custom_trace("ada", "x", custom_trace_id="order")
    assert manager.find_trace("order") is None, "it is open: the store does not have it"
    manager.end_custom_trace("order")
    found = manager.find_trace("order")  # without a flush
    assert found is not None
    assert found.info.trace_id == trace_id_for("order")
    assert (manager.find_trace("ord"), manager.find_trace("")) == (None, None)


def test_a_trace_that_another_tool_tagged_is_found(store: Store) -> None:
    experiment = mlflow.MlflowClient().create_experiment("another")
    with traced_span("raw", experiment_id=experiment, tags={"custom_trace_id": "order 7"}) as raw:
        pass
    with traced_span("similar", tags={"custom_trace_id": "order_7"}):
        pass
    assert spanguard.flush(60)
    found = CustomTraceManager().find_trace("order 7")
    assert found is not None
    assert found.info.trace_id == raw.trace_id


def test_a_store_that_fails_finds_nothing_and_says_so(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    findings.reraise_internal = False
    (store.path.parent / "broken.db").write_text("this is no database")
    mlflow.set_tracking_uri(f"sqlite:///{store.path.parent / 'broken.db'}")
    try:
        assert CustomTraceManager(strict=True).find_trace("order") is None
    finally:
        mlflow.set_tracking_uri(store.uri)
    assert "finding a trace by its custom id failed" in caplog.text


def test_a_store_that_does_not_answer_is_read_for_a_bounded_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CustomTraceManager()
    with manager.custom_trace("ada", "x", custom_trace_id="order"):
        pass
    assert spanguard.flush(60)
    monkeypatch.setattr(_store, "READ_SECONDS", 0.2)
    with locked(store):
        assert manager.find_trace("order") is None
    await_true(lambda: not asking())
    monkeypatch.setattr(_store, "READ_SECONDS", 30.0)
    assert manager.find_trace("order") is not None


HOSTILE_IDS = {
    "single quotes": "it's 'quoted'",
    "double quotes": 'say "hi"',
    "both quotes": "'\"`\"'",
    "an injection": "' OR tags.x = 'y",
    "backslashes": "a\\' \\\\ \\",
    "newlines": "line 1\nline 2\r\n\t",
    "a comment": "a -- b /* c */ # d",
    "a statement": "a; drop table trace_info;",
    "wildcards": "100%_[a-z]*?",
    "other scripts": "Zürich 日本語 🦉 עברית e\u0301",
    "surrogate": "a\udc80b\ud800",
    "nul": "a\x00b",
    "blanks": "  a  ",
    "51 characters": "x" * 51,
    "4001 characters": "y" * 4_001,
    "10000 characters": "z'\n" * 3_333 + "z",
}


def test_ids_of_any_kind_are_stored_and_found(store: Store) -> None:
    manager = CustomTraceManager(strict=True)
    # Each beside one that is nearly the same.
    ids = [custom_id + end for custom_id in HOSTILE_IDS.values() for end in ("", "'")]
    for custom_id in ids:
        manager.start_custom_trace("ada", "x", custom_trace_id=custom_id)
        assert manager.get_active_trace(custom_id) is not None
    for custom_id in ids:
        manager.end_custom_trace(custom_id)
    assert spanguard.flush(60)
    for custom_id in ids:
        assert_found(manager, custom_id)
    assert len(store.traces()) == len(ids)


def assert_found(manager: CustomTraceManager, custom_id: str) -> None:
    written = custom_id.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")
    found = manager.find_trace(custom_id)
    assert found is not None
    assert found.info.trace_id == trace_id_for(custom_id)
    assert found.data.spans[0].get_attribute("custom_trace_id") == written
    assert len(found.info.client_request_id) <= 50
    if len(written) <= 50:
        assert found.info.client_request_id == written
    else:
        assert found.info.client_request_id == trace_id_for(custom_id)
    label = found.info.tags["custom_trace_id"]
    assert label == found.info.tags["mlflow.traceName"]
    assert label == written if len(written) <= 4_000 else len(label) <= 4_000
    by_tag = _store.find_by_tag("custom_trace_id", label)
    assert by_tag is not None
    assert by_tag.info.trace_id == found.info.trace_id


@settings(
    max_examples=12,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(custom_ids=st.sets(st.text(st.characters(), min_size=1), min_size=1, max_size=5))
def test_any_texts_are_ids(store: Store, custom_ids: set[str]) -> None:
    manager = CustomTraceManager()
    started: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DuplicateTraceIdWarning)  # of an earlier example's ids
        for custom_id in custom_ids:
            with manager.custom_trace("ada", "x", custom_trace_id=custom_id) as span:
                started[span.get_attribute("custom_trace_id")] = span.trace_id
    assert len(started) == len(custom_ids)
    assert spanguard.flush(60)
    for custom_id, trace_id in started.items():
        assert trace_id == trace_id_for(custom_id)
        assert_found(manager, custom_id)
    assert (current_span(), dict(manager.active_traces)) == (None, {})


# -- other processes ---------------------------------------------------------------------------


def run(script: str, store: Store) -> str:
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": store.uri,
        "PYTHONPATH": str(Path(spanguard.__file__).parent.parent),
        "PYTHONIOENCODING": "utf-8",
    }
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_a_trace_of_another_process_is_found_and_its_id_in_use(store: Store) -> None:
    printed = run(
        """
        from spanguard import CustomTraceManager, traced_span

        manager = CustomTraceManager()
        with manager.custom_trace("ada", "checkout", custom_trace_id="it's order 42") as span:
            with traced_span("charge"):
                pass
        print(span.trace_id)
        """,
        store,
    )
    manager = CustomTraceManager()
    found = manager.find_trace("it's order 42")
    assert found is not None
    assert {span.name for span in found.data.spans} == {"it's order 42", "charge"}
    # By the derived id, with MLflow alone; by the tag; by the client's request id.
    assert trace_id_for("it's order 42") == printed.strip() == found.info.trace_id
    by_id = mlflow.get_trace(trace_id_for("it's order 42"))
    assert by_id.info.trace_id == found.info.trace_id
    for filter_string in (
        'tags.custom_trace_id = "it\'s order 42"',
        'client_request_id = "it\'s order 42"',
    ):
        (by_search,) = mlflow.MlflowClient().search_traces(
            locations=["0"], filter_string=filter_string
        )
        assert by_search.info.trace_id == found.info.trace_id
    # A second run under the same id is another trace, or refused.
    with pytest.raises(spanguard.DuplicateTraceIdError):
        CustomTraceManager(strict=True).start_custom_trace(
            "ada", "checkout", custom_trace_id="it's order 42"
        )
    with pytest.warns(DuplicateTraceIdWarning):
        with manager.custom_trace("ada", "checkout", custom_trace_id="it's order 42"):
            pass
    assert len(store.traces()) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_takes_no_id_of_its_parents(store: Store) -> None:
    run(
        """
        import os, warnings
        from spanguard import CustomTraceManager, flush
        from spanguard.exceptions import DuplicateTraceIdWarning

        warnings.simplefilter("ignore", DuplicateTraceIdWarning)
        manager = CustomTraceManager()
        manager.start_custom_trace("ada", "x", custom_trace_id="order")
        (ended, end), (stored, store) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.close(store)
            assert dict(manager.active_traces) == {}
            span = manager.start_custom_trace("ada", "x", custom_trace_id="order")
            manager.end_custom_trace(span.name)
            flush()
            os.write(end, b"x")
            os.read(stored, 1)
            assert manager.find_trace("order") is not None
            os._exit(0)
        os.close(end)
        os.read(ended, 1)
        manager.end_custom_trace("order")
        flush()
        os.write(store, b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """,
        store,
    )
    traces = named(store)
    assert len(traces) == 2
    assert "order" in traces
    assert all(len(trace.data.spans) == 1 for trace in traces.values())


def test_what_is_left_open_at_exit_is_found(store: Store) -> None:
    run(
        """
        from spanguard import CustomTraceManager

        manager = CustomTraceManager()
        manager.start_custom_trace("ada", "x", custom_trace_id="order", amount=3)
        """,
        store,
    )
    found = CustomTraceManager().find_trace("order")
    assert found is not None
    (root,) = found.data.spans
    assert (status(root), outcome(root)) == ("ERROR", "orphaned")
    assert root.get_attribute("spanguard.orphaned_by") == "exit"
    assert (root.get_attribute("amount"), found.info.tags["custom_trace_id"]) == (3, "order")
