"""MLflow's end of a span, done here: the same record, at a third of what it costs.

`LiveSpan.end` decodes what it has just encoded, and asks at each end for what hardly ever changes.
Here that is left out, and nothing else is: status, hint to coding agents, default log level, the
configured span processors (PII masks) and OpenTelemetry's end, in MLflow's order
(test_own_end.py compares what arrives).

That holds for an `end` that is known by all it names. One of a newer MLflow that does anything
else, one of a subclass, and one that somebody has put in its place are called as they are.
"""

from __future__ import annotations

import json
import logging
from types import CodeType, FunctionType
from typing import Any, NamedTuple, cast

from mlflow.entities import LiveSpan
from opentelemetry.trace import Status, StatusCode

from spanguard._base.interrupts import let_the_users_pass
from spanguard._mlflow.known_code import names_in, names_of
from spanguard._mlflow.names import (
    CHAT_USAGE_KEY,
    INPUTS_KEY,
    LOG_LEVEL_KEY,
    OUTPUTS_KEY,
    SPAN_TYPE_KEY,
)
from spanguard._mlflow.optional import optional_module
from spanguard._mlflow.own_write import write_encoded

__all__ = ["end_as_mlflow"]


_BEGINNING = (
    "set_attributes set_outputs set_status status status_code SpanStatusCode ERROR SpanStatus OK"
)
_HINT = "mlflow.agent.hint maybe_warn_local_tracking_for_databricks Exception"
_HINT_BY_TYPE = "span_type SpanType LLM TOOL RETRIEVER maybe_warn_agent inputs name outputs"
_COST = "should_compute_cost_client_side set_span_cost_attribute"
_LEVEL = "_attributes get SpanAttributeKey LOG_LEVEL set int default_log_level_for_span_type"
_LOG = "_logger warning span_id isEnabledFor logging DEBUG"
_ENDING = "apply_span_processors _span end"

# What a known `end` names, in that order, which is the same in each Python.
_ENDS = {
    f"{_BEGINNING} {_COST} {_ENDING} Exception {_LOG}",  # 3.10 to 3.12
    f"{_BEGINNING} {_COST} {_LEVEL} span_type {_ENDING} Exception {_LOG}",  # 3.13 to 3.15
    f"{_BEGINNING} {_HINT} {_HINT_BY_TYPE} {_COST} {_LEVEL} {_ENDING} {_LOG}",  # from 3.16 on
}

# And what it asks for the cost of a span: of one without token usage there is none.
_COSTS = {
    "set_span_cost_attribute": (
        "calculate_span_cost set_attribute SpanAttributeKey LLM_COST Exception _logger debug",
        "SpanAttributeKey LLM_COST _span attributes calculate_span_cost set_attribute Exception "
        "_logger debug",  # 3.17
    ),
    "calculate_span_cost": (
        "get_attribute SpanAttributeKey MODEL CHAT_USAGE MODEL_PROVIDER "
        "calculate_cost_by_model_and_token_usage",
    ),
}


class _Known(NamedTuple):
    """An end that is known: its code, and what it does beside what all of them do."""

    code: CodeType | None = None
    gives_level: bool = False
    gives_hint: bool = False


_known = _Known()

_module: Any = optional_module("mlflow.entities.span")
_utils: Any = optional_module("mlflow.tracing.utils")
_config: Any = optional_module("mlflow.tracing.config")
_hints: Any = optional_module("mlflow.agent.hint")  # from MLflow 3.16 on
_give_level = getattr(_module, "default_log_level_for_span_type", None)  # from MLflow 3.13 on
_apply_processors = getattr(_module, "apply_span_processors", None)

_OK = Status(StatusCode.OK, "")  # the description as well is as MLflow gives it
_ERROR = StatusCode.ERROR

# The types of which MLflow hints at missing inputs and outputs, as they are written.
_HINTED = frozenset({'"LLM"', '"TOOL"', '"RETRIEVER"'})

# The default log level of a span type, both as they are written. A program has few types.
_levels: dict[str, str] = {}
_MAX_LEVELS = 1_000


def end_as_mlflow(span: Any, end_time_ns: int | None) -> bool:
    """End a span as `span.end(end_time_ns=...)` does. False where that has to be called itself.

    Then nothing has been done. As in MLflow, what fails is a line in MLflow's log.
    """
    known = _known_end(span)
    level = _level_to_write(known, span) if known is not None else None
    if known is None or level is None:
        return False
    otel = span._span
    try:
        if otel.status.status_code is not _ERROR:
            otel.set_status(_OK)
        if known.gives_hint:
            _hint()
        if level:
            write_encoded(otel, {LOG_LEVEL_KEY: level})
        apply = _module.apply_span_processors
        if apply is not _apply_processors or _config.get_config().span_processors:
            apply(span)
        otel.end(end_time=end_time_ns)
    except Exception as error:  # noqa: BLE001
        _log_failure(span, error)
    return True


def _known_end(span: Any) -> _Known | None:
    """Return what the end of a span does, if that is known."""
    if type(span) is not LiveSpan or "end" in vars(span):
        return None
    end = getattr(LiveSpan, "end", None)
    if type(end) is not FunctionType:  # what wrapt puts there has the code of what is inside of it
        return None
    known = _known
    return known if end.__code__ is known.code else _look_at(end.__code__)


def _look_at(code: CodeType) -> _Known | None:
    global _known
    named = names_of(code)
    if named not in _ENDS or not all(names_in(_utils, name) in _COSTS[name] for name in _COSTS):
        return None
    _known = _Known(
        code,
        gives_level="default_log_level_for_span_type" in named,
        gives_hint="maybe_warn_agent" in named,
    )
    return _known


def _level_to_write(known: _Known, span: Any) -> str | None:
    """Return the log level that is still to be written, "" for none.

    None where MLflow's own end has more to do: work out a cost, or give a hint.
    """
    otel = span._span
    written = getattr(getattr(otel, "_attributes", None), "_dict", None)
    if type(written) is not dict or CHAT_USAGE_KEY in written or otel.end_time is not None:
        return None
    span_type = written.get(SPAN_TYPE_KEY)
    if type(span_type) is not str:  # not as MLflow writes it, and perhaps without a hash
        return None
    if known.gives_hint and span_type in _HINTED and not _is_complete(otel, written):
        return None
    if not known.gives_level:
        return ""
    level = written.get(LOG_LEVEL_KEY)
    if level is not None:
        return "" if type(level) is str and level.isdigit() else None
    if _module.default_log_level_for_span_type is not _give_level:
        return None
    return _levels.get(span_type) or _level_of(span_type)


def _is_complete(otel: Any, written: dict[str, object]) -> bool:
    """Tell whether there is nothing to hint at: an error, or inputs and outputs for certain."""
    given = (written.get(INPUTS_KEY), written.get(OUTPUTS_KEY))
    return otel.status.status_code is _ERROR or all(map(_is_given, given))


def _is_given(payload: object) -> bool:
    """Tell whether a payload, as it is written, is certainly not None."""
    return type(payload) is str and payload.lstrip()[:1] not in ("", "n")


def _level_of(span_type: str) -> str | None:
    try:
        read = json.loads(span_type)
        level = str(int(cast("Any", _give_level)(read)))
    except Exception as error:  # noqa: BLE001 - not as MLflow writes it: MLflow knows what it is
        let_the_users_pass(error)
        return None
    if len(_levels) < _MAX_LEVELS:
        _levels[span_type] = level
    return level


def _hint() -> None:
    try:
        # Asked first, since it is remembered; what else there is to ask is asked anew each time.
        is_driving = getattr(_hints, "_is_agent_driving", None)
        if is_driving is None or is_driving():
            _hints.maybe_warn_local_tracking_for_databricks()
    except Exception as error:  # noqa: BLE001 - as in MLflow: a hint must never prevent an end
        let_the_users_pass(error)


def _log_failure(span: Any, error: Exception) -> None:
    _module._logger.warning(
        f"Failed to end span {span.span_id}: {error}. "
        "For full traceback, set logging level to debug.",
        exc_info=_module._logger.isEnabledFor(logging.DEBUG),
    )
