"""Events and links as the store can take them, in MLflow's form and in OpenTelemetry's."""

from __future__ import annotations

from typing import Any

from spanguard._base.values import attribute_of, is_a, text_of
from spanguard._lifecycle.times import read_time
from spanguard._mlflow import writing
from spanguard._record.payload import clean_facts
from spanguard._record.text import clean_text
from spanguard.exceptions import InvalidSpanArgumentError

__all__ = ["read_event", "read_link"]


def read_event(
    event: object, attributes: object, timestamp: object, span_name: str
) -> tuple[object, InvalidSpanArgumentError | None]:
    """Read a SpanEvent, or a name with attributes and a time: an event, and what is wrong.

    None for the event, where it has no name that is a string.
    """
    name = text_of(event)
    if name is None:
        name = text_of(attribute_of(event, "name"))
        attributes = attribute_of(event, "attributes") if attributes is None else attributes
        timestamp = attribute_of(event, "timestamp") if timestamp is None else timestamp
    if name is None:
        return None, InvalidSpanArgumentError(
            f"add_event() of span {span_name!r} was given no event; nothing was added. Pass a "
            "SpanEvent, or a name and a dict of attributes.",
            span_name=span_name,
        )
    facts = {} if attributes is None else clean_facts(attributes)
    at, finding = read_time("timestamp of an event", timestamp, span_name)
    return writing.make_event(clean_text(name), facts, at), finding


def read_link(
    link: object, attributes: object, span_name: str
) -> tuple[object, InvalidSpanArgumentError | None]:
    """Read a Link, or the context of a span with attributes: a link, and what is wrong.

    None for the link, where it names no span.
    """
    context = attribute_of(link, "context", link)  # of a Link of OpenTelemetry's
    trace_id = _id(attribute_of(context, "trace_id"), "tr-{:032x}")
    span_id = _id(attribute_of(context, "span_id"), "{:016x}")
    if trace_id is None or span_id is None:
        return None, InvalidSpanArgumentError(
            f"add_link() of span {span_name!r} was given no link; nothing was added. Pass a Link "
            "with the ids of the other span as strings.",
            span_name=span_name,
        )
    given = attribute_of(link, "attributes") if attributes is None else attributes
    facts = None if given is None else clean_facts(given)
    return writing.make_link(trace_id, span_id, facts), None


def _id(value: Any, form: str) -> str | None:
    if is_a(value, int):
        number = int.__add__(value, 0)
        return form.format(number) if 0 < number < 2**128 else None
    return text_of(value)
