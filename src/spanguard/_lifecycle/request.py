"""What was asked for: the arguments of a new span, read, mended, and what was wrong with them."""

from __future__ import annotations

import inspect
import re
from typing import Any

from spanguard._base.site import CalledFunction
from spanguard._base.values import (
    attribute_of,
    is_a,
    items_of,
    kind_name,
    number_of,
    text_of,
    truth_of,
)
from spanguard._lifecycle.times import read_time
from spanguard._mlflow import names, starting
from spanguard._mlflow.own_client import is_plain_client
from spanguard._mlflow.shapes import Client
from spanguard._record.payload import clean_labels
from spanguard._record.text import clean_text, shortened, whole_text
from spanguard.exceptions import InvalidSpanArgumentError, SpanguardError

__all__ = ["MAX_SPAN_NAME_CHARS", "SpanRequest", "no_client"]


MAX_SPAN_NAME_CHARS = 4_000
# A longer session id costs the whole trace on newer versions of MLflow (test_custom.py).
MAX_SESSION_CHARS = 250
_UNKNOWN = "UNKNOWN"
_AS_MLFLOW = ("name", "span_type", "attributes")
_AS_RECIPE = ("client", "name", "trace_id", "parent_id")
_COLLECTIONS = (tuple, list, set, frozenset)
_MOST = 1_000  # exception classes
_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD
_OTEL_TRACE_ID = re.compile("[0-9a-fA-F]{32}")


_NOTHING: tuple[object, ...] = ()

# Names that are clean as they are: a program has few, and uses them again and again.
_clean_names: set[str] = set()
_MAX_CLEAN_NAMES = 10_000

_EITHER_WAY = {
    "name": ...,
    "client": None,
    "trace_id": None,
    "parent_id": None,
    "span_type": _UNKNOWN,
    "attributes": None,
}


class SpanRequest:
    """What was asked for: the arguments of `traced_span`, in either form, read and mended.

    What hardly ever is given is looked at only if it is: this is run through for each span.
    """

    __slots__ = (
        "attributes",
        "client",
        "description",
        "expected",
        "experiment_id",
        "findings",
        "for_trace",
        "function",
        "inputs",
        "is_reserved",
        "links",
        "log_level",
        "lost_trace_id",
        "metadata",
        "name",
        "new_trace",
        "otel_trace_id",
        "parent_id",
        "run_id",
        "sampling_ratio",
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
        args: tuple[object, ...],
        /,
        *,
        name: object = ...,
        trace_id: object = None,
        request_id: object = None,
        parent_id: object = None,
        client: Client | None = None,
        span_type: object = _UNKNOWN,
        inputs: object = None,
        attributes: object = None,
        tags: object = None,
        metadata: object = None,
        experiment_id: Any = None,
        run_id: object = None,
        session_id: object = None,
        user: object = None,
        links: object = None,
        start_time_ns: object = None,
        otel_trace_id: object = None,
        new_trace: object = False,
        expected: object = _NOTHING,
        strict: object = None,
        description: Any = None,
        log_level: object = None,
        trace_destination: object = None,
        sampling_ratio_override: object = None,
        **unknown: Any,
    ) -> None:
        self.findings: list[SpanguardError] = []
        if len(args) == 1 and name is ...:
            name = args[0]
        elif args:
            named = (name, client, trace_id, parent_id, span_type, attributes)
            name, client, trace_id, parent_id, span_type, attributes = self._one_of(args, named)
        self.name = name if type(name) is str and name in _clean_names else self._name(name)
        self.client = None if client is None or is_plain_client(client) else client
        asked = request_id if trace_id is None else trace_id
        self.trace_id = None if asked is None else self._id("trace_id", asked)
        self.parent_id = None if parent_id is None else self._id("parent_id", parent_id)
        self.span_type = span_type if span_type is _UNKNOWN else self._type(span_type)
        self.inputs = inputs
        self.attributes = attributes
        self.tags = tags
        self.metadata = metadata
        self.experiment_id = experiment_id
        self.run_id = run_id
        self.session_id = session_id
        self.user = user
        is_plain = tags is metadata is experiment_id is run_id is session_id is user is None
        self.for_trace = not is_plain
        self.links = links
        self.start_time_ns = None if start_time_ns is None else self._start_time(start_time_ns)
        self.otel_trace_id = None if otel_trace_id is None else self._otel_id(otel_trace_id)
        self.function: CalledFunction | None = None  # whose call the span is, if it is one's
        # Set by _lifecycle/chosen_ids.py:
        self.is_reserved = False  # the chosen trace id
        self.lost_trace_id: str | None = None  # the chosen one, if it was not to be had
        self.new_trace = new_trace is not False and bool(self._flag("new_trace", new_trace))
        self.expected = () if expected is _NOTHING else self._expected(expected)
        self.strict = strict if strict is None else self._flag("strict", strict)
        self.description = description
        self.log_level = None if log_level is None else self._log_level(log_level)
        ratio = sampling_ratio_override
        self.sampling_ratio = None if ratio is None else self._ratio(ratio)
        if trace_destination is not None and self.experiment_id is None:
            self._go_to(trace_destination)
        for key in unknown:
            self._found(f"There is no argument {key!r}; it was ignored. Check its spelling.")

    @classmethod
    def signature(cls) -> inspect.Signature:
        """Return the signature of what takes the arguments of a request, a name first."""
        taken = inspect.signature(cls.__init__).parameters.values()
        named = [p.replace(annotation=p.empty) for p in taken if p.kind is p.KEYWORD_ONLY]
        in_place = [p.replace(kind=_EITHER) for p in named if p.name in _AS_MLFLOW]
        in_place.sort(key=lambda p: _AS_MLFLOW.index(p.name))
        in_place[0] = in_place[0].replace(default=inspect.Parameter.empty)
        return inspect.Signature([*in_place, *(p for p in named if p.name not in _AS_MLFLOW)])

    def _placed(self, args: tuple[object, ...], name: object) -> dict[str, object]:
        """Read positional arguments: as `mlflow.start_span` takes them, or as the recipe does.

        `(name, span_type, attributes)`, or `(client, name, request_id, parent_id)`.
        """
        form: tuple[str, ...] = _AS_MLFLOW if is_a(args[0], str) else _AS_RECIPE
        if form is _AS_RECIPE and name is not ...:
            form = tuple(place for place in form if place != "name")
        if len(args) > len(form):
            self._found(f"{len(args) - len(form)} positional arguments too many were ignored.")
        return dict(zip(form, args, strict=False))

    def _one_of(self, args: tuple[object, ...], named: tuple[Any, ...]) -> list[Any]:
        """Return what may be given by its place or by its name, in the order of `_EITHER_WAY`."""
        placed = self._placed(args, named[0])
        taken = []
        for (argument, default), value in zip(_EITHER_WAY.items(), named, strict=True):
            if argument not in placed:
                taken.append(value)
            elif value is default:
                taken.append(placed[argument])
            else:
                taken.append(value)
                self._found(f"{argument} was given twice; what was given by its name was taken.")
        return taken

    def _found(self, text: str) -> None:
        name = getattr(self, "name", None)
        self.findings.append(InvalidSpanArgumentError(text, span_name=name))

    def _name(self, name: object) -> str:
        if type(name) is str and name:
            clean = clean_text(name, MAX_SPAN_NAME_CHARS)
            if clean is name and len(_clean_names) < _MAX_CLEAN_NAMES:
                _clean_names.add(clean)
            return clean
        text = "" if name is ... else clean_text(name, MAX_SPAN_NAME_CHARS)
        if text and is_a(name, str):
            return text
        text = text or "span"
        self._found(
            f"A span needs a name that is a string with at least one character; it is called "
            f"{text!r}. Pass the name as the first argument."
        )
        return text

    def _id(self, argument: str, value: object) -> str | None:
        if value is None or type(value) is str:
            return value
        text = text_of(value)
        if text is None:
            self._found(
                f"{argument} of span {self.name!r} is a {kind_name(value)}, not a string; it was "
                "ignored. Pass span.trace_id or span.span_id."
            )
        return text

    def _type(self, span_type: object) -> str:
        if span_type is None:
            return _UNKNOWN
        if not is_a(span_type, str):  # an enumeration's member is one
            self._found(f"span_type of span {self.name!r} is not a string. Pass one of SpanType.")
        return clean_text(span_type)

    def _flag(self, argument: str, value: object) -> bool | None:
        truth = truth_of(value)
        if truth is None:
            self._found(
                f"{argument} of span {self.name!r} is a {kind_name(value)}, neither true nor "
                "false; it was ignored. Pass True or False."
            )
        return truth

    def _log_level(self, level: object) -> object:
        name = text_of(level)
        level = level if name is None else name
        if starting.is_log_level(level):
            return level
        self._found(
            f"log_level of span {self.name!r} is none of MLflow's; it was ignored. Pass one of "
            "SpanLogLevel, or its name."
        )
        return None

    def _ratio(self, ratio: object) -> float | None:
        part = number_of(ratio)
        if part is not None and 0 <= part <= 1:
            return float(part)
        self._found(
            f"sampling_ratio_override of span {self.name!r} is not between 0.0 and 1.0; it was "
            "ignored. Pass the part of the traces that is to be recorded."
        )
        return None

    def _go_to(self, destination: object) -> None:
        """Read the experiment of one of MLflow's trace locations."""
        self.experiment_id = attribute_of(destination, "experiment_id")
        if self.experiment_id is None:
            self._found(
                f"trace_destination of span {self.name!r} names no experiment; it was ignored. "
                "Pass an MlflowExperimentLocation."
            )
        self.for_trace = self.for_trace or self.experiment_id is not None

    def _start_time(self, value: object) -> int | None:
        nanoseconds, finding = read_time("start_time_ns", value, self.name)
        if finding is not None:
            self.findings.append(finding)
        return nanoseconds

    def _otel_id(self, value: object) -> str | None:
        text = text_of(value)
        if text is not None and _OTEL_TRACE_ID.fullmatch(text) and int(text, 16):
            return text.lower()
        self._found(
            f"otel_trace_id of span {self.name!r} is not 32 hexadecimal digits; a fresh id was "
            "taken. Pass f'{trace_id:032x}'."
        )
        return None

    def _expected(self, expected: object) -> tuple[type[BaseException], ...]:
        if type(expected) is tuple and not expected:
            return ()
        given = items_of(expected, _MOST) if is_a(expected, _COLLECTIONS) else [expected]
        classes: list[Any] = [k for k in given if is_a(k, type)]
        kinds = tuple(k for k in classes if issubclass(k, BaseException))
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

    def misplaced_under(self, parent: object) -> list[str]:
        """Return the names of the given arguments that a child of `parent` cannot honour."""
        return self.trace_arguments()

    def trace_tags(self) -> dict[str, str]:
        return clean_labels(self.tags) if self.tags is not None else {}

    def trace_metadata(self) -> dict[str, str]:
        """Return the trace's metadata, session, user and run among them, by MLflow's names."""
        metadata = clean_labels(self.metadata) if self.metadata is not None else {}
        if self.run_id is not None:
            metadata[names.RUN_KEY] = clean_text(self.run_id)
        for key, value in ((names.SESSION_KEY, self.session_id), (names.USER_KEY, self.user)):
            given = metadata.get(key) if value is None else value
            if given is not None:
                metadata[key] = shortened(whole_text(given), MAX_SESSION_CHARS)
        return metadata


def no_client(client: object, name: str) -> InvalidSpanArgumentError:
    """Make a finding of a client that starts no spans."""
    return InvalidSpanArgumentError(
        f"The client of {name!r} is a {kind_name(client)}, which starts no spans; it was ignored. "
        "Pass an MlflowClient, or nothing.",
        span_name=name,
    )
