"""`traced`: a span for every call of a function, whatever kind of callable it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any, TypeVar, cast, overload

from typing_extensions import Unpack

from spanguard._api.callables import NotTraceable, trace_callable, trace_class
from spanguard._api.plan import MAX_ITEMS, Options, Plan, Redact, kept_arguments, tell
from spanguard._base.values import is_a, truth_of, whole_number_of
from spanguard._lifecycle.arguments import TracedOptions
from spanguard._lifecycle.request import MAX_SPAN_NAME_CHARS
from spanguard._record.text import clean_text

__all__ = ["traced"]


F = TypeVar("F", bound=Any)


def _traced(function: object, options: Options) -> Any:
    findings: list[str] = []
    result = function
    try:
        if isinstance(function, type):
            trace_class(function, functools.partial(_plan_of_method, options, function))
        else:
            result = trace_callable(function, functools.partial(_plan, options, findings))
    except (NotTraceable, TypeError, AttributeError):
        # The last two: a class that does not let its methods be replaced, as Python's own.
        findings.append(
            f"traced() found nothing to trace in {_described(function)}; it was left as it is. "
            "Pass a function, or a class of your own."
        )
    tell(findings, options.strict)
    return result


def _described(thing: object) -> str:
    kind = thing if isinstance(thing, type) else type(thing)
    return f"the class {kind.__name__}" if kind is thing else f"an object of {kind.__name__}"


def _plan(
    options: Options, findings: list[str], function: object, *, takes_self: bool | None = None
) -> Plan:
    plan = Plan(function, replace(options, takes_self=takes_self))
    unknown = plan.binder.unknown()
    if unknown:
        findings.append(
            f"capture_inputs names {', '.join(unknown)}, and {plan.name} has no such parameter. "
            "Check the spelling."
        )
    return plan


def _plan_of_method(
    options: Options, owner: type, function: object, *, method: str, takes_self: bool | None = None
) -> Plan:
    name = f"{options.name or owner.__name__}.{method}"
    return Plan(function, replace(options, name=name, takes_self=takes_self))


class _Decorator:
    """`traced(...)` with its options, waiting for the function."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, function: F) -> F:
        return cast("F", _traced(function, self._options))


@overload
def traced(
    func: str | None = None,
    name: str | None = None,
    span_type: str = "UNKNOWN",
    attributes: dict[str, Any] | None = None,
    output_reducer: Callable[[list[Any]], Any] | None = None,
    trace_destination: Any = None,
    sampling_ratio_override: float | None = None,
    log_level: Any = None,
    links: Iterable[Any] | None = None,
    description: str | None = None,
    **options: Unpack[TracedOptions],
) -> _Decorator: ...


@overload
def traced(
    func: F,
    name: str | None = None,
    span_type: str = "UNKNOWN",
    attributes: dict[str, Any] | None = None,
    output_reducer: Callable[[list[Any]], Any] | None = None,
    trace_destination: Any = None,
    sampling_ratio_override: float | None = None,
    log_level: Any = None,
    links: Iterable[Any] | None = None,
    description: str | None = None,
    **options: Unpack[TracedOptions],
) -> F: ...


def traced(
    func: Any = None,
    name: Any = None,
    span_type: str = "UNKNOWN",
    attributes: dict[str, Any] | None = None,
    output_reducer: Callable[[list[Any]], Any] | None = None,
    trace_destination: Any = None,
    sampling_ratio_override: float | None = None,
    log_level: Any = None,
    links: Any = None,
    description: str | None = None,
    *,
    tags: dict[str, Any] | None = None,
    capture_inputs: bool | str | Collection[str] = True,
    capture_outputs: bool = True,
    redact: Redact | None = None,
    max_items: int = MAX_ITEMS,
    expected: tuple[type[BaseException], ...] | type[BaseException] = (),
    client: Any = None,
    strict: bool | None = None,
    **unknown: Any,
) -> Any:
    """Open a span for each call of a function, method, generator, coroutine or callable.

    Arguments are recorded by parameter name, without self and cls, and what the call returns as
    outputs. Signature, name, documentation, kind and pickling stay the function's own. A
    generator's span opens at its first step and is active only while its body runs; its items
    are the outputs. On a class, its public methods are traced and the class stays the class.
    Nothing of the tracing raises into the call; exceptions of the function pass unchanged.

    Takes what `@mlflow.trace` takes, in the same places, so a swap of the decorator migrates. An
    argument that does not exist, or a value that cannot be meant, is ignored and told of.

    Args:
        func: the function; or the span's name, where it is used as `@traced("name")`.
        name: the span's name; the function's, if not given.
        span_type, attributes, links, description, log_level: as for `traced_span`.
        output_reducer: makes a generator's outputs of the list of its items. It gets the items
            themselves, which are kept alive until then: lower `max_items` where they are big.
        trace_destination: where the traces go that a call starts: its `experiment_id` counts.
        sampling_ratio_override: what part of the traces that a call starts is recorded, 0.0 to
            1.0. As in MLflow it overrides MLFLOW_TRACE_SAMPLING_RATIO, where that is set.
        tags: for the trace, where a call starts one.
        capture_inputs: True, False, or the names of the parameters to record.
        capture_outputs: whether to record what is returned or yielded. What the body itself gives
            to `set_outputs()` is recorded in any case, and stays.
        redact: sees every captured argument, and the output as "return", and gives back what may
            be recorded. If it raises, the value is dropped, never leaked. Of a generator it sees
            each item when it is yielded, as a list of one.
        max_items: so many of a generator's items are recorded; then they are only counted. Each
            is recorded as it is when it is yielded, and let go of; all of them share the size
            cap of one payload.
        expected: exception classes that are no error here.
        client: an MLflow client whose `start_*` and `end_*` are to be called.
        strict: overrides `strict()` and the environment for this function's spans.

    >>> import spanguard
    >>> @spanguard.traced
    ... def double(x: int) -> int:
    ...     return 2 * x
    >>> double(21)
    42
    """
    findings = [
        f"traced() does not take {', '.join(sorted(unknown))}; ignored. Remove it, or check its "
        "spelling."
    ][: len(unknown)]
    func, name = _named(func, name, findings)
    inputs, outputs, most = _captures(capture_inputs, capture_outputs, max_items, findings)
    tell(findings, strict)
    extras = {
        "sampling_ratio_override": sampling_ratio_override,
        "log_level": log_level,
        "links": links,
        "description": description,
    }
    options = Options(
        name=clean_text(name, MAX_SPAN_NAME_CHARS) if name is not None else None,
        span_type=span_type,
        attributes=attributes,
        tags=tags,
        capture_inputs=inputs,
        capture_outputs=outputs,
        redact=redact,
        output_reducer=output_reducer,
        max_items=most,
        expected=expected,
        client=client,
        strict=strict,
        trace_destination=trace_destination,
        extras={argument: value for argument, value in extras.items() if value is not None},
    )
    return _Decorator(options) if func is None else _traced(func, options)


def _named(func: object, name: object, findings: list[str]) -> tuple[Any, Any]:
    """Return the function, if it is given already, and the name: it may come first."""
    if is_a(func, str):
        if name is not None:
            findings.append(
                f"traced() was given two names; {func!r} was taken. Pass what else there is by "
                "name: span_type=, attributes=."
            )
        func, name = None, func
    if name is not None and not is_a(name, str):
        findings.append("name of traced() is no string. Pass a string, or no name.")
    return func, name


def _captures(
    capture_inputs: object, capture_outputs: object, max_items: object, findings: list[str]
) -> tuple[bool | Collection[str], bool, int]:
    """Read what is to be recorded. What cannot be read is not recorded: it may be a secret."""
    kept = kept_arguments(capture_inputs)
    if kept is None:
        findings.append(
            "capture_inputs of traced() is neither True, False nor names of parameters; no inputs "
            "are recorded. Pass a list of strings."
        )
    captures = truth_of(capture_outputs)
    if captures is None:
        findings.append(
            "capture_outputs of traced() is neither true nor false; no outputs are recorded. Pass "
            "True or False."
        )
    most = whole_number_of(max_items)
    if most is None:
        findings.append(
            f"max_items of traced() is no whole number; {MAX_ITEMS} was taken. Pass a number."
        )
        most = MAX_ITEMS
    return kept or False, captures or False, most
