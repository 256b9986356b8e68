"""The demo runs as `make demo` runs it; its picture and its store tell the same story."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner
from mlflow.entities import Span, Trace
from rich.cells import cell_len
from rich.console import Console

import spanguard
from spanguard import cli
from spanguard.render import TraceTree
from tests.store import Store, outcome, status

SOURCE = Path(spanguard.__file__).parent / "cli" / "demo.py"


def leaking_line() -> int:
    """Return the line of the demo that opens a span and forgets it."""
    lines = SOURCE.read_text(encoding="utf-8").splitlines()
    (line,) = (n for n, text in enumerate(lines, start=1) if 'start_span("look up author"' in text)
    return line


@dataclass
class Demo:
    """One run of the demo."""

    folder: Path
    printed: str
    errors: str

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    def trace(self) -> Trace:
        client = mlflow.MlflowClient(tracking_uri=self.uri)
        experiment = client.get_experiment_by_name("spanguard-demo")
        assert experiment is not None
        (trace,) = client.search_traces(locations=[experiment.experiment_id])
        return trace

    def line(self, name: str) -> str:
        (line,) = (
            line for line in self.printed.splitlines() if re.search(rf"[✓✗] \w+ +{name}", line)
        )
        return line


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    here = tmp_path_factory.mktemp("demo")
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    environment |= {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONPATH": str(Path(spanguard.__file__).parent.parent),
        "PYTHONIOENCODING": "utf-8",
        "SPANGUARD_STRICT": "1",  # the demo shows its leak, whatever the user's settings
    }
    finished = subprocess.run(
        [sys.executable, "-m", "spanguard", "demo", "--folder", "shown here"],
        cwd=here,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    return Demo(here / "shown here", finished.stdout, finished.stderr)


@pytest.fixture
def spans(demo: Demo) -> dict[str, list[Span]]:
    """The spans of the demo's trace by name, from its store."""
    by_name: dict[str, list[Span]] = {}
    for span in demo.trace().data.spans:
        by_name.setdefault(span.name, []).append(span)
    return by_name


def test_it_draws_what_went_well(demo: Demo) -> None:
    assert demo.line("measure email").startswith("└── ✓ OK ")
    assert re.search(r"✓ OK +message\.py  TOOL +[\d.]+ [mµ]?s  3 spans below", demo.printed)


def test_it_draws_the_broken_file_as_an_error(demo: Demo) -> None:
    for name in (r"broken\.py", r"parse  PARSER +[\d.]+ [mµ]?s  S"):
        assert "✗ ERROR" in demo.line(name)
        assert "SyntaxError: '{' was never closed" in demo.line(name)


def test_it_draws_the_expected_failure_as_ok(demo: Demo) -> None:
    assert "✓ OK" in demo.line(r"latin1\.py")
    assert re.search(r"expected +UnicodeDecodeError", demo.line(r"latin1\.py"))


def test_it_names_the_line_that_leaked(demo: Demo) -> None:
    site = f"demo.py:{leaking_line()} in look_up_and_forget"
    assert "✗ ERROR" in demo.line("look up author")
    assert "orphaned" in demo.line("look up author")
    assert site in demo.line("look up author")
    (notice,) = (line for line in demo.printed.splitlines() if "spanguard noticed:" in line)
    assert site in notice


def test_its_store_says_the_same(demo: Demo, spans: dict[str, list[Span]]) -> None:
    trace = demo.trace()
    assert trace.info.trace_id in demo.printed
    assert trace.info.state.value == "OK"
    (broken,), (latin1,) = spans["broken.py"], spans["latin1.py"]
    assert (status(broken), outcome(broken)) == ("ERROR", "error")
    assert broken.get_attribute("error_type") == "SyntaxError"
    assert (status(latin1), outcome(latin1)) == ("OK", "expected")
    (leaked,) = spans["look up author"]
    assert (status(leaked), outcome(leaked)) == ("ERROR", "orphaned")
    site = f"{SOURCE}:{leaking_line()} in look_up_and_forget"
    assert leaked.get_attribute("spanguard.opened_at") == site
    assert all(span.end_time_ns is not None for group in spans.values() for span in group)


def test_its_job_is_real(demo: Demo, spans: dict[str, list[Span]]) -> None:
    (root,) = spans["measure email"]
    assert root.outputs["files"] == len(spans["measure"]) > 20
    assert root.outputs["lines"] > 5_000
    assert max(span.outputs["functions"] for span in spans["message.py"]) > 10
    (rank,) = spans["rank"]
    assert rank.parent_id == root.span_id, "the fluent API's span is in the same trace"


def test_it_prints_one_command_for_the_ui_of_that_store(demo: Demo) -> None:
    *_, command = demo.printed.rstrip().splitlines()
    assert command.endswith("ui --backend-store-uri 'sqlite:///shown here/mlflow.db' --port 5000")
    assert "mlflow" in command


def test_it_is_quiet_and_plain_when_piped(demo: Demo) -> None:
    assert demo.errors == ""
    assert "\x1b" not in demo.printed
    assert "\r" not in demo.printed
    assert not [line for line in demo.printed.splitlines() if line != line.rstrip()]
    assert not Path(demo.folder.parent / "mlruns").exists()


def test_it_fits_into_a_terminal_of_100_columns(demo: Demo) -> None:
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=True, color_system=None).print(
        TraceTree(demo.trace(), fold=3)
    )
    lines = out.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= 100
    assert f"demo.py:{leaking_line()} in look_up_and_forget" in out.getvalue()


def test_show_draws_a_stored_trace(demo: Demo) -> None:
    trace_id = demo.trace().info.trace_id
    shown = CliRunner().invoke(cli.main, ["show", trace_id, "--tracking-uri", demo.uri])
    assert shown.exit_code == 0
    assert trace_id in shown.output
    assert len(re.findall(r"[✓✗] (OK|ERROR)", shown.output)) == len(demo.trace().data.spans)
    assert "characters" not in shown.output, "payloads are shown on demand only"


def test_show_folds_and_shows_payloads_on_demand(demo: Demo) -> None:
    arguments = ["show", demo.trace().info.trace_id, "--fold", "2", "--payloads"]
    shown = CliRunner().invoke(cli.main, arguments, env={"MLFLOW_TRACKING_URI": demo.uri})
    assert shown.exit_code == 0
    assert re.search(r"✓ OK +email/.*\d+ spans below, all OK", shown.output)
    assert 'inputs: {"package": "email"}' in shown.output


def test_show_reports_an_unknown_trace(store: Store) -> None:
    shown = CliRunner().invoke(cli.main, ["show", "tr-unknown", "--tracking-uri", store.uri])
    assert shown.exit_code == 1
    assert "Error: " in shown.output
    assert "tr-unknown" in shown.output
    assert "Traceback" not in shown.output


def test_show_reports_a_store_that_is_none() -> None:
    shown = CliRunner().invoke(cli.main, ["show", "tr-x", "--tracking-uri", "nonsense://there"])
    assert shown.exit_code == 1
    assert shown.output.startswith("Error: ")
    assert len(shown.output.splitlines()) == 1


def test_the_demo_reports_a_folder_it_cannot_use(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    shown = CliRunner().invoke(cli.main, ["demo", "--folder", str(taken)])
    assert shown.exit_code == 2
    assert "is a file" in shown.output


def test_the_demo_reports_a_store_it_cannot_open(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database" * 100)
    environment = {**os.environ, "PYTHONPATH": str(Path(spanguard.__file__).parent.parent)}
    finished = subprocess.run(
        [sys.executable, "-m", "spanguard", "demo", "--folder", str(tmp_path)],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert finished.returncode == 1
    assert "Error: MLflow could not open a store in" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_command_knows_its_version() -> None:
    shown = CliRunner().invoke(cli.main, ["--version"])
    assert shown.output == f"spanguard, version {spanguard.__version__}\n"
