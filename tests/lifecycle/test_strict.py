"""Strict mode: raises, after everything is closed, and never in place of a user's exception."""

from __future__ import annotations

import asyncio
import sys
import threading
import warnings

import mlflow
import pytest

import spanguard
from spanguard import strict, traced_span
from spanguard._base.config import is_strict
from tests.store import Store, outcome

pytestmark = pytest.mark.versions


def leak(client: mlflow.MlflowClient, **kwargs: object) -> None:
    with traced_span("root", **kwargs) as root:  # type: ignore[arg-type]
        client.start_span("leaked", root.trace_id, root.span_id)


def test_a_leak_raises_after_all_is_recorded(store: Store, client: mlflow.MlflowClient) -> None:
    with pytest.raises(spanguard.OrphanedSpanError) as caught:
        leak(client, strict=True)
    error = caught.value
    assert error.span_name == "root"
    assert [span.name for span in error.spans] == ["leaked"]
    assert "test_strict.py" in error.spans[0].opened_at
    assert error.spans[0].opened_at in str(error)
    spans = store.spans()
    assert error.span_id == spans["root"].span_id
    assert error.trace_id == spans["root"].trace_id
    assert (outcome(spans["root"]), outcome(spans["leaked"])) == ("ok", "orphaned")
    assert mlflow.get_current_active_span() is None


def test_a_users_exception_wins_and_carries_the_finding(
    store: Store, client: mlflow.MlflowClient
) -> None:
    error = ValueError("users")
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ValueError) as raised:
        warnings.simplefilter("always")
        with traced_span("root", strict=True) as root:
            client.start_span("leaked", root.trace_id, root.span_id)
            raise error
    assert raised.value is error
    if sys.version_info >= (3, 11):
        assert "OrphanedSpanError" in error.__notes__[0]
        assert "leaked" in error.__notes__[0]
    else:
        assert any("leaked" in str(warning.message) for warning in caught)
    assert outcome(store.spans()["leaked"]) == "orphaned"


def test_strict_as_a_setter_and_its_end(client: mlflow.MlflowClient) -> None:
    strict()
    assert is_strict()
    with pytest.raises(spanguard.OrphanedSpanError):
        leak(client)
    strict(False)
    assert not is_strict()
    with pytest.warns(spanguard.OrphanedSpanWarning):
        leak(client)


def test_strict_as_a_block_restores_what_was(client: mlflow.MlflowClient) -> None:
    with strict():
        assert is_strict()
        with strict(False):
            assert not is_strict()
        assert is_strict()
        with pytest.raises(spanguard.OrphanedSpanError):
            leak(client)
    assert not is_strict()
    strict()
    with strict(False):
        assert not is_strict()
    assert is_strict()


def test_a_strict_block_is_of_its_context_only() -> None:
    seen: list[bool] = []
    with strict():
        thread = threading.Thread(target=lambda: seen.append(is_strict()))
        thread.start()
        thread.join()
    assert seen == [False]

    async def main() -> list[bool]:
        async def inside() -> bool:
            with strict():
                await asyncio.sleep(0.01)
                return is_strict()

        async def beside() -> bool:
            await asyncio.sleep(0.005)
            return is_strict()

        return list(await asyncio.gather(inside(), beside()))

    assert asyncio.run(main()) == [True, False]


def test_the_setter_reaches_other_threads() -> None:
    strict()
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(is_strict()))
    thread.start()
    thread.join()
    assert seen == [True]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", True), ("true", True), ("YES", True), ("0", False), ("", False), ("no", False)],
)
def test_the_environment_is_the_default(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    monkeypatch.setenv("SPANGUARD_STRICT", value)
    assert is_strict() is expected
    with strict(not expected):
        assert is_strict() is not expected


def test_the_argument_wins_over_everything(
    client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPANGUARD_STRICT", "1")
    with strict(), pytest.warns(spanguard.OrphanedSpanWarning):
        leak(client, strict=False)


def test_a_managers_setting_wins_over_the_block() -> None:
    with strict():
        assert spanguard.TraceStateManager(strict=False).pop_trace() is None
    with pytest.raises(spanguard.EmptyTraceStackError):
        spanguard.TraceStateManager(strict=True).pop_trace()


def test_ending_twice_raises_with_the_ids(store: Store, client: mlflow.MlflowClient) -> None:
    with pytest.raises(spanguard.SpanAlreadyEndedError) as caught:
        with traced_span("root", strict=True) as root:
            client.end_trace(root.trace_id)
    assert caught.value.span_name == "root"
    assert caught.value.span_id == store.spans()["root"].span_id

    with pytest.raises(spanguard.SpanAlreadyEndedError):
        with traced_span("other", strict=True) as span:
            span.end()
            span.end()


def test_a_late_end_of_an_orphan(store: Store) -> None:
    outer = traced_span("outer", strict=True)
    outer.__enter__()
    inner = traced_span("inner", strict=True)
    inner.__enter__()
    with pytest.raises(spanguard.OrphanedSpanError):
        outer.__exit__(None, None, None)
    with pytest.raises(spanguard.SpanAlreadyEndedError, match="orphan of outer"):
        inner.__exit__(None, None, None)
    assert mlflow.get_current_active_span() is None
    assert outcome(store.spans()["inner"]) == "orphaned"


def test_what_setters_find_raises_when_the_span_closes(store: Store) -> None:
    with pytest.raises(spanguard.InvalidSpanArgumentError, match=r"mlflow\.spanType"):
        with traced_span("span", strict=True) as span:
            span.set_attribute("mlflow.spanType", "x")
            span.set_status("BOGUS")
    stored = store.spans()["span"]
    assert stored.span_type == "UNKNOWN"


def test_warnings_as_errors_never_replace_a_users_exception(client: mlflow.MlflowClient) -> None:
    error = ValueError("users")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as caught, traced_span("root") as root:
            client.start_span("leaked", root.trace_id, root.span_id)
            raise error
    assert caught.value is error


def test_warnings_as_errors_leave_nothing_open(store: Store) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(spanguard.SpanguardWarning):
            with traced_span("span", start_time_ns="rubbish"):  # type: ignore[arg-type]
                pytest.fail("the block must not run")
    assert spanguard.open_spans() == []
    assert mlflow.get_current_active_span() is None


def test_nothing_is_raised_where_nothing_is_wrong(store: Store) -> None:
    with strict():
        with traced_span("root"), mlflow.start_span("fluent"), traced_span("inner"):
            pass
        manager = spanguard.TraceStateManager()
        manager.push_trace("a")
        manager.push_trace("b")
        manager.pop_trace()
        manager.pop_trace()
    assert len(store.traces()) == 2
