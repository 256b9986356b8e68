"""Settings that are a plain call for the process, and a with-block for one thread or task."""

from __future__ import annotations

import dis
import weakref
from abc import ABC, abstractmethod
from contextvars import ContextVar
from types import FrameType, TracebackType
from typing import Any

from spanguard._base.collector import is_collecting

__all__ = ["Mark", "Setting", "SettingBlock", "context_settings", "innermost"]


# The blocks in force in this context, the innermost last. They may leave in any order.
context_settings: ContextVar[tuple[SettingBlock, ...]] = ContextVar(
    "spanguard_settings", default=()
)


class SettingBlock:
    """What one with-block puts in force. A task that was begun in the block keeps it."""

    __slots__ = ("is_dropped", "kind", "value")

    def __init__(self, kind: type[Setting], value: Any) -> None:
        self.kind = kind
        self.value = value
        # Its setting is gone, and nothing of it left the block: an interrupt did, or what held
        # the block open was thrown away. Then it is in force nowhere.
        self.is_dropped = False


class Setting(ABC):
    """What a setter returns.

    A plain call is in force for the process from there on; a with-block in its context only, and
    the process never sees it.

    A call does not know what becomes of its result, and must not set the process for the moment
    until a block is entered: another thread would see it. So the caller's next step is read, in
    its bytecode. Where that is a with-statement, nothing is set. Where the result goes through
    another call first (`stack.enter_context(strict())`) or is returned, the process is set when
    the result is dropped without ever having been entered. Anything else is a plain call.
    """

    _waits = False
    _is_in_force = False
    _blocks: tuple[SettingBlock, ...] = ()  # those that it was entered for, and has not left

    def called_from(self, caller: FrameType) -> None:
        """Be set for the process, unless the caller is about to make a block of it."""
        use = _next_use(caller)
        if use == "passed on" and self._can_wait:
            self._waits = True
        elif use != "block":
            self._set_process()

    # Whether it may be set where it is dropped, which can be in the garbage collector.
    _can_wait = True

    def _set_process(self) -> None:
        self._waits = False
        self._is_in_force = True
        self._apply()

    @abstractmethod
    def _apply(self) -> None:
        """Be in force for the process."""

    @abstractmethod
    def _withdraw(self) -> None:
        """Be no longer in force for the process; what was set since stays."""

    def __enter__(self) -> Any:
        self._waits = False
        if self._is_in_force:  # `setting = strict()`, and a block of it afterwards
            self._is_in_force = False
            self._withdraw()
        block = SettingBlock(type(self), self._value())
        self._blocks = (*self._blocks, block)  # first: an interrupt finds what is to be dropped
        here = [other for other in context_settings.get() if not other.is_dropped]
        context_settings.set((*here, block))
        return block.value

    @abstractmethod
    def _value(self) -> Any:
        """Return what is in force in a block that is entered now."""

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Out of the middle, if need be. In another context, which never saw it, nothing is found;
        # and in the one that did, it is dropped with this object.
        here = context_settings.get()
        for block in reversed(self._blocks):
            if is_collecting():  # the body of a generator: no variable may be set here
                block.is_dropped = True
            elif block in here:
                context_settings.set(tuple(other for other in here if other is not block))
                self._blocks = tuple(other for other in self._blocks if other is not block)
                return

    def __del__(self) -> None:
        for block in self._blocks:
            block.is_dropped = True
        if self._waits:
            self._set_process()


def innermost(kind: type[Setting]) -> Any:
    """Return what the innermost block of a kind puts in force here; None where there is none."""
    for block in reversed(context_settings.get()):
        if block.kind is kind and not block.is_dropped:
            return block.value
    return None


# -- what is set for the process ---------------------------------------------------------------


class Mark:
    """One plain call, on top of those before it that may still be taken back."""

    __slots__ = ("_setting", "under", "values")

    _setting: weakref.ref[Setting]
    values: dict[str, Any]
    under: Mark | None

    def __init__(self, setting: Setting, values: dict[str, object], under: Mark | None) -> None:
        if under is not None and under._setting() is None:
            # Nobody has its setting any more, to make a block of it: it stays, and is all there is.
            under.values, under.under = under.all_values(), None
        self._setting = weakref.ref(setting)
        self.values = values
        self.under = under

    def all_values(self) -> dict[str, Any]:
        """Return what is set by this call and those before it."""
        return {**(self.under.all_values() if self.under is not None else {}), **self.values}

    def without(self, setting: Setting) -> Mark | None:
        """Return what is left when a call is taken back."""
        if self._setting() is setting:
            return self.under
        if self.under is not None:
            self.under = self.under.without(setting)
        return self


# -- what a caller does next -------------------------------------------------------------------

# By what the names of instructions begin with, on Python 3.10 to 3.14.
_USES = {
    "SETUP_WITH": "block",
    "BEFORE_WITH": "block",
    "LOAD_SPECIAL": "block",
    "CALL_INTRINSIC": "plain",  # shows the result at a prompt
    "CALL": "passed on",
    "PRECALL": "passed on",
    "RETURN": "passed on",
    "YIELD": "passed on",
    "JUMP": "passed on",
    "POP_JUMP": "passed on",
    "POP": "plain",
    "STORE": "plain",
    "PRINT_EXPR": "plain",
    "BUILD": "plain",
}
_FAR = 200  # bytes: a statement decides much sooner


def _next_use(caller: FrameType) -> str:
    """Tell what a caller does with the result of the call that it is in: see `_USES`."""
    above = 0  # what lies on the result on the interpreter's stack
    argument = 0
    start = caller.f_lasti + 2
    code = caller.f_code.co_code[start : start + _FAR]
    for operation, part in zip(code[::2], code[1::2], strict=False):
        argument = argument << 8 | part
        name = dis.opname[operation]
        if name == "EXTENDED_ARG":
            continue
        effect = _effect(operation, argument)
        argument = 0
        use = next((use for start, use in _USES.items() if name.startswith(start)), None)
        # How much of what lies above is left when it has taken what it takes, and put nothing
        # back yet: a call, or what builds a list, puts back one (but not 3.11's PRECALL).
        left = above + effect - name.startswith(("CALL", "BUILD"))
        takes = left < 0 if name.startswith(("CALL", "PRECALL", "BUILD")) else above == 0
        if use is not None and takes:
            return use
        above += effect
        if above < 0:
            break
    return "plain"


def _effect(operation: int, argument: int) -> int:
    """Return by how much an instruction makes the interpreter's stack grow."""
    if dis.opname[operation] == "CACHE":
        return 0
    try:
        return dis.stack_effect(operation, argument if operation >= dis.HAVE_ARGUMENT else None)
    except ValueError:
        return 0
