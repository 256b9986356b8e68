"""Pytest runs with the plugin: in this process, or in one of its own."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before pytester takes its snapshots of sys.modules, which would import these again each time.
import _spanguard_pytest_plugin  # noqa: F401
import spanguard.pytest_plugin
import spanguard.render
import spanguard.testing
from tests.testing.plugin_runs import ROOT, Run


class Flushing:
    """Waits for MLflow's export thread, which imports modules while pytester goes through them."""

    def pytest_sessionfinish(self) -> None:
        assert spanguard.flush(60)


@pytest.fixture
def installed(tmp_path: Path) -> str:
    """A PYTHONPATH on which spanguard is installed as pyproject.toml says.

    Whatever the environment of this test run has installed: an older version, or none.
    """
    metadata = tmp_path / "installed" / "spanguard_under_test-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Name: spanguard-under-test\nVersion: 0\n")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = pyproject.partition("[project.entry-points.pytest11]\n")[2].partition("\n\n")[0]
    entry_points = "[pytest11]\n" + table.replace('"', "")
    (metadata / "entry_points.txt").write_text(entry_points)
    return os.pathsep.join([str(metadata.parent), str(ROOT / "src")])


@pytest.fixture
def run(
    pytester: pytest.Pytester, installed: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Run]:
    """Run pytest in this process, with the plugin, on files given by name."""
    for path in reversed(installed.split(os.pathsep)):
        monkeypatch.syspath_prepend(path)

    def run(*arguments: str, **files: str) -> pytest.RunResult:
        pytester.makepyfile(**files)
        without = [f"-pno:{name}" for name in ("cacheprovider", "asyncio", "hypothesispytest")]
        return pytester.runpytest_inprocess(*without, *arguments, plugins=[Flushing()])

    yield run
    # MLflow's blocks that were left open set what is active when they are collected: now, then,
    # and not in the middle of another test.
    gc.collect()
    assert spanguard.flush(60)


@pytest.fixture
def run_elsewhere(
    pytester: pytest.Pytester, installed: str, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Run pytest in a process of its own, which gets to know the plugin by its entry point."""
    monkeypatch.setenv("PYTHONPATH", installed)

    def run(*arguments: str, **files: str) -> pytest.RunResult:
        pytester.makepyfile(**files)
        without = [f"-pno:{name}" for name in ("cacheprovider", "hypothesispytest")]
        return pytester.runpytest_subprocess(*without, *arguments)

    return run
