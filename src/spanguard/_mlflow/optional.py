"""What not every supported MLflow has: looked for once, at import."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["optional", "optional_module"]


def optional_module(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def optional(module: str, name: str) -> Any:
    return getattr(optional_module(module), name, None)
