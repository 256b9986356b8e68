"""A test run with `--spanguard-strict`: tests that leave a span open fail.

pytest loads `_spanguard_pytest_plugin`, beside this package, and that imports this only for a
run that asks for it. Other test runners have the same as `spanguard.testing.no_open_spans`.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from _spanguard_pytest_plugin import MARKER
from spanguard._base.config import STRICT_VARIABLE
from spanguard.testing._leaks import LeakCheck, Leaks

__all__ = ["StrictRun"]

_TITLE = "spanguard: left open by this test"


class StrictRun:
    """A test run with `--spanguard-strict`: each test closes what it opens, or fails.

    Looked at are the test itself, right when it is over; and its fixtures of function scope,
    after their teardown. A fixture of a wider scope may hold a span open across tests, and make
    it ambient, for as long as the fixture lives.

    Strict mode is on for each test, as by SPANGUARD_STRICT=1: `strict=False`, `strict(False)`,
    or that variable set to 0 by whoever runs the tests, win over it.
    """

    def __init__(self) -> None:
        # Of the test that runs: for its call, and around it for its setup and teardown.
        self._checks: list[LeakCheck] = []
        self._leaks: dict[str, Leaks] = {}
        # What fixtures of wider scopes hold open: by fixture definition, the spans' ids.
        self._held: dict[object, set[int]] = {}

    # -- the phases of a test

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._checks, self._leaks = [], {}
        with _strict_mode(is_allowed=_is_allowed(item)):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None, None, None]:
        self._begin_check()
        return (yield)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        check = self._begin_check()
        with self._failing_for_leaks(item, "call"), _inside_its_task(item, check):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        if not self._checks:  # the setup of another plugin failed before ours
            return (yield)
        with self._failing_for_leaks(item, "teardown"):
            return (yield)

    def _begin_check(self) -> LeakCheck:
        check = LeakCheck(unraised=True)
        self._checks.append(check)
        return check

    @contextmanager
    def _failing_for_leaks(self, item: pytest.Item, when: str) -> Iterator[None]:
        raised: BaseException | None = None
        try:
            yield
        except BaseException as error:
            raised = error
            raise
        finally:
            leaks = self._checks.pop().finish(f"the end of {item.nodeid}")
            if leaks and not _is_allowed(item):
                self._leaks[when] = leaks
                if raised is None or isinstance(raised, pytest.skip.Exception):
                    pytest.fail(str(leaks), pytrace=False)

    # -- fixtures of wider scopes

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any]
    ) -> Generator[None, object, object]:
        if fixturedef.scope == "function":
            return (yield)
        held = self._held.setdefault(fixturedef, set())
        with ExitStack() as allowing:
            for check in self._checks:
                allowing.enter_context(check.allowing(held))
            return (yield)

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        held = self._held.pop(fixturedef, set())
        for check in self._checks:
            check.forbid(held)

    # -- a failing test that leaks as well

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        leaks = self._leaks.pop(call.when, None)
        if leaks is not None and report.failed and str(leaks) not in report.longreprtext:
            _append(report, str(leaks))
        return report


def _is_allowed(item: pytest.Item) -> bool:
    return item.get_closest_marker(MARKER) is not None


@contextmanager
def _strict_mode(*, is_allowed: bool) -> Iterator[None]:
    """Turn strict mode on for a test; off, if it is allowed to break rules."""
    found = os.environ.get(STRICT_VARIABLE)
    # The environment, because everything else wins over it, and child processes inherit it.
    os.environ[STRICT_VARIABLE] = "0" if is_allowed else found or "1"
    try:
        yield
    finally:
        os.environ.pop(STRICT_VARIABLE, None)
        if found is not None:
            os.environ[STRICT_VARIABLE] = found


@contextmanager
def _inside_its_task(item: pytest.Item, check: LeakCheck) -> Iterator[None]:
    """Check a coroutine test in its own context, which may go on to the next test (anyio)."""
    function = getattr(item, "obj", None)
    if not isinstance(item, pytest.Function) or not inspect.iscoroutinefunction(function):
        yield
        return

    @functools.wraps(function)
    async def checked(*args: Any, **kwargs: Any) -> Any:
        with check.in_context_of_its_own():
            return await function(*args, **kwargs)

    item.obj = checked
    try:
        yield
    finally:
        item.obj = function


def _append(report: pytest.TestReport, text: str) -> None:
    addsection = getattr(report.longrepr, "addsection", None)
    if addsection is not None:
        addsection(_TITLE, text)
    else:
        report.sections.append((_TITLE, text))
