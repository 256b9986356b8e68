"""A forked child starts afresh: nothing of the parent's is ended, sent or waited for in it.

Each test runs a script in a process of its own, which forks; the store shows what arrived.
"""

from __future__ import annotations

import os

import mlflow
import pytest
from packaging.version import Version

from tests.process.forking import run
from tests.store import Store, outcome, status

pytestmark = [
    pytest.mark.pythons,
    pytest.mark.versions,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here"),
]


def test_the_child_starts_empty_and_its_spans_arrive(store: Store) -> None:
    run(
        """
        manager, shared = TraceStateManager(), TraceStateManager(scope="process")
        with traced_span("parent"):
            manager.push_trace("pushed")
            shared.push_trace("shared")

            def child():
                assert current_span() is None
                assert open_spans() == []
                assert manager.depth == shared.depth == 0
                assert manager.pop_trace() is None
                assert spanguard.close_open_spans() == 0
                step("of the child")
                assert spanguard.flush(30)

            assert forked(child) == 0
            assert len(open_spans()) == 3
            shared.pop_trace()
            manager.pop_trace()
        """,
        store,
    )
    spans = store.spans()
    assert set(spans) == {"parent", "pushed", "shared", "of the child"}
    assert {status(span) for span in spans.values()} == {"OK"}
    assert {outcome(span) for span in spans.values()} == {"ok"}
    assert spans["of the child"].parent_id is None


def test_a_block_of_the_parent_is_left_by_both_and_ended_by_the_parent(store: Store) -> None:
    run(
        """
        with traced_span("outer"), mlflow.start_span("fluent"), traced_span("inner") as inner:
            pid = os.fork()
            if pid == 0:
                inner.set_attribute("by", "child")
        if pid == 0:
            assert spanguard.flush(30)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        """,
        store,
    )
    trace = store.trace()
    assert sorted(span.name for span in trace.data.spans) == ["fluent", "inner", "outer"]
    assert {status(span) for span in trace.data.spans} == {"OK"}
    assert not any(span.get_attribute("by") for span in trace.data.spans)


def test_a_child_that_leaves_by_the_front_door_hangs_neither_in_flush_nor_at_exit(
    store: Store,
) -> None:
    # A burst before each fork: MLflow's threads have exports pending when it happens.
    run(
        """
        with traced_span("root"):
            for n in range(4):
                for m in range(50):
                    step(f"burst {n}.{m}")
                assert forked(lambda: step(f"child {n}"), leave=sys.exit) == 0
        """,
        store,
        interval=5000,
    )
    traces = {trace.data.spans[0].name: trace for trace in store.traces() if trace.data.spans}
    children = {name for name in traces if name.startswith("child")}
    assert children == {f"child {n}" for n in range(4)}
    (root,) = (trace for trace in traces.values() if len(trace.data.spans) > 1)
    assert len(root.data.spans) == 201


def test_carried_work_in_a_forked_child_joins_the_trace(store: Store) -> None:
    run(
        """
        import multiprocessing
        with traced_span("root"):
            child = multiprocessing.get_context("fork").Process(target=carry(step), args=("job",))
            child.start()
            child.join()
            assert child.exitcode == 0
        """,
        store,
    )
    spans = store.spans()
    assert spans["job"].parent_id == spans["root"].span_id


def test_the_child_ends_nothing_that_raw_code_opened_in_the_parent(store: Store) -> None:
    run(
        """
        client = spanguard.guard(ambient=True)
        root = client.start_trace("root")
        step = client.start_span("step", root.trace_id, root.span_id)

        def child():
            client.end_span(root.trace_id, step.span_id, outputs="child")
            client.end_trace(root.trace_id, outputs="child")
            client.end_trace(client.start_trace("of the child").trace_id)
            assert spanguard.flush(30)

        assert forked(child) == 0
        client.end_span(root.trace_id, step.span_id, outputs="parent")
        client.end_trace(root.trace_id, outputs="parent")
        """,
        store,
    )
    traces = {tuple(span.name for span in trace.data.spans): trace for trace in store.traces()}
    assert set(traces) == {("root", "step"), ("of the child",)}
    assert [span.outputs for span in traces["root", "step"].data.spans] == ["parent"] * 2


def test_a_child_of_a_child(store: Store) -> None:
    run(
        """
        def grandchild():
            assert open_spans() == []
            step("grandchild")
            assert spanguard.flush(30)

        def child():
            with traced_span("child"):
                assert forked(grandchild) == 0
            assert spanguard.flush(30)

        with traced_span("parent"):
            assert forked(child) == 0
        """,
        store,
    )
    assert sorted(len(trace.data.spans) for trace in store.traces()) == [1, 1, 1]


@pytest.mark.skipif(
    Version(mlflow.__version__) < Version("3.12"),
    reason="MLflow 3.10 stores a span in the thread that ends it: a fork finds nothing pending",
)
def test_the_parent_is_not_held_up_by_a_dead_server(store: Store) -> None:
    # The fork waits 2 s at most; without a bound it would wait for MLflow's retries, minutes.
    run(
        """
        import socket
        with socket.socket() as listener:  # takes connections and never answers
            listener.bind(("127.0.0.1", 0))
            listener.listen(50)
            mlflow.set_tracking_uri(f"http://127.0.0.1:{listener.getsockname()[1]}")
            step("lost")
            assert forked(lambda: None) == 0
            print("forked", flush=True)
            os._exit(0)
        """,
        store,
    )
