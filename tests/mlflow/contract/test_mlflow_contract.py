"""What MLflow does with spans left open, out of order, with equal ids, or in another context."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient, MlflowException
from mlflow.entities import LiveSpan, NoOpSpan
from mlflow.environment_variables import (
    MLFLOW_TRACE_BUFFER_MAX_SIZE,
    MLFLOW_TRACE_BUFFER_TTL_SECONDS,
)
from mlflow.tracing import provider
from mlflow.tracing.trace_manager import InMemoryTraceManager
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

from tests.mlflow.contract.raw_client import (
    BATCHING,
    DEFERRAL,
    RETIRES,
    by_root,
    child_of,
    end,
    is_open,
    left_at_exit,
    name_of,
    names,
    of_waiting_roots,
    state_of,
    stored_spans,
    stored_traces,
)
from tests.store import Store, await_true, status

pytestmark = pytest.mark.versions

# A root that ended waits for its open children. Before: it is written at once, without them.


def in_a_process(store: Store, script: str, **env: str) -> list[str]:
    """Run a script that ends by itself in a Python of its own; return the lines it printed."""
    prelude = "import mlflow\nclient = mlflow.MlflowClient()\n"
    if sys.version_info[:2] == (3, 12):
        # 3.12.1 starts no threads at exit: MLflow alone then stores nothing of the last seconds.
        prelude += (
            "client.end_trace(client.start_trace('first').trace_id)\n"
            "mlflow.flush_trace_async_logging()\nclient.delete_traces('0', max_timestamp_millis="
            "2**53)\n"
        )
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        env={**os.environ, "MLFLOW_TRACKING_URI": store.uri, **env},
        cwd=store.path.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# -- closing -----------------------------------------------------------------------------------


def test_one_child_left_open_loses_the_whole_trace_at_exit(store: Store) -> None:
    assert "they will be ended forcefully" in str(MlflowClient.end_trace.__doc__)
    (trace_id,) = in_a_process(
        store,
        """
        root = client.start_trace("root", tags={"env": "test"})
        done = client.start_span("done", root.trace_id, root.span_id)
        client.end_span(root.trace_id, done.span_id)
        client.start_span("left open", root.trace_id, root.span_id)
        client.end_trace(root.trace_id)
        print(root.trace_id)
        """,
    )
    assert stored_traces(store.path) == [(trace_id, "OK")]
    assert stored_spans(store.path) == ["done", "root"]
    assert store.traces() == []
    assert mlflow.get_trace(trace_id) is None
    # Only a list without the spans still shows it, as if all were well.
    (listed,) = mlflow.search_traces(include_spans=False, return_type="list")
    assert (name_of(listed), state_of(listed), listed.info.tags["env"]) == ("root", "OK", "test")


def test_ending_the_child_late_repairs_the_trace_only_where_the_root_waited(
    store: Store, client: MlflowClient
) -> None:
    root = client.start_trace("root", tags={"env": "test"})
    child = child_of(root)
    client.end_trace(root.trace_id)
    found = store.traces()
    # Where the root waits, its trace is visible meanwhile, but has no name and no tags.
    assert [name_of(trace) for trace in found] == ([None] if DEFERRAL else [])
    assert all("env" not in trace.info.tags for trace in found)
    end(child)
    if DEFERRAL:
        trace = store.trace()
        assert (name_of(trace), trace.info.tags["env"]) == ("root", "test")
        assert names([trace]) == ["child", "root"]
    else:
        assert is_open(child), "the trace left the memory with its root, so nothing was ended"
        assert store.traces() == []


def test_a_root_that_never_ends_is_stuck_in_progress_or_not_stored_at_all(store: Store) -> None:
    _, trace_id = in_a_process(
        store,
        """
        print(client.start_trace("alone").trace_id)
        root = client.start_trace("root", tags={"env": "test"})
        child = client.start_span("child", root.trace_id, root.span_id)
        client.end_span(root.trace_id, child.span_id)
        print(root.trace_id)
        """,
    )
    assert stored_traces(store.path) == [(trace_id, "IN_PROGRESS")]
    trace = store.trace()
    assert names([trace]) == ["child"]
    assert name_of(trace) is None
    assert "env" not in trace.info.tags


def test_a_span_started_after_the_end_breaks_the_finished_trace(
    store: Store, client: MlflowClient
) -> None:
    """As long as the export has not run, which by default takes up to five seconds."""
    root = client.start_trace("root")
    client.end_trace(root.trace_id)
    if BATCHING:
        assert isinstance(child_of(root), LiveSpan)
        assert names(left_at_exit(store)) == of_waiting_roots(1)
        assert stored_spans(store.path) == ["root"]
    else:
        with pytest.raises(MlflowException, match="not found"):
            child_of(root)
        assert names(store.traces()) == ["root"]


def test_a_root_may_be_ended_as_a_span(store: Store, client: MlflowClient) -> None:
    root = client.start_trace("root")
    end(root)
    if BATCHING:
        client.end_trace(root.trace_id)  # not exported yet: silent
    trace = store.trace()
    assert (name_of(trace), state_of(trace)) == ("root", "OK")
    with pytest.raises(MlflowException, match="already finished"):
        client.end_trace(root.trace_id)


# -- order and ids -----------------------------------------------------------------------------


def test_ending_a_parent_before_its_child_is_silent(store: Store, client: MlflowClient) -> None:
    root = client.start_trace("root")
    parent = child_of(root, "parent")
    child = child_of(parent, "child")
    end(parent)
    late = child_of(parent, "under an ended span")
    end(late)
    end(child)
    client.end_trace(root.trace_id)
    spans = store.spans()
    assert {status(span) for span in spans.values()} == {"OK"}
    assert spans["child"].end_time_ns > spans["parent"].end_time_ns
    assert spans["under an ended span"].start_time_ns > spans["parent"].end_time_ns


def test_a_second_end_is_silent_and_drops_what_it_brings(
    store: Store, client: MlflowClient
) -> None:
    root = client.start_trace("root")
    child = child_of(root)
    end(child)
    ended_at = child.end_time_ns
    end(child, status="ERROR", outputs={"late": True})
    client.end_trace(root.trace_id)
    span = store.spans()["child"]
    assert (span.end_time_ns, status(span), span.outputs) == (ended_at, "OK", None)


def test_ending_an_unknown_span_is_silent_but_an_unknown_trace_raises(
    client: MlflowClient,
) -> None:
    root = client.start_trace("root")
    client.end_span(root.trace_id, "0123456789abcdef")
    client.end_span("tr-unknown", root.span_id)
    assert is_open(root)
    with pytest.raises(MlflowException, match="not found"):
        client.end_trace("tr-unknown")


def test_a_parent_that_is_none_unknown_or_foreign_raises_into_user_code(
    client: MlflowClient,
) -> None:
    root, foreign = client.start_trace("root"), client.start_trace("foreign")
    with pytest.raises(MlflowException, match="explicit parent_id"):
        client.start_span("child", root.trace_id, None)
    for parent_id in ("0123456789abcdef", foreign.span_id):
        with pytest.raises(MlflowException, match="not found"):
            client.start_span("child", root.trace_id, parent_id)


def test_the_same_random_seed_repeats_the_trace_id_and_the_second_trace_replaces_the_first(
    store: Store,
) -> None:
    ids = in_a_process(
        store,
        """
        import random
        for name in ("first", "second"):
            random.seed(1)
            root = client.start_trace(name)
            client.end_trace(root.trace_id)
            mlflow.flush_trace_async_logging()
            print(root.trace_id)
        """,
    )
    assert names(store.traces()) == ["second"]
    assert len(ids) == 2 and len(set(ids)) == 1


def test_seam_the_provider_and_its_tracers_share_one_generator_of_ids(
    client: MlflowClient,
) -> None:
    tracer = provider._get_tracer(provider.__name__)
    assert tracer.id_generator is provider.provider.get().id_generator
    assert isinstance(tracer.id_generator, RandomIdGenerator)
    assert not RandomIdGenerator.__dict__.get("__slots__")  # its class may be changed


def test_search_finds_tags_and_names_but_no_equal_attribute(
    store: Store, client: MlflowClient
) -> None:
    root = client.start_trace("findable", attributes={"key": "value"}, tags={"tag": "value"})
    client.end_trace(root.trace_id)
    assert len(store.traces()) == 1

    def hits(condition: str) -> int:
        return len(mlflow.search_traces(filter_string=condition, return_type="list"))

    assert hits("tags.tag = 'value'") == 1
    assert hits("name = 'findable'") == 1
    assert hits("span.attributes.key LIKE '%value%'") == 1
    assert hits("span.attributes.key = 'value'") == 0


# -- contexts ----------------------------------------------------------------------------------


def test_fluent_spans_under_a_client_span_are_traces_of_their_own(
    store: Store, client: MlflowClient
) -> None:
    root = client.start_trace("root")
    with mlflow.start_span("fluent"):
        pass
    mlflow.trace(lambda: None, name="decorated")()
    client.end_trace(root.trace_id)
    assert sorted(by_root(store)) == ["decorated", "fluent", "root"]


def test_start_trace_under_a_fluent_span_raises_into_user_code(client: MlflowClient) -> None:
    with mlflow.start_span("fluent"):
        with pytest.raises(MlflowException, match="Another trace is already set"):
            client.start_trace("inner")


def test_more_traces_than_the_buffer_holds_evict_the_oldest(store: Store) -> None:
    assert MLFLOW_TRACE_BUFFER_MAX_SIZE.default == 1000
    printed = in_a_process(
        store,
        """
        def attempt(call, *args):
            try:
                call(*args)
            except mlflow.MlflowException as error:
                print(error)

        evicted, *kept = [client.start_trace(f"root {n}") for n in range(3)]
        attempt(client.start_span, "child", evicted.trace_id, evicted.span_id)
        attempt(client.end_span, evicted.trace_id, evicted.span_id)
        assert evicted.end_time_ns is None
        attempt(client.end_trace, evicted.trace_id)
        for root in kept:
            client.end_trace(root.trace_id)
        """,
        MLFLOW_TRACE_BUFFER_MAX_SIZE="2",
    )
    from_start_span, from_end_trace = printed
    assert "Parent span" in from_start_span and "not found" in from_start_span
    assert "Trace" in from_end_trace and "not found" in from_end_trace
    assert sorted(by_root(store)) == ["root 1", "root 2"]
    assert store.rows() == 2


def test_a_trace_older_than_the_buffers_age_is_evicted(
    store: Store, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MLFLOW_TRACE_BUFFER_TTL_SECONDS.default == 3600
    monkeypatch.setenv("MLFLOW_TRACE_BUFFER_TTL_SECONDS", "1")
    InMemoryTraceManager.reset()
    root = client.start_trace("root")
    buffered = InMemoryTraceManager.get_instance()._traces
    assert root.trace_id in buffered
    await_true(lambda: root.trace_id not in buffered)
    with pytest.raises(MlflowException, match="not found"):
        child_of(root)
    end(root)
    assert is_open(root), "the client does not find it any more"
    root.end()
    assert not is_open(root)
    assert store.rows() == 0


def test_set_experiment_while_a_trace_is_open_loses_the_root(store: Store) -> None:
    in_a_process(
        store,
        """
        root = client.start_trace("root", tags={"env": "test"})
        child = client.start_span("child", root.trace_id, root.span_id)
        client.end_span(root.trace_id, child.span_id)
        mlflow.set_experiment("another")
        client.end_trace(root.trace_id)
        assert root.end_time_ns is not None
        """,
    )
    trace = store.trace()
    if RETIRES:
        assert (state_of(trace), name_of(trace)) == ("IN_PROGRESS", None)
        assert names([trace]) == ["child"]
    else:  # the replaced provider still writes
        assert (state_of(trace), name_of(trace)) == ("OK", "root")
        assert names([trace]) == ["child", "root"]


def test_disabling_tracing_while_a_trace_is_open_loses_it(
    store: Store, client: MlflowClient
) -> None:
    root = client.start_trace("root")
    mlflow.tracing.disable()
    try:
        assert isinstance(child_of(root), NoOpSpan)
        client.end_trace(root.trace_id)
        assert not is_open(root)
    finally:
        mlflow.tracing.enable()
    assert names(store.traces()) == ([] if BATCHING else ["root"])


def test_another_tracking_uri_tears_an_open_trace_apart(
    store: Store, client: MlflowClient, template: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.db"
    other.write_bytes(template.read_bytes())
    root = client.start_trace("root")
    end(child_of(root, "before"))
    mlflow.set_tracking_uri(f"sqlite:///{other}")
    end(child_of(root, "after"))
    client.end_trace(root.trace_id)
    assert names(store.traces()) == ["after"]
    assert stored_traces(other) == [(root.trace_id, "IN_PROGRESS")]
    # A replaced provider writes what it still has where traces go now, or is flushed in time.
    before = ["before"] if RETIRES else []
    assert stored_spans(store.path) == (before if BATCHING else ["before", "root"])


def test_the_clients_own_tracking_uri_is_ignored(
    store: Store, template: Path, tmp_path: Path
) -> None:
    wanted = tmp_path / "wanted.db"
    wanted.write_bytes(template.read_bytes())
    client = MlflowClient(tracking_uri=f"sqlite:///{wanted}")
    root = client.start_trace("root")
    client.end_trace(root.trace_id)
    assert names(store.traces()) == ["root"]
    assert stored_traces(wanted) == []
