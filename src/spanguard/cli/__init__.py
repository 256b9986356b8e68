"""The command line: `spanguard check`, `demo`, `replay FOLDER`, `show TRACE_ID`."""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spanguard import __version__

if TYPE_CHECKING:
    from mlflow.entities import Trace
    from rich.console import Console

__all__ = ["main"]

# Without a terminal there is no width to fit into: long lines stay whole, for grep.
_PIPED_WIDTH = 1000


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="spanguard")
def main() -> None:
    """Safe spans for MLflow's low-level tracing client."""


@main.command()
@click.option("--json", "is_json", is_flag=True, help="Print it for programs.")
def check(is_json: bool) -> None:
    """Tell what is installed and set, and what of MLflow's is missing: for a bug report.

    Opens no store. Exits with 1 if something is missing that spanguard cannot work without.
    """
    from spanguard.cli.check import as_json, draw, look

    _hush_mlflow()
    report = look()
    if is_json:
        click.echo(as_json(report))
    else:
        draw(report, _console())
    if not report.is_usable:
        raise SystemExit(1)


@main.command()
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("spanguard-demo"),
    show_default=True,
    help="Where the demo's store goes.",
)
def demo(folder: Path) -> None:
    """Run a real job, traced; read its trace back from the store and draw it."""
    from spanguard.cli.demo import DemoError, run

    _hush_mlflow()
    try:
        run(folder, _console())
    except (DemoError, OSError) as error:
        raise click.ClickException(_first_line(error)) from error


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--store", metavar="URI", help="Where to store it. [default: where it was meant for]")
@click.option("--keep", is_flag=True, help="Leave the files there when all is stored.")
def replay(folder: Path, store: str | None, keep: bool) -> None:
    """Store the traces that `deliver(spill=FOLDER)` has left on disk.

    What is in the store already is not added again. A file that a live process has is left
    alone. Exits with 1 if something is not stored.
    """
    from spanguard.cli.replay import ReplayError, run

    _hush_mlflow()
    try:
        is_all_stored = run(folder, _console(), store=store, keep=keep)
    except (ReplayError, OSError) as error:
        click.echo(f"Error: {_first_line(error)}", err=True)
        raise SystemExit(2) from error
    if not is_all_stored:
        raise SystemExit(1)


@main.command()
@click.argument("trace_id")
@click.option(
    "--tracking-uri",
    envvar="MLFLOW_TRACKING_URI",
    help="Where the trace is stored. [default: MLFLOW_TRACKING_URI, else MLflow's default]",
)
@click.option("--payloads", is_flag=True, help="Show inputs, outputs and attributes too.")
@click.option(
    "--fold",
    type=click.IntRange(min=1),
    metavar="LEVEL",
    help="Draw branches in which all went well down to this level only.",
)
def show(trace_id: str, tracking_uri: str | None, payloads: bool, fold: int | None) -> None:
    """Draw a stored trace as a tree."""
    from spanguard.render import TraceTree

    _hush_mlflow()
    trace = _stored_trace(trace_id, tracking_uri)
    _console().print(TraceTree(trace, payloads=payloads, fold=fold))


def _stored_trace(trace_id: str, tracking_uri: str | None) -> Trace:
    from mlflow import MlflowClient

    try:
        trace: Trace | None = MlflowClient(tracking_uri).get_trace(trace_id, display=False)
    except Exception as error:  # a store can fail in any way: one line instead of a traceback
        raise click.ClickException(f"MLflow could not read it: {_first_line(error)}") from error
    if trace is None:
        raise click.ClickException(f"There is no readable trace {trace_id!r} in the store.")
    return trace


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _hush_mlflow() -> None:
    """Leave out the log lines that tell of what went well: migrations, flushing at exit."""
    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _console() -> Console:
    """Return a console for standard output that wraps for terminals only."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name from a store may hold any character, a terminal's encoding may lack it.
        sys.stdout.reconfigure(errors="backslashreplace")
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH
    return Console(width=width)
