"""A file that one process holds: another can tell, also when the first has died."""

from __future__ import annotations

import sys

__all__ = ["hold"]


if sys.platform == "win32":
    import msvcrt

    def hold(descriptor: int) -> bool:
        """Hold an open file for this process; False where another one holds it."""
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def hold(descriptor: int) -> bool:
        """Hold an open file for this process; False where another one holds it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
