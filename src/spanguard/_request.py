"""What was asked for: the arguments of a new span, read, mended, and what was wrong with them."""

from __future__ import annotations

import re
from typing import Any

from spanguard import _mlflow
from spanguard._payload import clean_labels, clean_text, shortened, whole_text
from spanguard.exceptions import InvalidSpanArgumentError, SpanguardError

__all__ = ["SpanRequest", "read_time"]

MAX_SPAN_NAME_CHARS = 4_000
# A longer session id costs the whole trace on newer versions of MLflow (test_custom.py).
MAX_SESSION_CHARS = 250

_OTEL_TRACE_ID = re.compile("[0-9a-fA-F]{32}")


class SpanRequest:
    """What was asked for: the arguments of `traced_span`, in either form, read and mended."""

    __slots__ = (
        "attributes",
        "client",
        "expected",
        "experiment_id",
        "findings",
        "for_trace",
        "inputs",
        "is_reserved",
        "links",
        "lost_trace_id",
        "metadata",
        "name",
        "new_trace",
        "otel_trace_id",
        "parent_id",
        "run_id",
        "session_id",
        "span_type",
        "start_time_ns",
        "strict",
        "tags",
        "trace_id",
        "user",
    )

    def __init__(
        self,
        args: tuple[Any, ...],
        *,
        name: Any = ...,
        trace_id: Any = None,
        request_id: Any = None,
        parent_id: Any = None,
        client: Any = None,
        span_type: Any = "UNKNOWN",
        inputs: Any = None,
        attributes: Any = None,
        tags: Any = None,
        metadata: Any = None,
        experiment_id: Any = None,
        run_id: Any = None,
        session_id: Any = None,
        user: Any = None,
        links: Any = None,
        start_time_ns: Any = None,
        otel_trace_id: Any = None,
        new_trace: Any = False,
        expected: Any = (),
        strict: bool | None = None,
        **unknown: Any,
    ) -> None:
        self.findings: list[SpanguardError] = []
        self.client = client
        if args:
            name, trace_id, parent_id = self._positional(args, name, trace_id, parent_id)
        self.name = self._name(name)
        self.trace_id = self._id("trace_id", request_id if trace_id is None else trace_id)
        self.parent_id = self._id("parent_id", parent_id)
        self.span_type = span_type if type(span_type) is str else self._type(span_type)
        self.inputs = inputs
        self.attributes = attributes
        self.tags = tags
        self.metadata = metadata
        self.experiment_id = experiment_id
        self.run_id = run_id
        self.session_id = session_id
        self.user = user
        self.for_trace = not (
            tags is None
            and metadata is None
            and experiment_id is None
            and run_id is None
            and session_id is None
            and user is None
        )
        self.links = links
        self.start_time_ns = None if start_time_ns is None else self._start_time(start_time_ns)
        self.otel_trace_id = None if otel_trace_id is None else self._otel_id(otel_trace_id)
        # Set by _trace_ids.py:
        self.is_reserved = False  # the chosen trace id
        self.lost_trace_id: str | None = None  # the chosen one, if it was not to be had
        self.new_trace = bool(new_trace)
        self.expected = expected if expected == () else self._expected(expected)
        self.strict = strict
        for key in unknown:
            self._found(f"There is no argument {key!r}; it was ignored. Check its spelling.")

    def _positional(self, args: tuple[Any, ...], name: Any, trace_id: Any, parent_id: Any) -> Any:
        """Read `(name)` or the documented recipe's `(client, name, request_id, parent_id)`."""
        if len(args) == 1 and name is ...:
            return args[0], trace_id, parent_id
        self.client, rest = args[0], list(args[1:])
        if name is ... and rest:
            name = rest.pop(0)
        if rest:
            trace_id = rest.pop(0)
        if rest:
            parent_id = rest.pop(0)
        if rest:
            self._found(f"{len(rest)} positional arguments too many were ignored.")
        return name, trace_id, parent_id

    def _found(self, text: str) -> None:
        name = getattr(self, "name", None)
        self.findings.append(InvalidSpanArgumentError(text, span_name=name))

    def _name(self, name: Any) -> str:
        if type(name) is str and name:
            return clean_text(name, MAX_SPAN_NAME_CHARS)
        text = "span" if name is ... or name == "" else clean_text(name, MAX_SPAN_NAME_CHARS)
        self._found(
            f"A span needs a name that is a string with at least one character; it is called "
            f"{text!r}. Pass the name as the first argument."
        )
        return text

    def _id(self, argument: str, value: Any) -> str | None:
        if value is None or type(value) is str:
            return value
        if isinstance(value, str):
            return str.__str__(value)
        self._found(
            f"{argument} of span {self.name!r} is a {type(value).__name__}, not a string; it was "
            "ignored. Pass span.trace_id or span.span_id."
        )
        return None

    def _type(self, span_type: Any) -> str:
        if span_type is None:
            return "UNKNOWN"
        if isinstance(span_type, str):  # an enumeration's member
            return str.__str__(span_type)
        self._found(f"span_type of span {self.name!r} is not a string. Pass one of SpanType.")
        return clean_text(span_type)

    def _start_time(self, value: Any) -> int | None:
        nanoseconds, finding = read_time("start_time_ns", value, self.name)
        if finding is not None:
            self.findings.append(finding)
        return nanoseconds

    def _otel_id(self, value: Any) -> str | None:
        if isinstance(value, str) and _OTEL_TRACE_ID.fullmatch(value) and int(value, 16):
            return str.lower(value)
        self._found(
            f"otel_trace_id of span {self.name!r} is not 32 hexadecimal digits; a fresh id was "
            "taken. Pass f'{trace_id:032x}'."
        )
        return None

    def _expected(self, expected: Any) -> tuple[type[BaseException], ...]:
        given = tuple(expected) if isinstance(expected, (tuple, list, set)) else (expected,)
        kinds = tuple(k for k in given if isinstance(k, type) and issubclass(k, BaseException))
        if len(kinds) != len(given):
            self._found(
                f"expected of span {self.name!r} holds something that is no exception class; it "
                "was ignored. Pass a tuple of exception classes."
            )
        return kinds

    # -- what belongs to a trace ---------------------------------------------------------------

    def trace_arguments(self) -> list[str]:
        """Return the names of the given arguments that mean something on a root only."""
        given = {
            "tags": self.tags,
            "metadata": self.metadata,
            "experiment_id": self.experiment_id,
            "run_id": self.run_id,
            "session_id": self.session_id,
            "user": self.user,
        }
        return [argument for argument, value in given.items() if value is not None]

    def misplaced_under(self, parent: Any) -> list[str]:
        """Return the names of the given arguments that a child of `parent` cannot honour."""
        return self.trace_arguments()

    def trace_tags(self) -> dict[str, str]:
        return clean_labels(self.tags) if self.tags is not None else {}

    def trace_metadata(self) -> dict[str, str]:
        """Return the trace's metadata, session, user and run among them, by MLflow's names."""
        metadata = clean_labels(self.metadata) if self.metadata is not None else {}
        if self.run_id is not None:
            metadata[_mlflow.RUN_KEY] = clean_text(self.run_id)
        for key, value in ((_mlflow.SESSION_KEY, self.session_id), (_mlflow.USER_KEY, self.user)):
            given = metadata.get(key) if value is None else value
            if given is not None:
                metadata[key] = shortened(whole_text(given), MAX_SESSION_CHARS)
        return metadata


def read_time(
    argument: str, value: Any, span_name: str
) -> tuple[int | None, InvalidSpanArgumentError | None]:
    """Read a time in nanoseconds: the time, None for now; and what is wrong with it."""
    if value is None:
        return None, None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            nanoseconds = int(value)
            if 0 < nanoseconds < 2**63:
                return nanoseconds, None
        except (ValueError, OverflowError):
            pass
    return None, InvalidSpanArgumentError(
        f"{argument} of span {span_name!r} is not a time in nanoseconds since 1970; now "
        "was taken. Pass time.time_ns().",
        span_name=span_name,
    )
