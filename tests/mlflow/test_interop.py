"""With MLflow's fluent API, autologging's way in, its context settings, and tracing off."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import sys
import threading
from typing import Any

import mlflow
import pytest
from mlflow.entities import NoOpSpan

import spanguard
from spanguard import current_span, traced_span
from tests.store import Store, parents, status

pytestmark = pytest.mark.versions


def test_fluent_inside_ours_inside_fluent(store: Store) -> None:
    with mlflow.start_span("outer"):
        with traced_span("middle"):
            with mlflow.start_span("inner"):
                pass
    assert parents(store) == {"outer": None, "middle": "outer", "inner": "middle"}
    assert len(store.traces()) == 1


def test_ours_inside_fluent_inside_ours_with_a_decorator(store: Store) -> None:
    @mlflow.trace
    def fluent(x: int) -> int:
        with traced_span("inner"):
            return x

    with traced_span("outer"):
        assert fluent(3) == 3
    assert parents(store) == {"outer": None, "fluent": "outer", "inner": "fluent"}


def test_fluent_inside_ours_inside_fluent_across_gather(store: Store) -> None:
    async def branch(number: int) -> None:
        with mlflow.start_span(f"outer {number}"):
            await asyncio.sleep(0.001)
            async with traced_span(f"middle {number}"):
                await asyncio.sleep(0.001)
                with mlflow.start_span(f"inner {number}"):
                    await asyncio.sleep(0.001)

    async def main() -> None:
        await asyncio.gather(*(branch(number) for number in range(10)))

    asyncio.run(main())
    traces = store.traces()
    assert [len(trace.data.spans) for trace in traces] == [3] * 10
    found = parents(store)
    for number in range(10):
        assert found[f"middle {number}"] == f"outer {number}"
        assert found[f"inner {number}"] == f"middle {number}"


def test_tasks_nest_under_the_block_that_started_them(store: Store) -> None:
    async def work(number: int) -> None:
        with traced_span(f"ours {number}"):
            await asyncio.sleep(0.001)
            with mlflow.start_span(f"fluent {number}"):
                await asyncio.sleep(0.001)

    async def main() -> None:
        async with traced_span("root"):
            await asyncio.gather(*(work(number) for number in range(10)))

    asyncio.run(main())
    found = parents(store)
    assert len(store.traces()) == 1
    assert all(found[f"ours {n}"] == "root" for n in range(10))
    assert all(found[f"fluent {n}"] == f"ours {n}" for n in range(10))


def test_after_an_exception_the_context_is_as_found(store: Store) -> None:
    with mlflow.start_span("outer") as outer:
        with pytest.raises(ValueError):
            with traced_span("bad"), mlflow.start_span("bad fluent"):
                raise ValueError
        assert mlflow.get_current_active_span().span_id == outer.span_id
        with traced_span("next"):
            pass
    assert parents(store)["next"] == "outer"
    assert mlflow.get_current_active_span() is None


def test_the_context_itself_is_the_one_that_was_found(store: Store) -> None:
    from mlflow.tracing.provider import get_current_context

    before = get_current_context()
    with traced_span("outer"):
        inside = get_current_context()
        with pytest.raises(ValueError), traced_span("inner"):
            raise ValueError
        assert get_current_context() is inside
        manager = spanguard.TraceStateManager()
        manager.push_trace("pushed")
        manager.pop_trace()
        assert get_current_context() is inside
    assert get_current_context() is before


def test_current_span_is_the_ambient_one_of_any_api(store: Store) -> None:
    assert current_span() is None
    with traced_span("ours") as ours:
        assert current_span() is ours
        with mlflow.start_span("fluent") as fluent:
            seen = current_span()
            assert seen is not None
            assert seen.span_id == fluent.span_id
            seen.set_attribute("hostile", object())
        assert current_span() is ours
    assert current_span() is None
    assert "hostile" in store.spans()["fluent"].attributes


def test_a_fluent_span_opened_before_spanguard_is_the_parent(store: Store) -> None:
    # The fluent span's provider has no watcher yet.
    with mlflow.start_span("fluent") as fluent:
        assert current_span().span_id == fluent.span_id  # type: ignore[union-attr]
        with traced_span("ours"):
            pass
    assert parents(store) == {"fluent": None, "ours": "fluent"}


def test_ending_a_fluent_span_through_current_span_closes_descendants(
    store: Store, client: mlflow.MlflowClient
) -> None:
    with traced_span("warm"):
        pass
    with mlflow.start_span("fluent") as fluent:
        client.start_span("leaked", fluent.trace_id, fluent.span_id)
        current_span().end(outputs=1, status="ERROR")  # type: ignore[union-attr]
    spans = store.spans()
    assert status(spans["fluent"]) == "ERROR"
    assert spans["leaked"].get_attribute("spanguard.outcome") == "orphaned"


def test_a_task_that_outlives_its_trace_starts_a_new_one(store: Store) -> None:
    async def main() -> None:
        over = asyncio.Event()

        async def straggler() -> None:
            await over.wait()
            assert current_span() is None
            with traced_span("ours late"):
                pass
            with mlflow.start_span("fluent late"):
                pass

        async with traced_span("request"):
            task = asyncio.create_task(straggler())
            await asyncio.sleep(0)
        over.set()
        await task

    asyncio.run(main())
    assert parents(store) == {"request": None, "ours late": None, "fluent late": None}
    assert len(store.traces()) == 3


def test_a_task_that_outlives_its_span_nests_under_the_nearest_open_one(store: Store) -> None:
    async def main() -> None:
        over = asyncio.Event()

        async def straggler() -> None:
            await over.wait()
            with mlflow.start_span("late"):
                pass

        async with traced_span("request"):
            async with traced_span("step"):
                task = asyncio.create_task(straggler())
                await asyncio.sleep(0)
            over.set()
            await task

    asyncio.run(main())
    assert parents(store)["late"] == "request"


def test_a_block_left_in_another_context(store: Store) -> None:
    with traced_span("root") as root:
        block = traced_span("moved")
        contextvars.copy_context().run(block.__enter__)
        assert current_span() is root

        def leave() -> None:
            with traced_span("there", new_trace=True) as there:
                block.__exit__(None, None, None)
                assert current_span() is there

        contextvars.copy_context().run(leave)
        assert current_span() is root
    assert parents(store)["moved"] == "root"


def test_a_block_left_in_a_copy_of_its_context(store: Store) -> None:
    with traced_span("root") as root:
        block = traced_span("moved")
        block.__enter__()

        def leave() -> Any:
            block.__exit__(None, None, None)
            return current_span()

        assert contextvars.copy_context().run(leave) is root
        # This context was not restored, but what it holds stands for the root now.
        assert mlflow.get_current_active_span().span_id == root.span_id
        with mlflow.start_span("fluent"):
            pass
    assert parents(store)["fluent"] == "root"
    assert mlflow.get_current_active_span() is None


def test_blocks_left_out_of_order(store: Store) -> None:
    outer, inner = traced_span("outer"), traced_span("inner")
    outer.__enter__()
    inner.__enter__()
    with pytest.warns(spanguard.OrphanedSpanWarning):
        outer.__exit__(None, None, None)
    assert mlflow.get_current_active_span() is None
    inner.__exit__(None, None, None)
    assert mlflow.get_current_active_span() is None
    assert parents(store) == {"outer": None, "inner": "outer"}


def test_context_settings_are_honoured(store: Store) -> None:
    context = getattr(mlflow.tracing, "context", None)
    if context is None or "session_id" not in inspect.signature(context).parameters:
        pytest.skip("this MLflow's context() takes no session")
    with mlflow.tracing.context(tags={"t": "1"}, session_id="s", user="u"):
        with traced_span("root"), traced_span("child"):
            pass
    info = store.trace().info
    assert info.tags["t"] == "1"
    assert info.trace_metadata["mlflow.trace.session"] == "s"
    assert info.trace_metadata["mlflow.trace.user"] == "u"


def run_everything() -> list[Any]:
    """Use every part of the API once; return what the code in between computed."""
    done: list[Any] = []
    with traced_span("root", inputs={"a": 1}, tags={"t": 1}, session_id="s") as root:
        root.set_outputs(object())
        root.set_attribute("k", "v")
        with traced_span("child", trace_id=root.trace_id, parent_id=root.span_id) as child:
            child.record_exception(ValueError())
            child.set_status("ERROR")
            done.append(1)
        with pytest.raises(KeyError), traced_span("bad"):
            raise KeyError
        with mlflow.start_span("fluent"), traced_span("inside"):
            done.append(2)
        root.end()
    for scope in ("context", "process"):
        manager = spanguard.TraceStateManager(scope=scope)  # type: ignore[arg-type]
        span = manager.push_trace("a")
        manager.push_trace("b")
        manager.pop_trace()
        assert manager.pop_trace(span, outputs=1, status="ERROR") is span
        assert manager.depth == 0
    done.append(3)
    return done


@pytest.mark.filterwarnings("ignore::spanguard.SpanguardWarning")
def test_tracing_disabled(store: Store) -> None:
    mlflow.tracing.disable()
    try:
        with traced_span("root") as span:
            assert isinstance(span, NoOpSpan)
        assert run_everything() == [1, 2, 3]
    finally:
        mlflow.tracing.enable()
    assert store.traces() == []
    with traced_span("again"):
        pass
    assert len(store.traces()) == 1


@pytest.mark.filterwarnings("ignore::spanguard.SpanguardWarning")
def test_tracing_disabled_in_a_context(store: Store) -> None:
    context = getattr(mlflow.tracing, "context", None)
    if context is None or "session_id" not in inspect.signature(context).parameters:
        pytest.skip("this MLflow's context() takes no session")
    with mlflow.tracing.context(enabled=False):
        assert run_everything() == [1, 2, 3]
    assert store.traces() == []


def test_a_disabled_part_inside_a_trace(store: Store) -> None:
    context = getattr(mlflow.tracing, "context", None)
    if context is None or "session_id" not in inspect.signature(context).parameters:
        pytest.skip("this MLflow's context() takes no session")
    with traced_span("root"):
        with mlflow.tracing.context(enabled=False):
            with traced_span("hidden"), mlflow.start_span("hidden too"):
                pass
        with traced_span("shown"):
            pass
    assert parents(store) == {"root": None, "shown": "root"}


@pytest.mark.filterwarnings("ignore::spanguard.SpanguardWarning")
def test_sampled_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0")
    mlflow.tracing.reset()
    assert run_everything() == [1, 2, 3]
    with traced_span("root"):
        with mlflow.start_span("fluent"):
            pass
    assert store.traces() == []
    assert mlflow.get_current_active_span() is None


def test_tracing_broken(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from spanguard._base import findings
    from spanguard._mlflow import active, ending, starting, watching

    findings.reraise_internal = False

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken")

    seams = {
        "start_root": starting,
        "start_child": starting,
        "add_processor": watching,
        "current_otel_span": active,
        "end_live": ending,
    }
    ours = [module for name, module in sys.modules.items() if name.startswith("spanguard.")]
    for name, home in seams.items():
        works = getattr(home, name)
        with monkeypatch.context() as patch:
            for module in ours:
                if vars(module).get(name) is works:
                    patch.setattr(module, name, broken)
            done = []
            with traced_span("root", inputs=1) as span:
                span.set_outputs(2)
                with traced_span("child"):
                    done.append(name)
            assert done == [name]
    assert "broken" not in caplog.text


def test_the_global_provider_mode(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry import trace as otel

    monkeypatch.setenv("MLFLOW_USE_DEFAULT_TRACER_PROVIDER", "false")
    mlflow.tracing.reset()
    mlflow.set_tracking_uri(store.uri)
    try:
        with traced_span("ours"):
            with otel.get_tracer("other library").start_as_current_span("theirs"):
                with mlflow.start_span("fluent"), traced_span("inside"):
                    pass
        assert not otel.get_current_span().get_span_context().is_valid
        assert parents(store) == {
            "ours": None,
            "theirs": "ours",
            "fluent": "theirs",
            "inside": "fluent",
        }
    finally:
        mlflow.tracing.reset()


def test_opentelemetry_sees_our_span_where_mlflow_shows_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import environment_variables
    from opentelemetry import trace as otel

    if not hasattr(environment_variables, "MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT"):
        pytest.skip("this MLflow does not propagate")
    monkeypatch.setenv("MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT", "true")
    with traced_span("ours") as ours:
        assert f"{otel.get_current_span().get_span_context().span_id:016x}" == ours.span_id
    assert not otel.get_current_span().get_span_context().is_valid


def test_a_plain_thread_starts_its_own_trace_and_a_given_parent_joins(store: Store) -> None:
    def work(root: Any) -> None:
        assert current_span() is None
        with traced_span("alone"):
            pass
        with traced_span("joined", trace_id=root.trace_id):
            with mlflow.start_span("fluent"):
                pass

    with traced_span("root") as root:
        thread = threading.Thread(target=work, args=(root,))
        thread.start()
        thread.join()
    assert parents(store) == {"root": None, "alone": None, "joined": "root", "fluent": "joined"}


def test_an_exporter_that_fails_leaves_nothing_open(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracing.processor.base_mlflow import BaseMlflowSpanProcessor

    def fail(*args: Any) -> None:
        raise RuntimeError("export failed")

    monkeypatch.setattr(BaseMlflowSpanProcessor, "on_end", fail)
    with traced_span("root"), traced_span("child"):
        pass
    assert current_span() is None
    assert spanguard.open_spans() == []


def test_under_a_fluent_span_that_mlflow_could_not_start(store: Store) -> None:
    with mlflow.start_span("over") as over:
        over.end()
        assert spanguard.flush(60)
        # MLflow finds its trace exported, and makes a span without any ids active.
        with mlflow.start_span("nothing") as nothing:
            assert nothing.span_id is None
            assert current_span() is None
            with traced_span("ours") as ours:
                assert current_span() is ours
    assert store.spans()["ours"].parent_id is None
