"""Why a trace did not get into the store, in a few words without its data."""

from __future__ import annotations

import re

from spanguard._base.findings import PASSWORD

__all__ = ["GONE", "reason_of"]


GONE = "MLflow gave no reason"

_MAX_REASON_CHARS = 200
# Where data may begin: a statement's parameters, JSON, a server's words about what it was sent.
_DATA = re.compile(r"[\[{]|Response body|DETAIL")
_NO_REASON = re.compile(r"\(raised as a result of [^)]*\)")  # but what SQLAlchemy says before it
_TRACE_ID = re.compile(r"tr-[0-9a-f]{32}")  # one reason, not one for each trace


def reason_of(error: BaseException) -> str:
    """Return in a few words why MLflow or the store failed. No payload gets into them."""
    try:
        text = _DATA.split(PASSWORD.sub("://***@", str(error)), maxsplit=1)[0]
        text = _TRACE_ID.sub("tr-...", " ".join(_NO_REASON.sub("", text).split()))
        text = text.encode(errors="backslashreplace").decode()
    except Exception:  # noqa: BLE001
        text = ""
    return text.strip(" .:")[:_MAX_REASON_CHARS] or type(error).__qualname__
