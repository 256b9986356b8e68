"""`spanguard check` tells what a bug report needs, opens no store, and fails where it must."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner, Result

import spanguard
from spanguard._mlflow.seam_check import MISSING, NOT_IN_THIS_VERSION, OK
from spanguard._mlflow.seams import SEAMS
from spanguard.cli import main
from spanguard.cli.check import without_secrets
from tests.renaming import rename

NEEDED = next(seam for seam in SEAMS if seam.is_needed and seam.path.endswith("get_span_from_id"))
OPTIONAL = next(seam for seam in SEAMS if seam.path.endswith("Span._events"))


def check(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["check", *arguments])


def test_it_tells_versions_store_and_every_name() -> None:
    done = check()
    assert done.exit_code == 0, done.output
    assert f"spanguard         {spanguard.__version__}" in done.output
    assert f"python            {platform.python_version()}" in done.output
    assert f"mlflow            {mlflow.__version__}" in done.output
    assert "opentelemetry-sdk " in done.output
    assert f"store             {mlflow.get_tracking_uri()}" in done.output
    assert all(seam.path in done.output for seam in SEAMS)
    assert "Nothing is missing." in done.output
    assert "\x1b" not in done.output, "colours where there is no terminal"


def test_the_settings_that_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    monkeypatch.setenv("SPANGUARD_STRICT", "1")
    monkeypatch.setenv("MLFLOW_TRACE_TIMEOUT_SECONDS", "60")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    done = check()
    assert "  SPANGUARD_STRICT=1\n" in done.output
    assert "  MLFLOW_TRACE_TIMEOUT_SECONDS=60\n" in done.output
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in done.output
    assert "hunter2" not in done.output


def test_it_opens_and_makes_nothing(tmp_path: Path) -> None:
    """A store that is not there is not there afterwards: MLflow's client would create it."""
    before = sorted(tmp_path.iterdir())
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/absent.db")
    assert f"{tmp_path}/absent.db" in check().output
    assert sorted(tmp_path.iterdir()) == before
    assert mlflow.tracing.provider.provider.get() is None, "it has started MLflow's tracing"


def test_a_setting_that_mlflow_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise ValueError("no")

    monkeypatch.setattr(mlflow, "get_tracking_uri", refuse)
    done = check()
    assert done.exit_code == 0
    assert "unknown: ValueError" in done.output


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("sqlite:////tmp/a@b.db", "sqlite://***@b.db"),
        ("https://host:5000/x", "https://host:5000/x"),
        ("postgresql://me:p@ss/w@db/x", "postgresql://***@db/x"),
        ("mysql://db/x?ssl=1&Password=abc&a=1", "mysql://db/x?ssl=1&Password=***&a=1"),
        ("databricks", "databricks"),
    ],
)
def test_no_password_is_shown(uri: str, shown: str) -> None:
    assert without_secrets(uri) == shown


def test_something_needed_is_missing() -> None:
    """It fails, names it, and says what it is for."""
    with pytest.MonkeyPatch.context() as patch:
        rename(NEEDED.path, patch)
        done = check()
    assert done.exit_code == 1
    assert f"{NEEDED.path}, used by {NEEDED.needed_by}; needed: {NEEDED.without}" in done.output
    assert "cannot work with this MLflow" in done.output


def test_something_else_is_missing() -> None:
    """It says what is lost, and does not fail."""
    with pytest.MonkeyPatch.context() as patch:
        rename(OPTIONAL.path, patch)
        done = check()
    assert done.exit_code == 0
    assert f"{OPTIONAL.path}, used by {OPTIONAL.needed_by}; lost: {OPTIONAL.without}" in done.output
    assert "Nothing is missing" not in done.output


def test_for_programs() -> None:
    report = json.loads(check("--json").stdout)
    assert report["versions"]["mlflow"] == mlflow.__version__
    assert report["store"] == mlflow.get_tracking_uri()
    assert report["is_usable"] is True
    assert {seam["path"]: seam["state"] for seam in report["seams"]}.keys() == {
        seam.path for seam in SEAMS
    }
    assert {seam["state"] for seam in report["seams"]} <= {OK, NOT_IN_THIS_VERSION}
    with pytest.MonkeyPatch.context() as patch:
        rename(NEEDED.path, patch)
        done = check("--json")
    report = json.loads(done.stdout)
    assert done.exit_code == 1
    assert report["is_usable"] is False
    assert [s["path"] for s in report["seams"] if s["state"] == MISSING] == [NEEDED.path]
