"""What becomes of a broken rule: an error in strict mode, one warning per site otherwise.

And of a failure inside spanguard or MLflow: one log line per site, never an exception.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from spanguard._base.config import is_strict
from spanguard._base.interrupts import let_the_users_pass
from spanguard._base.site import Site
from spanguard.exceptions import SpanguardError, SpanguardWarning

__all__ = [
    "PASSWORD",
    "afresh",
    "contained",
    "forget_sites",
    "internal_error",
    "logger",
    "note_unraised",
    "settle",
    "unraised",
    "warn_once",
]


logger = logging.getLogger("spanguard")

# Our own test suite sets this: a failure that production contains must fail a test.
reraise_internal = False

# Findings that strict mode could not raise, because a user's exception was on its way or the
# garbage collector found them. A test run collects them here, in the innermost list.
unraised: list[list[SpanguardError]] = []

# Bounded by the call sites a program has; forgotten before it could grow without bound.
_MAX_REMEMBERED = 10_000


class _Told:
    """What has been told already: warnings by kind, function and line; failures by place."""

    __slots__ = ("failures", "warnings")

    def __init__(self) -> None:
        self.warnings: set[object] = set()
        self.failures: set[object] = set()


_told = _Told()


def settle(
    findings: Sequence[SpanguardError],
    *,
    strict: bool | None,
    raised: BaseException | None,
    site: Site,
) -> None:
    """Raise the first finding (strict) or warn of each of them (lenient).

    With a user's exception on its way (`raised`), nothing is raised here: the strict findings
    become notes on that exception.
    """
    if not findings:
        return
    if not is_strict(strict):
        for finding in findings:
            _warn_once(finding, site, raised)
        return
    if raised is None:
        first, *others = findings
        for other in others:
            _annotate(first, other, site)
        raise first
    for finding in findings:
        note_unraised(finding)
        _annotate(raised, finding, site)


def note_unraised(finding: SpanguardError) -> None:
    """Let a test run know of a finding that nobody can catch."""
    for innermost in unraised[-1:]:
        innermost.append(finding)


def _annotate(exception: BaseException, finding: SpanguardError, site: Site) -> None:
    if sys.version_info >= (3, 11):
        try:
            exception.add_note(f"{type(finding).__name__}: {finding}")
            return
        except Exception:  # noqa: BLE001 - an exception type may refuse notes: fall back to the warning
            pass
    _warn_once(finding, site, exception)


def _warn_once(finding: SpanguardError, site: Site, raised: BaseException | None) -> None:
    try:
        warn_once(str(finding), finding.warning, finding.site or site)
    except Warning:
        # `-W error`: the user asked for exceptions, but never in place of one of theirs.
        if raised is None:
            raise


def warn_once(text: str, category: type[SpanguardWarning], spot: Site) -> None:
    """Warn at a line of a function, the first time that something of this kind is found there."""
    told = _told
    code = spot.code
    key = (category.__name__, code.co_filename, spot.line, code.co_name)
    warning = category(text)
    warning._told = (told, key)
    recorded = _recorded_warnings()
    if recorded is not None:
        if any(_is_told(entry, told, key) for entry in recorded):
            return
    elif not _is_new(told.warnings, key):
        return
    # A registry of its own: "once" is ours to decide, not the interpreter's per-module memory.
    warnings.warn_explicit(warning, category, code.co_filename, spot.line, registry={})


def _is_new(known: set[object], key: object) -> bool:
    if key in known:
        return False
    if len(known) >= _MAX_REMEMBERED:
        known.clear()
    known.add(key)
    return True


def _recorded_warnings() -> list[object] | None:
    """Return the record of `catch_warnings(record=True)`, `pytest.warns`, `assertWarns` and such.

    Whoever records warnings wants to see them: in a record it is once per line and record, not
    once per process (issue 9, 29). The record itself says what is in it already, so nothing is to
    be remembered. None where warnings are shown, or nobody can tell.
    """
    record = getattr(getattr(warnings, "_showwarnmsg_impl", None), "__self__", None)
    is_replaced = warnings.showwarning is not getattr(warnings, "_showwarning_orig", None)
    return record if type(record) is list and not is_replaced else None


def _is_told(entry: object, told: _Told, key: object) -> bool:
    found = getattr(getattr(entry, "message", None), "_told", None)
    return type(found) is tuple and found[0] is told and found[1] == key


def forget_sites() -> None:
    """Let every site warn and log again."""
    global _told
    _told = _Told()


@contextmanager
def afresh() -> Iterator[None]:
    """Let every site warn and log again in a block, and remember after it what was told before."""
    global _told
    before = _told
    forget_sites()
    try:
        yield
    finally:
        _told = before


def internal_error(where: str, error: BaseException, *, quoted: bool = False) -> None:
    """Log a failure that is not the user's, once per place. No payload gets into the line.

    What a handler of the user's for a signal has raised in the middle of our code is raised on.

    Args:
        where: what was being done.
        error: what failed.
        quoted: say MLflow's own message too, which often names the cure. For what is done without
            a payload: listening, looking up, flushing.
    """
    let_the_users_pass(error)
    key = (where, type(error).__qualname__)
    if _is_new(_told.failures, key):
        # The message of the error may quote a payload: else type and place only.
        logger.warning(
            "%s failed with %s%s%s; the traced code is not affected. Logged once.",
            where,
            type(error).__qualname__,
            _innermost_line(error),
            _message(error) if quoted else "",
        )
    if reraise_internal:
        raise error


# Whose messages are MLflow's own, or of what it could not open.
_QUOTED = frozenset({"mlflow", "sqlalchemy", "alembic"})
_MAX_QUOTED_CHARS = 800
PASSWORD = re.compile(r"://[^/@\s]*@")


def _message(error: BaseException) -> str:
    """Return what MLflow says, on one line, without passwords and the values of a query."""
    package = type(error).__module__.partition(".")[0]
    if package not in _QUOTED and not isinstance(error, ImportError):
        return ""
    try:
        said = str(error).partition("[SQL:")[0]
    except Exception:  # noqa: BLE001
        return ""
    line = PASSWORD.sub("://***@", " ".join(said.split()))
    if len(line) > _MAX_QUOTED_CHARS:  # the cure may stand first or last
        half = _MAX_QUOTED_CHARS // 2
        line = f"{line[:half]} … {line[-half:]}"
    return f' ("{line}")'.encode(errors="backslashreplace").decode() if line else ""


def _innermost_line(error: BaseException) -> str:
    traceback = error.__traceback__
    if traceback is None:
        return ""
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return f" at {traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"


class contained:
    """A with-block that keeps a failure of ours or of MLflow's away from the user's code.

    A class, because a generator-based context manager costs four times as much per write.
    """

    __slots__ = ("_where",)

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if isinstance(error, Exception):
            internal_error(self._where, error)
            return True
        return False
