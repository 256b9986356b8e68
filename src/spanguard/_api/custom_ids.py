"""Business ids, and the MLflow ids that they map to."""

from __future__ import annotations

import hashlib
import uuid
from datetime import datetime, timezone

from mlflow.entities import Trace

from spanguard._base.values import is_a
from spanguard._mlflow import ids, names, queue, store
from spanguard._process import listening
from spanguard._record.payload import MAX_LABEL_CHARS
from spanguard._record.text import clean_text, shortened, whole_text
from spanguard.exceptions import (
    DuplicateTraceIdError,
    InvalidSpanArgumentError,
    SpanguardError,
    UnknownSpanError,
)

__all__ = [
    "CUSTOM_TRACE_ID",
    "client_request_id",
    "duplicate",
    "find",
    "generated",
    "not_to_choose",
    "otel_trace_id",
    "random_digits",
    "read_id",
    "quoted",
    "trace_id_for",
    "unknown",
]


CUSTOM_TRACE_ID = "custom_trace_id"

# Before the id: so a hash made for something else is never a trace id of ours.
_DOMAIN = "spanguard:custom_trace_id:"


def trace_id_for(custom_trace_id: str) -> str:
    r"""Return the MLflow trace id that a business id maps to, without asking anyone.

    `tr-`, then the first 32 hexadecimal digits (128 bits) of the SHA-256 of the UTF-8 text
    `spanguard:custom_trace_id:` followed by the id. No key, no salt: any system can compute it, in
    a shell by `printf 'spanguard:custom_trace_id:%s' "$id" | sha256sum | cut -c1-32`. The digits
    are the OpenTelemetry trace id, too. Lone surrogates and NULs, which no store takes, are read
    as what is written for them: `\udc80`, `\x00`.

    >>> import spanguard
    >>> spanguard.trace_id_for("order-42")
    'tr-a1d82f31dc228e1635c54d7eac5425d0'
    """
    return ids.mlflow_trace_id_of(int(otel_trace_id(whole_text(custom_trace_id)), 16))


def otel_trace_id(custom_id: str) -> str:
    return hashlib.sha256((_DOMAIN + custom_id).encode()).hexdigest()[:32]


def generated(user_id: object, operation: object) -> str:
    now = datetime.now(timezone.utc)
    return f"{whole_text(user_id)}_{whole_text(operation)}_{now:%Y%m%d%H%M%S}_{random_digits()}"


def random_digits() -> str:
    return uuid.uuid4().hex[:8]  # not of `random`, which user code may seed


def read_id(
    given: object, what: str, user_id: object, operation: object
) -> tuple[str, list[SpanguardError]]:
    """Read an id that a user has given; a generated one where there is nothing in it."""
    custom_id = whole_text(given) if given is not None else ""
    if custom_id and is_a(given, str):
        return custom_id, []
    custom_id = custom_id or generated(user_id, operation)
    finding = InvalidSpanArgumentError(
        f"{what} is no text with at least one character; the trace is {quoted(custom_id)}. "
        "Use a string."
    )
    return custom_id, [finding]


def client_request_id(custom_id: str) -> str:
    is_short = len(custom_id) <= names.MAX_CLIENT_REQUEST_ID_CHARS
    return custom_id if is_short else trace_id_for(custom_id)


def quoted(custom_id: object) -> str:
    return repr(clean_text(custom_id, 100))


def duplicate(custom_id: str, instead: str) -> DuplicateTraceIdError:
    return DuplicateTraceIdError(
        f"The custom trace id {quoted(custom_id)} is in use by another trace, open or stored; "
        f"{instead}. Use an id for one trace only.",
        span_name=clean_text(custom_id),
        trace_id=trace_id_for(custom_id),
    )


def not_to_choose(given: list[str], custom_id: str) -> InvalidSpanArgumentError:
    return InvalidSpanArgumentError(
        f"{', '.join(given)} of the custom trace {quoted(custom_id)} cannot be chosen: its id "
        "decides. Recorded as attributes. Use traced_span() for a span of your choice, or pass "
        "attributes={...}.",
        span_name=clean_text(custom_id),
    )


def unknown(custom_trace_id: str) -> UnknownSpanError:
    return UnknownSpanError(
        f"This manager has no open trace with the custom id {quoted(custom_trace_id)}: it has "
        "ended, or was not started here. Nothing was done. End each trace once, by the id in its "
        f"attribute {CUSTOM_TRACE_ID!r}.",
        span_name=clean_text(custom_trace_id),
        trace_id=trace_id_for(custom_trace_id),
    )


def find(custom_id: str) -> Trace | None:
    if not custom_id:
        return None
    number = int(otel_trace_id(custom_id), 16)
    if listening.has_just_ended(number):
        queue.flush_everything()
    found = store.get_trace(ids.mlflow_trace_id_of(number))
    if found is None:
        found = store.find_by_tag(CUSTOM_TRACE_ID, shortened(custom_id, MAX_LABEL_CHARS))
    return found
