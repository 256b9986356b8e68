"""What `@traced` does around each call of one function."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from spanguard._api.binder import Binder
from spanguard._api.call_plan import Args, Caller, Kwargs, Wrapped
from spanguard._api.callables import kind_of, name_of
from spanguard._base.findings import contained, settle
from spanguard._base.interrupts import is_the_users
from spanguard._base.site import CalledFunction, user_site
from spanguard._base.values import is_a, items_of, kind_name, text_of
from spanguard._lifecycle.handle import SpanHandle
from spanguard._lifecycle.opening import open_handle
from spanguard._lifecycle.request import SpanRequest
from spanguard._mlflow import memory
from spanguard._mlflow.shapes import Client
from spanguard._process.ambient import ambient_span
from spanguard._propagation.async_generators import TracedAsyncGenerator
from spanguard._propagation.coroutines import TracedCoroutine, TracedGeneratorCoroutine
from spanguard._propagation.drive import Recorder
from spanguard._propagation.generators import TracedGenerator
from spanguard._record import writing
from spanguard._record.items import Items, WholeItems
from spanguard.exceptions import InvalidSpanArgumentError

__all__ = ["MAX_ITEMS", "Options", "Plan", "Redact", "kept_arguments", "tell"]


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
    attributes: dict[str, object] | None = None
    tags: dict[str, object] | None = None
    capture_inputs: bool | Collection[str] = True
    capture_outputs: bool = True
    redact: Redact | None = None
    output_reducer: Callable[[list[Any]], Any] | None = None
    max_items: int = MAX_ITEMS
    expected: object = ()
    client: Client | None = None
    strict: bool | None = None
    trace_destination: object = None
    extras: dict[str, object] = field(default_factory=dict)  # more of `traced_span`'s arguments
    takes_self: bool | None = None


class Plan:
    """How the calls of one callable are traced."""

    __slots__ = ("binder", "called", "function", "name", "options", "owner")

    def __init__(self, function: object, options: Options) -> None:
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

    def caller(self) -> Caller:
        """Return what makes a call, by the kind of the function."""
        call: Caller
        call = getattr(self, kind_of(self.function))
        return call

    def of(self, function: object) -> Plan:
        """Return the same plan for another function."""
        return Plan(function, self.options)

    def __reduce__(self) -> tuple[object, ...]:
        # The class only where it is what tells that the first argument is self.
        named = (self.owner, self.name) if self.owner and self.asks_owner else None
        return Plan, (self.function, self.options), named

    def __setstate__(self, named: tuple[type, str]) -> None:
        self.named_in(*named)

    def open(self, args: Args, kwargs: Kwargs) -> SpanHandle:
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
        return open_handle(request)

    def _for_trace(self) -> dict[str, object]:
        """Return the arguments that mean something where the call starts a trace only."""
        options = self.options
        for_trace = options.tags is not None or options.trace_destination is not None
        if for_trace and _starts_a_trace():
            return {"tags": options.tags, "trace_destination": options.trace_destination}
        return {}

    def write_output(self, handle: SpanHandle, value: object) -> None:
        options = self.options
        if (
            options.capture_outputs
            and value is not None
            and handle.is_open
            and not memory.has_outputs(handle.live)  # the body's own win, as in MLflow
        ):
            if options.redact is not None:
                value = _redacted(options.redact, "return", value)
            writing.outputs(handle.live, value)

    def write_items(self, handle: SpanHandle, items: Items) -> None:
        options = self.options
        if not options.capture_outputs or not handle.is_open:
            return
        more = items.count - items.taken
        if more:
            writing.attribute(handle.live, ITEM_COUNT, items.count)
        if memory.has_outputs(handle.live):
            return
        if options.output_reducer is not None:
            self._write_reduced(handle, options.output_reducer, items.kept)
            return
        if more:
            items.kept.append(f"[spanguard: {more} more items, {items.count} in all]")
        writing.taken_outputs(handle.live, items.kept)

    def _write_reduced(
        self, handle: SpanHandle, reduce: Callable[[list[Any]], Any], items: list[object]
    ) -> None:
        outputs: object = items
        try:
            outputs = reduce(items)
        except BaseException as error:
            if is_the_users(error):
                raise
            _log_hook("output_reducer", error)
        if self.options.redact is not None:
            outputs = _redacted(self.options.redact, "return", outputs)
        writing.outputs(handle.live, outputs)

    def recorder(self, args: Args, kwargs: Kwargs) -> Recorder:
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

    def call(self, wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
        handle: SpanHandle | None = None
        try:
            handle = self.open(args, kwargs)
            result = wrapped(*args, **kwargs)
            self.write_output(handle, result)
        except BaseException as error:
            if handle is not None:
                handle.finish(error)
            raise
        handle.finish(None)
        return result

    def call_coroutine(
        self, wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs
    ) -> TracedCoroutine:
        return TracedCoroutine(
            wrapped(*args, **kwargs),
            lambda: self.open(args, kwargs),
            self.write_output,
        )

    def call_generator_coroutine(
        self, wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs
    ) -> TracedGeneratorCoroutine:
        return TracedGeneratorCoroutine(
            wrapped(*args, **kwargs), lambda: self.open(args, kwargs), self.write_output
        )

    def call_generator(
        self, wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs
    ) -> TracedGenerator:
        generator = wrapped(*args, **kwargs)
        return TracedGenerator(generator, self.recorder(args, kwargs))

    def call_async_generator(
        self, wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs
    ) -> TracedAsyncGenerator:
        generator = wrapped(*args, **kwargs)
        return TracedAsyncGenerator(generator, self.recorder(args, kwargs))


def _redacted(redact: Redact, name: str, value: object) -> object:
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


_MAX_NAMES = 1_000


def kept_arguments(capture_inputs: object) -> bool | Collection[str] | None:
    """Read which parameters are to be recorded; None if that cannot be told."""
    if is_a(capture_inputs, bool):
        return bool(capture_inputs)
    name = text_of(capture_inputs)
    if name is not None:
        return (name,)
    names = [text_of(each) for each in items_of(capture_inputs, _MAX_NAMES)]
    known = tuple(each for each in names if each is not None)
    return known if len(known) == len(names) else None


def tell(findings: list[str], strict: bool | None) -> None:
    """Raise or warn of what is wrong with a decoration, at the line of the decorator."""
    errors = [InvalidSpanArgumentError(finding) for finding in findings]
    settle(errors, strict=strict, raised=None, site=user_site())
