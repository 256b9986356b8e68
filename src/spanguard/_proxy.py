"""The span that users hold: MLflow's own, seen through a proxy whose writes cannot hurt them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import wrapt

from spanguard import _mlflow, _record, _registry
from spanguard._findings import contained, settle
from spanguard._mlflow import SpanStatus, SpanStatusCode
from spanguard._outcome import ERROR
from spanguard._payload import as_mapping, clean_text, safe_repr
from spanguard._site import user_site
from spanguard.exceptions import InvalidSpanArgumentError, SpanAlreadyEndedError, SpanguardError

if TYPE_CHECKING:
    from spanguard._opened import OpenedSpan

    _ObjectProxy = wrapt.BaseObjectProxy[Any]
else:
    _ObjectProxy = wrapt.BaseObjectProxy

__all__ = ["SpanProxy", "parse_status"]


def parse_status(status: Any) -> tuple[str | None, str, InvalidSpanArgumentError | None]:
    """Read a status in any form and case: its code, its description, and what is wrong with it.

    An unreadable status reads as ERROR: whoever says something else than OK about an end does
    not mean that all went well, and it must be seen.
    """
    if status is None:
        return None, "", None
    description = ""
    if isinstance(status, SpanStatus):
        description = clean_text(status.description or "")
        status = status.status_code
    text = status.value if isinstance(status, SpanStatusCode) else status
    code = text.strip().upper() if isinstance(text, str) else None
    if code in {"OK", "ERROR", "UNSET"}:
        return code, description, None
    shown = clean_text(safe_repr(status), 100)
    return (
        "ERROR",
        f"invalid status {shown}",
        InvalidSpanArgumentError(
            f"The status {shown} is not one of OK, ERROR, UNSET; ERROR was recorded. "
            "Pass 'OK' or 'ERROR'."
        ),
    )


class SpanProxy(_ObjectProxy):
    """An MLflow span by delegation. Reads pass through; writes are sanitised and contained.

    `isinstance(span, LiveSpan)` holds. Setters, `record_exception`, `set_status` and `add_event`
    never raise, also not in strict mode: what is wrong with them is a warning, or with strict
    mode raised when the span closes. ERROR is sticky. `end` closes open descendants first.
    """

    def __init__(self, span: Any, opened: OpenedSpan | None = None) -> None:
        super().__init__(span)
        self._self_opened = opened

    # -- payloads

    def set_inputs(self, inputs: Any) -> None:
        """Record the inputs."""
        if self._self_writable():
            _record.inputs(self.__wrapped__, inputs)

    def set_outputs(self, outputs: Any) -> None:
        """Record the outputs."""
        if self._self_writable():
            _record.outputs(self.__wrapped__, outputs)

    def set_attribute(self, key: str, value: Any) -> None:
        """Record one attribute. A key of MLflow's own is recorded under `user.`."""
        if self._self_writable():
            self._self_found(_record.attribute(self.__wrapped__, key, value))

    def set_attributes(self, attributes: dict[str, Any]) -> None:
        """Record several attributes."""
        if self._self_writable():
            values = as_mapping(attributes)
            self._self_found(*_record.attributes(self.__wrapped__, values))

    # -- classification and events

    def set_span_type(self, span_type: str) -> None:
        """Set the span's type."""
        self._self_write("set_span_type", clean_text(span_type))

    def set_description(self, description: str) -> None:
        """Set the span's description. Ignored by an MLflow that has none."""
        self._self_write("set_description", clean_text(description, 10_000))

    def set_log_level(self, level: Any) -> None:
        """Set the span's severity. Ignored by an MLflow that has none."""
        self._self_write("set_log_level", level)

    def add_event(self, event: Any) -> None:
        """Add an event."""
        self._self_write("add_event", event)

    def add_link(self, link: Any) -> None:
        """Add a link to another span. Ignored by an MLflow that has none."""
        self._self_write("add_link", link)

    def _self_write(self, method: str, value: Any) -> None:
        write = getattr(self.__wrapped__, method, None)
        if write is None or not self._self_writable():
            return
        try:
            write(value)
        except Exception as error:
            self._self_found(
                InvalidSpanArgumentError(
                    f"{method}() of span {self.__wrapped__.name!r} did not take its argument "
                    f"({type(error).__name__}). See MLflow's documentation of {method}()."
                )
            )

    # -- status and end

    def set_status(self, status: Any) -> None:
        """Set the status, in any case. OK does not undo an ERROR."""
        if status is None or not self._self_writable():
            return
        code, description, finding = parse_status(status)
        self._self_found(finding)
        if code == "ERROR":
            _record.error(self.__wrapped__, description)
        elif code == "OK" and _mlflow.status_code(self.__wrapped__) != "ERROR":
            with contained("setting the status"):
                self.__wrapped__.set_status("OK")

    def record_exception(self, exception: BaseException | str) -> None:
        """Record an exception, of any kind, and set ERROR. It stays ERROR when the span ends."""
        if not self._self_writable():
            return
        if not isinstance(exception, BaseException):
            exception = Exception(clean_text(exception, 10_000))
        with contained("recording an exception"):
            entry = _registry.entry_of(_mlflow.otel_span(self.__wrapped__))
            _record.exception(self.__wrapped__, exception, ERROR, entry)

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
        if self._self_opened is not None:
            self._self_opened.end_by_user(outputs, attributes, status, end_time_ns)
            return
        # A span of another API, got by current_span().
        if not self._self_writable():
            return
        entry = _registry.entry_of(_mlflow.otel_span(self.__wrapped__))
        if entry is not None:
            _registry.close_descendants(entry)
        if outputs is not None:
            self.set_outputs(outputs)
        self.set_attributes(attributes or {})
        self.set_status(status)
        _record.end(self.__wrapped__, None, end_time_ns)

    # -- how the proxy behaves as an object

    def _self_writable(self) -> bool:
        span = self.__wrapped__
        otel = _mlflow.recording_span(span)
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
        entry = self._self_opened.entry if self._self_opened is not None else None
        return entry is not None and entry.awaits is not None

    def _self_found(self, *findings: SpanguardError | None) -> None:
        found = [finding for finding in findings if finding is not None]
        if not found:
            return
        if self._self_opened is not None and self._self_opened.keep(found):
            return
        settle(found, strict=False, raised=None, site=user_site())

    def __repr__(self) -> str:
        return repr(self.__wrapped__)

    def __copy__(self) -> Any:
        return copy.copy(self.__wrapped__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce__(self) -> Any:
        return self.__wrapped__.__reduce__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__wrapped__.__reduce_ex__(protocol)
