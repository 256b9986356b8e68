"""What is written on a span that was open when its process died: as on any orphan."""

from __future__ import annotations

import json
from typing import Any

from spanguard._record.outcome import ORPHANED
from spanguard._record.writing import ORPHANED_BY, OUTCOME

__all__ = ["orphan_by_crash"]


_WHY = "orphaned: its process died while it was open"


def orphan_by_crash(span: dict[str, Any]) -> None:
    """Write on the plain data of a span (`Span.to_dict`) that a crash has left it open."""
    span["status"] = {"code": "STATUS_CODE_ERROR", "message": _WHY}
    span["attributes"] = {
        **span["attributes"],
        OUTCOME: json.dumps(ORPHANED.name),
        ORPHANED_BY: json.dumps("crash"),
    }
    event = {
        "name": "exception",
        "time_unix_nano": span["end_time_unix_nano"],
        "attributes": {"exception.type": ORPHANED.name, "exception.message": _WHY},
    }
    span["events"] = [*span.get("events", ()), event]
