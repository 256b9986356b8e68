"""Pushed blocks, and a manager that is closed: what is left is closed, and told."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import TraceStateManager
from tests.api.scopes import BOTH_SCOPES, in_thread
from tests.store import Store, outcome, status

pytestmark = pytest.mark.versions


# -- blocks and closing ------------------------------------------------------------------------


@BOTH_SCOPES
def test_a_pushed_block(store: Store, scope: Any) -> None:
    manager = TraceStateManager(scope=scope)
    error = ValueError("bad")
    with pytest.raises(ValueError) as caught:
        with manager.trace("outer") as outer:
            assert manager.current_trace is outer
            with manager.trace("good", inputs=1):
                assert manager.depth == 2
            with manager.trace("bad"):
                raise error
    assert caught.value is error
    assert manager.depth == 0
    spans = store.spans()
    assert [outcome(spans[name]) for name in ("outer", "good", "bad")] == ["error", "ok", "error"]
    assert spans["good"].inputs == 1


def test_a_pushed_block_closes_what_was_pushed_in_it(store: Store) -> None:
    manager = TraceStateManager()
    with pytest.warns(spanguard.SpanguardWarning):
        with manager.trace("block"):
            manager.push_trace("leaked")
    assert manager.depth == 0
    assert outcome(store.spans()["leaked"]) == "orphaned"


def test_a_pushed_block_works_once_and_async(store: Store) -> None:
    manager = TraceStateManager()

    async def main() -> None:
        async with manager.trace("a"):
            await asyncio.sleep(0)

    asyncio.run(main())
    block = manager.trace("b")
    with block:
        pass
    with pytest.raises(RuntimeError, match="new one"), block:
        pass
    assert len(store.traces()) == 2


@BOTH_SCOPES
def test_close_unwinds_everything_everywhere(store: Store, scope: Any) -> None:
    manager = TraceStateManager(scope=scope)
    manager.push_trace("a")
    manager.push_trace("b")
    in_thread(lambda: manager.push_trace("c"))
    assert manager.close() == 3
    assert (manager.close(), manager.depth) == (0, 0)
    spans = store.spans()
    assert {outcome(span) for span in spans.values()} == {"orphaned"}
    assert spans["a"].get_attribute("spanguard.orphaned_by") == "close"
    assert mlflow.get_current_active_span() is None


def test_close_as_ok(store: Store) -> None:
    manager = TraceStateManager()
    manager.push_trace("a")
    manager.push_trace("b")
    assert manager.close(status="OK") == 2
    assert [(status(s), outcome(s)) for s in store.spans().values()] == [("OK", "ok")] * 2


def test_a_managers_block_closes_what_is_left_as_orphans(store: Store) -> None:
    with pytest.warns(spanguard.OrphanedSpanWarning, match="2 not popped"):
        with TraceStateManager() as manager:
            manager.push_trace("a")
            manager.push_trace("b")
    assert [outcome(span) for span in store.spans().values()] == ["orphaned"] * 2
    with pytest.raises(spanguard.OrphanedSpanError) as caught:
        with TraceStateManager(strict=True) as manager:
            manager.push_trace("c")
    assert [span.name for span in caught.value.spans] == ["c"]


def test_an_exception_in_a_managers_block_marks_what_is_left(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt):
        with TraceStateManager(strict=True) as manager:
            manager.push_trace("done")
            manager.pop_trace()
            manager.push_trace("a")
            manager.push_trace("b")
            raise KeyboardInterrupt
    spans = store.spans()
    found = {name: outcome(span) for name, span in spans.items()}
    assert found == {"done": "ok", "a": "interrupted", "b": "interrupted"}


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ValueError, match="scope"):
        TraceStateManager(scope="galaxy")  # type: ignore[arg-type]


def test_a_given_client_is_used(store: Store) -> None:
    calls: list[str] = []

    class Recording(mlflow.MlflowClient):
        def start_trace(self, **kwargs: Any) -> Any:  # type: ignore[override]
            calls.append("start_trace")
            return super().start_trace(**kwargs)

        def end_trace(self, **kwargs: Any) -> None:  # type: ignore[override]
            calls.append("end_trace")
            super().end_trace(**kwargs)

    manager = TraceStateManager(Recording())
    manager.push_trace("a")
    manager.pop_trace()
    assert calls == ["start_trace", "end_trace"]


# -- what a manager finds when it is closed (issue 9, 28) ----------------------------------------


def leak_below(client: mlflow.MlflowClient, manager: TraceStateManager) -> None:
    root = manager.push_trace("pushed")
    client.start_span("leaked", root.trace_id, root.span_id)


@BOTH_SCOPES
def test_closing_a_manager_tells_of_what_was_left_open_below(
    store: Store, client: mlflow.MlflowClient, scope: Any
) -> None:
    manager = TraceStateManager(scope=scope)
    leak_below(client, manager)
    with pytest.warns(spanguard.OrphanedSpanWarning, match="'leaked'"):
        assert manager.close() == 1
    assert {outcome(span) for span in store.spans().values()} == {"orphaned"}


@BOTH_SCOPES
@pytest.mark.parametrize("how", ["close", "close as OK", "block", "block that raises"])
def test_a_strict_manager_raises_for_what_was_left_open_below(
    store: Store, client: mlflow.MlflowClient, scope: Any, how: str
) -> None:
    manager = TraceStateManager(scope=scope, strict=True)
    if how == "block that raises":
        with pytest.raises(KeyError) as users, manager:
            leak_below(client, manager)
            raise KeyError("the user's own")
        if sys.version_info >= (3, 11):
            assert "'leaked'" in users.value.__notes__[0]
    else:
        with pytest.raises(spanguard.OrphanedSpanError) as caught:
            if how == "block":
                with manager:
                    leak_below(client, manager)
            else:
                leak_below(client, manager)
                manager.close("OK" if how == "close as OK" else "ERROR")
        assert [span.name for span in caught.value.spans] == ["leaked"]
    assert spanguard.open_spans() == []
    assert outcome(store.spans()["leaked"]) == "orphaned"
    assert len(store.trace().data.spans) == 2
