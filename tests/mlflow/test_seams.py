"""Every private name that spanguard uses is in a list, and each is looked for by its name."""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

import spanguard
from spanguard import traced_span
from spanguard._base import findings
from spanguard._mlflow import seam_check
from spanguard._mlflow.seam_check import MISSING, NOT_IN_THIS_VERSION, OK, state_of
from spanguard._mlflow.seams import SEAMS, Seam
from tests.processes import run_script
from tests.renaming import rename
from tests.store import Store

pytestmark = pytest.mark.versions

SOURCE = Path(spanguard.__file__).parent
IN_PLACE = mlflow.__version__.startswith(("3.10.", "3.11."))
HERE = [seam for seam in SEAMS if state_of(seam) == OK]


def by_path(seam: Seam) -> str:
    return seam.path


@pytest.mark.parametrize("seam", SEAMS, ids=by_path)
def test_the_installed_mlflow_has_it(seam: Seam) -> None:
    """An MLflow of a version that should have a seam has it: else this names it."""
    assert state_of(seam) != MISSING, f"MLflow {mlflow.__version__}: {seam.without}"


@pytest.mark.parametrize("seam", HERE, ids=by_path)
def test_one_that_is_renamed_is_missed(seam: Seam) -> None:
    """The look-up fails for a name that is gone, and for no other than is part of it."""
    before = {found.path for found in seam_check.missing_seams(importing=True)}
    with pytest.MonkeyPatch.context() as patch:
        rename(seam.path, patch)
        assert state_of(seam) == MISSING
        now = {found.path for found in seam_check.missing_seams(importing=True)}
    others = now - before - {seam.path}
    assert all(depends(path, seam.path) for path in others), others


def depends(path: str, on: str) -> bool:
    """Tell whether a seam is inside another, or inherits the renamed attribute."""
    is_inherited = path.rpartition(".")[2] == on.rpartition(".")[2]
    return path.startswith(on) or is_inherited


def test_a_seam_of_other_versions_is_not_missed() -> None:
    gone = "mlflow.tracing.provider:gone"
    assert state_of(Seam(gone, "", "", since="3.99")) == NOT_IN_THIS_VERSION
    assert state_of(Seam(gone, "", "", until="3.9")) == NOT_IN_THIS_VERSION
    assert state_of(Seam(gone, "", "")) == MISSING
    assert state_of(Seam("mlflow.tracing.gone:gone", "", "")) == MISSING


@pytest.mark.parametrize("version", ["3.13.0rc1", "3.14.1.dev0", "3.13"])
def test_versions_of_all_kinds_are_read(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow, "__version__", version)
    assert state_of(Seam("threading:Thread", "", "", since="3.13", until="3.14")) == OK


def test_each_is_described_once() -> None:
    """No path twice, each used by a module that there is, each with one sentence on its loss."""
    assert len({seam.path for seam in SEAMS}) == len(SEAMS)
    for seam in SEAMS:
        assert seam.without.endswith("."), seam
        for room in seam.needed_by.split(", "):
            name = room.removeprefix("spanguard.") if "." in room else f"_mlflow.{room}"
            assert (SOURCE / f"{name.replace('.', '/')}.py").exists(), seam


def private_names(path: Path) -> set[str]:
    """Return the private names of other people's objects in a module: read, set or asked for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    ours = {node.id for node in nodes if isinstance(node, ast.Name)}
    ours |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    used: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Attribute):
            if getattr(node.value, "id", None) in {"self", "cls"}:
                ours.add(node.attr)
            else:
                used.add(node.attr)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"_[a-z]\w+", str(node.value)):
            used.add(str(node.value))
    return {name for name in used if re.match(r"_[A-Za-z]", name)} - ours


# Of Python's, and of the objects of ours in other modules.
NOT_SEAMS = {
    "_current_frames",
    "_is_owned",
    "_log_spans",
    "_store",
    "_upload",
    "_begin",
    "_end",
    "_export",
    "_thread",
}


@pytest.mark.parametrize("path", sorted((SOURCE / "_mlflow").glob("*.py")), ids=lambda p: p.stem)
def test_no_other_private_name_is_used(path: Path) -> None:
    """Who uses another private name of MLflow's writes it down in the list."""
    listed = {part for seam in SEAMS for part in re.split(r"[.:]", seam.path.split(" says ")[0])}
    assert private_names(path) - listed - NOT_SEAMS == set()


def test_nothing_is_missing_here(caplog: pytest.LogCaptureFixture, store: Store) -> None:
    """Where nothing is missing nothing is said."""
    if seam_check.missing_seams(importing=True):
        pytest.skip("something is missing: test_the_installed_mlflow_has_it names it")
    look_again()
    with caplog.at_level(logging.WARNING, "spanguard"), traced_span("root"):
        pass
    assert "lacks" not in caplog.text


def look_again() -> None:
    seam_check._has_looked = False
    seam_check._missing.clear()


@pytest.fixture
def _afresh() -> Iterator[None]:
    look_again()
    yield
    look_again()


@pytest.mark.usefixtures("_afresh")
def test_it_is_said_once_and_in_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is looked, one line names all that is missing and what is lost."""
    missing = [
        seam for seam in HERE if seam.path.endswith(("Span._events", "BatchProcessor._queue"))
    ]
    for seam in missing:
        rename(seam.path, monkeypatch)
    for _ in range(3):
        seam_check.look_once()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name == "spanguard"
    for seam in missing:
        assert seam.path in record.message and seam.without.rstrip(".") in record.message


@pytest.mark.usefixtures("_afresh")
def test_a_look_that_fails_is_contained(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    def broken(*args: object, **kwargs: object) -> list[Seam]:
        raise RuntimeError("broken")

    monkeypatch.setattr(findings, "reraise_internal", False)
    with monkeypatch.context() as patch:
        patch.setattr(seam_check, "missing_seams", broken)
        mlflow.tracing.reset()
        with traced_span("root"):
            pass
    assert "root" in store.spans()


PROGRAM = """
import pytest
from tests.renaming import rename
rename({path!r}, pytest.MonkeyPatch())

import spanguard
from spanguard import traced_span
with traced_span("root", inputs=1):
    with traced_span("child"):
        print("the work is done")
print("flush:", spanguard.flush(30))
"""

CHECK = """
import pytest
from tests.renaming import rename
rename({path!r}, pytest.MonkeyPatch())

from spanguard.cli import main
main(["check", "--json"])
"""

# One of each kind: of an instance, a class, a module; needed or not; with a flush that is blind.
PRIVATE = "mlflow.tracing.{}".format
OTHER_MLFLOWS = {
    PRIVATE("trace_manager:InMemoryTraceManager._traces"): True,
    PRIVATE("trace_manager:InMemoryTraceManager._lock"): True,
    PRIVATE("provider:mlflow_runtime_context"): True,
    PRIVATE("sampling:_SAMPLING_RATIO_OVERRIDE"): True,
    PRIVATE("client:TracingClient._upload_trace_data"): False,
    PRIVATE("processor.mlflow_v3:MlflowV3SpanProcessor._start_trace"): False,
    "opentelemetry.sdk.trace:Span._events": True,
}
if not IN_PLACE:  # where MLflow exports in the thread that ends a span there is no queue
    OTHER_MLFLOWS |= {
        PRIVATE("export.mlflow_v3:MlflowV3SpanExporter._async_queue"): False,
        PRIVATE("export.async_export_queue:AsyncTraceExportQueue._queue"): False,
        PRIVATE("provider:provider"): False,
    }


@pytest.mark.parametrize(("path", "is_known"), OTHER_MLFLOWS.items())
def test_the_program_runs_on_an_mlflow_that_lacks_one(
    path: str, is_known: bool, store: Store
) -> None:
    """One warning names it, the trace is whole, and flush() claims nothing that nobody can know."""
    done = run_script(PROGRAM.format(path=path), store)
    assert done.returncode == 0, done.stderr
    assert "the work is done" in done.stdout
    (trace,) = store.what_is_left()
    assert {span.name for span in trace.data.spans} == {"root", "child"}
    assert f"flush: {is_known}" in done.stdout
    told = [line for line in done.stderr.splitlines() if "spanguard" in line or "failed" in line]
    assert len(told) == 1 and path in told[0], done.stderr


LATE_PROGRAM = """
import importlib.util, sys
import pytest
from tests.renaming import rename

class Renaming:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            work = spec.loader.exec_module
            def exec_module(module):
                work(module)
                rename({path!r}, pytest.MonkeyPatch())
            spec.loader.exec_module = exec_module
            return spec

assert {module!r} not in sys.modules
sys.meta_path.insert(0, Renaming())
import spanguard
with spanguard.traced_span("root"):
    print("the work is done")
"""


def test_one_in_a_module_that_comes_with_the_first_span_is_told_of(store: Store) -> None:
    """MLflow imports its exporter when the first span starts, and not before."""
    module = PRIVATE("export.mlflow_v3")
    path = f"{module}:MlflowV3SpanExporter._client"
    done = run_script(LATE_PROGRAM.format(module=module, path=path), store)
    assert "the work is done" in done.stdout, done.stderr
    told = [line for line in done.stderr.splitlines() if "lacks what spanguard relies on" in line]
    assert len(told) == 1 and path in told[0], done.stderr


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (PRIVATE("trace_manager:InMemoryTraceManager.get_span_from_id"), 1),
        (PRIVATE("trace_manager:InMemoryTraceManager._traces"), 0),
    ],
)
def test_the_check_names_it(path: str, status: int, store: Store) -> None:
    """`spanguard check` names that one and no other, and fails if it is needed."""
    done = run_script(CHECK.format(path=path), store)
    assert done.returncode == status, done.stderr
    seams = json.loads(done.stdout)["seams"]
    here = {seam.path for seam in seam_check.missing_seams(importing=True)}
    missing = [seam["path"] for seam in seams if seam["state"] == MISSING]
    assert [found for found in missing if found not in here] == [path]
