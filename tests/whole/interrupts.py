"""Raise KeyboardInterrupt at a line of spanguard's own code: any line that a piece of work runs."""

from __future__ import annotations

import dis
import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import spanguard

__all__ = [
    "Interrupt",
    "SoftTimeLimit",
    "by_ctrl_c",
    "by_signal_handler",
    "places_of",
    "run_interrupted",
]

OURS = str(Path(spanguard.__file__).parent)

Line = tuple[str, int]
Place = tuple[CodeType, Line]


class Interrupt(KeyboardInterrupt):
    """What the tracer raises. Not an Exception: nothing of ours may catch it and go on."""


class SoftTimeLimit(Exception):
    """What a signal handler raises: an Exception like any other, but for where it comes from."""


def by_ctrl_c() -> None:
    raise Interrupt


def by_signal_handler() -> None:
    """Let a real handler raise, as that of Celery's soft time limit does."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise SoftTimeLimit

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(OURS)


def places_of(work: Callable[[], Any]) -> dict[Place, list[int]]:
    """Run a piece of work; return the lines of ours that it ran, by the function of ours that the
    work had called: for each the turns of the line, of all in the work, at which it ran.
    """
    turns: dict[Line, int] = {}
    places: dict[Place, list[int]] = {}

    def follow(frame: FrameType, event: str, arg: Any) -> Any:
        if not _is_ours(frame):
            return None
        face = _outermost_of_ours(frame)

        def note(frame: FrameType, event: str, arg: Any) -> Any:
            if event == "line" and not _is_leaving_a_block(frame):
                line = (frame.f_code.co_filename, frame.f_lineno)
                turns[line] = turns.get(line, 0) + 1
                places.setdefault((face, line), []).append(turns[line])
            return note

        return note

    _traced(work, follow)
    return places


def _outermost_of_ours(frame: FrameType) -> CodeType:
    face = frame
    above = frame.f_back
    while above is not None:
        if _is_ours(above):
            face = above
        above = above.f_back
    return face.f_code


def run_interrupted(
    work: Callable[[], Any],
    at: Line,
    turn: int,
    interrupt: Callable[[], None] = by_ctrl_c,
) -> bool:
    """Run a piece of work, interrupted at a line the n-th time it comes there.

    Returns:
        False if the interrupt was raised and did not come out of the work; True otherwise, also
        if this time the work did not come to that line, or came there in a finalizer, out of
        which Python lets no exception.
    """
    left = [turn]
    unraisable = False

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal unraisable
        here = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and left[0] and here == at and not _is_leaving_a_block(frame):
            left[0] -= 1
            if not left[0]:
                unraisable = _is_in_finalizer(frame)
                interrupt()
        return local

    try:
        _traced(work, lambda frame, event, arg: local if _is_ours(frame) else None)
    except (Interrupt, SoftTimeLimit):
        return True
    return bool(left[0]) or unraisable


@functools.cache
def _leaves_of(code: CodeType) -> frozenset[int]:
    """Return the offsets at which a with-block is left: up to its exit no interrupt is raised.

    Python looks for signals elsewhere; a tracer that raises there leaves a lock locked for ever.
    """
    found = []
    instructions = [one for one in dis.get_instructions(code) if one.opname != "CACHE"]
    for number, one in enumerate(instructions):
        names = [other.opname for other in instructions[number : number + 5]]
        if names[0] == "POP_BLOCK":  # Python 3.10
            names = names[1:]
        nones = one.opname == "POP_BLOCK" or (one.opname == "LOAD_CONST" and one.argval is None)
        if nones and names[:3] in (["LOAD_CONST"] * 3, ["LOAD_CONST", "DUP_TOP", "DUP_TOP"]):
            found.append(one.offset)
    return frozenset(found)


def _is_leaving_a_block(frame: FrameType) -> bool:
    return frame.f_lasti in _leaves_of(frame.f_code)


def _is_in_finalizer(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name in ("__del__", "_forget"):
            return True
        frame = frame.f_back
    return False


def _traced(work: Callable[[], Any], tracer: Any) -> None:
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        work()
    finally:
        sys.settrace(before)
