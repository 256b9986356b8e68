"""What a seam is: a private or half-public name of others that is used here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["FORKED", "PROVIDER", "SDK", "Seam", "UNDONE", "each"]


@dataclass(frozen=True)
class Seam:
    """A name that others may rename without notice.

    Attributes:
        path: `module:Name.attribute`. An attribute is one of the class, or one that a method of
            the class sets on its instances. After `says` comes a text that code of it contains.
        needed_by: the modules of `spanguard._mlflow` that use it; others by their full name.
        without: what is lost where it is missing, in one sentence.
        since: the first MLflow that has it, or from which on it is needed.
        until: the last one that has it, or in which it is needed; None: there is no newer one
            that lacks it.
        is_needed: without it nothing, or hardly anything, is recorded.
        flush_needs: without it nobody can tell whether a trace is stored.
    """

    path: str
    needed_by: str
    without: str
    since: str = "3.10"
    until: str | None = None
    is_needed: bool = False
    flush_needs: bool = False


def each(paths: tuple[str, ...], needed_by: str, without: str, **more: Any) -> tuple[Seam, ...]:
    """Return seams that are needed for the same reason."""
    return tuple(Seam(path, needed_by, without, **more) for path in paths)


PROVIDER = "mlflow.tracing.provider:"
SDK = "opentelemetry.sdk.trace:"
FORKED = "A forked child may wait for a lock of its parent's for ever, and spans of it are lost."
UNDONE = "A test's recording leaves what it changed as it is."
