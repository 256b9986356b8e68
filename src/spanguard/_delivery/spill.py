"""Traces on disk: in one file for each process, a line for each, attachments beside it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from spanguard._base.file_lock import hold
from spanguard._mlflow.on_disk import as_line, as_text, from_data
from spanguard._mlflow.outgoing import Destination, Outgoing

__all__ = ["FORMAT", "SpillFile", "attachments_beside", "prepare", "read_lines", "read_attachments"]


FORMAT = 1
"""What is written in a file's first line; a file with another number is not read."""

_FILE_MODE, _FOLDER_MODE = 0o600, 0o700
# A file in which more than this is superfluous is written anew, without that.
_SUPERFLUOUS_BYTES = 64 * 2**20


def prepare(folder: str | os.PathLike[str]) -> Path:
    """Make a folder for spill files, if there is none, and try to write there.

    Raises:
        OSError: it cannot be written to.
    """
    path = Path(folder).absolute()
    try:
        path.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
        trial = path / f".trial-{secrets.token_hex(4)}"
        os.close(os.open(trial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _FILE_MODE))
        trial.unlink()
    except OSError as error:
        raise type(error)(
            error.errno,
            f"The folder for spilled traces cannot be written to: {error.strerror}",
            str(path),
        ) from None
    return path


class SpillFile:
    """The file of this process. It is there while it has something in it that is not stored.

    Any thread may call. Everything is appended; what is stored is noted at the end. When nothing
    is left, the file is emptied.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.RLock()
        self._descriptor: int | None = None
        self._path: Path | None = None
        self._end = 0
        self._start = 0  # where the first line ends
        self._superfluous = 0
        self._is_torn = False  # the last line is not whole: the disk was full
        # Where each trace is that is not stored: in the order in which they were written.
        self._places: OrderedDict[str, tuple[int, int, Destination]] = OrderedDict()
        self._out: set[str] = set()  # read back, and on their way

    def write(self, item: Outgoing, *, is_durable: bool = False, is_out: bool = False) -> None:
        """Put a trace into the file.

        Args:
            item: the trace.
            is_durable: let it survive a power failure, too.
            is_out: it is on its way at the same time.

        Raises:
            OSError: the disk is full, or gone.
        """
        line = as_line(item)
        with self._lock:
            for name, attachment in item.attachments.items():
                self._write_attachment(name, attachment.content_bytes)
            place = self._append(line)
            if is_durable and self._descriptor is not None:
                os.fsync(self._descriptor)
            self._places[item.key] = (*place, item.destination)
            if is_out:
                self._out.add(item.key)

    def note(self, data: Mapping[str, Any]) -> None:
        """Put something into the file that is of use only to who finds it after a crash."""
        with self._lock:
            self._append(as_text(data))

    def take(self, count: int) -> list[Outgoing]:
        """Read back the oldest traces that are not on their way."""
        with self._lock:
            names = [name for name in self._places if name not in self._out][:count]
            found = [self._read(name) for name in names]
            self._out.update(names)
        return [item for item in found if item is not None]

    def put_back(self, key: str) -> None:
        """Take note that something which was read back is not stored after all."""
        with self._lock:
            self._out.discard(key)

    def forget(self, keys: Sequence[str]) -> None:
        """Take note that things are stored, or not to be stored at all."""
        with self._lock:
            known = [name for name in keys if name in self._places]
            if not known:
                return
            for name in known:
                self._superfluous += self._places.pop(name)[1]
                self._out.discard(name)
            if not self._places:
                self._empty()
                return
            with suppress(OSError):  # a second replay adds nothing
                self._append(as_text({"kind": "stored", "ids": known}))
            if self._superfluous > max(_SUPERFLUOUS_BYTES, self._end // 2):
                self._write_anew()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    @property
    def is_waiting(self) -> bool:
        """Tell whether there is something that is not on its way."""
        return len(self._places) > len(self._out)

    def close(self) -> None:
        """Let go of the file; it goes away if all in it is stored."""
        with self._lock:
            if self._descriptor is not None:
                if not self._places and self._path is not None:
                    self._path.unlink(missing_ok=True)
                    shutil.rmtree(attachments_beside(self._path), ignore_errors=True)
                os.close(self._descriptor)
                self._descriptor = self._path = None

    # -- the file ------------------------------------------------------------------------------

    def _open(self) -> int:
        if self._descriptor is None:
            name = f"spanguard-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
            self._path = self._folder / name
            self._descriptor = _new_file(self._path)
            self._end = self._start = 0
            self._append(as_text(_first_line()))
            self._start = self._end
        return self._descriptor

    def _append(self, line: bytes) -> tuple[int, int]:
        descriptor = self._open()
        if self._is_torn:
            line = b"\n" + line
        self._is_torn = True
        start = self._end
        left = memoryview(line)
        while left:
            count = os.write(descriptor, left)
            self._end += count
            left = left[count:]
        self._is_torn = False
        return start, len(line)

    def _read(self, key: str) -> Outgoing | None:
        start, length, destination = self._places[key]
        assert self._descriptor is not None
        try:
            os.lseek(self._descriptor, start, os.SEEK_SET)
            data = json.loads(os.read(self._descriptor, length))
            return from_data(data, destination, self._attachments(data))
        except (OSError, ValueError, KeyError):
            return None

    def _attachments(self, data: Mapping[str, Any]) -> dict[str, bytes]:
        assert self._path is not None
        return read_attachments(self._path, data.get("attachments", ()))

    def _write_attachment(self, name: str, content: bytes) -> None:
        self._open()
        assert self._path is not None
        folder = attachments_beside(self._path)
        folder.mkdir(mode=_FOLDER_MODE, exist_ok=True)
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
        descriptor = os.open(folder / _plain_name(name), flags, _FILE_MODE)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)

    def _empty(self) -> None:
        assert self._descriptor is not None and self._path is not None
        with suppress(OSError):
            os.ftruncate(self._descriptor, self._start)
            self._end, self._superfluous, self._is_torn = self._start, 0, False
        shutil.rmtree(attachments_beside(self._path), ignore_errors=True)

    def _write_anew(self) -> None:
        """Write the file again without what is stored, in one step for who looks at it."""
        assert self._descriptor is not None and self._path is not None
        old, path = self._descriptor, self._path
        new = path.with_suffix(".new")
        with suppress(OSError):
            self._descriptor = _new_file(new)
            places, self._end = dict(self._places), 0
            self._append(as_text(_first_line()))
            for name, (start, length, destination) in places.items():
                os.lseek(old, start, os.SEEK_SET)
                place = self._append(os.read(old, length).lstrip(b"\n"))
                self._places[name] = (*place, destination)
            new.replace(path)
            self._superfluous = 0
            os.close(old)


def _new_file(path: Path) -> int:
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0), _FILE_MODE)
    hold(descriptor)
    return descriptor


def _first_line() -> dict[str, Any]:
    return {
        "kind": "file",
        "format": FORMAT,
        "pid": os.getpid(),
        "python": sys.version.split()[0],
        "written": int(time.time()),
    }


def attachments_beside(path: Path) -> Path:
    """Return the folder with the attachments of a file's traces."""
    return path.with_suffix(".attachments")


def read_attachments(path: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Return the bytes of attachments, as far as they are there."""
    found: dict[str, bytes] = {}
    for name in names:
        with suppress(OSError):
            found[name] = (attachments_beside(path) / _plain_name(name)).read_bytes()
    return found


def _plain_name(name: str) -> str:
    return "".join(char for char in name if char.isalnum() or char in "-_")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what is in a file, without the lines that a crash has cut off."""
    with path.open("rb") as file:
        for line in file:
            with suppress(ValueError):
                data = json.loads(line)
                if isinstance(data, dict):
                    yield data
