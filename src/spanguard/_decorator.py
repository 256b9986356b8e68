"""`traced`: a span for every call of a function, whatever kind of callable it is."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, TypeVar, cast, overload

import wrapt

from spanguard import _record
from spanguard._context import ambient_span
from spanguard._findings import contained, settle
from spanguard._generators import (
    Recorder,
    TracedAsyncGenerator,
    TracedCoroutine,
    TracedGenerator,
)
from spanguard._items import Items, WholeItems
from spanguard._opened import OpenedSpan
from spanguard._pickling import asked_by_cloudpickle
from spanguard._request import SpanRequest
from spanguard._site import user_site
from spanguard._span import open_span
from spanguard.exceptions import InvalidSpanArgumentError

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
    experiment_id: str | None = None
    links: Any = None
    extras: dict[str, Any] = field(default_factory=dict)


# -- arguments by name -------------------------------------------------------------------------


class _Binder:
    """Names the arguments of a call. What can be worked out once is, at decoration."""

    __slots__ = ("_defaults", "_kept", "_known", "_names", "_rest", "_self_first", "_words")

    def __init__(self, function: Any, kept: bool | Collection[str]) -> None:
        self._kept = kept if isinstance(kept, bool) else frozenset(kept)
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # a builtin without a signature
            parameters = [
                inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
                inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
            ]
        by_kind: dict[Any, list[str]] = {}
        for parameter in parameters:
            by_kind.setdefault(parameter.kind, []).append(parameter.name)
        kinds = inspect.Parameter
        self._names = by_kind.get(kinds.POSITIONAL_ONLY, []) + by_kind.get(
            kinds.POSITIONAL_OR_KEYWORD, []
        )
        self._rest = next(iter(by_kind.get(kinds.VAR_POSITIONAL, [])), None)
        self._words = next(iter(by_kind.get(kinds.VAR_KEYWORD, [])), None)
        self._known = {*self._names, *by_kind.get(kinds.KEYWORD_ONLY, [])}
        self._defaults = {
            p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty
        }
        self._self_first = isinstance(function, FunctionType)

    def bind(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by parameter name, without self or cls."""
        names = self._names
        first = 0
        if self._self_first and names:
            if instance is not None:
                first = 1  # wrapt has taken it off the arguments
            elif names[0] in ("self", "cls") and args:
                first, args = 1, args[1:]
        if first:
            names = names[first:]
        bound = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in self._known:
                bound[name] = value
            else:
                bound.setdefault(self._words or name, {} if self._words else value)
                if self._words:
                    bound[self._words][name] = value
        if self._rest is not None and len(args) > len(names):
            bound[self._rest] = list(args[len(names) :])
        for name, value in self._defaults.items():
            bound.setdefault(name, value)
        kept = self._kept
        if not isinstance(kept, bool):
            bound = {name: value for name, value in bound.items() if name in kept}
        return bound


# -- one traced callable -----------------------------------------------------------------------


class _Plan:
    """How the calls of one callable are traced."""

    __slots__ = ("binder", "name", "options")

    def __init__(self, function: Any, options: Options) -> None:
        inner = _inner(function)
        self.options = options
        self.name = options.name or _name_of(inner)
        self.binder = _Binder(inner, options.capture_inputs)

    def open(self, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpenedSpan:
        """Open the span of one call, with its inputs, and make it ambient."""
        options = self.options
        inputs = None
        if options.capture_inputs is not False:
            with contained("capturing the arguments of a call"):
                inputs = self.binder.bind(instance, args, kwargs)
                if options.redact is not None:
                    inputs = {k: _redacted(options.redact, k, v) for k, v in inputs.items()}
        request = SpanRequest(
            (),
            name=self.name,
            span_type=options.span_type,
            inputs=inputs,
            attributes=options.attributes,
            expected=options.expected,
            client=options.client,
            strict=options.strict,
            links=options.links,
        )
        if (options.tags or options.experiment_id) and _starts_a_trace():
            request.tags = options.tags
            request.experiment_id = options.experiment_id
            request.for_trace = True
        opened = open_span(request)
        for setter, value in options.extras.items():
            getattr(opened.proxy, setter)(value)
        return opened

    def write_output(self, opened: OpenedSpan, value: Any) -> None:
        options = self.options
        if options.capture_outputs and value is not None and opened.is_open:
            if options.redact is not None:
                value = _redacted(options.redact, "return", value)
            _record.outputs(opened.live, value)

    def write_items(self, opened: OpenedSpan, items: Items) -> None:
        options = self.options
        if not options.capture_outputs or not opened.is_open:
            return
        more = items.count - items.taken
        if more:
            _record.attribute(opened.live, ITEM_COUNT, items.count)
        if options.output_reducer is not None:
            self._write_reduced(opened, options.output_reducer, items.kept)
            return
        if more:
            items.kept.append(f"[spanguard: {more} more items, {items.count} in all]")
        _record.taken_outputs(opened.live, items.kept)

    def _write_reduced(
        self, opened: OpenedSpan, reduce: Callable[[list[Any]], Any], items: list[Any]
    ) -> None:
        outputs: Any = items
        try:
            outputs = reduce(items)
        except Exception as error:
            _log_hook("output_reducer", error)
        if self.options.redact is not None:
            outputs = _redacted(self.options.redact, "return", outputs)
        _record.outputs(opened.live, outputs)

    def recorder(self, instance: Any, args: Any, kwargs: Any) -> Recorder:
        return Recorder(
            lambda: self.open(instance, args, kwargs), self._new_items(), self.write_items
        )

    def _new_items(self) -> Items:
        options = self.options
        most = options.max_items if options.capture_outputs else 0
        if options.output_reducer is not None:
            return WholeItems(most)
        redact = options.redact
        return Items(most, redact and (lambda item: _redacted(redact, "return", item)))

    # -- the four kinds of calls: what wrapt calls, with self or cls taken off the arguments

    def call(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        opened: OpenedSpan | None = None
        try:
            opened = self.open(instance, args, kwargs)
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
            lambda: self.open(instance, args, kwargs),
            self.write_output,
        )

    def call_generator(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        generator = wrapped(*args, **kwargs)
        return TracedGenerator(generator, self.recorder(instance, args, kwargs))

    def call_async_generator(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        generator = wrapped(*args, **kwargs)
        return TracedAsyncGenerator(generator, self.recorder(instance, args, kwargs))


def _redacted(redact: Redact, name: str, value: Any) -> Any:
    """Return what the redactor makes of a value; if it fails, nothing of the value."""
    try:
        return redact(name, value)
    except Exception as error:
        _log_hook("redact", error)
        return f"[spanguard: not recorded, redact() raised {type(error).__name__}]"


_logged_hooks: set[tuple[str, str]] = set()


def _log_hook(hook: str, error: Exception) -> None:
    """Log that a user's hook failed, once per hook and type. Its message may hold the payload."""
    key = (hook, type(error).__qualname__)
    if key not in _logged_hooks:
        _logged_hooks.add(key)
        logger.warning("%s() of @traced raised %s. Logged once.", *key)


def _starts_a_trace() -> bool:
    return not ambient_span().get_span_context().is_valid


def _inner(function: Any) -> Any:
    """Return the function under classmethod and staticmethod objects."""
    return function.__func__ if isinstance(function, (classmethod, staticmethod)) else function


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


def _kind_of(function: Any) -> str:
    """Tell what a call gives back. An object counts by its `__call__`."""
    candidates = [_inner(function)]
    if not inspect.isroutine(candidates[0]) and not isinstance(candidates[0], functools.partial):
        candidates.append(inspect.getattr_static(type(candidates[0]), "__call__", None))
    for candidate in candidates:
        if inspect.iscoroutinefunction(candidate):
            return "call_coroutine"
        if inspect.isasyncgenfunction(candidate):
            return "call_async_generator"
        if inspect.isgeneratorfunction(candidate):
            return "call_generator"
    return "call"


# -- the decorator -----------------------------------------------------------------------------


class TracedMethod(wrapt.BoundFunctionWrapper):  # type: ignore[type-arg, unused-ignore]
    """A traced function bound to an object or a class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (self._self_instance, self.__wrapped__.__name__)


class TracedFunction(wrapt.FunctionWrapper):  # type: ignore[type-arg, unused-ignore]
    """A function that opens a span for each call; in all else the function itself."""

    __bound_function_wrapper__ = TracedMethod

    def __init__(self, function: Any, options: Options) -> None:
        plan = _Plan(function, options)
        super().__init__(function, getattr(plan, _kind_of(function)))
        self._self_options = options

    def __reduce_ex__(self, protocol: Any) -> Any:
        # By name, as functions are: so ProcessPoolExecutor takes it, and it stays traced there.
        if asked_by_cloudpickle() and not _has_name(self):
            return TracedFunction, (self.__wrapped__, self._self_options)
        return str(self.__wrapped__.__qualname__)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore
        # A function to everyone, but cloudpickle would take a function apart and ship what is
        # wrapped: to it, something that knows how it pickles.
        return TracedFunction if asked_by_cloudpickle() else self.__wrapped__.__class__

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)

    def __copy__(self) -> TracedFunction:
        return self

    def __deepcopy__(self, memo: Any) -> TracedFunction:
        return self


def _has_name(function: TracedFunction) -> bool:
    """Tell whether another process finds it by name: not in __main__, a function or a lambda."""
    return function.__module__ != "__main__" and "<" not in function.__qualname__


def _trace_class(cls: type, options: Options) -> None:
    """Trace the public methods that a class itself defines."""
    for name, member in list(vars(cls).items()):
        plain = isinstance(member, (FunctionType, classmethod, staticmethod))
        if name.startswith("_") or not plain or isinstance(member, TracedFunction):
            continue
        method_options = replace(options, name=f"{options.name or cls.__name__}.{name}")
        setattr(cls, name, TracedFunction(member, method_options))


def _traced(function: Any, options: Options) -> Any:
    if isinstance(function, type):
        _trace_class(function, options)
        return function
    if isinstance(function, property):
        getter = TracedFunction(function.fget, options) if function.fget else None
        return property(getter, function.fset, function.fdel, function.__doc__)
    return TracedFunction(function, options)


class _Decorator:
    """`traced(...)` with its options, waiting for the function."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, function: F) -> F:
        return cast(F, _traced(function, self._options))


@overload
def traced(name: str | None = None, **options: Any) -> _Decorator: ...


@overload
def traced(name: F, **options: Any) -> F: ...


def traced(
    name: Any = None,
    *,
    span_type: str = "UNKNOWN",
    attributes: dict[str, Any] | None = None,
    tags: dict[str, Any] | None = None,
    capture_inputs: bool | Collection[str] = True,
    capture_outputs: bool = True,
    redact: Redact | None = None,
    output_reducer: Callable[[list[Any]], Any] | None = None,
    max_items: int = MAX_ITEMS,
    expected: tuple[type[BaseException], ...] | type[BaseException] = (),
    client: Any = None,
    strict: bool | None = None,
    func: Any = None,
    **migrated: Any,
) -> Any:
    """Open a span for each call of a function, method, generator, coroutine or callable.

    Arguments are recorded by parameter name, without self and cls, and what the call returns as
    outputs. Signature, name, documentation, kind and pickling stay the function's own. A
    generator's span opens at its first step and is active only while its body runs; its items
    are the outputs. On a class, its public methods are traced and the class stays the class.
    Nothing of the tracing raises into the call; exceptions of the function pass unchanged.

    Args:
        name: the span's name; the function's, if not given.
        span_type, attributes: as for `traced_span`.
        tags: for the trace, where a call starts one.
        capture_inputs: True, False, or the names of the parameters to record.
        capture_outputs: whether to record what is returned or yielded.
        redact: sees every captured argument, and the output as "return", and gives back what may
            be recorded. If it raises, the value is dropped, never leaked. Of a generator it sees
            each item when it is yielded, as a list of one.
        output_reducer: makes a generator's outputs of the list of its items. It gets the items
            themselves, which are kept alive until then: lower `max_items` where they are big.
        max_items: so many of a generator's items are recorded; then they are only counted. Each
            is recorded as it is when it is yielded, and let go of; all of them share the size
            cap of one payload.
        expected: exception classes that are no error here.
        client: an MLflow client whose `start_*` and `end_*` are to be called.
        strict: overrides `strict()` and the environment for this function's spans.

    What `@mlflow.trace` takes beside these is taken as well where it means the same: `func`,
    `links`, `description`, `log_level`, and the experiment of a `trace_destination`.

    >>> import spanguard
    >>> @spanguard.traced
    ... def double(x: int) -> int:
    ...     return 2 * x
    >>> double(21)
    42
    """
    function = func
    if name is not None and not isinstance(name, str):
        function, name = name, migrated.pop("name", None)
    experiment_id, extras = _from_mlflow(migrated)
    options = Options(
        name=name,
        span_type=span_type,
        attributes=attributes,
        tags=tags,
        capture_inputs=capture_inputs,
        capture_outputs=capture_outputs,
        redact=redact,
        output_reducer=output_reducer,
        max_items=max_items,
        expected=expected,
        client=client,
        strict=strict,
        experiment_id=experiment_id,
        links=migrated.pop("links", None),
        extras=extras,
    )
    if migrated:
        finding = InvalidSpanArgumentError(
            f"traced() does not take {', '.join(sorted(migrated))}; ignored. Remove it, or check "
            "its spelling."
        )
        settle([finding], strict=strict, raised=None, site=user_site())
    if function is None:
        return _Decorator(options)
    return _traced(function, options)


def _from_mlflow(migrated: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Take what `@mlflow.trace` is given and means the same here."""
    destination = migrated.pop("trace_destination", None)
    extras = {
        setter: migrated.pop(argument)
        for argument, setter in (("description", "set_description"), ("log_level", "set_log_level"))
        if migrated.get(argument) is not None
    }
    for argument in ("description", "log_level"):
        migrated.pop(argument, None)
    return getattr(destination, "experiment_id", None), extras
