"""Attributes that are plain JSON, written as MLflow writes them, at a fraction of the cost.

`LiveSpan.set_attribute` makes an encoder for each value, and OpenTelemetry looks through each
string for what may not be in it. Neither is needed for what is known to be plain. What arrives are
the same strings under the same keys, in the same order (test_own_end.py).
"""

from __future__ import annotations

import json
from json import encoder as _json
from typing import Any

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.trace import Span

from spanguard._mlflow.known_code import names_in

__all__ = ["write_encoded", "write_plain"]


_CONSTANTS = {True: "true", False: "false"}


def _refuse(value: object) -> object:
    raise TypeError(f"{type(value).__name__} is not plain")


_encode_any = json.JSONEncoder(ensure_ascii=False).encode
_encode_text: Any = getattr(_json, "encode_basestring", _encode_any)
_encoder: Any = getattr(_json, "c_make_encoder", None)
# What `JSONEncoder.encode` makes anew for each value. It is made without the look for circles, of
# which a plain value has none: what is written down for that must not be shared by threads.
_make_chunks = _encoder and _encoder(
    None, _refuse, _encode_text, None, ": ", ", ", False, False, True
)


def encode_plain(value: Any) -> str:
    """Return a value that is known to be plain JSON as MLflow writes it."""
    kind = type(value)
    if kind is str:
        return str(_encode_text(value))
    if kind is int:
        return int.__repr__(value)
    if kind is bool:
        return _CONSTANTS[value]
    return _encode_any(value) if _make_chunks is None else "".join(_make_chunks(value, 0))


def write_plain(otel: Any, values: dict[str, Any]) -> None:
    """Write attributes whose values are known to be plain JSON, all in one go."""
    write_encoded(otel, {key: encode_plain(value) for key, value in values.items()})


# What OpenTelemetry does when it writes attributes, by what its code names. One that does anything
# else, or checks what others do not, writes them itself.
_writes_as_known = (
    names_in(Span, "set_attributes") == "_lock _end_time logger warning _attributes _set_items"
    and names_in(BoundedAttributes, "_set_items")
    == "_raise_if_immutable maxlen _lock dropped len _clean_attribute_value max_value_len items "
    "_setitem_locked"
    and names_in(BoundedAttributes, "_setitem_locked")
    == "_dict maxlen len _logger warning next iter keys dropped"
)


def write_encoded(otel: Any, encoded: dict[str, str]) -> None:
    """Write attributes that are encoded already, under keys that are clean, all in one go."""
    attributes = getattr(otel, "_attributes", None)
    # Not where a string may have to be cut.
    if (
        _writes_as_known
        and type(attributes) is BoundedAttributes
        and attributes.max_value_len is None
    ):
        # Under both locks of OpenTelemetry's, in its order.
        with otel._lock:
            written, most = attributes._dict, attributes.maxlen
            fits = most is None or len(written) + len(encoded) <= most
            if fits and otel._end_time is None:
                with attributes._lock:
                    for key, text in encoded.items():
                        written.pop(key, None)  # what is written again comes last
                        written[key] = text
                return
    otel.set_attributes(encoded)
