"""Exceptions that are the user's, in the middle of our code: Ctrl-C, what a handler raises."""

from __future__ import annotations

import inspect
import threading
from types import FrameType

from spanguard._base.site import is_machinery

__all__ = [
    "all_held_back",
    "forget_held_back",
    "hold_back_the_users",
    "is_the_users",
    "let_the_users_pass",
    "raise_held_back",
]


def is_the_users(error: BaseException) -> bool:
    """Tell whether an exception that came up in our code is the user's, and not to be contained."""
    return the_users(error) is error


# How far a chain of causes is followed.
_MAX_CAUSES = 20


def the_users(error: BaseException) -> BaseException | None:
    """Return the exception of the user's that an error in our code is, or was made of.

    That is: Ctrl-C, and whatever a signal handler raises (issue 9, A3).
    """
    found: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if found is None or issubclass(type(found), KeyboardInterrupt) or _is_of_a_handler(found):
            return found
        found = found.__context__ if found.__cause__ is None else found.__cause__
        if found is not None and not _was_caught_by_machinery(found):
            return None  # the one that is on its way through a block of the user's already
    return None


def _was_caught_by_machinery(error: BaseException) -> bool:
    """Tell an exception that MLflow or we have caught from one that came from the user's code."""
    traceback = error.__traceback__
    return traceback is not None and is_machinery(str(traceback.tb_frame.f_globals.get("__name__")))


def _is_of_a_handler(error: BaseException) -> bool:
    """Tell whether a signal handler raised an exception.

    A handler runs between any two instructions, so its frame stands in the traceback right above
    the one it interrupts, and that very frame is what it was called with.
    """
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        interrupted, traceback = traceback.tb_frame, traceback.tb_next
        for given in _arguments(traceback.tb_frame):
            if given is interrupted:
                return True
    return False


def _arguments(frame: FrameType) -> list[object]:
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    given: list[object] = [frame.f_locals.get(name) for name in code.co_varnames[:count]]
    if code.co_flags & inspect.CO_VARARGS:
        rest = frame.f_locals.get(code.co_varnames[count])
        given += rest if type(rest) is tuple else ()
    return given


# What a signal handler raised in the middle of MLflow, or of what MLflow has called, and that may
# be swallowed there. By thread: whether it is empty is asked at each start and end of a span.
all_held_back: dict[int, BaseException] = {}


def _hold_back(users: BaseException) -> None:
    all_held_back[threading.get_ident()] = users


def let_the_users_pass(error: BaseException) -> None:
    """Raise the user's exception that an error caught in our code is, or was made of."""
    users = the_users(error)
    if users is not None:
        _hold_back(users)
        raise users


def hold_back_the_users(error: BaseException) -> None:
    """Take note of an error that MLflow swallows, if it is the user's."""
    users = the_users(error)
    if users is not None:
        _hold_back(users)


def forget_held_back() -> None:
    """Forget what this thread has held back: it has reached the user, or came too early."""
    all_held_back.pop(threading.get_ident(), None)


def raise_held_back() -> None:
    """Raise the user's exception that MLflow has swallowed in this thread, if there is one."""
    held_back = all_held_back.pop(threading.get_ident(), None)
    if held_back is not None:
        raise held_back
