"""Every private name that spanguard uses is in a list, and each is looked for by its name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import mlflow
import pytest

import spanguard
from spanguard._mlflow import seam_check
from spanguard._mlflow.seam_check import MISSING, NOT_IN_THIS_VERSION, OK, state_of
from spanguard._mlflow.seams import SEAMS, Seam
from tests.renaming import rename

SOURCE = Path(spanguard.__file__).parent
HERE = [seam for seam in SEAMS if state_of(seam) != NOT_IN_THIS_VERSION]


def by_path(seam: Seam) -> str:
    return seam.path


@pytest.mark.parametrize("seam", SEAMS, ids=by_path)
def test_the_installed_mlflow_has_it(seam: Seam) -> None:
    """An MLflow of a version that should have a seam has it: else this names it."""
    assert state_of(seam) != MISSING, f"MLflow {mlflow.__version__}: {seam.without}"


@pytest.mark.parametrize("seam", HERE, ids=by_path)
def test_one_that_is_renamed_is_missed(seam: Seam) -> None:
    """The look-up fails for a name that is gone, and for no other than is part of it."""
    assert state_of(seam) == OK
    with pytest.MonkeyPatch.context() as patch:
        rename(seam.path, patch)
        assert state_of(seam) == MISSING
        others = {found.path for found in seam_check.missing_seams(importing=True)} - {seam.path}
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
