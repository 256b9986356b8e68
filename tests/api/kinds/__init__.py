"""Callables of every kind, in sources that run twice: in callables.py, and traced.

A source asks by the name of the module it runs in whether it is the traced one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import CodeType

SOURCES = ("functions", "objects", "methods", "classes", "descriptors")


def sources() -> Iterator[CodeType]:
    """Return the code of each source, in their order."""
    for name in SOURCES:
        path = Path(__file__).with_name(f"{name}.py")
        yield compile(path.read_text(encoding="utf-8"), str(path), "exec")
