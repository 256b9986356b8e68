"""The demo: a real job on real input, traced, stored, read back from the store and drawn.

The job measures a package of the standard library, file by file. Two files that it adds itself
are broken in two ways, and one function uses MLflow's raw client with a common bug: a return
that comes before the span's end.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
from mlflow import MlflowClient
from rich.console import Console
from rich.text import Text

from spanguard import SpanguardWarning, current_span, flush, strict, traced_span
from spanguard.render import TraceTree

if TYPE_CHECKING:
    from mlflow.entities import Trace

__all__ = ["DemoError", "run"]


PACKAGE = "email"
EXPERIMENT = "spanguard-demo"
PORT = 5000


class DemoError(Exception):
    """The demo could not show what it wanted to show."""


def run(folder: Path, console: Console) -> str:
    """Run the demo with its store in `folder`, and return the id of the trace.

    Raises:
        DemoError: the store could not be opened, or the trace not be read back from it.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # the demo does without the network
    store = _Store(folder)
    console.print(
        f"[bold]spanguard demo[/]: measuring the standard library's package {PACKAGE!r}\n"
    )
    with console.status("Setting up an SQLite store, which takes MLflow a few seconds"):
        store.open()
    with console.status("Working"), strict(False), _noticed() as notices:
        trace_id, tally = measure(store.client, store.experiment_id, folder / "input")
    with console.status("Waiting until everything is stored"):
        flush(60)
        trace = store.read(trace_id)
    _say(console, "measured:", _result(tally))
    _say(console, "left out:", _left_out(tally))
    for notice in notices:
        _say(console, "spanguard noticed:", notice, style="yellow")
    _say(
        console, "stored:", f"{len(trace.data.spans)} spans in {store.path}, read back from there:"
    )
    console.print()
    console.print(TraceTree(trace, fold=3))
    console.print("\nOpen the same trace in MLflow's own UI:\n")
    console.print(Text(f"  {_ui_command(store.uri)}", "bold cyan"), soft_wrap=True)
    return trace_id


# -- the job -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measures:
    """What is measured of one file."""

    lines: int
    functions: int
    classes: int
    longest: tuple[int, str]
    """Lines and name of the longest function."""


@dataclass
class Tally:
    """What is measured of all files."""

    measured: dict[str, Measures] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    undecodable: list[str] = field(default_factory=list)
    author: str = "unknown"
    longest: tuple[int, str] = (0, "")

    def total(self, what: str) -> int:
        """Return the sum of one measure over all files."""
        return sum(getattr(measures, what) for measures in self.measured.values())

    def summary(self) -> dict[str, object]:
        """Return what the job found out, in short."""
        lines, name = self.longest
        return {
            "files": len(self.measured),
            **{what: self.total(what) for what in ("lines", "functions", "classes")},
            "longest_function": f"{name}: {lines} lines",
            "author": self.author,
            "broken": self.broken,
            "not_utf8": self.undecodable,
        }


def measure(client: MlflowClient, experiment_id: str, extra: Path) -> tuple[str, Tally]:
    """Measure the package and the files in the folder `extra`, all in one trace."""
    tally = Tally()
    package = package_folder()
    write_difficult_files(package, extra)
    with traced_span(
        f"measure {PACKAGE}",
        span_type="WORKFLOW",
        inputs={"package": PACKAGE},
        experiment_id=experiment_id,
        tags={"job": "spanguard-demo"},
    ) as root:
        tally.author = look_up_and_forget(client, package)
        measure_folder(package, tally)
        measure_folder(extra, tally)
        with mlflow.start_span("rank"):  # MLflow's fluent API lands in the same trace
            tally.longest = max(measures.longest for measures in tally.measured.values())
        root.set_outputs(tally.summary())
        return root.trace_id, tally


def package_folder() -> Path:
    """Return where the package is, as Python's own import system finds it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DemoError(f"This Python has no package {PACKAGE!r} with source files.")
    return Path(next(iter(spec.submodule_search_locations)))


def write_difficult_files(package: Path, folder: Path) -> None:
    """Copy one of the package's files twice: cut off in the middle, and not in UTF-8."""
    folder.mkdir(parents=True, exist_ok=True)
    source = (package / "charset.py").read_text(encoding="utf-8")
    (folder / "broken.py").write_text(source[: source.index("{") + 1], encoding="utf-8")
    (folder / "latin1.py").write_bytes(f"# naïve, not UTF-8\n{source}".encode("latin-1"))


def measure_folder(folder: Path, tally: Tally) -> None:
    """Measure every file of a folder and of the folders in it; a bad file stops nothing."""
    with traced_span(f"{folder.name}/", span_type="TASK", attributes={"folder": str(folder)}):
        for path in sorted(folder.iterdir()):
            if path.is_dir() and path.name != "__pycache__":
                measure_folder(path, tally)
            elif path.suffix == ".py":
                try:
                    tally.measured[f"{folder.name}/{path.name}"] = measure_file(path)
                except UnicodeDecodeError:
                    tally.undecodable.append(path.name)
                except SyntaxError:
                    tally.broken.append(path.name)


def measure_file(path: Path) -> Measures:
    """Read, parse and measure one file.

    Files that are not UTF-8 are to be expected among many: their spans are OK, and say so.
    """
    with traced_span(path.name, span_type="TOOL", expected=UnicodeDecodeError) as span:
        with traced_span("read", expected=UnicodeDecodeError) as reading:
            text = path.read_text(encoding="utf-8")
            reading.set_outputs({"characters": len(text)})
        with traced_span("parse", span_type="PARSER"):
            tree = ast.parse(text, filename=path.name)
        with traced_span("measure"):
            measures = measure_tree(tree, text, path.name)
        span.set_outputs(asdict(measures))
        return measures


def measure_tree(tree: ast.Module, text: str, filename: str) -> Measures:
    """Count what there is in one parsed file."""
    nodes = list(ast.walk(tree))
    functions = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = [((f.end_lineno or f.lineno) - f.lineno + 1, f.name) for f in functions]
    lines, name = max(lengths, default=(0, "none"))
    return Measures(
        lines=len(text.splitlines()),
        functions=len(functions),
        classes=sum(isinstance(node, ast.ClassDef) for node in nodes),
        longest=(lines, f"{name} in {filename}"),
    )


def look_up_and_forget(client: MlflowClient, package: Path) -> str:
    """Find out who wrote the package, with a bug: the span is ended only where nobody is found."""
    parent = current_span()
    assert parent is not None
    span = client.start_span("look up author", parent.trace_id, parent.span_id)
    for path in sorted(package.glob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("# Author: "):
                return line.removeprefix("# Author: ")
    client.end_span(span.trace_id, span.span_id)
    return "unknown"


@contextmanager
def _noticed() -> Iterator[list[str]]:
    """Collect what spanguard warns of, to be shown as notes."""
    notices: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield notices
        finally:
            notices += [str(w.message) for w in caught if issubclass(w.category, SpanguardWarning)]


# -- the store ---------------------------------------------------------------------------------


class _Store:
    """MLflow on an SQLite file in the demo's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = _shown_path(folder / "mlflow.db")
        self.uri = f"sqlite:///{self.path}"
        self.experiment_id = ""

    def open(self) -> None:
        """Create what is not there yet.

        Raises:
            DemoError: the folder cannot hold a store.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._open()
        except Exception as error:  # MLflow lets its database's errors through
            raise DemoError(f"MLflow could not open a store in {self._folder}: {error}") from error

    def _open(self) -> None:
        mlflow.set_tracking_uri(self.uri)
        self.client = MlflowClient()
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        self.experiment_id = (
            experiment.experiment_id
            if experiment is not None
            else self.client.create_experiment(
                EXPERIMENT, artifact_location=(self._folder / "artifacts").resolve().as_uri()
            )
        )

    def read(self, trace_id: str) -> Trace:
        """Search the store for the trace: `get_trace` would look into MLflow's memory first."""
        found = MlflowClient(tracking_uri=self.uri).search_traces(
            locations=[self.experiment_id], max_results=50
        )
        for trace in found:
            if trace.info.trace_id == trace_id:
                return trace  # type: ignore[no-any-return]
        raise DemoError(f"The trace {trace_id} did not arrive in {self.path}.")


def _shown_path(path: Path) -> str:
    """Return a path as short as it can be said here."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.resolve().as_posix()


# -- what is printed ---------------------------------------------------------------------------


def _say(console: Console, title: str, text: str, *, style: str = "") -> None:
    """Print a titled paragraph with a hanging indent."""
    for line in Text(text, style).wrap(console, max(console.width - 20, 20)):
        line.rstrip()
        console.print(Text.assemble((f"{title:<20}", "bold"), line), soft_wrap=True)
        title = ""


def _result(tally: Tally) -> str:
    lines, name = tally.longest
    return (
        f"{len(tally.measured)} files with {tally.total('lines'):,} lines, "
        f"{tally.total('functions')} functions and {tally.total('classes')} classes; "
        f"the longest function is {name}, {lines} lines; first author {tally.author}"
    )


def _left_out(tally: Tally) -> str:
    return (
        f"{', '.join(tally.broken)} (broken syntax), "
        f"{', '.join(tally.undecodable)} (not UTF-8, as expected)"
    )


def _ui_command(uri: str) -> str:
    return f"{_mlflow_command()} ui --backend-store-uri {shlex.quote(uri)} --port {PORT}"


def _mlflow_command() -> str:
    """Return how to call the MLflow of this very environment."""
    here = Path(sys.executable).parent
    on_path = shutil.which("mlflow")
    if on_path is not None and Path(on_path).parent == here:
        return "mlflow"
    executable = Path(sys.executable)
    if executable.is_relative_to(Path.cwd()):
        executable = executable.relative_to(Path.cwd())
    return f"{shlex.quote(str(executable))} -m mlflow"
