"""The span that users hold: MLflow's own, seen through a proxy whose writes cannot hurt them."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from spanguard._base.findings import contained, settle
from spanguard._base.interrupts import is_the_users
from spanguard._base.proxies import ObjectProxy
from spanguard._base.site import user_site
from spanguard._base.values import is_a, kind_name, text_of
from spanguard._lifecycle.events import read_event, read_link
from spanguard._lifecycle.times import read_time
from spanguard._mlflow import ending, spans
from spanguard._mlflow.shapes import MlflowSpan
from spanguard._process import orphans, registry
from spanguard._record import writing
from spanguard._record.outcome import ERROR
from spanguard._record.payload import as_mapping
from spanguard._record.status import parse_status
from spanguard._record.text import clean_text
from spanguard.exceptions import InvalidSpanArgumentError, SpanAlreadyEndedError, SpanguardError

__all__ = ["SpanProxy"]


class Owner(Protocol):
    """What the proxy needs of the handle that has it (handle.py)."""

    entry: registry.Entry | None

    def keep(self, findings: list[SpanguardError]) -> bool:
        """Hold findings of a setter back until the span closes. False if they need no wait."""
        ...

    def end_by_user(
        self, outputs: object, attributes: object, status: object, end_time_ns: object
    ) -> None:
        """End as `span.end(...)` asks, before the block or the manager does."""


Method = TypeVar("Method", bound=Callable[..., None])


def _setter(method: Method) -> Method:
    """Make a call that does not fit a finding: what fits is taken, the rest is ignored."""
    names = _taken_by(method)

    @functools.wraps(method)
    def setter(self: SpanProxy, *args: Any, **kwargs: Any) -> None:
        try:
            method(self, *args, **kwargs)
        except TypeError as error:
            traceback = error.__traceback__
            if traceback is not None and traceback.tb_next is not None:
                raise  # from inside of it: a failure of ours, which a test must see
            fitting = dict(zip(names, args, strict=False))
            for name in names:
                if name in kwargs:
                    fitting.setdefault(name, kwargs[name])
            self._self_call_fitting(method, fitting)

    return cast("Method", setter)


def _taken_by(method: Callable[..., None]) -> list[str]:
    return list(inspect.signature(method).parameters)[1:]


class SpanProxy(ObjectProxy):
    """An MLflow span by delegation. Reads pass through; writes are sanitised and contained.

    `isinstance(span, LiveSpan)` holds. Setters, `record_exception`, `set_status` and `add_event`
    never raise, also not in strict mode: what is wrong with them is a warning, or with strict
    mode raised when the span closes. ERROR is sticky. `end` closes open descendants first.
    """

    def __init__(self, span: MlflowSpan, owner: Owner | None = None) -> None:
        super().__init__(span)
        self._self_owner = owner

    # -- payloads

    @_setter
    def set_inputs(self, inputs: Any) -> None:
        """Record the inputs."""
        if self._self_writable():
            writing.inputs(self.__wrapped__, inputs)

    @_setter
    def set_outputs(self, outputs: Any) -> None:
        """Record the outputs."""
        if self._self_writable():
            writing.outputs(self.__wrapped__, outputs)

    @_setter
    def set_attribute(self, key: str, value: Any) -> None:
        """Record one attribute. A key of MLflow's own is recorded under `user.`."""
        if self._self_writable():
            self._self_found(writing.attribute(self.__wrapped__, key, value))

    @_setter
    def set_attributes(self, attributes: dict[str, Any]) -> None:
        """Record several attributes."""
        if self._self_writable():
            values = as_mapping(attributes)
            self._self_found(*writing.attributes(self.__wrapped__, values))

    # -- classification and events

    @_setter
    def set_span_type(self, span_type: str) -> None:
        """Set the span's type."""
        self._self_write("set_span_type", clean_text(span_type))

    @_setter
    def set_description(self, description: str) -> None:
        """Set the span's description. Ignored by an MLflow that has none."""
        self._self_write("set_description", clean_text(description, 10_000))

    @_setter
    def set_log_level(self, level: Any) -> None:
        """Set the span's severity. Ignored by an MLflow that has none."""
        name = text_of(level)
        self._self_write("set_log_level", level if name is None else name)

    @_setter
    def add_event(
        self, event: Any = None, attributes: Any = None, timestamp: Any = None, *, name: Any = None
    ) -> None:
        """Add an event: a `SpanEvent`, or a name, as in OpenTelemetry, with attributes and a time.

        >>> import spanguard
        >>> with spanguard.traced_span("fetch") as span:
        ...     spanguard.current_span().add_event("retry", {"attempt": 2})
        """
        event = name if event is None else event
        read, finding = read_event(event, attributes, timestamp, self.__wrapped__.name)
        self._self_found(finding)
        if read is not None:
            self._self_write("add_event", read)

    @_setter
    def add_link(self, link: Any, attributes: Any = None) -> None:
        """Add a link to another span. Ignored by an MLflow that has none."""
        read, finding = read_link(link, attributes, self.__wrapped__.name)
        self._self_found(finding)
        if read is not None:
            self._self_write("add_link", read)

    def _self_write(self, method: str, value: object) -> None:
        write = getattr(self.__wrapped__, method, None)
        if write is None or not self._self_writable():
            return
        try:
            write(value)
        except BaseException as error:
            if is_the_users(error):
                raise
            self._self_found(
                InvalidSpanArgumentError(
                    f"{method}() of span {self.__wrapped__.name!r} did not take its argument "
                    f"({kind_name(error)}). See MLflow's documentation of {method}()."
                )
            )

    def _self_call_fitting(self, method: Callable[..., None], fitting: dict[str, object]) -> None:
        """Answer a call that did not fit: with what fits, if that is enough, and a finding."""
        name = method.__name__
        try:
            inspect.signature(method).bind(self, **fitting)
            became = "the rest was ignored"
        except TypeError:
            became = "nothing was recorded"
        self._self_found(
            InvalidSpanArgumentError(
                f"{name}() of span {self.__wrapped__.name!r} does not take what it was called "
                f"with; {became}. It takes {', '.join(_taken_by(method))}."
            )
        )
        if became == "the rest was ignored":
            method(self, **fitting)

    # -- status and end

    @_setter
    def set_status(self, status: Any, description: Any = None) -> None:
        """Set the status, in any case, as in OpenTelemetry with a description.

        OK does not undo an ERROR.
        """
        if status is None or not self._self_writable():
            return
        code, description, finding = parse_status(status, description)
        self._self_found(finding)
        if code == "ERROR":
            writing.error(self.__wrapped__, description)
        elif code == "OK" and ending.status_code(self.__wrapped__) != "ERROR":
            with contained("setting the status"):
                self.__wrapped__.set_status("OK")

    @_setter
    def record_exception(self, exception: BaseException | str) -> None:
        """Record an exception, of any kind, and set ERROR. It stays ERROR when the span ends."""
        if not self._self_writable():
            return
        raised: Any = exception
        if not is_a(exception, BaseException):
            raised = Exception(clean_text(exception, 10_000))
        with contained("recording an exception"):
            entry = registry.entry_of(spans.otel_span(self.__wrapped__))
            writing.exception(self.__wrapped__, raised, ERROR, entry)

    @_setter
    def end(
        self,
        outputs: Any = None,
        attributes: dict[str, Any] | None = None,
        status: Any = None,
        end_time_ns: int | None = None,
    ) -> None:
        """End the span, its open descendants first. Ending twice does nothing.

        In strict mode what was left open raises `OrphanedSpanError`, and a second end
        `SpanAlreadyEndedError`, after everything is recorded.
        """
        if self._self_owner is not None:
            self._self_owner.end_by_user(outputs, attributes, status, end_time_ns)
            return
        # A span of another API, got by current_span().
        if not self._self_writable():
            return
        entry = registry.entry_of(spans.otel_span(self.__wrapped__))
        if entry is not None:
            orphans.close_descendants(entry)
        if outputs is not None:
            self.set_outputs(outputs)
        if attributes is not None:
            self.set_attributes(attributes)
        self.set_status(status)
        at, finding = read_time("end_time_ns", end_time_ns, self.__wrapped__.name)
        self._self_found(finding)
        writing.end(self.__wrapped__, None, at)

    # -- how the proxy behaves as an object

    def _self_writable(self) -> bool:
        span = self.__wrapped__
        otel = spans.recording_span(span)
        if (otel is None or otel.end_time is None) and not self._self_is_waiting():
            return True
        self._self_found(
            SpanAlreadyEndedError(
                f"Span {span.name!r} ({span.span_id}) has ended; what was written to it now is "
                "not recorded. Write before the span ends.",
                span_name=span.name,
                span_id=span.span_id,
            )
        )
        return False

    def _self_is_waiting(self) -> bool:
        """Tell a root that is closed, and only waits for what outlives it."""
        entry = self._self_owner.entry if self._self_owner is not None else None
        return entry is not None and entry.awaits is not None

    def _self_found(self, *findings: SpanguardError | None) -> None:
        found = [finding for finding in findings if finding is not None]
        if not found:
            return
        if self._self_owner is not None and self._self_owner.keep(found):
            return
        settle(found, strict=False, raised=None, site=user_site())

    def __repr__(self) -> str:
        return repr(self.__wrapped__)

    def __copy__(self) -> object:
        return copy.copy(self.__wrapped__)

    def __deepcopy__(self, memo: dict[int, Any]) -> object:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce__(self) -> Any:
        return self.__wrapped__.__reduce__()

    def __reduce_ex__(self, protocol: object) -> Any:
        return self.__wrapped__.__reduce_ex__(protocol)
