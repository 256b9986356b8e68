"""Any value as text that cannot fail, cut to a length."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from spanguard._base.interrupts import is_the_users
from spanguard._base.values import kind_name, text_of

__all__ = [
    "SHORT_STRING",
    "clean_text",
    "cut",
    "is_utf8",
    "safe_repr",
    "shortened",
    "utf8",
    "whole_text",
]


MAX_NAME_CHARS = 250
_DIGEST_CHARS = 16

SHORT_STRING = 255  # below this nobody encodes a picture


def is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates: the store would refuse the whole span
        return False
    return True


def utf8(text: str) -> str:
    if text.isascii() or is_utf8(text):
        return text
    return text.encode("utf-8", "backslashreplace").decode()


def cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[:limit]}[spanguard: {len(text) - limit} characters cut]"


def _rendered(render: Callable[[object], str], value: object) -> str:
    try:
        text = render(value)
        return str.__str__(text)
    except BaseException as error:
        if is_the_users(error):
            raise
        return f"<{kind_name(value)} object, its text raised {kind_name(error)}>"


def _as_text(value: object) -> str:
    """Return a string itself, of anything else its text."""
    text = text_of(value)
    return _rendered(str, value) if text is None else text


def safe_repr(value: object) -> str:
    """Return `repr(value)`, or what there is to say when that raises."""
    return _rendered(repr, value)


def clean_text(value: object, limit: int = MAX_NAME_CHARS) -> str:
    """Return `str(value)` as valid UTF-8 without NULs, cut at `limit` characters."""
    text = value if type(value) is str else _as_text(value)
    if len(text) <= limit and text.isascii() and "\x00" not in text:
        return text
    return cut(utf8(text[: limit + 1_000_000]).replace("\x00", "\\x00"), limit)


def whole_text(value: object) -> str:
    """Return `str(value)` as valid UTF-8 without NULs, uncut."""
    return utf8(_as_text(value)).replace("\x00", "\\x00")


def shortened(text: str, limit: int) -> str:
    """Return a text that fits in so many characters; two texts that differ stay different."""
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_CHARS]
    return f"{text[: limit - _DIGEST_CHARS - 1]}~{digest}"
