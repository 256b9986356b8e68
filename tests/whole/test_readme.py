"""The code of the README, the manual and the docstrings does what they say: each runs, on a store.

And the papers hold together: every page is linked, every link leads somewhere, every module that
is named is there.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest

import spanguard
from tests.store import Store

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MANUAL = sorted((ROOT / "docs").glob("*.md"))
PAPERS = [
    README,
    *MANUAL,
    *map(ROOT.joinpath, ["ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"]),
]


def blocks(page: Path = README) -> list[tuple[str, int, str]]:
    """Return a page's Python blocks: the heading above, the line in the file, the code."""
    found = []
    heading, start, code = "", None, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
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


def as_words(heading: str) -> str:
    return re.sub(r"[^a-z]+", "-", heading.lower()).strip("-")


def label(page: Path, heading: str, line: int) -> str:
    where = as_words(heading) if page == README else f"{page.stem}-{as_words(heading)}"
    return f"{where}-line-{line}"


@pytest.mark.filterwarnings("ignore::spanguard.exceptions.SpanguardWarning")
@pytest.mark.parametrize(
    ("page", "line", "code"),
    [
        pytest.param(page, line, code, id=label(page, heading, line))
        for page in [README, *MANUAL]
        for heading, line, code in blocks(page)
    ],
)
def test_a_block_of_the_readme_or_the_manual_runs(
    page: Path, line: int, code: str, store: Store
) -> None:
    # As many empty lines before it as the page has: a failure then names the page's line.
    exec(compile("\n" * line + code, str(page), "exec"), {"__name__": "__main__"})
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


def test_the_manual_has_code() -> None:
    assert sum(len(blocks(page)) for page in MANUAL) >= 20


# -- the papers --------------------------------------------------------------------------------


def links(page: Path) -> list[str]:
    """Return the targets of a page's links that stay in this repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [target for target in found if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Return what its headings can be linked by, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("index", [README, ROOT / "docs" / "README.md"], ids=["readme", "index"])
def test_every_page_of_the_manual_is_linked(index: Path) -> None:
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in links(index)}
    assert set(MANUAL) - linked <= {index}


@pytest.mark.parametrize("page", PAPERS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_link_leads_somewhere(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        to = (page.parent / name).resolve() if name else page
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), target


@pytest.mark.parametrize("page", PAPERS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_file_that_is_named_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:_[a-z]+|src|tests|examples|benchmarks)/[\w/]*(?:\.py)?)`", text):
        assert (ROOT / name).exists() or (ROOT / "src" / "spanguard" / name).exists(), name


def test_a_line_of_the_papers_fits_a_screen() -> None:
    for page in PAPERS:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
            assert len(line) <= 125 or line.startswith("|"), f"{page.name}:{number}"


def test_help_lists_every_target_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.findall(r"^\.PHONY: ((?:.*\\\n)*.*)$", makefile, flags=re.MULTILINE)
    targets = {name for names in phony for name in names.replace("\\\n", " ").split()}
    told = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert {"demo", "test", "help"} <= targets
    assert targets == set(re.findall(r"^make ([\w-]+)", told, flags=re.MULTILINE))


def test_the_changelog_has_the_version_that_is_released() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", changelog, flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert spanguard.__version__ in headings
