"""Lines of tests, to compare with those that spanguard names."""

from __future__ import annotations

import sys


def here() -> int:
    """Return the caller's line."""
    return sys._getframe(1).f_lineno
