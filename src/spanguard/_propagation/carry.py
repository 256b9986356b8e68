"""Take a trace elsewhere: to a thread, a task, a process, another machine, and back from headers.

What crosses is a handful of strings. Where the span they name is open in this process, work runs
under that span itself. Elsewhere it runs under a stand-in for it, and what it recorded is handed
to the store before the work's result goes back: a worker may be gone a moment later.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import FunctionType, MethodType
from typing import Any, ParamSpec, TypeVar, cast

from spanguard._base.findings import contained, settle
from spanguard._base.site import user_site
from spanguard._base.tasks import Aside
from spanguard._propagation.async_generators import TracedAsyncGenerator
from spanguard._propagation.attachment import Attachment
from spanguard._propagation.context import TraceContext, capture
from spanguard._propagation.drive import Recorder
from spanguard._propagation.generators import TracedGenerator
from spanguard._propagation.pickling import ray_asking
from spanguard._record.outcome import Outcome
from spanguard.exceptions import InvalidSpanArgumentError

__all__ = ["carry"]


P = ParamSpec("P")
R = TypeVar("R")


class Carried:
    """A function that runs under the span it was carried from. Pickles where the function does.

    It has the function's looks, but no name that it could be found by: what is found is the
    function (issue 9, 37).
    """

    def __init__(self, function: Callable[..., Any], context: TraceContext) -> None:
        if isinstance(function, Carried):
            # weakref.WeakMethod makes a method again by its type, of a function and an object.
            carried: Any = function
            function, context = MethodType(carried._function, context), carried._context
        functools.update_wrapper(self, function, updated=())
        self.__qualname__ = f"carry.<locals>.{getattr(function, '__qualname__', '?')}"
        self._function = function
        self._context = context

    def _attachment(self) -> Attachment:
        return Attachment(self._context, about=self._function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._attachment():
            return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[object, ...]:
        return _carried, (self._function, self._context)

    def __copy__(self) -> Carried:
        return self._over(copy.copy(self._function))

    def __deepcopy__(self, memo: dict[int, Any]) -> Carried:
        return self._over(copy.deepcopy(self._function, memo))

    def _over(self, function: Any) -> Carried:
        return self if function is self._function else type(self)(function, self._context)

    @property
    def __func__(self) -> Any:
        """Of a bound method: its function, carried. It is kept: WeakMethod has a weak reference."""
        try:
            return vars(self)["_carried_function"]
        except KeyError:
            function: Any = self._function
            self._carried_function = type(self)(function.__func__, self._context)
            return self._carried_function

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # pyright: ignore
        # Ray takes functions only. Of others that ask, RQ would keep a function's name.
        is_function = isinstance(self._function, FunctionType) and ray_asking()
        return FunctionType if is_function else type(self)

    def __getattr__(self, name: str) -> Any:
        # What inspect and frameworks look at: __code__, __defaults__, attributes of the user's.
        if name in ("_function", "_context"):  # before __init__, as in copying
            raise AttributeError(name)
        found = getattr(self._function, name)
        if not name.startswith("_"):
            with contained("looking at an attribute of a carried function"):
                self._look_at(name, found)
        return found

    def _look_at(self, name: str, found: object) -> None:
        """Tell once of a method that would run the function without what is carried.

        `carry(task).delay(x)` of Celery sends the task's name.
        """
        runs = inspect.ismethod(found) and found.__self__ is self._function
        if not (runs or (name in _SENDERS and callable(found))):
            return
        bare = InvalidSpanArgumentError(
            f"{name}() of carry({_name_of(self._function)}) is the function's own: what it runs is "
            "not under the span that was carried. Pass capture().to_headers() as an argument, "
            "and run the work in TraceContext.from_headers(headers).attach()."
        )
        # Never an error: to look at an attribute is no harm.
        settle([bare], strict=False, raised=None, site=user_site(3))

    def __repr__(self) -> str:
        return f"<carried {self._function!r}>"


_SENDERS = frozenset({"apply_async", "delay", "enqueue", "remote", "send"})
"""What engines put on functions, to send them by name."""


def _name_of(function: object) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _carried(function: Callable[..., Any], context: TraceContext) -> Carried:
    return _kind_of(function)(function, context)


class CarriedCoroutineFunction(Carried):
    """The same for coroutine functions: the span is ambient while the coroutine runs."""

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        async with self._attachment():
            return await cast("Awaitable[Any]", self._function(*args, **kwargs))


class CarriedGeneratorFunction(Carried):
    """The same for generator functions: the span is ambient while the body runs, step by step."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = Recorder(lambda: _AttachedBody(self._attachment()))
        return TracedGenerator(self._function(*args, **kwargs), recorder)


class CarriedAsyncGeneratorFunction(Carried):
    """The same for async generator functions."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        body = _AttachedAsyncBody(self._attachment())
        return _CarriedAsyncGenerator(self._function(*args, **kwargs), body)


class _AttachedBody:
    """A generator's body under an attached context: what the drive opens in place of a span."""

    __slots__ = ("_attachment",)

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        attachment.__enter__()

    def finish(self, raised: BaseException | None) -> None:
        self._attachment.__exit__(None if raised is None else type(raised), raised, None)

    def finish_as(self, outcome: Outcome) -> None:
        self.finish(None)


class _AttachedAsyncBody:
    """The same for an async generator, which must not wait for the store where it ends."""

    __slots__ = ("_attachment", "_delivery")

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._delivery: Aside | None = None

    def open(self) -> _AttachedAsyncBody:
        self._attachment.__enter__()
        return self

    def finish(self, raised: BaseException | None) -> None:
        findings = self._attachment.leave()
        if self._attachment.has_more_to_do:
            self._delivery = Aside(self._attachment.deliver)
        self._attachment.tell(findings, raised)

    def finish_as(self, outcome: Outcome) -> None:
        self.finish(None)

    async def delivered(self) -> None:
        """Wait for the store, where the body has ended."""
        delivery, self._delivery = self._delivery, None
        if delivery is not None:
            await delivery.done()


class _CarriedAsyncGenerator(TracedAsyncGenerator):
    """An async generator that waits for the store, at its end, as its last step does."""

    def __init__(self, generator: AsyncGenerator[Any, Any], body: _AttachedAsyncBody) -> None:
        super().__init__(generator, Recorder(body.open))
        self._self_body = body

    async def _self_step(self, step: Callable[..., Any], *args: Any) -> Any:
        try:
            return await super()._self_step(step, *args)
        finally:
            await self._self_body.delivered()

    async def aclose(self) -> None:
        try:
            await super().aclose()
        finally:
            await self._self_body.delivered()


def carry(fn: Callable[P, R]) -> Callable[P, R]:
    """Return a callable that runs `fn` elsewhere under the span that is current now.

    One form for every engine: `pool.submit(carry(work), x)`, `dask_client.submit(carry(work),
    x)`, a thread's target, `run_in_executor`, `multiprocessing`, joblib. It pickles wherever
    `fn` does. Coroutine functions stay coroutine functions. The body of a generator runs under the
    span step by step, and what consumes it does not. What it takes along is strings: the span's
    ids, the tracking URI, the experiment, strictness; the worker needs no set-up.

    Engines that store a function by its name (Celery's tasks, APScheduler's persistent stores)
    would run it without what is carried, so what this returns has no name to be found by, and
    `carry(task).delay(x)` warns. Pass them `capture().to_headers()` as an argument, and run the
    work in `TraceContext.from_headers(headers).attach()`.

    It opens no span itself: spans that `fn` opens, by whichever API, nest under the captured
    one. In another process they are in the store before `fn`'s result goes back, which waits for
    the store 5 seconds at most. What `fn` leaves open there is closed as an orphan, with a
    warning, or in strict mode `OrphanedSpanError`. Results and exceptions pass through unchanged.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> import spanguard
    >>> @spanguard.traced
    ... def work(x):
    ...     return 2 * x
    >>> with spanguard.traced_span("job"), ThreadPoolExecutor() as pool:
    ...     list(pool.map(spanguard.carry(work), [1, 2]))
    [2, 4]

    Raises:
        TypeError: `fn` is not callable.
    """
    if not callable(fn):
        raise TypeError(f"carry() takes a callable, not a {type(fn).__name__}.")
    return cast("Callable[P, R]", _kind_of(fn)(fn, capture()))


def _kind_of(fn: Any) -> type[Carried]:
    if type(fn) is FunctionType and not fn.__dict__:  # nothing is wrapped, and nobody marked it
        return _KIND_BY_FLAG.get(fn.__code__.co_flags & _FLAGS, Carried)
    function = inspect.unwrap(fn) if not isinstance(fn, functools.partial) else fn
    for is_kind, kind in _KINDS:
        if is_kind(function) or is_kind(inspect.getattr_static(type(function), "__call__", None)):
            return kind
    return Carried


_KINDS: tuple[tuple[Callable[[Any], bool], type[Carried]], ...] = (
    (inspect.iscoroutinefunction, CarriedCoroutineFunction),
    (inspect.isgeneratorfunction, CarriedGeneratorFunction),
    (inspect.isasyncgenfunction, CarriedAsyncGeneratorFunction),
)

# The same for a function as Python compiles it: all that `inspect` looks at then.
_KIND_BY_FLAG = {
    inspect.CO_COROUTINE: CarriedCoroutineFunction,
    inspect.CO_GENERATOR: CarriedGeneratorFunction,
    inspect.CO_ASYNC_GENERATOR: CarriedAsyncGeneratorFunction,
}
_FLAGS = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR

# As Python names what cannot be found by name. Engines that store a callable object by its class's
# name refuse these, and by a function's name they would run it without what is carried.
_all_kinds: list[type[Carried]] = [Carried, *(kind for _, kind in _KINDS)]
for _kind in _all_kinds:
    _kind.__qualname__ = f"carry.<locals>.{_kind.__name__}"
