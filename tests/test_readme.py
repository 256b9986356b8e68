"""The README's code and the docstrings' examples do what they say: each runs, on a real store."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import spanguard
from tests.store import Store

README = Path(__file__).parent.parent / "README.md"


def blocks() -> list[tuple[str, int, str]]:
    """Return the README's Python blocks: the heading above, the line in the file, the code."""
    found = []
    heading, start, code = "", None, []
    for number, line in enumerate(README.read_text(encoding="utf-8").splitlines(), start=1):
        if line == "```python":
            start, code = number, []
        elif line == "```" and start is not None:
            found.append((heading, start, "\n".join(code)))
            start = None
        elif start is not None:
            code.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    return found


def doctests() -> list[doctest.DocTest]:
    names = [
        module.name
        for module in pkgutil.walk_packages(spanguard.__path__, "spanguard.")
        if not module.name.endswith("__main__")
    ]
    modules = [spanguard, *map(importlib.import_module, names)]
    found = [test for module in modules for test in doctest.DocTestFinder().find(module)]
    return [test for test in found if test.examples]


def label(heading: str, line: int) -> str:
    return f"{re.sub(r'[^a-z]+', '-', heading.lower()).strip('-')}-line-{line}"


@pytest.mark.filterwarnings("ignore::spanguard.exceptions.SpanguardWarning")
@pytest.mark.parametrize(
    ("line", "code"),
    [pytest.param(line, code, id=label(heading, line)) for heading, line, code in blocks()],
)
def test_a_block_of_the_readme_runs(line: int, code: str, store: Store) -> None:
    # As many empty lines before it as the README has: a failure then names the README's line.
    exec(compile("\n" * line + code, str(README), "exec"), {"__name__": "__main__"})
    assert spanguard.open_spans() == []
    assert len(store.traces()) == store.rows(), "a block left a trace that cannot be read"


@pytest.mark.filterwarnings("ignore::spanguard.exceptions.SpanguardWarning")
@pytest.mark.parametrize("example", doctests(), ids=lambda test: test.name)
def test_an_example_of_a_docstring_says_what_happens(example: doctest.DocTest) -> None:
    runner = doctest.DocTestRunner(verbose=False)
    output: list[str] = []
    runner.run(example, out=output.append)
    assert runner.failures == 0, "".join(output)


def test_the_readme_has_code() -> None:
    assert len(blocks()) >= 8
