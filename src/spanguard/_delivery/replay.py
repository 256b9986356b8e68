"""Storing what processes have left on disk: they are gone, or the store was."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spanguard._base.file_lock import hold
from spanguard._delivery.retries import Verdict, retrying, store_by_halves, verdict_on
from spanguard._delivery.spill import FORMAT, attachments_beside, read_attachments, read_lines
from spanguard._mlflow.on_disk import OpenTrace, from_data
from spanguard._mlflow.outgoing import Destination, Outgoing
from spanguard._mlflow.reasons import reason_of
from spanguard._mlflow.sending import Sender, destination_of, sender_to
from spanguard._record.crash import orphan_by_crash

__all__ = ["ReplayError", "Replayed", "replay_file", "spill_files"]


_AT_A_TIME = 200
_PATIENCE_SECONDS = 30.0  # of a store that is down, before it is given up


class ReplayError(Exception):
    """A file cannot be replayed: the text says why, in one line."""


@dataclass(frozen=True)
class Replayed:
    """What became of the traces of one file.

    Attributes:
        stored: traces that are in the store now, also those that were there before.
        finished: those among them that were open when their process died.
        refused: traces that the store does not take.
        reason: why, of the last of them.
        is_in_use: a live process has the file; it was left alone.
    """

    stored: int = 0
    finished: int = 0
    refused: int = 0
    reason: str | None = None
    is_in_use: bool = False


def spill_files(folder: Path) -> list[Path]:
    """Return the files that processes have left in a folder, oldest first."""
    if not folder.is_dir():
        raise ReplayError(f"There is no folder {str(folder)!r}.")
    return sorted(folder.glob("spanguard-*.jsonl"), key=lambda path: path.stat().st_mtime)


def replay_file(
    path: Path,
    *,
    store: str | None = None,
    keep: bool = False,
    on_progress: Callable[[int], object] = lambda count: None,
) -> Replayed:
    """Store what is in a file that a process has left; do it twice, and nothing is added.

    Args:
        path: the file.
        store: the tracking URI to store it at; None is the one that it was recorded for.
        keep: leave the file there when all is stored.
        on_progress: told of how many more traces are done.

    Raises:
        ReplayError: it is not such a file, or of another version; or the store is down. What is
            stored by then stays, and the file does, too.
    """
    with path.open("r+b") as file:
        if not hold(file.fileno()):
            return Replayed(is_in_use=True)
        found = _File(path, store)
        done = _Stored(on_progress)
        for batch in _batches(found.items()):
            done.store(batch)
        result = replace(done.result, finished=found.finished)
        if not keep and not result.refused:
            path.unlink()
            shutil.rmtree(attachments_beside(path), ignore_errors=True)
    return result


class _File:
    """What is in a file and not stored, read twice: what is stored is noted at the end."""

    def __init__(self, path: Path, store: str | None) -> None:
        self._path = path
        self._store = store
        self._settled: set[str] = set()
        self._places: dict[str, Destination] = {}
        self.finished = 0
        lines = read_lines(path)
        if next(lines, {}).get("format") != FORMAT:
            raise ReplayError(f"{str(path)!r} is no file of this version of spanguard.")
        for line in lines:
            if line.get("kind") == "stored":
                self._settled.update(line["ids"])

    def items(self) -> Iterator[Outgoing]:
        left: dict[str, OpenTrace] = {}
        stores: dict[str, str] = {}
        for line in read_lines(self._path):
            kind, trace_id = line.get("kind"), str(line.get("id"))
            if kind == "ended":
                left.setdefault(trace_id, OpenTrace()).add(line)
                stores[trace_id] = line["store"]
            elif kind in ("trace", "part"):
                left.pop(trace_id, None)
                item = self._item(line, line["store"])
                if item.key not in self._settled:
                    yield item
        for trace_id, trace in left.items():
            if trace_id not in self._settled:
                data = trace.finished(orphan_by_crash)
                if data is not None:
                    self.finished += 1
                    yield self._item(data, stores[trace_id])

    def _item(self, data: dict[str, Any], store: str) -> Outgoing:
        files = read_attachments(self._path, data.get("attachments", ()))
        return from_data(data, self._destination(store), files)

    def _destination(self, recorded: str) -> Destination:
        uri = self._store or recorded
        if "***@" in uri:
            raise ReplayError("The store has a password, which is not written down: use --store.")
        if uri not in self._places:
            self._places[uri] = destination_of(uri)
        return self._places[uri]


class _Stored:
    """Stores batches, and counts."""

    def __init__(self, on_progress: Callable[[int], object]) -> None:
        self.result = Replayed()
        self._on_progress = on_progress
        self._senders: dict[Destination, Sender] = {}

    def store(self, batch: Sequence[Outgoing]) -> None:
        store_by_halves(self._send, batch, self._give_up)

    def _give_up(self, batch: Sequence[Outgoing], error: Exception) -> None:
        if verdict_on(error) in (Verdict.LATER, Verdict.BARRED):
            raise ReplayError(f"The store takes nothing: {reason_of(error)}.") from error
        self._count(batch, refused=reason_of(error))

    def _send(self, batch: Sequence[Outgoing]) -> None:
        destination = batch[0].destination
        if destination not in self._senders:
            self._senders[destination] = sender_to(destination)
        over = threading.Event()
        timer = threading.Timer(_PATIENCE_SECONDS, over.set)
        timer.daemon = True
        timer.start()
        try:
            retrying(threading.Event(), over.is_set)(self._senders[destination].send, batch)
        finally:
            timer.cancel()
        self._count(batch)

    def _count(self, batch: Sequence[Outgoing], refused: str | None = None) -> None:
        traces = sum(item.trace is not None for item in batch)
        if refused is None:
            self.result = replace(self.result, stored=self.result.stored + traces)
        else:
            self.result = replace(
                self.result, refused=self.result.refused + len(batch), reason=refused
            )
        self._on_progress(traces)


def _batches(items: Iterator[Outgoing]) -> Iterator[list[Outgoing]]:
    batch: list[Outgoing] = []
    for item in items:
        if batch and (item.destination != batch[0].destination or len(batch) == _AT_A_TIME):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
