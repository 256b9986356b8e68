"""How traces are delivered. What delivers them is imported only where it is on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """How traces are delivered: the arguments of `deliver()`."""

    max_pending_bytes: int = 256 * 2**20
    batch_traces: int = 200
    interval_seconds: float = 1.0
    spill: Path | None = None
    durable: bool = False
