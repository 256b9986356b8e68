"""What pytest loads wherever spanguard is installed: the fixture, the options and the marker.

It stands beside the package, because importing that imports MLflow, which takes seconds. A test
run that uses none of this imports neither. `spanguard.pytest_plugin` has the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from spanguard.testing._recorded import RecordedSpans

__all__ = ["MARKER", "spans"]

MARKER = "spanguard_allow_open_spans"


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "fail tests that leave a span open, and turn strict mode on"
    group = parser.getgroup("spanguard")
    group.addoption("--spanguard-strict", action="store_true", default=False, help=what)
    parser.addini("spanguard_strict", what, type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{MARKER}(reason=None): this test may leave spans open and break rules of spanguard's, "
        "also with --spanguard-strict; they are closed after it all the same.",
    )
    if config.getoption("spanguard_strict") or config.getini("spanguard_strict"):
        from spanguard.pytest_plugin import StrictRun

        config.pluginmanager.register(StrictRun(), "spanguard-strict")


@pytest.fixture
def spans() -> Iterator[RecordedSpans]:
    """The spans that this test has recorded so far, whichever API opened them, in a list.

    They go to no store. The list has `one(name)`, `by_name(name)`, `roots`, `children(span)`,
    `parent(span)`, `names`, `traces` and `tree()`: see `spanguard.testing._recorded.RecordedSpans`.
    """
    from spanguard.testing import record_spans

    with record_spans() as recorded:
        yield recorded
