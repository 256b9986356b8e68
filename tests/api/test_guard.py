"""What raw code does wrong costs no trace on a guarded client: the rows of the README's table."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import SpanEvent, SpanStatus, SpanStatusCode
from mlflow.tracing.trace_manager import InMemoryTraceManager

import spanguard
from spanguard import guard, traced_span
from spanguard.exceptions import (
    InvalidParentWarning,
    InvalidSpanArgumentWarning,
    OrphanedSpanWarning,
    SpanAlreadyEndedWarning,
    TraceLostWarning,
    UnknownSpanWarning,
)
from tests.api.raw_code import Hostile
from tests.lines import here
from tests.store import Store, outcome, status


def test_a_child_left_open_when_the_trace_ends(store: Store, either: MlflowClient) -> None:
    root = either.start_trace("root")
    either.start_span("leaked", root.trace_id, root.span_id)
    line = here() - 1
    with pytest.warns(OrphanedSpanWarning, match="leaked") as caught:
        either.end_trace(root.trace_id)
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)
    spans = store.spans()
    assert (status(spans["root"]), outcome(spans["leaked"])) == ("OK", "orphaned")
    function = "test_a_child_left_open_when_the_trace_ends"
    opened_at = spans["leaked"].get_attribute("spanguard.opened_at")
    assert opened_at == f"{__file__}:{line} in {function}"
    assert spans["leaked"].end_time_ns <= spans["root"].end_time_ns


@pytest.mark.parametrize("block", [True, False])
def test_a_root_that_nobody_ends_when_the_process_exits(
    store: Store, tmp_path: Path, block: bool
) -> None:
    script = tmp_path / "exits.py"
    script.write_text(
        "import contextlib, sys, spanguard\n"
        "client = spanguard.guard()\n"
        f"with client if {block} else contextlib.nullcontext():\n"
        "    root = client.start_trace('root')\n"
        "    client.start_span('step', root.trace_id, root.span_id)\n"
        "    sys.exit(3)\n"
    )
    source = str(Path(spanguard.__file__).parent.parent)
    finished = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "MLFLOW_TRACKING_URI": store.uri, "PYTHONPATH": source},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert finished.returncode == 3, finished.stderr
    spans = store.spans()
    expected = "interrupted" if block else "orphaned"
    assert {name: outcome(span) for name, span in spans.items()} == {
        "root": expected,
        "step": expected,
    }


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_an_interrupt_that_except_exception_does_not_see(
    store: Store, guarded: MlflowClient, kind: type[BaseException]
) -> None:
    error = kind("stop")

    def step(trace_id: str, parent_id: str) -> None:
        span = guarded.start_span("step", trace_id, parent_id)
        try:
            raise error
        except Exception:
            guarded.end_span(trace_id, span.span_id, status="ERROR")
            raise

    root = guarded.start_trace("root")
    with pytest.warns(OrphanedSpanWarning), pytest.raises(kind) as caught:
        try:
            step(root.trace_id, root.span_id)
        finally:
            guarded.end_trace(root.trace_id)
    assert caught.value is error
    assert outcome(store.spans()["step"]) == "orphaned"


@pytest.mark.parametrize("how", ["record_exception", "set_status", "event and status"])
def test_a_recorded_error_is_not_overwritten(store: Store, either: MlflowClient, how: str) -> None:
    root: Any = either.start_trace("root")
    span: Any = either.start_span("span", root.trace_id, root.span_id)
    if how == "record_exception":
        span.record_exception(ValueError("bad"))
    elif how == "set_status":
        span.set_status("ERROR")
    else:
        span.add_event(SpanEvent.from_exception(ValueError("bad")))
        span.set_status(SpanStatus(SpanStatusCode.ERROR, "bad"))
    either.end_span(root.trace_id, span.span_id)
    either.end_trace(root.trace_id, status="OK")
    spans = store.spans()
    assert [status(spans[name]) for name in ("root", "span")] == ["OK", "ERROR"]


@pytest.mark.parametrize("bogus", ["FAILED", 3, object()])
def test_an_invalid_status_is_an_error(store: Store, either: MlflowClient, bogus: Any) -> None:
    root = either.start_trace("root")
    span = either.start_span("span", root.trace_id, root.span_id)
    with pytest.warns(InvalidSpanArgumentWarning, match="not one of OK"):
        either.end_span(root.trace_id, span.span_id, status=bogus)
    either.end_trace(root.trace_id)
    spans = store.spans()
    assert [status(spans[name]) for name in ("root", "span")] == ["OK", "ERROR"]


@pytest.mark.parametrize("good", ["error", "ERROR", SpanStatus("ERROR", "why"), "Error"])
def test_a_status_in_any_form(store: Store, either: MlflowClient, good: Any) -> None:
    root = either.start_trace("root")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        either.end_trace(root.trace_id, status=good)
    span = store.spans()["root"]
    assert status(span) == "ERROR"
    assert span.status.description == ("why" if isinstance(good, SpanStatus) else "")


def test_payloads_whose_repr_raises(store: Store, either: MlflowClient) -> None:
    root = either.start_trace("root", inputs={"x": Hostile()}, attributes={"k": Hostile()})
    span = either.start_span("span", root.trace_id, root.span_id, inputs=Hostile())
    either.end_span(root.trace_id, span.span_id, outputs=Hostile(), attributes={"k": Hostile()})
    either.end_trace(root.trace_id, outputs=[Hostile(), 1])
    spans = store.spans()
    assert "object" in spans["root"].inputs["x"]
    assert spans["root"].outputs[1] == 1
    assert "object" in spans["span"].outputs
    assert "object" in spans["span"].get_attribute("k")
    assert [status(span) for span in spans.values()] == ["OK", "OK"]


def test_a_generator_that_is_left_early(store: Store, guarded: MlflowClient) -> None:
    def stream(trace_id: str, parent_id: str) -> Iterator[int]:
        span = guarded.start_span("stream", trace_id, parent_id)
        yield from range(10)
        guarded.end_span(trace_id, span.span_id)

    root = guarded.start_trace("root")
    for number in stream(root.trace_id, root.span_id):
        if number == 2:
            break
    with pytest.warns(OrphanedSpanWarning):
        guarded.end_trace(root.trace_id)
    assert outcome(store.spans()["stream"]) == "orphaned"


def test_a_parent_that_ends_before_its_child(store: Store, either: MlflowClient) -> None:
    root = either.start_trace("root")
    parent = either.start_span("parent", root.trace_id, root.span_id)
    child = either.start_span("child", root.trace_id, parent.span_id)
    with pytest.warns(OrphanedSpanWarning, match="'parent'.*'child'"):
        either.end_span(root.trace_id, parent.span_id)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the orphan warning has told it
        either.end_span(root.trace_id, child.span_id, outputs=1)
        either.end_trace(root.trace_id)
    spans = store.spans()
    assert [outcome(spans[name]) for name in ("root", "parent", "child")] == [
        "ok",
        "ok",
        "orphaned",
    ]
    assert spans["child"].outputs is None


def test_a_double_end(store: Store, either: MlflowClient) -> None:
    root = either.start_trace("root")
    span = either.start_span("span", root.trace_id, root.span_id)
    either.end_span(root.trace_id, span.span_id, outputs="first")
    with pytest.warns(SpanAlreadyEndedWarning, match=f"'span' \\({span.span_id}\\)"):
        either.end_span(root.trace_id, span.span_id, outputs="second", status="ERROR")
    either.end_trace(root.trace_id, outputs="first")
    with pytest.warns(SpanAlreadyEndedWarning, match="'root'"):
        either.end_trace(root.trace_id, outputs="second")
    assert spanguard.flush(60)  # now MLflow itself has forgotten the trace
    with pytest.warns(SpanAlreadyEndedWarning, match="'root'"):
        either.end_trace("".join(root.trace_id))
    with pytest.warns(SpanAlreadyEndedWarning, match="'span'"):
        guard().end_span(root.trace_id, span.span_id)
    assert {s.name: (status(s), s.outputs) for s in store.trace().data.spans} == {
        "root": ("OK", "first"),
        "span": ("OK", "first"),
    }


class Incomparable:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no answer")

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "unknown", ["tr-" + "0" * 32, "", "rubbish", None, 17, [], b"\x00", Incomparable()]
)
def test_unknown_ids(store: Store, either: Any, unknown: Any) -> None:
    root = either.start_trace("root")
    with pytest.warns(UnknownSpanWarning, match="nothing was ended"):
        either.end_trace(unknown)
    with pytest.warns(UnknownSpanWarning, match="nothing was ended"):
        either.end_span(root.trace_id, unknown)
    with pytest.warns(UnknownSpanWarning):
        either.end_span(unknown, unknown)
    either.end_trace(root.trace_id)
    assert status(store.spans()["root"]) == "OK"


def test_a_span_ended_under_another_traces_id(store: Store, either: MlflowClient) -> None:
    one, two = either.start_trace("one"), either.start_trace("two")
    span = either.start_span("span", one.trace_id, one.span_id)
    with pytest.warns(UnknownSpanWarning, match="ended all the same"):
        either.end_span(two.trace_id, span.span_id, outputs=1)
    either.end_trace(two.trace_id)
    either.end_trace(one.trace_id)
    assert store.spans()["span"].outputs == 1
    assert len(store.traces()) == 2


def test_a_child_under_a_span_that_ended(store: Store, either: MlflowClient) -> None:
    root = either.start_trace("root")
    ended = either.start_span("ended", root.trace_id, root.span_id)
    either.end_span(root.trace_id, ended.span_id)
    with pytest.warns(InvalidParentWarning, match="root of the trace"):
        child = either.start_span("child", root.trace_id, ended.span_id)
    either.end_span(root.trace_id, child.span_id)
    either.end_trace(root.trace_id)
    spans = store.spans()
    assert spans["child"].parent_id == root.span_id
    lost = spans["child"].get_attribute("spanguard.lost_parent")
    assert lost == f"{root.trace_id}/{ended.span_id}"


def test_a_child_in_a_trace_that_ended(store: Store, either: MlflowClient) -> None:
    """Its start breaks the finished trace; here it is a trace of its own, with what is under it."""
    root = either.start_trace("root")
    either.end_trace(root.trace_id)
    with pytest.warns(InvalidParentWarning, match="a new trace"):
        late = either.start_span("late", root.trace_id, root.span_id)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once; the code goes on with the ids it has
        below = either.start_span("below", root.trace_id, late.span_id)
        guard().end_span(root.trace_id, below.span_id)
        either.end_span(root.trace_id, late.span_id)
    first, second = store.traces()
    assert [span.name for span in first.data.spans] == ["root"]
    assert {span.name: span.parent_id for span in second.data.spans} == {
        "late": None,
        "below": late.span_id,
    }


def test_a_parent_of_another_trace(store: Store, either: MlflowClient) -> None:
    one, two = either.start_trace("one"), either.start_trace("two")
    with pytest.warns(InvalidParentWarning):
        child = either.start_span("child", one.trace_id, two.span_id)
    either.end_span(child.trace_id, child.span_id)
    either.end_trace(two.trace_id)
    either.end_trace(one.trace_id)
    assert store.spans()["child"].parent_id == one.span_id


def test_without_a_parent_the_root_or_the_active_span_of_that_trace(
    store: Store, either: MlflowClient
) -> None:
    root = either.start_trace("root")
    under_root: Any = either.start_span("under root", root.trace_id, None)
    with traced_span("elsewhere"):
        also = either.start_span("also", trace_id=root.trace_id, parent_id=None)
    with traced_span("active", trace_id=root.trace_id) as active:
        under_active = either.start_span("under active", root.trace_id, None)
        either.end_span(root.trace_id, under_active.span_id)
    for span in (also, under_root):
        either.end_span(root.trace_id, span.span_id)
    either.end_trace(root.trace_id)
    spans = store.spans()
    assert [spans[name].parent_id for name in ("under root", "also")] == [root.span_id] * 2
    assert spans["under active"].parent_id == active.span_id


def test_without_any_id_a_span_is_where_a_block_would_be(store: Store, either: Any) -> None:
    alone = either.start_span("alone")
    with traced_span("block") as block:
        inside = either.start_span("inside", None, None)
        either.end_span(inside.trace_id, inside.span_id)
    either.end_trace(alone.trace_id)
    spans = store.spans()
    assert spans["alone"].parent_id is None
    assert spans["inside"].parent_id == block.span_id


def test_start_trace_under_an_active_fluent_span_joins(store: Store, either: MlflowClient) -> None:
    with mlflow.start_span("fluent") as fluent:
        joined = either.start_trace("joined", tags={"k": "v"})
        either.end_trace(joined.trace_id, outputs=1)
        assert fluent.end_time_ns is None
    trace = store.trace()
    spans = {span.name: span for span in trace.data.spans}
    assert spans["joined"].parent_id == fluent.span_id
    assert spans["joined"].outputs == 1
    assert trace.info.tags["k"] == "v"


@pytest.mark.parametrize("outer", ["fluent", "ours"])
def test_a_new_trace_inside_an_active_span(store: Store, either: Any, outer: str) -> None:
    with mlflow.start_span("outer") if outer == "fluent" else traced_span("outer") as around:
        root = either.start_trace("root", new_trace=True)
        assert root.trace_id != around.trace_id
        either.end_trace(root.trace_id)
        assert around.end_time_ns is None
    assert store.spans()["root"].parent_id is None
    assert len(store.traces()) == 2


def test_plain_threads_with_explicit_ids(store: Store, guarded: MlflowClient) -> None:
    root = guarded.start_trace("root")

    def work(number: int) -> None:
        span = guarded.start_span(f"{number}", root.trace_id, root.span_id)
        guarded.end_span(root.trace_id, span.span_id)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    guarded.end_trace(root.trace_id)
    assert len(store.trace().data.spans) == 9


def crowd_around(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Start more traces than MLflow's buffer has room for, and return their roots."""
    monkeypatch.setenv("MLFLOW_TRACE_BUFFER_MAX_SIZE", "3")
    InMemoryTraceManager.reset()
    return [client.start_trace(f"root {number}") for number in range(5)]


def test_more_open_traces_than_mlflow_has_room_for(
    store: Store, either: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for root in crowd_around(either, monkeypatch):
        either.end_trace(root.trace_id)
    assert len(store.traces()) == 5


def test_an_evicted_trace_is_a_warning(
    store: Store, either: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_TIMEOUT_SECONDS", "3600")  # then MLflow's own buffer stays
    with pytest.warns(TraceLostWarning, match="MLFLOW_TRACE_TIMEOUT_SECONDS is set"):
        evicted, *others = crowd_around(either, monkeypatch)
    with pytest.warns(TraceLostWarning, match=evicted.trace_id):
        either.end_trace(evicted.trace_id)
    for other in reversed(others):
        either.end_trace(other.trace_id)
    assert spanguard.open_spans() == []


def test_another_tracking_uri_while_a_trace_is_open(
    store: Store, either: MlflowClient, tmp_path: Path
) -> None:
    root = either.start_trace("root")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.warns(TraceLostWarning, match="tracking URI changed"):
        either.end_trace(root.trace_id)
