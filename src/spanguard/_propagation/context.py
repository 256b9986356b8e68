"""Where a span is, as a value that can be sent: captured, attached, spoken as headers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from opentelemetry.trace import Span as OtelSpan

from spanguard._base.config import is_strict
from spanguard._base.findings import contained, settle
from spanguard._base.interrupts import is_the_users
from spanguard._base.site import user_site
from spanguard._base.values import is_mapping, items_of, text_of
from spanguard._mlflow import destination, ids
from spanguard._mlflow.remote import remote_span, traceparent_of
from spanguard._process.ambient import ambient_span
from spanguard._propagation import destinations
from spanguard._propagation.attachment import Attachment
from spanguard.exceptions import InvalidSpanArgumentError

__all__ = ["TraceContext", "capture", "headers_here"]


TRACEPARENT = "traceparent"


@dataclass(frozen=True, repr=False, slots=True)
class TraceContext:
    """A place in a trace, and where traces go: small, immutable, picklable, nothing but strings.

    Falsy where there is no span to nest under. Attaching it then changes nothing but what the
    other fields say.

    Attributes:
        trace_id: the MLflow trace id of the span to nest under, or None.
        traceparent: that span by W3C's `traceparent` header, or None.
        tracking_uri: where the traces of the process it was captured in go, or None.
        experiment_id: the experiment, or None for the default one.
        strict: whether strict mode was on, or None if that is not known.

    >>> import pickle, spanguard
    >>> with spanguard.traced_span("job") as job:
    ...     context = pickle.loads(pickle.dumps(spanguard.capture()))
    >>> context.trace_id == job.trace_id
    True
    """

    trace_id: str | None = None
    traceparent: str | None = None
    tracking_uri: str | None = None
    experiment_id: str | None = None
    strict: bool | None = None
    _origin: str | None = None
    # The span itself, in its own process.
    _local: OtelSpan | None = field(default=None, compare=False)

    def __reduce__(self) -> tuple[object, ...]:
        # Without the span itself: what crosses is strings.
        return TraceContext, self._strings()

    def _strings(self) -> tuple[object, ...]:
        return tuple(getattr(self, one.name) for one in fields(self) if one.compare)

    def __bool__(self) -> bool:
        return self.traceparent is not None

    @property
    def _span(self) -> OtelSpan | None:
        """OpenTelemetry's stand-in for the span; None where there is none."""
        return None if self.traceparent is None else remote_span(self.traceparent)

    @property
    def _otel_trace_id(self) -> int:
        return int(self.traceparent.split("-")[1], 16) if self.traceparent is not None else 0

    @property
    def _is_recorded(self) -> bool:
        """Whether the span is one that MLflow records: it was not sampled out."""
        if self.traceparent is None or self.trace_id is None:
            return False
        return bool(int(self.traceparent.split("-")[3], 16) & 1)

    def __repr__(self) -> str:
        return f"TraceContext(trace_id={self.trace_id!r}, traceparent={self.traceparent!r})"

    def attach(self) -> Attachment:
        """Run a with-block under the captured span, whatever thread or process this is.

        In a process that the span is not open in, the block's spans belong to its trace all the
        same, and traces go where they went there. At the block's end what was opened in it and
        left open is closed as an orphan, and the spans are handed to the store, which takes 5
        seconds at most. With `async with` other tasks run on meanwhile. Good for one block:
        entering it again raises `RuntimeError`.

        Work that begins after its trace has ended is a trace of its own, here and in other
        processes, which ask the store: its root has a link to the span it comes from, and the
        attribute `spanguard.lost_parent`; a warning tells it once. A context that was read from
        headers continues its trace whatever has become of that.

        >>> import threading, spanguard
        >>> with spanguard.traced_span("job") as job:
        ...     context = spanguard.capture()
        ...     def work():
        ...         with context.attach(), spanguard.traced_span("step") as step:
        ...             print(step.parent_id == job.span_id)
        ...     thread = threading.Thread(target=work)
        ...     thread.start()
        ...     thread.join()
        True
        """
        return Attachment(self)

    def to_headers(self) -> dict[str, str]:
        """Return the HTTP headers that continue the trace in another service.

        By W3C Trace Context: `traceparent`. Empty where there is no span to nest under.

        >>> import spanguard
        >>> with spanguard.traced_span("call"):
        ...     list(spanguard.capture().to_headers())
        ['traceparent']
        """
        return {TRACEPARENT: self.traceparent} if self.traceparent is not None else {}

    @classmethod
    def from_headers(cls, headers: Mapping[Any, Any] | Iterable[tuple[Any, Any]]) -> TraceContext:
        """Read W3C Trace Context from the headers of a request, names in any case.

        Never raises. Without the header, or with junk in it, the context is empty (falsy), and
        attaching it starts no foreign trace; junk warns once per calling line.

        >>> import spanguard
        >>> header = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        >>> spanguard.TraceContext.from_headers({"Traceparent": header}).trace_id
        'tr-0af7651916cd43dd8448eb211c80319c'
        """
        with contained("reading trace headers"):
            given = _header(headers)
            if given is None:
                return cls()
            span = remote_span(given)
            if span is not None:
                otel_id = span.get_span_context().trace_id
                return cls(ids.mlflow_trace_id_of(otel_id), traceparent_of(span))
            junk = InvalidSpanArgumentError(
                "The header 'traceparent' is not of the form that W3C Trace Context asks for; it "
                "was ignored. Check what sends the request."
            )
            # Never an error: what a stranger sends must not raise in a service.
            settle([junk], strict=False, raised=None, site=user_site(2))
        return cls()


_MAX_HEADERS = 10_000


def _header(headers: Any) -> str | None:
    """Return the header, if that is what it is looked for in: a mapping, or pairs."""
    try:
        pairs = headers.items() if is_mapping(headers) else headers
        for name, value in items_of(pairs, _MAX_HEADERS):
            if _text(name).lower() == TRACEPARENT:
                return _text(value)
    except BaseException as error:
        if is_the_users(error):
            raise
    return None


def _text(value: object) -> str:
    return value.decode("latin-1") if type(value) is bytes else text_of(value) or ""


def headers_here() -> dict[str, str]:
    """Return what `capture().to_headers()` does, and look at no more than that takes."""
    with contained("capturing the trace context"):
        active = ambient_span()
        if active.get_span_context().is_valid:
            return {TRACEPARENT: traceparent_of(active)}
    return {}


def capture() -> TraceContext:
    """Capture the ambient span, the destination of traces and strictness, to use elsewhere.

    The value pickles, and holds nothing but strings. Never raises; without an ambient span it is
    empty (falsy) and still takes along where traces go.

    >>> import spanguard
    >>> bool(spanguard.capture())
    False
    """
    with contained("capturing the trace context"):
        active = ambient_span()
        uri = destination.tracking_uri()
        experiment_id = destination.active_experiment_id()
        if not active.get_span_context().is_valid:
            return TraceContext(
                None, None, uri, experiment_id, is_strict(), destinations.process_token
            )
        trace_id, experiment_of_trace = destination.place_of(active)
        return TraceContext(
            trace_id,
            traceparent_of(active),
            uri,
            experiment_of_trace or experiment_id,
            is_strict(),
            destinations.process_token,
            active,
        )
    return TraceContext()
