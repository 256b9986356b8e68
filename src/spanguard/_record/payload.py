"""Make any Python value recordable: what MLflow cannot take is replaced, not lost.

MLflow serialises payloads with json and an encoder of its own. A value that is plain JSON and
small passes through untouched, at the cost of one walk. Everything else is rebuilt: strings are
cut at the cap and made valid UTF-8, integers beyond 64 bits become strings (the REST transport
has no wider ones), circular and too deep places get a marker, foreign objects are encoded as
MLflow would encode them and, where that fails, by a `repr` that cannot raise.
"""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

from spanguard._base.config import current_limits
from spanguard._base.interrupts import is_the_users
from spanguard._base.values import is_a, is_mapping, kind_name
from spanguard._mlflow import names, payloads
from spanguard._record.text import SHORT_STRING, clean_text, cut, is_utf8, safe_repr, utf8

__all__ = [
    "Budget",
    "MAX_LABEL_CHARS",
    "as_mapping",
    "clean",
    "clean_attributes",
    "clean_facts",
    "clean_key",
    "clean_labels",
    "is_plain_under",
    "is_simple",
    "known_keys",
]


MAX_DEPTH = 100
MAX_LABEL_CHARS = 4_000  # a tag's or a metadata entry's value
_INT64 = 2**63 - 1
_MAX_DECIMAL_BITS = 10_000  # below Python's limit of 4300 digits
_NODE_CHARS = 8  # what a number, a separator or a bracket costs of the budget

_MAX_PAIRS = 10_000  # of an iterable that may have no end

_NOT_PLAIN = -1


def clean(value: object) -> Any:
    """Return the value itself if MLflow can record it as it is, else a recordable likeness."""
    return value if is_plain(value) else Budget().take(value)


class Budget:
    """The characters that one payload may hold, also where it is taken part by part."""

    __slots__ = ("_rebuilder",)

    def __init__(self) -> None:
        self._rebuilder = _Rebuilder(current_limits().value_chars)

    @property
    def is_spent(self) -> bool:
        return self._rebuilder.left <= 0

    def take(self, value: object) -> Any:
        """Return a recordable likeness that shares nothing with the value that could change."""
        try:
            return self._rebuilder.rebuild(value, MAX_DEPTH)
        except BaseException as error:
            if is_the_users(error):
                raise
            return f"[spanguard: {kind_name(value)} not recorded, {kind_name(error)}]"


def is_plain(value: object) -> bool:
    """Tell whether a value is plain JSON within the caps."""
    return _is_within(value, current_limits().value_chars, any_string=True)


def is_plain_under(value: Any, limit: int) -> bool:
    """Do what `is_plain` does under a cap that is known: most attributes are one short value."""
    kind = type(value)
    if kind is str:
        return len(value) <= limit and (value.isascii() or is_utf8(value))
    return kind is bool or kind is float or _is_within(value, limit, any_string=True)


def is_simple(value: object) -> bool:
    """Tell whether a value is plain and can hold nothing that MLflow stores as an attachment."""
    return _is_within(value, current_limits().value_chars, any_string=False)


def _is_within(value: object, limit: int, *, any_string: bool) -> bool:
    try:
        return 0 <= _plain_cost(value, MAX_DEPTH, limit, any_string) <= limit
    except (RuntimeError, RecursionError):
        return False  # changed by another thread while we looked, or the stack is nearly used up


def _plain_cost(value: Any, depth: int, limit: int, any_string: bool) -> int:  # noqa: C901, PLR0912
    """Return the characters a plain JSON value takes, or _NOT_PLAIN."""
    kind = type(value)
    if kind is str:
        if not (value.isascii() or is_utf8(value)):
            return _NOT_PLAIN
        if not any_string and (len(value) > SHORT_STRING or value.startswith("data:")):
            return _NOT_PLAIN
        return len(value)
    if kind is int:
        return _NODE_CHARS if -_INT64 <= value <= _INT64 else _NOT_PLAIN
    if kind is float or kind is bool or value is None:
        return _NODE_CHARS
    if depth <= 0:
        return _NOT_PLAIN
    total = _NODE_CHARS
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str or not (key.isascii() or is_utf8(key)):
                return _NOT_PLAIN
            if not any_string and key in names.ATTACHMENT_KEYS:
                return _NOT_PLAIN
            of_item = type(item)
            if of_item is str and len(item) <= SHORT_STRING and item.isascii():
                # The most frequent of all, without a call.
                cost = _NOT_PLAIN if not any_string and item.startswith("data:") else len(item)
            else:
                cost = _plain_cost(item, depth - 1, limit, any_string)
            total += len(key) + cost
            if cost < 0 or total > limit:
                return _NOT_PLAIN
        return total
    if kind is list or kind is tuple:
        for item in value:
            cost = _plain_cost(item, depth - 1, limit, any_string)
            total += cost
            if cost < 0 or total > limit:
                return _NOT_PLAIN
        return total
    return _NOT_PLAIN


class _Rebuilder:
    """One walk over a value that is not plain, with one budget of characters for all of it."""

    def __init__(self, limit: int) -> None:
        self.left = limit
        self._path: set[int] = set()

    def rebuild(self, value: Any, depth: int) -> Any:
        self.left -= _NODE_CHARS
        if value is None or is_a(value, bool):
            return value
        if is_a(value, str):
            return self._text(str.__str__(value))
        if is_a(value, int):
            return self._integer(value)
        if is_a(value, float):
            return float.__add__(value, 0.0)
        if payloads.is_attachment(value):
            return value
        if is_a(value, (dict, list, tuple)):
            return self._container(value, depth)
        return self._foreign(value, depth)

    def _container(self, value: Any, depth: int) -> object:
        if depth <= 0:
            return f"[spanguard: nested deeper than {MAX_DEPTH} levels]"
        if id(value) in self._path:
            return "[spanguard: circular reference]"
        self._path.add(id(value))
        try:
            # The base classes' own iteration: a subclass may raise in its.
            if is_a(value, dict):
                return self._mapping(list(dict.items(value)), depth - 1)
            items = list.__iter__(value) if is_a(value, list) else tuple.__iter__(value)
            return self._sequence(list(items), depth - 1)
        finally:
            self._path.discard(id(value))

    def _mapping(self, items: list[tuple[object, object]], depth: int) -> dict[str, object]:
        rebuilt: dict[str, object] = {}
        for number, (key, item) in enumerate(items):
            if self.left <= 0:
                rebuilt["[spanguard]"] = f"{len(items) - number} more entries left out"
                break
            text = self._text(_key_text(key))
            while text in rebuilt:  # 1 and "1" are two keys, and stay two
                text += "'"
            rebuilt[text] = self.rebuild(item, depth)
        return rebuilt

    def _sequence(self, items: list[object], depth: int) -> list[object]:
        rebuilt: list[object] = []
        for number, item in enumerate(items):
            if self.left <= 0:
                rebuilt.append(f"[spanguard: {len(items) - number} more items left out]")
                break
            rebuilt.append(self.rebuild(item, depth))
        return rebuilt

    def _foreign(self, value: object, depth: int) -> object:
        if depth <= 0:
            return self._text(safe_repr(value))
        try:
            encoded = json.dumps(value, cls=payloads.payload_encoder(), ensure_ascii=False)
            plain = json.loads(encoded)
        except BaseException as error:
            if is_the_users(error):
                raise
            return self._text(safe_repr(value))
        return self.rebuild(plain, depth - 1)

    def _integer(self, value: int) -> int | str:
        number = int.__add__(value, 0)
        if -_INT64 <= number <= _INT64:
            return number
        decimal = number.bit_length() <= _MAX_DECIMAL_BITS
        return self._text(int.__repr__(number) if decimal else hex(number))

    def _text(self, text: str) -> str:
        text = cut(utf8(text), max(self.left, 0))
        self.left -= len(text)
        return text


def _key_text(key: Any) -> str:
    if is_a(key, str):
        return str.__str__(key)
    if key is None or is_a(key, (bool, int, float)):
        # As json writes them: null, true, 1, 1.5; but it cannot write an integer of any size.
        whole: Any = key
        big = is_a(key, int) and int.bit_length(whole) > _MAX_DECIMAL_BITS
        return hex(int.__add__(whole, 0)) if big else json.dumps(key)
    return safe_repr(key)


# Keys that are clean as they are: a program has few, and uses them again and again.
known_keys: set[str] = set()
_MAX_KNOWN_KEYS = 10_000


def clean_key(key: object) -> str:
    """Return the text of a key, which must not be empty: OpenTelemetry would drop the value."""
    text = clean_text(key) or "(empty)"
    if text is key and len(known_keys) < _MAX_KNOWN_KEYS:
        known_keys.add(text)
    return text


def clean_labels(labels: object) -> dict[str, str]:
    """Return tags or metadata as MLflow needs them: strings to strings, cut."""
    return {
        clean_key(key): clean_text(value, MAX_LABEL_CHARS)
        for key, value in as_mapping(labels).items()
    }


def clean_attributes(attributes: object) -> dict[str, object]:
    """Return attributes under string keys, every value recordable."""
    return {clean_key(key): clean(value) for key, value in as_mapping(attributes).items()}


def clean_facts(facts: object) -> dict[str, object]:
    """Return the attributes of an event or a link: scalars, and lists of one kind of them.

    OpenTelemetry has no others there; what is more than that becomes its JSON text.
    """
    return {clean_key(key): _fact(value) for key, value in as_mapping(facts).items()}


_SCALARS = (str, bool, int, float)


def _fact(value: object) -> object:
    cleaned = clean(value)
    if type(cleaned) in _SCALARS:
        return cleaned
    if type(cleaned) in (list, tuple):
        kinds = {type(item) for item in cleaned}
        if len(kinds) == 1 and kinds.issubset(_SCALARS):
            return list(cleaned)
    return json.dumps(cleaned, cls=payloads.payload_encoder(), ensure_ascii=False)


def as_mapping(value: Any) -> dict[Any, object]:
    """Read a mapping, or pairs, into a dict; keep anything else whole under the key `value`."""
    if type(value) is dict:
        return value.copy()  # another thread may change it while it is gone through
    try:
        if is_a(value, dict):
            return dict.copy(value)  # as a subclass may raise in its own methods
        if is_mapping(value) or hasattr(value, "keys"):
            return dict(value)
        if not is_a(value, (str, bytes)):
            return dict(islice(iter(value), _MAX_PAIRS))
    except BaseException as error:
        if is_the_users(error):
            raise
    return {"value": value}
