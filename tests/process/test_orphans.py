"""What is left open under a span: closed before it, deepest first, and named."""

from __future__ import annotations

import threading
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import traced_span
from tests.store import Store, outcome, status

pytestmark = pytest.mark.versions


def here() -> int:
    """Return the caller's line."""
    import sys

    return sys._getframe(1).f_lineno


def test_a_child_left_open_by_the_raw_client(store: Store, client: mlflow.MlflowClient) -> None:
    with pytest.warns(spanguard.OrphanedSpanWarning) as caught:
        with traced_span("root") as root:
            client.start_span("leaked", root.trace_id, root.span_id)
            line = here() - 1
    trace = store.trace()
    spans = {span.name: span for span in trace.data.spans}
    assert trace.info.state.value == "OK"
    assert (status(spans["root"]), outcome(spans["root"])) == ("OK", "ok")
    leaked = spans["leaked"]
    assert (status(leaked), outcome(leaked)) == ("ERROR", "orphaned")
    site = f"{__file__}:{line} in test_a_child_left_open_by_the_raw_client"
    assert leaked.get_attribute("spanguard.opened_at") == site
    assert leaked.get_attribute("spanguard.orphaned_by") == f"root ({root.span_id})"
    assert leaked.end_time_ns <= spans["root"].end_time_ns
    warning = caught[0]
    assert site in str(warning.message)
    assert (warning.filename, warning.lineno) == (__file__, line)


@pytest.mark.parametrize("with_client", [False, True], ids=["direct", "client"])
def test_a_deep_chain_of_leaks_closes_deepest_first(
    store: Store, client: mlflow.MlflowClient, with_client: bool
) -> None:
    with pytest.warns(spanguard.OrphanedSpanWarning, match="5 open below"):
        with traced_span("root", client=client if with_client else None) as root:
            parent: Any = root
            for number in range(5):
                parent = client.start_span(f"leak {number}", root.trace_id, parent.span_id)
    spans = store.spans()
    ends = [spans[f"leak {number}"].end_time_ns for number in range(5)]
    assert ends == sorted(ends, reverse=True)
    assert all(outcome(spans[f"leak {number}"]) == "orphaned" for number in range(5))
    assert spans["root"].end_time_ns >= ends[0]


def test_leaks_of_every_api_in_every_thread(store: Store, client: mlflow.MlflowClient) -> None:
    held: list[Any] = []

    def leak_in_thread(root: Any) -> None:
        held.append(client.start_span("raw in thread", root.trace_id, root.span_id))
        block = traced_span("ours in thread", trace_id=root.trace_id)
        held.extend([block, block.__enter__()])

    with pytest.warns(spanguard.OrphanedSpanWarning):
        with traced_span("root") as root:
            fluent = mlflow.start_span("fluent")
            held.append(fluent)
            fluent.__enter__()
            held.append(mlflow.start_span_no_context("imperative", parent_span=client_span(root)))
            manager = spanguard.TraceStateManager()
            manager.push_trace("pushed")
            held.append(manager)
            thread = threading.Thread(target=leak_in_thread, args=(root,))
            thread.start()
            thread.join()
    assert mlflow.get_current_active_span() is None
    spans = store.spans()
    names = ["raw in thread", "ours in thread", "fluent", "imperative", "pushed"]
    assert {name: outcome(spans[name]) for name in names} == dict.fromkeys(names, "orphaned")
    assert manager.depth == 0


def client_span(proxy: Any) -> Any:
    return mlflow.get_current_active_span() or proxy


def test_siblings_that_ended_keep_their_status(store: Store, client: mlflow.MlflowClient) -> None:
    with pytest.warns(spanguard.OrphanedSpanWarning):
        with traced_span("root") as root:
            done = client.start_span("done", root.trace_id, root.span_id)
            client.end_span(root.trace_id, done.span_id)
            client.start_span("leaked", root.trace_id, root.span_id)
    spans = store.spans()
    assert [status(spans[name]) for name in ("done", "leaked")] == ["OK", "ERROR"]


def test_a_span_whose_parent_ended_first_by_raw_code_is_still_closed(
    store: Store, client: mlflow.MlflowClient
) -> None:
    with pytest.warns(spanguard.OrphanedSpanWarning):
        with traced_span("root") as root:
            parent = client.start_span("parent", root.trace_id, root.span_id)
            client.start_span("child", root.trace_id, parent.span_id)
            client.end_span(root.trace_id, parent.span_id)
    spans = store.spans()
    assert outcome(spans["child"]) == "orphaned"
    assert status(spans["parent"]) == "OK"


def test_an_error_in_the_block_closes_leaks_and_passes(
    store: Store, client: mlflow.MlflowClient
) -> None:
    error = ValueError("users")
    with pytest.raises(ValueError) as caught:
        with pytest.warns(spanguard.OrphanedSpanWarning):
            with traced_span("root") as root:
                client.start_span("leaked", root.trace_id, root.span_id)
                raise error
    assert caught.value is error
    spans = store.spans()
    assert (outcome(spans["root"]), outcome(spans["leaked"])) == ("error", "orphaned")


def test_a_leak_that_fluent_code_opened_before_us_is_found_at_the_root(store: Store) -> None:
    # Opened before spanguard listens to this provider: found by a look at the trace at its end.
    mlflow.tracing.reset()
    with pytest.warns(spanguard.OrphanedSpanWarning):
        with traced_span("root") as root:
            from mlflow.tracing import provider as _provider_module

            from spanguard._process import listening

            provider = _provider_module.provider.get()
            active = provider._active_span_processor
            known, active._span_processors = (
                active._span_processors,
                tuple(p for p in active._span_processors if p is not listening.watcher),
            )
            mlflow.MlflowClient().start_span("unheard", root.trace_id, root.span_id)
            active._span_processors = known
    assert outcome(store.spans()["unheard"]) == "orphaned"


def test_one_warning_per_leaking_line(store: Store, client: mlflow.MlflowClient) -> None:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(20):
            with traced_span(f"root {number}") as root:
                client.start_span("leaked", root.trace_id, root.span_id)
    ours = [w for w in caught if issubclass(w.category, spanguard.SpanguardWarning)]
    assert len(ours) == 1
    assert len(store.traces()) == 20


def test_leaks_across_two_traces_do_not_mix(store: Store, client: mlflow.MlflowClient) -> None:
    with traced_span("one") as one:
        with pytest.warns(spanguard.OrphanedSpanWarning):
            with traced_span("two", new_trace=True) as two:
                inner = client.start_span("in one", one.trace_id, one.span_id)
                client.start_span("in two", two.trace_id, two.span_id)
        assert inner.end_time_ns is None, "it belongs to the trace that is still open"
        client.end_span(one.trace_id, inner.span_id)
    spans = store.spans()
    assert (outcome(spans["in one"]), outcome(spans["in two"])) == ("ok", "orphaned")


def test_a_concurrent_end_in_another_thread_is_no_orphan_twice(store: Store) -> None:
    for _ in range(30):
        with traced_span("root") as root:
            started = threading.Barrier(2)

            def work(root: Any = root, started: Any = started) -> None:
                with traced_span("child", trace_id=root.trace_id, strict=False):
                    started.wait()

            thread = threading.Thread(target=work)
            thread.start()
            started.wait()
        thread.join()
    traces = store.traces()
    assert len(traces) == 30
    assert all(len(trace.data.spans) == 2 for trace in traces)


def test_what_is_open_and_closing_all_of_it(store: Store, client: mlflow.MlflowClient) -> None:
    assert spanguard.open_spans() == []
    root = client.start_trace("warm up")
    client.end_trace(root.trace_id)
    with traced_span("root") as root:
        child = client.start_span("child", root.trace_id, root.span_id)
        line = here() - 1
        opened = spanguard.open_spans()
        assert [span.name for span in opened] == ["root", "child"]
        assert opened[1].span_id == child.span_id
        assert opened[1].trace_id == root.trace_id
        assert opened[1].opened_at.endswith(f"test_orphans.py:{line} in {SITE}")
        assert opened[1].thread == "MainThread"
        assert 0 <= opened[1].age < 60
        assert spanguard.open_spans(older_than=3600) == []
        assert spanguard.close_open_spans() == 2
        assert spanguard.open_spans() == []
        assert mlflow.get_current_active_span() is None
    spans = store.spans()
    assert [outcome(spans[name]) for name in ("root", "child")] == ["orphaned", "orphaned"]
    assert spans["child"].get_attribute("spanguard.orphaned_by") == "close_open_spans"


SITE = "test_what_is_open_and_closing_all_of_it"


def test_closing_open_spans_as_ok(store: Store) -> None:
    block = traced_span("root")
    block.__enter__()
    assert spanguard.close_open_spans(status="OK") == 1
    block.__exit__(None, None, None)
    span = store.spans()["root"]
    assert (status(span), outcome(span)) == ("OK", "ok")


def test_a_leak_closes_with_the_block_it_is_under_not_with_the_trace(
    store: Store, client: mlflow.MlflowClient
) -> None:
    with traced_span("root"):
        with pytest.warns(spanguard.OrphanedSpanWarning):
            with traced_span("inner") as inner:
                first = client.start_span("first", inner.trace_id, inner.span_id)
                second = client.start_span("second", inner.trace_id, first.span_id)
        assert second.end_time_ns <= first.end_time_ns <= inner.end_time_ns
    spans = store.spans()
    assert spans["second"].get_attribute("spanguard.orphaned_by") == f"inner ({inner.span_id})"
