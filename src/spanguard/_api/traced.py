"""`traced`: a span for every call of a function, whatever kind of callable it is."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from spanguard import _mlflow
from spanguard._api.binder import Binder
from spanguard._api.callables import NotTraceable, kind_of, name_of, trace_callable, trace_class
from spanguard._base.findings import contained, settle
from spanguard._base.site import CalledFunction, user_site
from spanguard._base.values import (
    is_a,
    is_the_users,
    items_of,
    kind_name,
    text_of,
    truth_of,
    whole_number_of,
)
from spanguard._lifecycle.handle import OpenedSpan
from spanguard._lifecycle.opening import open_span
from spanguard._lifecycle.request import MAX_SPAN_NAME_CHARS, SpanRequest
from spanguard._process.ambient import ambient_span
from spanguard._propagation.generators import (
    Recorder,
    TracedAsyncGenerator,
    TracedCoroutine,
    TracedGenerator,
    TracedGeneratorCoroutine,
)
from spanguard._record import writing
from spanguard._record.items import Items, WholeItems
from spanguard._record.payload import clean_text
from spanguard.exceptions import InvalidSpanArgumentError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from spanguard._lifecycle.arguments import TracedOptions

__all__ = ["traced"]

F = TypeVar("F", bound=Any)
Redact = Callable[[str, Any], Any]

MAX_ITEMS = 1_000
"""Items of a generator that are kept as its outputs, unless `max_items` says otherwise."""

ITEM_COUNT = "spanguard.item_count"

logger = logging.getLogger("spanguard")


@dataclass(frozen=True)
class Options:
    """What `traced` was told."""

    name: str | None = None
    span_type: str = "UNKNOWN"
    attributes: dict[str, Any] | None = None
    tags: dict[str, Any] | None = None
    capture_inputs: bool | Collection[str] = True
    capture_outputs: bool = True
    redact: Redact | None = None
    output_reducer: Callable[[list[Any]], Any] | None = None
    max_items: int = MAX_ITEMS
    expected: Any = ()
    client: Any = None
    strict: bool | None = None
    trace_destination: Any = None
    extras: dict[str, Any] = field(default_factory=dict)  # more of `traced_span`'s arguments
    takes_self: bool | None = None


# -- one traced callable -----------------------------------------------------------------------


class _Plan:
    """How the calls of one callable are traced."""

    __slots__ = ("binder", "called", "function", "name", "options", "owner")

    def __init__(self, function: Any, options: Options) -> None:
        self.function = function
        self.options = options
        self.owner: type | None = None
        self.name = options.name or name_of(function)
        self.called = CalledFunction(function)
        self.binder = Binder(function, options.capture_inputs, options.takes_self)

    @property
    def asks_owner(self) -> bool:
        return self.binder.asks_owner

    def named_in(self, owner: type, name: str) -> None:
        """Take note of the class that the function is in, and what it is called there."""
        self.owner = owner
        self.name = self.name or name

    def caller(self) -> Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]:
        """Return what makes a call, by the kind of the function."""
        call: Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]
        call = getattr(self, kind_of(self.function))
        return call

    def of(self, function: Any) -> _Plan:
        """Return the same plan for another function."""
        return _Plan(function, self.options)

    def __reduce__(self) -> Any:
        # The class only where it is what tells that the first argument is self.
        named = (self.owner, self.name) if self.owner and self.asks_owner else None
        return _Plan, (self.function, self.options), named

    def __setstate__(self, named: tuple[type, str]) -> None:
        self.named_in(*named)

    def open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpenedSpan:
        """Open the span of one call, with its inputs, and make it ambient."""
        options = self.options
        inputs = None
        if options.capture_inputs is not False:
            with contained("capturing the arguments of a call"):
                inputs = self.binder.bind(self.owner, args, kwargs)
                if options.redact is not None:
                    inputs = {k: _redacted(options.redact, k, v) for k, v in inputs.items()}
        request = SpanRequest(
            (),
            name=self.name or type(self.function).__name__,
            span_type=options.span_type,
            inputs=inputs,
            attributes=options.attributes,
            expected=options.expected,
            client=options.client,
            strict=options.strict,
            **options.extras,
            **self._for_trace(),
        )
        request.function = self.called
        return open_span(request)

    def _for_trace(self) -> dict[str, Any]:
        """Return the arguments that mean something where the call starts a trace only."""
        options = self.options
        for_trace = options.tags is not None or options.trace_destination is not None
        if for_trace and _starts_a_trace():
            return {"tags": options.tags, "trace_destination": options.trace_destination}
        return {}

    def write_output(self, opened: OpenedSpan, value: Any) -> None:
        options = self.options
        if (
            options.capture_outputs
            and value is not None
            and opened.is_open
            and not _mlflow.has_outputs(opened.live)  # the body's own win, as in MLflow
        ):
            if options.redact is not None:
                value = _redacted(options.redact, "return", value)
            writing.outputs(opened.live, value)

    def write_items(self, opened: OpenedSpan, items: Items) -> None:
        options = self.options
        if not options.capture_outputs or not opened.is_open:
            return
        more = items.count - items.taken
        if more:
            writing.attribute(opened.live, ITEM_COUNT, items.count)
        if _mlflow.has_outputs(opened.live):
            return
        if options.output_reducer is not None:
            self._write_reduced(opened, options.output_reducer, items.kept)
            return
        if more:
            items.kept.append(f"[spanguard: {more} more items, {items.count} in all]")
        writing.taken_outputs(opened.live, items.kept)

    def _write_reduced(
        self, opened: OpenedSpan, reduce: Callable[[list[Any]], Any], items: list[Any]
    ) -> None:
        outputs: Any = items
        try:
            outputs = reduce(items)
        except BaseException as error:
            if is_the_users(error):
                raise
            _log_hook("output_reducer", error)
        if self.options.redact is not None:
            outputs = _redacted(self.options.redact, "return", outputs)
        writing.outputs(opened.live, outputs)

    def recorder(self, args: Any, kwargs: Any) -> Recorder:
        return Recorder(lambda: self.open(args, kwargs), self._new_items(), self.write_items)

    def _new_items(self) -> Items:
        options = self.options
        most = options.max_items if options.capture_outputs else 0
        if options.output_reducer is not None:
            return WholeItems(most)
        redact = options.redact
        if redact is None:
            return Items(most)
        return Items(most, lambda item: _redacted(redact, "return", item))

    # -- the kinds of calls, by the signature of wrapt's wrappers; self is among the arguments

    def call(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        opened: OpenedSpan | None = None
        try:
            opened = self.open(args, kwargs)
            result = wrapped(*args, **kwargs)
            self.write_output(opened, result)
        except BaseException as error:
            if opened is not None:
                opened.finish(error)
            raise
        opened.finish(None)
        return result

    def call_coroutine(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return TracedCoroutine(
            wrapped(*args, **kwargs),
            lambda: self.open(args, kwargs),
            self.write_output,
        )

    def call_generator_coroutine(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return TracedGeneratorCoroutine(
            wrapped(*args, **kwargs), lambda: self.open(args, kwargs), self.write_output
        )

    def call_generator(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        generator = wrapped(*args, **kwargs)
        return TracedGenerator(generator, self.recorder(args, kwargs))

    def call_async_generator(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        generator = wrapped(*args, **kwargs)
        return TracedAsyncGenerator(generator, self.recorder(args, kwargs))


def _redacted(redact: Redact, name: str, value: Any) -> Any:
    """Return what the redactor makes of a value; if it fails, nothing of the value."""
    try:
        return redact(name, value)
    except BaseException as error:
        if is_the_users(error):
            raise
        _log_hook("redact", error)
        return f"[spanguard: not recorded, redact() raised {kind_name(error)}]"


_logged_hooks: set[tuple[str, str]] = set()


def _log_hook(hook: str, error: BaseException) -> None:
    """Log that a user's hook failed, once per hook and type. Its message may hold the payload."""
    key = (hook, type(error).__qualname__)
    if key not in _logged_hooks:
        _logged_hooks.add(key)
        logger.warning("%s() of @traced raised %s. Logged once.", *key)


def _starts_a_trace() -> bool:
    return not ambient_span().get_span_context().is_valid


# -- the decorator -----------------------------------------------------------------------------


def _traced(function: Any, options: Options) -> Any:
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
    _tell(findings, options.strict)
    return result


def _described(thing: Any) -> str:
    kind = thing if isinstance(thing, type) else type(thing)
    return f"the class {kind.__name__}" if kind is thing else f"an object of {kind.__name__}"


def _plan(
    options: Options, findings: list[str], function: Any, *, takes_self: bool | None = None
) -> _Plan:
    plan = _Plan(function, replace(options, takes_self=takes_self))
    unknown = plan.binder.unknown()
    if unknown:
        findings.append(
            f"capture_inputs names {', '.join(unknown)}, and {plan.name} has no such parameter. "
            "Check the spelling."
        )
    return plan


def _plan_of_method(
    options: Options, owner: type, function: Any, *, method: str, takes_self: bool | None = None
) -> _Plan:
    name = f"{options.name or owner.__name__}.{method}"
    return _Plan(function, replace(options, name=name, takes_self=takes_self))


class _Decorator:
    """`traced(...)` with its options, waiting for the function."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, function: F) -> F:
        return cast(F, _traced(function, self._options))


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
    if is_a(func, str):
        if name is not None:
            findings.append(
                f"traced() was given two names; {func!r} was taken. Pass what else there is by "
                "name: span_type=, attributes=."
            )
        func, name = None, func
    kept = _kept(capture_inputs)
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
    if name is not None and not is_a(name, str):
        findings.append("name of traced() is no string. Pass a string, or no name.")
    _tell(findings, strict)
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
        capture_inputs=kept or False,
        capture_outputs=captures or False,
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


_MAX_NAMES = 1_000


def _kept(capture_inputs: Any) -> bool | Collection[str] | None:
    """Read which parameters are to be recorded; None if that cannot be told."""
    if is_a(capture_inputs, bool):
        return bool(capture_inputs)
    name = text_of(capture_inputs)
    if name is not None:
        return (name,)
    names = [text_of(each) for each in items_of(capture_inputs, _MAX_NAMES)]
    known = tuple(each for each in names if each is not None)
    return known if len(known) == len(names) else None


def _tell(findings: list[str], strict: bool | None) -> None:
    """Raise or warn of what is wrong with a decoration, at the line of the decorator."""
    errors = [InvalidSpanArgumentError(finding) for finding in findings]
    settle(errors, strict=strict, raised=None, site=user_site())
