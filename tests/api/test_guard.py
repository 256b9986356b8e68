"""Code written for the raw client, run on a guarded one: what it does wrong costs no trace."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import LiveSpan, NoOpSpan, SpanEvent, SpanStatus, SpanStatusCode
from mlflow.tracing.trace_manager import InMemoryTraceManager

import spanguard
from spanguard import TraceStateManager, current_span, guard, traced_span
from spanguard._api import destination
from spanguard._api.held import _ended, _started
from spanguard._base import findings
from spanguard._mlflow.active import current_otel_span
from spanguard.exceptions import (
    InvalidParentWarning,
    InvalidSpanArgumentWarning,
    OrphanedSpanWarning,
    SpanAlreadyEndedWarning,
    TraceLostWarning,
    UnknownSpanWarning,
)
from tests.store import Store, outcome, own_attributes, status

# A client of a server asks it nothing when it is made.
ELSEWHERE = "http://elsewhere:5000"


def here() -> int:
    """Return the caller's line."""
    return sys._getframe(1).f_lineno


@pytest.fixture
def guarded() -> spanguard._api.guarded_client.GuardedClient:
    return guard(MlflowClient())


@pytest.fixture(params=["given", "made late"])
def either(request: pytest.FixtureRequest) -> spanguard._api.guarded_client.GuardedClient:
    """A guard of a given client, which is called; and one without, which does the same."""
    return guard(MlflowClient()) if request.param == "given" else guard()


# -- the documented example --------------------------------------------------------------------


def validate(item: dict[str, Any]) -> None:
    if item["value"] < 0:
        raise ValueError(f"negative value in item {item['id']}")


def process_batch(client: MlflowClient, items: list[dict[str, Any]]) -> dict[str, int]:
    """As the documented example has it: the validation span leaks when validation raises."""
    root = client.start_trace(name="batch", inputs={"count": len(items)}, tags={"kind": "nightly"})
    trace_id = root.request_id
    processed = failed = 0
    for item in items:
        item_span = client.start_span(
            name=f"item_{item['id']}", request_id=trace_id, parent_id=root.span_id, inputs=item
        )
        try:
            validation = client.start_span(
                name=f"validate_{item['id']}", request_id=trace_id, parent_id=item_span.span_id
            )
            validate(item)
            client.end_span(request_id=trace_id, span_id=validation.span_id)
            client.end_span(trace_id, item_span.span_id, outputs={"value": item["value"] * 2})
            processed += 1
        except Exception as error:
            client.end_span(
                request_id=trace_id,
                span_id=item_span.span_id,
                status="ERROR",
                attributes={"error": str(error)},
            )
            failed += 1
    client.end_trace(request_id=trace_id, outputs={"processed": processed, "failed": failed})
    return {"processed": processed, "failed": failed}


LEAKING_LINE = next(
    number
    for number, line in enumerate(Path(__file__).read_text().splitlines(), 1)
    if "validation = client.start_span(" in line
)
ITEMS = [{"id": n, "value": -1 if n == 1 else n} for n in range(3)]


def test_the_documented_batch_that_leaks_a_child(store: Store, either: MlflowClient) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert process_batch(either, ITEMS) == {"processed": 2, "failed": 1}
    ours = [w for w in caught if issubclass(w.category, spanguard.SpanguardWarning)]
    assert [(w.category, w.filename) for w in ours] == [(OrphanedSpanWarning, __file__)]
    assert not [w for w in caught if issubclass(w.category, FutureWarning)]

    trace = store.trace()
    spans = {span.name: span for span in trace.data.spans}
    assert trace.info.state.value == "OK"
    assert trace.info.tags["kind"] == "nightly"
    assert len(spans) == 7
    assert spans["batch"].outputs == {"processed": 2, "failed": 1}
    leaked = spans["validate_1"]
    assert (status(leaked), outcome(leaked)) == ("ERROR", "orphaned")
    site, _, function = str(leaked.get_attribute("spanguard.opened_at")).partition(" in ")
    assert function == "process_batch"
    assert site.startswith(__file__)
    assert LEAKING_LINE <= int(site.rpartition(":")[2]) <= LEAKING_LINE + 2
    item = spans["item_1"]
    assert leaked.get_attribute("spanguard.orphaned_by") == f"item_1 ({item.span_id})"
    assert (status(item), outcome(item)) == ("ERROR", "ok")
    assert own_attributes(item) == {"error": "negative value in item 1"}
    assert [status(spans[f"item_{n}"]) for n in (0, 2)] == ["OK", "OK"]
    assert [status(spans[f"validate_{n}"]) for n in (0, 2)] == ["OK", "OK"]


def test_the_same_batch_inside_a_traced_request(store: Store, guarded: MlflowClient) -> None:
    """Nested it is a branch of the trace around it, which goes on after its end_trace."""
    with pytest.warns(OrphanedSpanWarning):
        with traced_span("request") as request:
            process_batch(guarded, ITEMS)
            process_batch(guarded, ITEMS[:1])
            assert request.end_time_ns is None
    trace = store.trace()
    roots = [span for span in trace.data.spans if span.parent_id is None]
    batches = [span for span in trace.data.spans if span.name == "batch"]
    assert [span.name for span in roots] == ["request"]
    assert [span.parent_id for span in batches] == [request.span_id] * 2
    assert [span.outputs["processed"] for span in batches] == [2, 1]
    assert [status(span) for span in (*roots, *batches)] == ["OK"] * 3
    assert trace.info.tags["kind"] == "nightly"


def test_the_same_batch_in_strict_mode(store: Store) -> None:
    """The leak is found while the ValueError is handled, and raised when that is over."""
    with pytest.raises(spanguard.OrphanedSpanError) as caught:
        process_batch(guard(strict=True), ITEMS)
    assert [span.name for span in caught.value.spans] == ["validate_1"]
    spans = store.spans()
    assert len(spans) == 7
    assert outcome(spans["validate_1"]) == "orphaned"
    assert spans["batch"].outputs == {"processed": 2, "failed": 1}


# -- what raw code does wrong: the rows of the README's table -----------------------------------


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


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


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


# -- which span an end_trace means -------------------------------------------------------------


def test_end_trace_ends_the_child_that_its_start_trace_opened(
    store: Store, either: MlflowClient
) -> None:
    """Not the last one that joined: callbacks of concurrent jobs end in any order."""
    with traced_span("request"):
        one, two = either.start_trace("one"), either.start_trace("two")
        assert one.trace_id == two.trace_id
        either.end_trace(one.trace_id, outputs=1)
        assert (one.end_time_ns is None, two.end_time_ns is None) == (False, True)
        either.end_trace(two.trace_id, outputs=2)
    spans = store.spans()
    assert [spans[name].outputs for name in ("one", "two")] == [1, 2]


def test_a_copy_of_the_id_means_the_innermost(store: Store, either: MlflowClient) -> None:
    with traced_span("request"):
        one, two = either.start_trace("one"), either.start_trace("two")
        for span in (two, one):
            either.end_trace(pickle.loads(pickle.dumps(one.trace_id)), outputs=span.name)
            assert span.end_time_ns is not None
    spans = store.spans()
    assert [spans[name].outputs for name in ("one", "two")] == ["one", "two"]


def test_a_copy_of_the_id_means_the_innermost_of_this_thread(
    store: Store, guarded: MlflowClient
) -> None:
    with traced_span("request") as request:
        mine: Any = guarded.start_trace("mine")
        opened, ended = threading.Event(), threading.Event()

        def other() -> None:
            with traced_span("worker", trace_id=request.trace_id):
                theirs = guarded.start_trace("theirs")
                opened.set()
                assert ended.wait(60)
                guarded.end_trace(copy_of(theirs.trace_id), outputs="theirs")

        thread = threading.Thread(target=other)
        thread.start()
        assert opened.wait(60)
        guarded.end_trace(copy_of(mine.trace_id), outputs="mine")
        ended.set()
        thread.join()
    spans = store.spans()
    assert [spans[name].outputs for name in ("mine", "theirs")] == ["mine", "theirs"]


def copy_of(text: str) -> str:
    copied = text.encode().decode()
    assert copied is not text
    return copied


def test_the_id_of_a_child_span_leads_to_its_start_trace(
    store: Store, guarded: MlflowClient
) -> None:
    with traced_span("request"):
        one = guarded.start_trace("one")
        child = guarded.start_span("child", one.trace_id, one.span_id)
        two = guarded.start_trace("two")
        guarded.end_span(child.trace_id, child.span_id)
        guarded.end_trace(child.request_id)
        assert (one.end_time_ns is None, two.end_time_ns is None) == (False, True)
        guarded.end_trace(two.trace_id)


def test_ending_twice_does_not_end_what_is_around(store: Store, either: MlflowClient) -> None:
    """`except` and `finally` both end the trace: at the top it is harmless, and nested too."""

    def job(name: str, work: Any) -> None:
        root = either.start_trace(name)
        try:
            work()
        except ValueError:
            either.end_trace(root.trace_id, status="ERROR")
        finally:
            either.end_trace(root.trace_id)

    def fail() -> None:
        raise ValueError

    def outer() -> None:
        job("inner", fail)
        assert [span.name for span in spanguard.open_spans()] == ["request", "outer"]

    with pytest.warns(SpanAlreadyEndedWarning, match="'inner'"):
        with traced_span("request"):
            job("outer", outer)
    spans = store.spans()
    assert [status(spans[name]) for name in ("request", "outer", "inner")] == ["OK", "OK", "ERROR"]


def test_a_leaked_inner_trace_does_not_keep_the_outer_open(store: Store) -> None:
    client = guard(ambient=True)
    root = client.start_trace("root")
    client.start_trace("leaked")
    with pytest.warns(OrphanedSpanWarning, match="leaked"):
        client.end_trace(root.trace_id)
    assert outcome(store.spans()["leaked"]) == "orphaned"


@pytest.mark.parametrize("kind", ["fluent", "ours", "manager"])
def test_the_root_of_a_block_is_not_ended_by_end_trace(
    store: Store, either: MlflowClient, kind: str
) -> None:
    if kind == "fluent":
        block: Any = mlflow.start_span("root")
    else:
        block = traced_span("root") if kind == "ours" else TraceStateManager().trace("root")
    with block as root:
        with pytest.warns(UnknownSpanWarning, match="block or a manager"):
            either.end_trace(root.trace_id)
        assert root.end_time_ns is None
    assert status(store.spans()["root"]) == "OK"


def test_a_raw_clients_trace_is_ended_with_the_same_care(
    store: Store, either: MlflowClient, client: MlflowClient
) -> None:
    """Half of the code is still raw."""
    root = client.start_trace("root")
    span = client.start_span("span", root.trace_id, root.span_id)
    client.start_span("leaked", root.trace_id, span.span_id)
    with pytest.warns(OrphanedSpanWarning):
        either.end_span(root.trace_id, span.span_id, outputs=1)
    either.end_trace(root.trace_id, outputs=2, status="ERROR")
    with pytest.warns(SpanAlreadyEndedWarning):
        either.end_trace(root.trace_id)
    spans = store.spans()
    assert [spans[name].outputs for name in ("span", "root")] == [1, 2]
    assert (outcome(spans["leaked"]), status(spans["root"])) == ("orphaned", "ERROR")


def test_a_raw_trace_from_before_spanguard_listened(
    store: Store, either: MlflowClient, client: MlflowClient
) -> None:
    mlflow.tracing.reset()  # a provider that nobody listens to yet
    root = client.start_trace("root")
    child = client.start_span("child", root.trace_id, root.span_id)
    client.start_span("leaked", root.trace_id, root.span_id)
    either.start_span("ours", root.trace_id, child.span_id)
    with pytest.warns(OrphanedSpanWarning, match=r"'child'.*'ours'"):
        either.end_span(root.trace_id, child.span_id)
    with pytest.warns(OrphanedSpanWarning, match=r"'root'.*'leaked'"):
        either.end_trace(root.trace_id)
    spans = store.spans()
    assert {name: outcome(span) for name, span in spans.items()} == {
        "root": "ok",
        "child": "ok",
        "leaked": "orphaned",
        "ours": "orphaned",
    }
    assert "before spanguard listened" in spans["leaked"].get_attribute("spanguard.opened_at")


def test_a_block_ended_by_its_span_id(store: Store, either: MlflowClient) -> None:
    """Raw code may name any span; the block then finds it ended."""
    with pytest.warns(SpanAlreadyEndedWarning):
        with traced_span("root"), traced_span("block") as block:
            either.end_span(block.trace_id, block.span_id, outputs=1)
    assert store.spans()["block"].outputs == 1


def test_a_client_for_each_call(store: Store) -> None:
    """Raw code makes clients as it goes: what is open outlives them."""
    root = guard().start_trace("root")
    span_id = guard().start_span("span", root.trace_id, root.span_id).span_id
    gc.collect()
    guard().end_span(root.trace_id, span_id, outputs=1)
    guard().end_trace(root.trace_id, outputs=2)
    spans = store.spans()
    assert [(outcome(s), s.outputs) for s in spans.values()] == [("ok", 2), ("ok", 1)]


def test_spans_outlive_what_raw_code_keeps_of_them(store: Store, guarded: MlflowClient) -> None:
    trace_id = guarded.start_trace("root").trace_id
    gc.collect()
    assert [span.name for span in spanguard.open_spans()] == ["root"]
    guarded.end_trace(trace_id)
    assert outcome(store.spans()["root"]) == "ok"


# -- trace arguments of a start_trace that joins -----------------------------------------------


def test_an_experiment_of_its_own_cannot_be_joined(store: Store, either: Any) -> None:
    other = MlflowClient().create_experiment("other")
    with traced_span("root"):
        with pytest.warns(InvalidSpanArgumentWarning, match=r"experiment_id.*new_trace=True"):
            joined = either.start_trace("joined", experiment_id=other)
        either.end_trace(joined.trace_id)
        root = either.start_trace("own", experiment_id=other, new_trace=True)
        either.end_trace(root.trace_id)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same = either.start_trace("same", experiment_id="0", tags={"a": 1})
            either.end_trace(same.trace_id)
    experiments = {t.data.spans[0].name: t.info.experiment_id for t in store.traces()}
    assert experiments == {"root": "0", "own": other}


def test_a_run_of_its_own_cannot_be_joined(store: Store, either: Any) -> None:
    with traced_span("root", run_id="1" * 32):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            either.end_trace(either.start_trace("same", run_id="1" * 32).trace_id)
        with pytest.warns(InvalidSpanArgumentWarning, match="run_id"):
            either.end_trace(either.start_trace("other", run_id="2" * 32).trace_id)
    assert store.trace().info.trace_metadata["mlflow.sourceRun"] == "1" * 32


def test_a_trace_keeps_its_experiment_run_and_tags(store: Store, either: MlflowClient) -> None:
    other = MlflowClient().create_experiment("other")
    start_time_ns = 1_700_000_000_000_000_000
    root = either.start_trace(
        "root", "CHAIN", {"q": 1}, {"k": "v"}, {"tag": "t"}, other, start_time_ns, "1" * 32
    )
    span = either.start_span(
        "span", root.trace_id, root.span_id, "TOOL", [1], {"a": 1}, start_time_ns + 1
    )
    either.end_span(root.trace_id, span.span_id, [2], {"b": 2}, "OK", start_time_ns + 2)
    either.end_trace(root.trace_id, {"a": 2}, {"c": 3}, "ERROR", start_time_ns + 3)
    trace = store.trace()
    assert trace.info.experiment_id == other
    assert trace.info.tags["tag"] == "t"
    assert trace.info.trace_metadata["mlflow.sourceRun"] == "1" * 32
    stored = {s.name: s for s in trace.data.spans}
    found = stored["root"]
    assert (found.span_type, found.inputs, found.outputs) == ("CHAIN", {"q": 1}, {"a": 2})
    assert (found.start_time_ns, found.end_time_ns) == (start_time_ns, start_time_ns + 3)
    assert own_attributes(found) == {"k": "v", "c": 3}
    assert status(found) == "ERROR"
    found = stored["span"]
    assert (found.span_type, found.inputs, found.outputs) == ("TOOL", [1], [2])
    assert (found.start_time_ns, found.end_time_ns) == (start_time_ns + 1, start_time_ns + 2)
    assert own_attributes(found) == {"a": 1, "b": 2}


def test_bad_times_are_mended(store: Store, either: Any) -> None:
    with pytest.warns(InvalidSpanArgumentWarning, match="start_time_ns"):
        root = either.start_trace("root", start_time_ns="yesterday")
    with pytest.warns(InvalidSpanArgumentWarning, match="end_time_ns"):
        either.end_trace(root.trace_id, end_time_ns="now")
    span = store.spans()["root"]
    assert 0 <= span.end_time_ns - span.start_time_ns < 60e9


def test_many_attributes_at_both_ends(store: Store, either: MlflowClient) -> None:
    root = either.start_trace("root", attributes={f"start {n}": n for n in range(90)})
    either.end_trace(root.trace_id, attributes={f"end {n}": n for n in range(90)})
    attributes = own_attributes(store.trace().data.spans[0])
    folded = attributes.pop("spanguard.more_attributes")
    assert len(attributes) + len(folded) == 180
    assert {**attributes, **folded}["end 89"] == 89


def test_an_attribute_of_mlflows_own_at_the_end(store: Store, either: MlflowClient) -> None:
    root = either.start_trace("root")
    with pytest.warns(InvalidSpanArgumentWarning, match=r"mlflow\.traceRequestId"):
        either.end_trace(root.trace_id, attributes={"mlflow.traceRequestId": "x"})
    assert own_attributes(store.trace().data.spans[0]) == {"user.mlflow.traceRequestId": "x"}


# -- strict mode -------------------------------------------------------------------------------


def test_a_leak_raises_after_all_is_recorded(store: Store) -> None:
    client = guard(strict=True)
    root = client.start_trace("root")
    client.start_span("leaked", root.trace_id, root.span_id)
    with pytest.raises(spanguard.OrphanedSpanError) as caught:
        client.end_trace(root.trace_id, outputs=1)
    assert [span.name for span in caught.value.spans] == ["leaked"]
    assert (caught.value.span_name, caught.value.span_id) == ("root", root.span_id)
    spans = store.spans()
    assert (spans["root"].outputs, outcome(spans["leaked"])) == (1, "orphaned")


def test_broken_rules_raise_by_name(store: Store) -> None:
    with spanguard.strict():
        client = guard(MlflowClient())
        root = client.start_trace("root")
        child = client.start_span("child", root.trace_id, root.span_id)
        with pytest.raises(spanguard.InvalidParentError) as parent:
            client.start_span("x", root.trace_id, "0" * 16)
        assert (parent.value.span_name, parent.value.trace_id) == ("x", root.trace_id)
        with pytest.raises(spanguard.UnknownSpanError) as unknown:
            client.end_span(root.trace_id, "0" * 16)
        assert unknown.value.span_id == "0" * 16
        with pytest.raises(spanguard.UnknownSpanError) as unknown:
            client.end_trace("tr-unknown")
        assert unknown.value.trace_id == "tr-unknown"
        with pytest.raises(spanguard.InvalidSpanArgumentError, match="FAILED"):
            client.end_span(root.trace_id, child.span_id, status="FAILED")
        with pytest.raises(spanguard.SpanAlreadyEndedError) as again:
            client.end_span(root.trace_id, child.span_id)
        assert (again.value.span_name, again.value.span_id) == ("child", child.span_id)
        with pytest.raises(spanguard.InvalidParentError):
            client.start_span("x", root.trace_id, child.span_id)
        client.end_trace(root.trace_id)
        with pytest.raises(spanguard.SpanAlreadyEndedError) as again:
            client.end_trace(root.trace_id)
        assert again.value.trace_id == root.trace_id
    assert {s.name: status(s) for s in store.trace().data.spans} == {"root": "OK", "child": "ERROR"}
    assert spanguard.open_spans() == []


def test_the_late_end_of_an_orphan_raises_in_strict_mode(store: Store) -> None:
    client = guard(strict=True)
    root = client.start_trace("root")
    child = client.start_span("child", root.trace_id, root.span_id)
    with pytest.raises(spanguard.OrphanedSpanError):
        client.end_trace(root.trace_id)
    with pytest.raises(spanguard.SpanAlreadyEndedError, match="orphan of root"):
        client.end_span(root.trace_id, child.span_id)


def test_a_users_exception_wins_in_strict_mode(store: Store) -> None:
    client = guard(strict=True)
    error = ValueError("users")
    root = client.start_trace("root")
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ValueError) as raised:
        warnings.simplefilter("always")
        try:
            client.start_span("leaked", root.trace_id, root.span_id)
            raise error
        finally:
            client.end_trace(root.trace_id)
    assert raised.value is error
    if sys.version_info >= (3, 11):
        assert "OrphanedSpanError" in error.__notes__[0]
    else:
        assert any("leaked" in str(warning.message) for warning in caught)
    assert outcome(store.spans()["leaked"]) == "orphaned"


@pytest.mark.parametrize("by_hand", [True, False], ids=["span.end", "end_span"])
def test_what_is_found_in_an_except_clause_is_told_when_that_is_over(
    store: Store, by_hand: bool
) -> None:
    client = guard(strict=True)

    def job(is_handled: bool) -> None:
        root = client.start_trace("root")
        try:
            step: Any = client.start_span("step", root.trace_id, root.span_id)
            client.start_span("leaked", root.trace_id, step.span_id)
            try:
                raise error
            except ValueError:
                if by_hand:
                    step.end()
                else:
                    client.end_span(root.trace_id, step.span_id)
                if not is_handled:
                    raise
        finally:
            client.end_trace(root.trace_id)

    error = ValueError("handled")
    with pytest.raises(spanguard.OrphanedSpanError, match=r"'step'.*'leaked'"):
        job(is_handled=True)
    error = ValueError("users")
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ValueError) as raised:
        warnings.simplefilter("always")
        job(is_handled=False)
    assert raised.value is error
    if sys.version_info >= (3, 11):
        (note,) = error.__notes__
        assert "'leaked'" in note
    else:
        assert any("'leaked'" in str(warning.message) for warning in caught)


def test_nothing_is_raised_where_nothing_is_wrong(store: Store, either: MlflowClient) -> None:
    with spanguard.strict(), warnings.catch_warnings():
        warnings.simplefilter("error")
        root = either.start_trace("root", tags={"a": "b"})
        child = either.start_span("child", trace_id=root.trace_id, parent_id=root.span_id)
        either.end_span(trace_id=child.trace_id, span_id=child.span_id)
        either.end_trace(trace_id=root.trace_id)
    assert len(store.trace().data.spans) == 2


def test_one_warning_per_line(store: Store, either: MlflowClient) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(20):
            either.end_trace("tr-unknown")
    assert [w.category for w in caught] == [UnknownSpanWarning]
    assert caught[0].filename == __file__


# -- as a block --------------------------------------------------------------------------------


def test_a_block_closes_what_is_left_as_orphans(store: Store) -> None:
    with pytest.warns(OrphanedSpanWarning, match=r"guard\(\) ended with 3 open"):
        with guard() as client:
            root = client.start_trace("root")
            done = client.start_span("done", root.trace_id, root.span_id)
            client.end_span(root.trace_id, done.span_id)
            client.start_span("child", root.trace_id, root.span_id)
            client.start_trace("other")
    spans = store.spans()
    assert {name: outcome(span) for name, span in spans.items()} == {
        "root": "orphaned",
        "done": "ok",
        "child": "orphaned",
        "other": "orphaned",
    }
    assert spans["other"].get_attribute("spanguard.orphaned_by") == "the end of guard()'s block"
    assert len(store.traces()) == 2


def test_a_block_marks_what_is_left_with_its_exception(store: Store) -> None:
    error = ValueError("bad")
    with warnings.catch_warnings(), pytest.raises(ValueError) as caught:
        warnings.simplefilter("error")
        with guard(strict=True) as client:
            root = client.start_trace("root")
            client.start_span("child", root.trace_id, root.span_id)
            raise error
    assert caught.value is error
    spans = store.spans()
    assert [outcome(span) for span in spans.values()] == ["error", "error"]
    assert spans["root"].get_attribute("error_type") == "ValueError"


def test_a_block_in_strict_mode_raises_afterwards(store: Store) -> None:
    with pytest.raises(spanguard.OrphanedSpanError) as caught:
        with guard(strict=True) as client:
            client.start_trace("root")
    assert [span.name for span in caught.value.spans] == ["root"]
    assert outcome(store.spans()["root"]) == "orphaned"


def test_a_block_with_nothing_left_says_nothing(store: Store) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with guard() as client:
            client.end_trace(client.start_trace("root").trace_id)
    assert store.trace().info.state.value == "OK"


def test_an_async_block(store: Store) -> None:
    async def main() -> None:
        async with guard() as client:
            client.start_trace("root")
            await asyncio.sleep(0)
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert outcome(store.spans()["root"]) == "cancelled"


def test_overlapping_blocks_of_one_client_close_nothing_of_each_other(store: Store) -> None:
    client = guard()
    with client:
        root = client.start_trace("root")
        with client:
            pass
        assert root.end_time_ns is None
        client.end_trace(root.trace_id)
    assert outcome(store.spans()["root"]) == "ok"


def test_a_block_does_not_close_what_another_client_opened(store: Store) -> None:
    client = guard()
    root = client.start_trace("root")
    with guard(client) as inner:
        child = inner.start_span("child", root.trace_id, root.span_id)
        inner.end_span(root.trace_id, child.span_id)
    assert root.end_time_ns is None
    client.end_trace(root.trace_id)
    assert len(store.trace().data.spans) == 2


# -- ambient -----------------------------------------------------------------------------------


def test_guarded_spans_are_not_ambient(store: Store, either: MlflowClient) -> None:
    root = either.start_trace("root")
    assert current_span() is None
    with mlflow.start_span("fluent"):
        pass
    other = either.start_trace("other")
    either.end_trace(root.trace_id)
    either.end_trace(other.trace_id)
    assert len(store.traces()) == 3


@pytest.mark.parametrize("given", [True, False], ids=["given", "made late"])
def test_ambient_spans_are_what_others_nest_under(store: Store, given: bool) -> None:
    client = guard(MlflowClient() if given else None, ambient=True)
    found = current_otel_span()
    root = client.start_trace("root")
    assert current_span() is root
    step = client.start_span("step", root.trace_id, root.span_id)
    with mlflow.start_span("fluent"), traced_span("block"):
        inner = client.start_trace("inner")
        client.end_trace(inner.trace_id)
    client.end_span(root.trace_id, step.span_id)
    assert current_span() is root
    client.end_trace(root.trace_id)
    assert current_otel_span() is found, "the context was not left as it was found"
    assert mlflow.get_current_active_span() is None
    spans = store.spans()
    for outer, inside in [("root", "step"), ("step", "fluent"), ("fluent", "block")]:
        assert spans[inside].parent_id == spans[outer].span_id
    assert spans["inner"].parent_id == spans["block"].span_id


def test_ambient_spans_end_in_any_order_and_by_any_api(store: Store, client: MlflowClient) -> None:
    guarded = guard(ambient=True)
    one = guarded.start_trace("one")
    two = guarded.start_trace("two", new_trace=True)
    guarded.end_trace(one.trace_id)
    assert current_span() is two
    with traced_span("three", new_trace=True) as three:
        guarded.end_trace(two.trace_id)
        assert current_span() is three
    assert current_span() is None
    four = guarded.start_trace("four")
    client.end_trace(four.trace_id)
    assert current_span() is None
    five: Any = guarded.start_trace("five")
    five.end()
    assert mlflow.get_current_active_span() is None
    assert len(store.traces()) == 5


def test_an_ambient_span_ended_in_another_thread(store: Store) -> None:
    client = guard(ambient=True)
    root = client.start_trace("root")
    thread = threading.Thread(target=client.end_trace, args=(root.trace_id,))
    thread.start()
    thread.join()
    assert current_span() is None
    with traced_span("next") as following:
        assert following.parent_id is None


# -- the client that is guarded ----------------------------------------------------------------


class Recording(MlflowClient):
    """A client that writes down how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def start_trace(self, **kwargs: Any) -> Any:  # type: ignore[override]
        self.calls.append(("start_trace", kwargs))
        return super().start_trace(**kwargs)

    def start_span(self, **kwargs: Any) -> Any:  # type: ignore[override]
        self.calls.append(("start_span", kwargs))
        return super().start_span(**kwargs)

    def end_span(self, **kwargs: Any) -> None:  # type: ignore[override]
        self.calls.append(("end_span", kwargs))
        super().end_span(**kwargs)

    def end_trace(self, **kwargs: Any) -> None:  # type: ignore[override]
        self.calls.append(("end_trace", kwargs))
        super().end_trace(**kwargs)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


EACH_ONCE = ["start_trace", "start_span", "end_span", "end_trace"]


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


# -- a guarded client given to a block or a manager --------------------------------------------


@pytest.mark.parametrize("ambient", [False, True])
def test_a_block_of_a_guarded_client_starts_and_ends_once(store: Store, ambient: bool) -> None:
    client = Recording()
    guarded = guard(client, ambient=ambient)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with traced_span("root", client=guarded, tags={"a": "b"}):
            with pytest.raises(ZeroDivisionError), traced_span(guarded, "child", None, None):
                1 / 0
        assert current_span() is None
        with mlflow.start_span("fluent"):
            pass
        with traced_span("other", client=guarded, new_trace=True) as other:
            assert other.parent_id is None
    assert client.names == [*EACH_ONCE, "start_trace", "end_trace"]
    assert client.calls[2][1]["status"].status_code == SpanStatusCode.ERROR
    spans = store.spans()
    assert spans["child"].parent_id == spans["root"].span_id
    assert spans["fluent"].parent_id is None
    assert [outcome(spans[n]) for n in ("root", "child", "other")] == ["ok", "error", "ok"]
    assert not guarded._self_home.open
    assert spanguard.open_spans() == []


@pytest.mark.parametrize("scope", ["context", "process"])
def test_a_manager_of_a_guarded_client(store: Store, scope: Any) -> None:
    client = Recording()
    manager = TraceStateManager(guard(client), scope=scope, strict=True)
    a = manager.push_trace("a")
    b = manager.push_trace("b", inputs=1)
    assert manager.pop_trace(outputs=2) is b
    assert manager.pop_trace() is a
    assert client.names == EACH_ONCE
    manager.push_trace("c")
    manager.push_trace("d")
    assert manager.close() == 2
    spans = store.spans()
    assert (spans["b"].inputs, spans["b"].outputs) == (1, 2)
    assert [outcome(spans[name]) for name in "abcd"] == ["ok", "ok", "orphaned", "orphaned"]


def test_a_traced_function_of_a_guarded_client(store: Store) -> None:
    client = Recording()

    @spanguard.traced(client=guard(client))
    def double(x: int) -> int:
        return 2 * x

    assert double(2) == 4
    assert client.names == ["start_trace", "end_trace"]
    assert store.spans()["double"].outputs == 4


def test_a_wrapper_around_a_guarded_client(store: Store) -> None:
    """A user's own class that calls a guarded client sees both ends, and so does the client."""

    class Wrapper:
        def __init__(self, client: Any) -> None:
            self.client = client
            self.calls: list[str] = []

        def __getattr__(self, name: str) -> Any:
            self.calls.append(name)
            return getattr(self.client, name)

    client = Recording()
    wrapper = Wrapper(guard(client, strict=True))
    with traced_span("root", client=wrapper, strict=True):
        with traced_span("child", client=wrapper, strict=True) as child:
            child.set_outputs(1)
    assert wrapper.calls == EACH_ONCE
    assert client.names == EACH_ONCE
    assert store.spans()["child"].outputs == 1


def test_a_guards_strict_error_passes_through_a_block(store: Store) -> None:
    findings.reraise_internal = False  # as outside of tests: nothing failed
    client = guard(MlflowClient(tracking_uri=ELSEWHERE), strict=True)
    with pytest.raises(spanguard.InvalidSpanArgumentError, match="global tracking URI"):
        with traced_span("root", client=client):
            pytest.fail("the block must not run")
    assert spanguard.open_spans() == []


def test_a_guards_warning_made_an_error_passes_through_a_block(store: Store) -> None:
    findings.reraise_internal = False  # as outside of tests: nothing failed
    client = guard(MlflowClient(tracking_uri=ELSEWHERE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InvalidSpanArgumentWarning):
            with traced_span("root", client=client):
                pytest.fail("the block must not run")
    assert spanguard.open_spans() == []


def test_the_end_of_a_guards_block_takes_what_a_manager_pushed(store: Store) -> None:
    manager = TraceStateManager(guard())
    with pytest.warns(OrphanedSpanWarning):
        with manager._client:
            manager.push_trace("a")
    assert (manager.depth, len(manager._pushed)) == (0, 0)
    assert outcome(store.spans()["a"]) == "orphaned"


def test_a_dropped_block_of_a_guarded_client_is_abandoned(store: Store) -> None:
    def use() -> None:
        traced_span("dropped", client=guard()).__enter__()

    with pytest.warns(OrphanedSpanWarning, match="garbage-collected"):
        use()
        gc.collect()
        assert spanguard.open_spans() == []
    assert outcome(store.spans()["dropped"]) == "abandoned"


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


# -- threads, tasks, and what is kept ----------------------------------------------------------


def test_one_client_in_many_threads(store: Store, either: Any) -> None:
    """Traces of their own, and children in a trace of all."""
    shared = either.start_trace("shared")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(3):
                root = either.start_trace(f"{number}.{turn}", new_trace=True)
                child = either.start_span("child", root.trace_id, root.span_id)
                other = either.start_span("other", shared.trace_id, shared.span_id)
                either.end_span(root.trace_id, child.span_id, outputs=number)
                either.end_span(shared.trace_id, other.span_id)
                either.end_trace(copy_of(root.trace_id), outputs=number)
        except BaseException as error:
            failures.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # No more of them: on MLflow 3.10 each stores its own spans, and loses them without a word
        # when SQLite keeps it waiting for 20 seconds.
        threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        either.end_trace(shared.trace_id)
    assert failures == []
    traces = store.traces()
    assert sorted(len(trace.data.spans) for trace in traces) == [2] * 15 + [16]
    for trace in traces:
        outputs = {span.outputs for span in trace.data.spans if span.outputs is not None}
        assert len(outputs) <= 1, "an end reached another thread's span"


def test_jobs_of_many_tasks_in_one_request(store: Store, either: Any) -> None:
    async def job(number: int) -> None:
        root = either.start_trace(f"job {number}")
        await asyncio.sleep(0)
        child = either.start_span("step", root.trace_id, root.span_id)
        await asyncio.sleep(0)
        either.end_span(root.trace_id, child.span_id)
        await asyncio.sleep(0)
        # Half of them have only a copy of the id: then it is the task that tells.
        either.end_trace(copy_of(root.trace_id) if number % 2 else root.trace_id, outputs=number)

    async def main() -> None:
        with traced_span("request"):
            await asyncio.gather(*(job(number) for number in range(20)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main())
    trace = store.trace()
    outputs = {span.name: span.outputs for span in trace.data.spans if span.name.startswith("job")}
    assert outputs == {f"job {number}": number for number in range(20)}


def test_an_end_in_two_threads_at_once(store: Store, guarded: MlflowClient) -> None:
    for _ in range(20):
        root = guarded.start_trace("root")
        barrier = threading.Barrier(2)

        def end(root: Any = root, barrier: Any = barrier) -> None:
            barrier.wait()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                guarded.end_trace(root.trace_id)

        threads = [threading.Thread(target=end) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(store.traces()) == 20


@pytest.mark.parametrize("how", ["guard", "raw", "span", "ancestor", "close all"])
def test_nothing_outlives_its_span(either: Any, client: MlflowClient, how: str) -> None:
    _ended.clear()
    spans = weakref.WeakSet[Any]()
    for _ in range(20):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            root = either.start_trace("root")
            child = either.start_span("child", root.trace_id, root.span_id)
            spans.add(child.__wrapped__)
            if how == "guard":
                either.end_span(root.trace_id, child.span_id)
            elif how == "raw":
                client.end_span(root.trace_id, child.span_id)
            elif how == "span":
                child.end()
            elif how == "close all":
                spanguard.close_open_spans()
            either.end_trace(root.trace_id)
    del root, child
    assert spanguard.flush(30)
    gc.collect()
    assert not either._self_home.open
    assert not _started
    assert spanguard.open_spans() == []
    assert len(spans) <= 1, "the last one may still be in a local of MLflow's exporter"
    assert len(_ended) == 20 * 4


def test_what_is_remembered_of_ended_spans_is_bounded(
    monkeypatch: pytest.MonkeyPatch, guarded: MlflowClient
) -> None:
    monkeypatch.setattr("spanguard._api.held._MAX_REMEMBERED", 50)
    _ended.clear()
    root = guarded.start_trace("root")
    first = guarded.start_span("first", root.trace_id, root.span_id)
    guarded.end_span(root.trace_id, first.span_id)
    for number in range(100):
        span = guarded.start_span(f"{number}", root.trace_id, root.span_id)
        guarded.end_span(root.trace_id, span.span_id)
    assert len(_ended) == 50
    with pytest.warns(SpanAlreadyEndedWarning):
        guarded.end_span(root.trace_id, span.span_id)
    with pytest.warns(SpanAlreadyEndedWarning):  # MLflow has it still
        guarded.end_span(root.trace_id, first.span_id)
    guarded.end_trace(root.trace_id)
