"""A warning is given once per function and line: in each record of warnings, or in the process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import unittest
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spanguard import strict, traced_span
from spanguard._base import findings
from spanguard.exceptions import OrphanedSpanWarning, SpanguardWarning
from spanguard.testing import forget_warnings, record_spans
from tests.store import Store


def leak() -> None:
    with traced_span("root"):
        traced_span("left").__enter__()


@contextmanager
def by_catch_warnings() -> Iterator[list[Any]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


@contextmanager
def by_pytest() -> Iterator[Any]:
    with pytest.warns(OrphanedSpanWarning) as found:
        yield found


@contextmanager
def by_unittest() -> Iterator[Any]:
    with unittest.TestCase().assertWarns(OrphanedSpanWarning) as found:
        yield found


@pytest.mark.parametrize("again", [1, 2, 3])
def test_each_parameter_of_a_test_is_warned(store: Store, again: int) -> None:
    """Tests that expect the same line to warn do so in any number and order."""
    with pytest.warns(OrphanedSpanWarning):
        leak()


@pytest.mark.parametrize("record", [by_catch_warnings, by_pytest])
def test_each_record_of_warnings_starts_afresh(store: Store, record: Callable[..., Any]) -> None:
    """A line warns once in each record, also where one stands in another."""
    for _ in range(3):
        with record() as found:
            leak()
            leak()
        assert len([w for w in found if w.category is OrphanedSpanWarning]) == 1
    with record() as outer:
        leak()
        with record() as inner:
            leak()
            leak()
        leak()
    for found in (outer, inner):
        assert len([w for w in found if w.category is OrphanedSpanWarning]) == 1


def test_unittest_starts_afresh(store: Store) -> None:
    """`assertWarns` holds for the same line again and again."""
    for _ in range(3):
        with by_unittest():
            leak()


def test_a_warning_that_is_an_error_is_raised_each_time(store: Store) -> None:
    """Under `simplefilter("error")` a test may expect the same line to raise again."""
    for _ in range(2):
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("error")
            with pytest.raises(OrphanedSpanWarning):
                leak()


def test_a_recording_starts_afresh(store: Store) -> None:
    """In each `record_spans()` a line warns once."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            with record_spans():
                leak()
                leak()
    assert len(found) == 3


def test_warnings_can_be_forgotten(store: Store) -> None:
    """After `forget_warnings()` a line warns again, within one record too."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            leak()
            leak()
            forget_warnings()
    assert len(found) == 3


def test_a_record_from_before_is_not_asked(store: Store) -> None:
    """What else is in a record, of whatever kind, does not count."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        found += [None, 7, "x"]  # type: ignore[list-item]
        for _ in range(3):
            warnings.warn("another", SpanguardWarning, stacklevel=1)
        leak()
        leak()
    assert len(found) == 7


PROCESS = """
import warnings
import spanguard
from spanguard import traced_span
from spanguard.testing import record_spans

def leak():
    with traced_span("root"):
        traced_span("left").__enter__()

with record_spans():
    for _ in range(3):
        leak()
print("--")
{between}
with record_spans():
    leak()
"""

BETWEEN = {
    "nothing": ("", 2),
    "a filter": ("with warnings.catch_warnings(): warnings.simplefilter('ignore')", 2),
    "a hook": ("warnings.showwarning = lambda *a, **k: print('Warning', a[0])", 2),
}


@pytest.mark.parametrize("way", BETWEEN)
def test_where_warnings_are_shown_it_is_once(store: Store, way: str, tmp_path: Path) -> None:
    """Outside of records a line warns once for each recording, whatever filters come and go."""
    between, times = BETWEEN[way]
    script = tmp_path / "script.py"
    script.write_text(PROCESS.format(between=between))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, encoding="utf-8", timeout=120
    )
    assert (done.stdout + done.stderr).count("ended with 1 open below it") == times, done.stderr


ONCE = """
import warnings
from spanguard import traced_span

def leak():
    with traced_span("root"):
        traced_span("left").__enter__()

for _ in range(20):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        leak()
    leak()
    warnings.simplefilter("default")
"""


def test_a_process_is_not_flooded(store: Store, tmp_path: Path) -> None:
    """A line that leaks for ever warns once, though libraries change the filters meanwhile."""
    script = tmp_path / "script.py"
    script.write_text(ONCE)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "MLFLOW_TRACKING_URI": store.uri},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.stderr.count("ended with 1 open below it") == 1, done.stderr


def test_a_recording_remembers_what_was_told_before(store: Store) -> None:
    """After a recording what had been told before it stays told."""
    before = findings._told
    with record_spans():
        assert findings._told is not before
    assert findings._told is before


def test_warnings_of_other_threads_are_recorded_once(store: Store) -> None:
    """Threads that leak at one line while warnings are recorded are told of, and no flood."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=leak) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        told = len(found)
        leak()
    assert 1 <= told == len(found)


def test_strict_mode_raises_each_time(store: Store) -> None:
    """Strict mode has no "once"."""
    for _ in range(2):
        with strict(), pytest.raises(Exception, match="open below it"):
            leak()
