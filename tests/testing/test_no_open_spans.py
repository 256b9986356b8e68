"""`no_open_spans`: what it finds left open, and that nothing stays behind."""

from __future__ import annotations

import gc
import sys
import threading
import unittest
import warnings
from typing import Any

import mlflow
import pytest
from mlflow.tracing import provider

import spanguard
from spanguard import traced_span
from spanguard.testing import no_open_spans, record_spans
from spanguard.testing._leaks import SpansLeftOpenError, other_threads
from tests.lines import here
from tests.store import Store, await_true, outcome

HERE = __file__


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
