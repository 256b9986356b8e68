"""A traced callable is the callable: one list of checks, over {plain, traced} for every kind."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import doctest
import functools
import gc
import inspect
import io
import multiprocessing
import pickle
import re
import types
import typing
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import cloudpickle
import pydantic
import pytest

import spanguard.testing
import tests.api.callables as plain
import tests.api.traced_callables as traced_module
from spanguard import carry, traced
from tests.api.kinds.cases import Case
from tests.store import Store

pytestmark = pytest.mark.pythons

KINDS = list(plain.CASES)

# What is decorated in place is another object than what its module holds; and what nobody holds
# but the bound method itself is gone with it, traced or not.
both = pytest.mark.parametrize("kind", KINDS)


def result(case: Case, callable_: Any = None) -> Any:
    """Call a callable and use up what it returns; return that, or what it raised."""
    callable_ = case.get() if callable_ is None else callable_
    return used_up(callable_(*case.args, **case.kwargs))


def used_up(returned: Any) -> Any:
    if isinstance(returned, types.GeneratorType) and hasattr(returned, "__await__") is False:
        if returned.gi_code.co_flags & inspect.CO_ITERABLE_COROUTINE:
            return asyncio.run(awaited(returned))
        return list(returned)
    if inspect.isawaitable(returned):
        return asyncio.run(awaited(returned))
    if inspect.isasyncgen(returned):
        return asyncio.run(all_of(returned))
    if hasattr(returned, "__enter__"):
        with returned as entered:
            return entered
    return returned


async def awaited(awaitable: Any) -> Any:
    return await awaitable


async def all_of(stream: Any) -> list[Any]:
    return [item async for item in stream]


def as_text(value: Any) -> str:
    """Return a text without what differs between any two objects or the two modules."""
    text = value if isinstance(value, str) else repr(value)
    text = text.replace("tests.api.traced_callables", "tests.api.callables")
    return re.sub(r"0x[0-9a-f]+|id='[0-9]+'", "0x", text)


def attempt(work: Callable[[], Any]) -> Any:
    """Return what comes of it, as a text."""
    try:
        return as_text(work())
    except Exception:
        return "raises"


def finds_itself(method: Any) -> Any:
    """Tell whether the class has the method's function. One traced in place has its own."""
    if method is traced_module.bound or method is plain.bound:
        return None
    return method.__func__ is getattr(type(method.__self__), method.__name__)


FACTS: dict[str, Callable[[Any], Any]] = {
    "signature": inspect.signature,
    "unwrapped signature": lambda c: inspect.signature(c, follow_wrapped=False),
    "getfullargspec": lambda c: inspect.isroutine(c) and inspect.getfullargspec(c),
    "name": lambda c: c.__name__,
    "qualified name": lambda c: c.__qualname__,
    "module": lambda c: c.__module__,
    "documentation": inspect.getdoc,
    "type hints": typing.get_type_hints,
    "defaults": lambda c: (c.__defaults__, c.__kwdefaults__),
    "code": lambda c: c.__code__.co_name,
    "source": inspect.getsource,
    "repr": repr,
    "str": str,
    "self": lambda c: type(c.__self__),
    "class": lambda c: c.__class__,
    "attributes": lambda c: sorted(vars(c)),
    **{
        name: getattr(inspect, name)
        for name in (
            *("isfunction", "ismethod", "isbuiltin", "isroutine", "ismethoddescriptor"),
            *("iscoroutinefunction", "isgeneratorfunction", "isasyncgenfunction", "isclass"),
        )
    },
    "asyncio": asyncio.iscoroutinefunction,
    "equal": lambda c: c == c,
    "hash": lambda c: hash(c) == hash(c),
    "weakref": lambda c: weakref.ref(c)() is c,
    "finalize": lambda c: weakref.finalize(c, print).detach() is not None,
    "WeakMethod": lambda c: type(weakref.WeakMethod(c)()) is type(c),
    "copied": lambda c: copy.copy(c) is c,
    "copied equal": lambda c: copy.copy(c) == c,
    "deep-copied": lambda c: copy.deepcopy(c) is c,
    "deep-copied equal": lambda c: copy.deepcopy(c) == c,
    "deep-copied self": lambda c: copy.deepcopy(c).__self__ is c.__self__,
    **{f"pickled {n}": lambda c, n=n: pickle.loads(pickle.dumps(c, n)) == c for n in range(2, 6)},
    "bound again": lambda c: c.__get__(1, int),
    "function of the method": finds_itself,
    "autospec signature": lambda c: inspect.signature(mock.create_autospec(c)),
    # mock's answer for a partial depends on chance: what it has for its `func`.
    "autospec is async": lambda c: (
        isinstance(c, functools.partial) or inspect.iscoroutinefunction(mock.create_autospec(c))
    ),
    "autospec type": lambda c: type(mock.create_autospec(c)),
    "autospec wrong call": lambda c: mock.create_autospec(c)(*range(9), nonsense=1),
}


@both
def test_traced_and_plain_agree(kind: str) -> None:
    """What can be asked of a callable has the same answer, traced or not."""
    ours, pythons = traced_module.CASES[kind].get, plain.CASES[kind].get
    for fact, told in FACTS.items():
        expected = attempt(lambda: told(pythons()))  # noqa: B023
        if expected == "raises" and fact.startswith(MORE_IS_FINE):
            continue
        assert (fact, attempt(lambda: told(ours()))) == (fact, expected)  # noqa: B023


MORE_IS_FINE = ("pickled", "weakref", "finalize")


@both
def test_calls_agree_and_are_recorded(store: Store, kind: str) -> None:
    """A call returns what it would without tracing, and is one span, with its arguments by name."""
    case = traced_module.CASES[kind]
    forget(case.get())
    assert as_text(result(case)) == as_text(result(plain.CASES[kind]))
    spans = store.trace().data.spans
    assert [(span.name, span.inputs) for span in spans] == [(case.span, case.inputs)]


def forget(callable_: Any) -> None:
    """Empty the cache of a cached function."""
    clear = getattr(callable_, "cache_clear", None)
    if clear is not None:
        clear()


@pytest.mark.parametrize("use", plain.USES)
def test_descriptors_and_special_methods_agree(store: Store, use: str) -> None:
    """What a descriptor gives, and what Python calls by itself, is as without tracing."""
    work, name = traced_module.USES[use]
    assert as_text(work()) == as_text(plain.USES[use][0]())
    if name is not None:
        spans = [span for trace in store.traces() for span in trace.data.spans if span.name == name]
        assert spans
        assert not any({"self", "cls", "this"} & set(span.inputs) for span in spans)


def test_a_parameter_and_a_keyword_of_one_name(store: Store) -> None:
    """Neither of two arguments of the same name hides the other."""
    traced_module.same_name_twice(1, a=2)
    assert store.trace().data.spans[0].inputs == {"a": 1, "kw": {"a": 2}}


METHODS = [
    name
    for name in vars(plain.Methods)
    if not name.startswith("__") and type(getattr(plain.methods, name)) is types.MethodType
]


@pytest.mark.parametrize("name", METHODS)
def test_a_bound_method_is_held_weakly(name: str) -> None:
    """A WeakMethod lives as long as the object, and calls it."""
    for module in (plain, traced_module):
        owner = module.Methods()
        method = getattr(owner, name)
        of_class = inspect.isclass(method.__self__)
        held = weakref.WeakMethod(method)
        del method
        assert as_text(used_up(held()(1))) == as_text(used_up(getattr(owner, name)(1)))  # type: ignore[misc]
        del owner
        gc.collect()
        cached = "cached" in name or "dispatched" in name
        assert cached or (held() is None) != of_class


def test_a_method_that_was_bound_before_is_held_weakly() -> None:
    """`traced(obj.method)` is a method, too: alive as long as it and the object are."""
    owner = plain.Methods()
    method = traced(owner.method)
    held = weakref.WeakMethod(method)
    assert held()(1) == 2  # type: ignore[misc]
    assert held().__self__ is owner  # type: ignore[union-attr]
    del method
    assert held() is None


@pytest.mark.parametrize("name", METHODS)
def test_a_copied_object_calls_its_own_methods(name: str) -> None:
    """A deep copy of what holds a bound method holds that method of the copy."""
    owner = traced_module.Methods()
    holder = {"owner": owner, "method": getattr(owner, name)}
    copied = copy.deepcopy(holder)
    if not inspect.isclass(copied["method"].__self__):
        assert copied["method"].__self__ is copied["owner"]


def test_dataclasses_and_models_with_methods_are_copied() -> None:
    """`asdict`, `model_copy(deep=True)` and signals of frameworks take bound methods."""

    @dataclasses.dataclass
    class Holder:
        callback: Any

    class Model(pydantic.BaseModel):
        callback: Any

    method = traced_module.Methods(3).method
    for callback in (
        dataclasses.asdict(Holder(method))["callback"],
        Model(callback=method).model_copy(deep=True).callback,
    ):
        assert callback.__self__ == method.__self__ and callback.__self__ is not method.__self__
        assert callback(1) == 4


def test_signals_take_bound_methods() -> None:
    """blinker holds receivers weakly; so do Django's signals."""
    blinker = pytest.importorskip("blinker")
    signal = blinker.Signal()
    owner = traced_module.Methods()
    signal.connect(owner.method)
    assert [value for _, value in signal.send(1)] == [2]
    signal.disconnect(owner.method)
    assert signal.send(1) == []


def test_annotations_are_there_whoever_looks_at_the_class() -> None:
    """Python puts empty annotations on a class that is asked for its own, as mock does."""
    for kind in ("function", "callable object", "method of a builtin type"):
        wrapper: Any = type(traced_module.CASES[kind].get())
        assert wrapper.__annotations__ is not None
    assert typing.get_type_hints(traced_module.function) == typing.get_type_hints(plain.function)
    function = traced(lambda a: a)
    function.__annotations__ = {"a": int}
    assert typing.get_type_hints(function.__wrapped__) == {"a": int}


# doctest walks through linecache, which finalizers of SQLAlchemy's change.
@pytest.mark.usefixtures("no_collection")
def test_doctest_finds_the_same() -> None:
    """Examples in the documentation of what is traced are found, and pass."""
    spanguard.flush(60)  # MLflow's threads fill linecache
    found = [
        {as_text(test.name): len(test.examples) for test in doctest.DocTestFinder().find(module)}
        for module in (plain, traced_module)
    ]
    assert found[0] == found[1]
    with contextlib.redirect_stdout(io.StringIO()):
        assert doctest.testmod(traced_module) == doctest.testmod(plain)
    assert doctest.testmod(traced_module).attempted >= 4


# -- elsewhere -------------------------------------------------------------------------------------

PICKLABLE = [
    kind
    for kind in KINDS
    if attempt(lambda k=kind: pickle.loads(pickle.dumps(plain.CASES[k].get()))) != "raises"  # type: ignore[misc]
]
# Their methods pickle by the function's name, as Python's do; by that the class has another one.
BY_ANOTHER_NAME = {"partialmethod", "partialmethod of traced", "half of a traced class"}


def in_a_child(pickled: bytes, kind: str) -> str:
    """Call what was pickled; return what came of it, and the span that it left."""
    case = traced_module.CASES[kind]
    callable_ = pickle.loads(pickled)
    forget(callable_)
    with spanguard.testing.record_spans() as spans:
        outcome = as_text(result(case, callable_))
    return f"{outcome}, {[(span.name, span.inputs) for span in spans]}"


@pytest.fixture(scope="module")
def spawned() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def expected_in_a_child(kind: str) -> str:
    case = traced_module.CASES[kind]
    return f"{as_text(result(plain.CASES[kind]))}, {[(case.span, case.inputs)]}"


@pytest.mark.parametrize("kind", [kind for kind in PICKLABLE if kind not in BY_ANOTHER_NAME])
def test_it_pickles_to_a_spawned_process(kind: str, spawned: ProcessPoolExecutor) -> None:
    """What pickles untraced pickles traced, and is traced in the other process."""
    pickled = pickle.dumps(traced_module.CASES[kind].get())
    assert spawned.submit(in_a_child, pickled, kind).result(120) == expected_in_a_child(kind)


@both
def test_cloudpickle_keeps_it_traced(kind: str, spawned: ProcessPoolExecutor) -> None:
    """What cloudpickle takes untraced it takes traced, by value or by name, with the tracing."""
    try:
        cloudpickle.dumps(plain.CASES[kind].get())
    except Exception:
        pytest.skip("cloudpickle does not take it untraced")
    pickled = cloudpickle.dumps(traced_module.CASES[kind].get())
    assert spawned.submit(in_a_child, pickled, kind).result(120) == expected_in_a_child(kind)


CARRIED = [
    *("function", "coroutine", "generator", "async generator", "partial", "callable object"),
    *("method", "method of the class", "coroutine method", "generator method", "cached method"),
    *("above_class of the class", "above_class of an object", "below_class of the class"),
    *("above_static of the class", "below_static of an object", "static_generator of an object"),
    *("traced in place", "traced bound method", "method without self"),
    *("method of a dataclass", "method of a Enum", "cached of a traced class"),
    *("method of the traced class", "of of the traced class", "static of the traced class"),
]


def call_carried(pickled: bytes, kind: str) -> str:
    return as_text(result(traced_module.CASES[kind], pickle.loads(pickled)))


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps], ids=["pickle", "cloudpickle"])
@pytest.mark.parametrize("kind", CARRIED)
def test_it_is_carried_to_another_process(
    store: Store, kind: str, dumps: Any, spawned: ProcessPoolExecutor
) -> None:
    """What is traced is carried as what is not: the call is a span under the one it comes from."""
    case = traced_module.CASES[kind]
    forget(case.get())
    with spanguard.traced_span("root") as root:
        pickled = dumps(carry(case.get()))
        done = spawned.submit(call_carried, pickled, f"{kind}").result(120)
    assert done == as_text(result(plain.CASES[kind]))
    spans = {span.name: span for span in store.trace().data.spans}
    if kind in ("cached method", "cached of a traced class") and len(spans) == 1:
        return  # a worker that has the answer does not call
    assert spans[case.span].parent_id == root.span_id
    assert spans[case.span].inputs == case.inputs


@pytest.mark.parametrize("module", [plain, traced_module])
def test_a_carried_method_is_held_weakly_and_copied(store: Store, module: Any) -> None:
    """`carry(obj.method)` is held by WeakMethod while it lives, and copies keep the span."""
    owner = module.Methods()
    with spanguard.traced_span("root"):
        carried = carry(owner.method)
    with spanguard.traced_span("other"):
        carried_there = carry(owner.method)
    held = weakref.WeakMethod(carried)
    assert held()(1) == carried(1) == 2  # type: ignore[misc]
    assert held()._context == carried._context != carried_there._context  # type: ignore[union-attr]
    copied = copy.deepcopy({"owner": owner, "method": carried})
    assert copied["method"].__self__ is copied["owner"] is not owner
    assert copied["method"]._context == carried._context
    assert copied["method"](1) == 2
    assert copy.copy(carried)._context == carried._context
    function = carry(module.function)
    assert copy.deepcopy(function) is copy.copy(function) is function
    with pytest.raises(TypeError):
        weakref.WeakMethod(function)
    del carried
    gc.collect()
    assert held() is None
