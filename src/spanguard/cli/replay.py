"""`spanguard replay`: store what processes have left on disk."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from spanguard._delivery.replay import Replayed, ReplayError, replay_file, spill_files
from spanguard._delivery.spill import read_lines

__all__ = ["ReplayError", "run"]


def run(folder: Path, console: Console, *, store: str | None, keep: bool) -> bool:
    """Store what is in the files of a folder; tell whether all of it is stored now.

    Raises:
        ReplayError: it cannot be done: the text says why, in one line.
    """
    files = spill_files(folder)
    if not files:
        console.print(f"Nothing to replay in {folder}.")
    results = [_replay(path, console, store=store, keep=keep) for path in files]
    return not any(result.refused or result.is_in_use for result in results)


def _replay(path: Path, console: Console, *, store: str | None, keep: bool) -> Replayed:
    total = sum(line.get("kind") == "trace" for line in read_lines(path))
    columns = (TextColumn(path.name), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total)
        result = replay_file(
            path, store=store, keep=keep, on_progress=lambda count: bar.advance(task, count)
        )
    console.print(f"{path.name}: {_in_words(result)}", soft_wrap=True)
    return result


def _in_words(result: Replayed) -> str:
    if result.is_in_use:
        return "in use by a process that is alive; left alone"
    words = [f"{result.stored} traces stored"]
    if result.finished:
        words.append(f"{result.finished} of them were open when their process died")
    if result.refused:
        words.append(f"{result.refused} refused ({result.reason}); the file stays")
    return ", ".join(words)
