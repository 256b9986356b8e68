"""The block: opens, nests, yields MLflow's span, closes."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
import time
from typing import Any

import mlflow
import pytest
from mlflow.entities import LiveSpan, SpanStatusCode

import spanguard
from spanguard import current_span, traced_span
from tests.store import Store, own_attributes, status

pytestmark = pytest.mark.versions


def test_a_block_is_a_trace_with_its_payloads(store: Store) -> None:
    with traced_span(
        "root", span_type="CHAIN", inputs={"q": 1}, attributes={"model": "m"}, tags={"env": "test"}
    ) as span:
        span.set_outputs({"a": 2})
    trace = store.trace()
    (stored,) = trace.data.spans
    assert (stored.name, stored.span_type, status(stored)) == ("root", "CHAIN", "OK")
    assert (stored.inputs, stored.outputs) == ({"q": 1}, {"a": 2})
    assert own_attributes(stored) == {"model": "m"}
    assert trace.info.tags["env"] == "test"


def test_blocks_nest(store: Store) -> None:
    with traced_span("a") as a:
        with traced_span("b") as b:
            with traced_span("c"):
                pass
        with traced_span("d"):
            pass
    spans = store.spans()
    assert spans["a"].parent_id is None
    assert spans["b"].parent_id == spans["d"].parent_id == a.span_id
    assert spans["c"].parent_id == b.span_id
    assert len(store.traces()) == 1


def test_async_blocks_nest(store: Store) -> None:
    async def main() -> None:
        async with traced_span("a"):
            await asyncio.sleep(0)
            async with traced_span("b") as b:
                assert current_span() is b

    asyncio.run(main())
    spans = store.spans()
    assert spans["b"].parent_id == spans["a"].span_id


def test_entering_twice_is_an_error_that_says_the_cure(store: Store) -> None:
    block = traced_span("once")
    with block:
        pass
    with pytest.raises(RuntimeError, match="new one for each block"):
        with block:
            pass
    assert len(store.trace().data.spans) == 1


def test_the_span_is_mlflows_by_isinstance_and_by_every_read() -> None:
    with traced_span("root", inputs=[1]) as span:
        assert isinstance(span, LiveSpan)
        real = mlflow.get_current_active_span()
        assert span.span_id == real.span_id
        assert span.trace_id == real.trace_id
        assert span.inputs == [1]
        assert span.end_time_ns is None
        assert repr(span) == repr(real)
        assert span.get_attribute("mlflow.spanType") == "UNKNOWN"


def test_the_span_refuses_to_be_pickled_as_mlflows_does() -> None:
    with traced_span("root") as span:
        with pytest.raises(TypeError):
            pickle.dumps(span)


def test_the_span_copies_as_mlflows_does() -> None:
    with traced_span("root") as span:
        assert copy.copy(span).span_id == span.span_id


def test_the_recipes_positional_form(store: Store, client: mlflow.MlflowClient) -> None:
    root = client.start_trace("root")
    with traced_span(
        client, "op", root.trace_id, root.span_id, inputs={"x": 1}, attributes={"k": "v"}
    ) as op:
        with traced_span(client, "inner", root.trace_id, op.span_id):
            pass
    client.end_trace(root.trace_id)
    spans = store.spans()
    assert spans["op"].parent_id == root.span_id
    assert spans["inner"].parent_id == op.span_id
    assert spans["op"].inputs == {"x": 1}
    assert own_attributes(spans["op"]) == {"k": "v"}


@pytest.mark.parametrize("form", ["positional", "keyword", "request_id"])
def test_without_a_parent_id_the_recipe_nests_under_the_root(
    store: Store, client: mlflow.MlflowClient, form: str
) -> None:
    root = client.start_trace("root")
    block = {
        "positional": lambda: traced_span(client, "op", root.trace_id, None),
        "keyword": lambda: traced_span("op", client=client, trace_id=root.trace_id),
        "request_id": lambda: traced_span("op", request_id=root.trace_id, parent_id=None),
    }[form]
    with block():
        pass
    client.end_trace(root.trace_id)
    assert store.spans()["op"].parent_id == root.span_id


def test_a_trace_id_nests_under_the_ambient_span_if_that_is_in_the_trace(store: Store) -> None:
    with traced_span("root") as root:
        with traced_span("middle") as middle:
            with traced_span("leaf", trace_id=root.trace_id):
                pass
    assert store.spans()["leaf"].parent_id == middle.span_id


def test_a_trace_id_of_another_live_trace_nests_under_its_root(store: Store) -> None:
    with traced_span("one") as one:
        with traced_span("two", new_trace=True):
            with traced_span("leaf", trace_id=one.trace_id):
                pass
    spans = store.spans()
    assert spans["leaf"].parent_id == one.span_id
    assert spans["leaf"].trace_id == one.trace_id


def test_a_parent_id_alone_is_enough(store: Store) -> None:
    with traced_span("root"):
        with traced_span("a") as a:
            pass_to = a.span_id
            with traced_span("b"):
                with traced_span("leaf", parent_id=pass_to):
                    pass
    assert store.spans()["leaf"].parent_id == pass_to


def test_new_trace_starts_a_root_inside_another_trace_and_gives_it_back(store: Store) -> None:
    with traced_span("outer") as outer:
        with traced_span("inner", new_trace=True) as inner:
            assert inner.parent_id is None
            assert inner.trace_id != outer.trace_id
        assert current_span() is outer
    assert len(store.traces()) == 2


@pytest.mark.parametrize("with_client", [False, True])
def test_new_trace_starts_a_root_inside_a_fluent_span(
    store: Store, client: mlflow.MlflowClient, with_client: bool
) -> None:
    with mlflow.start_span("fluent") as fluent:
        with traced_span("own", new_trace=True, client=client if with_client else None) as own:
            assert own.parent_id is None
        assert mlflow.get_current_active_span().span_id == fluent.span_id
    assert len(store.traces()) == 2


def test_a_given_client_is_the_one_that_is_called(store: Store) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Recording(mlflow.MlflowClient):
        def start_trace(self, **kwargs: Any) -> Any:  # type: ignore[override]
            calls.append(("start_trace", kwargs))
            return super().start_trace(**kwargs)

        def start_span(self, **kwargs: Any) -> Any:  # type: ignore[override]
            calls.append(("start_span", kwargs))
            return super().start_span(**kwargs)

        def end_span(self, **kwargs: Any) -> None:  # type: ignore[override]
            calls.append(("end_span", kwargs))
            super().end_span(**kwargs)

        def end_trace(self, **kwargs: Any) -> None:  # type: ignore[override]
            calls.append(("end_trace", kwargs))
            super().end_trace(**kwargs)

    client = Recording()
    with traced_span("root", client=client, tags={"n": 1}, session_id="s1"):
        with pytest.raises(ZeroDivisionError), traced_span("child", client=client, inputs=[1]):
            1 / 0
    assert [call for call, _ in calls] == ["start_trace", "start_span", "end_span", "end_trace"]
    assert calls[1][1]["inputs"] == [1]
    assert calls[2][1]["status"].status_code == SpanStatusCode.ERROR
    trace = store.trace()
    assert trace.info.tags["n"] == "1"
    assert trace.info.trace_metadata["mlflow.trace.session"] == "s1"
    assert [status(span) for span in trace.data.spans] == ["OK", "ERROR"]


def test_a_client_that_is_a_double_is_called_and_its_span_is_yielded() -> None:
    class Double:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def __getattr__(self, name: str) -> Any:
            def call(**kwargs: Any) -> Any:
                self.calls.append(name)
                return FakeSpan()

            return call

    class FakeSpan:
        trace_id, span_id, parent_id, name, status, end_time_ns = "t", "s", None, "n", None, None

        def __init__(self) -> None:
            self.attributes: dict[str, Any] = {}

        def set_attribute(self, key: str, value: Any) -> None:
            self.attributes[key] = value

        def set_status(self, status: Any) -> None:
            pass

        def add_event(self, event: Any) -> None:
            pass

    double = Double()
    with pytest.raises(ValueError):
        with traced_span("x", client=double) as span:
            span.set_attribute("k", 1)
            assert span.attributes == {"k": 1}
            raise ValueError
    assert double.calls == ["start_trace", "end_trace"]


def test_a_client_that_fails_leaves_the_code_running(caplog: pytest.LogCaptureFixture) -> None:
    from spanguard._base import findings

    class Failing:
        def start_trace(self, **kwargs: Any) -> Any:
            raise OSError("secret payload")

    findings.reraise_internal = False
    ran = []
    for _ in range(3):
        with traced_span("x", client=Failing()) as span:
            span.set_outputs(1)
            ran.append(span)
    assert len(ran) == 3
    lines = [record for record in caplog.records if record.name == "spanguard"]
    assert len(lines) == 1, "one line per site"
    assert "OSError" in lines[0].getMessage()
    assert "secret" not in lines[0].getMessage()


def test_trace_level_arguments_of_a_root(store: Store) -> None:
    other = mlflow.MlflowClient().create_experiment("other")
    with traced_span(
        "root",
        tags={"team": "a", "count": 3},
        metadata={"build": 7},
        experiment_id=other,
        run_id="0" * 32,
        session_id="session-1",
        user="ada",
    ):
        pass
    info = store.trace().info
    assert info.experiment_id == other
    assert (info.tags["team"], info.tags["count"]) == ("a", "3")
    assert info.trace_metadata["build"] == "7"
    assert info.trace_metadata["mlflow.sourceRun"] == "0" * 32
    assert info.trace_metadata["mlflow.trace.session"] == "session-1"
    assert info.trace_metadata["mlflow.trace.user"] == "ada"


def test_start_time_is_taken_and_the_end_is_never_before_it(store: Store) -> None:
    past, future = time.time_ns() - 10**10, time.time_ns() + 10**12
    with traced_span("past", start_time_ns=past):
        with traced_span("future", start_time_ns=future):
            pass
    spans = store.spans()
    assert spans["past"].start_time_ns == past
    assert spans["future"].start_time_ns == future
    assert all(span.end_time_ns >= span.start_time_ns for span in spans.values())


def test_a_chosen_opentelemetry_trace_id(store: Store) -> None:
    wanted = "0123456789abcdef" * 2
    with traced_span("root", otel_trace_id=wanted) as root:
        with traced_span("child"):
            pass
    with traced_span("next") as following:
        pass
    assert root.trace_id == f"tr-{wanted}"
    assert following.trace_id != root.trace_id
    assert len(store.traces()) == 2


def test_links_are_recorded_where_mlflow_has_them(store: Store) -> None:
    link = pytest.importorskip("mlflow.entities.link").Link
    with traced_span("first") as first:
        pass
    with traced_span("second", links=[link(first.trace_id, first.span_id)]) as second:
        assert [known.span_id for known in second.links] == [first.span_id]


# -- where it runs -----------------------------------------------------------------------------


def test_a_reserved_key_is_recorded_under_user(store: Store) -> None:
    with traced_span("span") as span:
        with pytest.warns(spanguard.SpanguardWarning, match="mlflow"):
            span.set_attribute("mlflow.spanType", "EVIL")
        span.set_attribute("mlflow.chat.tokenUsage", {"input_tokens": 1})
    stored = store.spans()["span"]
    assert stored.span_type == "UNKNOWN"
    assert stored.get_attribute("user.mlflow.spanType") == "EVIL"
    assert stored.get_attribute("mlflow.chat.tokenUsage") == {"input_tokens": 1}


def test_a_span_opened_in_one_thread_may_close_in_another(store: Store) -> None:
    block = traced_span("moved")
    block.__enter__()
    thread = threading.Thread(target=block.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    # This thread still holds what it was given; it stands for nothing now.
    assert current_span() is None
    assert mlflow.get_current_active_span() is None
    with traced_span("next") as span:
        assert span.parent_id is None
    assert len(store.traces()) == 2


def test_an_abandoned_span_is_closed_and_named(store: Store) -> None:
    import gc

    with pytest.warns(spanguard.OrphanedSpanWarning, match="garbage-collected"):
        traced_span("dropped").__enter__()
        gc.collect()
        assert spanguard.open_spans() == [], "the finalizer left it to whoever comes next"
    stored = store.spans()["dropped"]
    assert status(stored) == "ERROR"
    assert stored.get_attribute("spanguard.outcome") == "abandoned"
    assert "in test_an_abandoned_span" in stored.get_attribute("spanguard.opened_at")
    assert mlflow.get_current_active_span() is None
