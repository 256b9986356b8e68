"""The line that a finding names is the user's, whoever calls the user's code."""

from __future__ import annotations

import _thread
import asyncio
import heapq
import inspect
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import spanguard
from spanguard import TraceStateManager, carry, trace_batch, traced, traced_span
from spanguard._base.site import user_site
from spanguard.exceptions import OrphanedSpanWarning, SpanOpenTooLongWarning
from tests.store import Store, await_true


def definition(function: Callable[..., Any]) -> str:
    """Return the line of a function's `def` as spanguard writes it."""
    code = inspect.unwrap(function).__code__
    lines, first = inspect.getsourcelines(code)
    at = next(i for i, line in enumerate(lines) if "def " in line)
    return f"{code.co_filename}:{first + at} in {code.co_name}"


def opened_at() -> str:
    """Return where the one span that is open was opened."""
    (span,) = spanguard.open_spans()
    return span.opened_at


seen: list[str] = []


@traced
def plain() -> None:
    seen.append(opened_at())


@traced(
    name="a decorator of several lines",
)
async def coroutine() -> None:
    seen.append(opened_at())


@traced
def generator() -> Any:
    seen.append(opened_at())
    yield 1


class Service:
    @traced
    def method(self) -> None:
        seen.append(opened_at())

    @traced
    @staticmethod
    def static() -> None:
        seen.append(opened_at())


def in_thread(function: Callable[[], Any]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def in_pool(function: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


def in_loop(function: Callable[[], Any]) -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(function)
        await asyncio.sleep(0)

    asyncio.run(main())


def in_executor_of_a_loop(function: Callable[[], Any]) -> None:
    async def main() -> None:
        await asyncio.to_thread(function)

    asyncio.run(main())


def in_timer(function: Callable[[], Any]) -> None:
    timer = threading.Timer(0, function)
    timer.start()
    timer.join()


def bare(function: Callable[[], Any]) -> None:
    done = threading.Event()
    _thread.start_new_thread(lambda: (function(), done.set()), ())
    assert done.wait(30)


RUNNERS = [in_thread, in_pool, in_loop, in_executor_of_a_loop, in_timer]


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize(
    "function", [plain, Service().method, Service.static], ids=["function", "method", "static"]
)
def test_a_function_that_a_library_calls_is_named_by_its_def(
    store: Store, run: Callable[..., None], function: Callable[[], None]
) -> None:
    """A traced function that a thread, pool or loop calls was opened at its own `def`."""
    seen.clear()
    run(function)
    assert seen == [definition(function)]


@pytest.mark.parametrize("start", [asyncio.run, lambda c: asyncio.run(as_task(c))])
def test_a_task_is_named_by_its_coroutine(store: Store, start: Callable[..., None]) -> None:
    """A traced coroutine that the loop starts was opened at its own `def`."""
    seen.clear()
    start(coroutine())
    assert seen == [definition(coroutine)]


async def as_task(awaitable: Any) -> None:
    await asyncio.gather(awaitable)


def test_a_coroutine_that_is_awaited_is_named_by_that_line(store: Store) -> None:
    """Where the user's own code awaits, that line has opened the span."""

    async def main() -> None:
        await coroutine()

    seen.clear()
    asyncio.run(main())
    assert seen[0].endswith(" in main")


def test_a_call_of_the_users_is_named_by_that_line(store: Store) -> None:
    """A plain call names the calling line, not the function."""
    seen.clear()
    here, line = sys._getframe(), sys._getframe().f_lineno + 1
    plain()
    assert seen == [f"{__file__}:{line} in {here.f_code.co_name}"]


@traced
def weight(number: int) -> int:
    seen.append(opened_at())
    return -number


def test_a_call_through_a_library_is_named_by_the_users_line(store: Store) -> None:
    """A library that calls back in the same breath was called by a line of the user's."""
    seen.clear()
    here, line = sys._getframe(), sys._getframe().f_lineno + 1
    heapq.nlargest(2, [1, 2, 3], key=weight)  # in Python, unlike sorted()
    assert set(seen) == {f"{__file__}:{line} in {here.f_code.co_name}"}


def test_a_generator_that_a_library_pulls_is_named_by_its_def(store: Store) -> None:
    """A traced generator that a pool pulls was opened at its own `def`."""
    seen.clear()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(list, generator()).result()
    assert seen == [definition(generator)]


def item(number: int) -> None:
    seen.extend(s.opened_at for s in spanguard.open_spans() if s.name == "item")


def test_an_item_of_a_batch_is_named_by_its_function(store: Store) -> None:
    """An item's span in a pool was opened at the `def` of the batch's function."""
    seen.clear()
    with ThreadPoolExecutor(1) as pool:
        trace_batch([1], item, name="batch", item_name="item", executor=pool)
    assert seen == [definition(item)]


def test_what_is_carried_is_named_by_its_def(store: Store) -> None:
    """A traced function that was carried into a thread was opened at its own `def`."""

    def named() -> str:
        return next(s.opened_at for s in spanguard.open_spans() if s.name == "named")

    found: list[str] = []
    work = traced(name="named")(lambda: found.append(named()))
    with traced_span("root"):
        in_thread(carry(work))
    assert found[0].startswith(f"{__file__}:")
    assert found[0].endswith(" in <lambda>")


@traced
def first_job(done: threading.Event) -> None:
    assert done.wait(60)


@traced
def second_job(done: threading.Event) -> None:
    assert done.wait(60)


def test_each_function_that_hangs_is_told_of(store: Store) -> None:
    """A second function that hangs in a pool is warned of as well, each once, at its `def`."""
    done = threading.Event()
    with warnings.catch_warnings(record=True) as told, ThreadPoolExecutor(3) as pool:
        warnings.simplefilter("always")
        with spanguard.watch(open_longer_than=0.01):
            for job in (first_job, second_job, first_job):
                pool.submit(job, done)
            try:
                await_true(lambda: len(places(told)) == 2)
            finally:
                done.set()
    assert sorted(places(told)) == [
        (__file__, first_job.__code__.co_firstlineno + 1),
        (__file__, second_job.__code__.co_firstlineno + 1),
    ]


def places(told: list[Any]) -> list[tuple[str, int]]:
    return [(w.filename, w.lineno) for w in told if w.category is SpanOpenTooLongWarning]


def test_two_functions_of_one_line_are_told_apart(store: Store) -> None:
    """Once per function and line: a line may hold two functions."""
    names = ["one", "two"]
    source = "\n".join(f"def {n}(): spanguard.traced_span('{n}').__enter__()" for n in names)
    code = compile(source, "generated.py", "exec")
    module: dict[str, Any] = {"spanguard": spanguard, "__name__": "generated"}
    exec(code, module)
    for name in names:  # as a template engine or a macro would make them
        module[name].__code__ = module[name].__code__.replace(co_firstlineno=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for name in [*names, *names]:
            with traced_span("root"):
                module[name]()
    assert len([w for w in told if w.category is OrphanedSpanWarning]) == 2


# -- nobody above ------------------------------------------------------------------------------


def test_a_pop_that_a_bare_thread_calls(store: Store) -> None:
    """A method of a manager may be what a thread starts with: no frame is above it."""
    failed: list[Any] = []
    manager = TraceStateManager(scope="process")
    hook, sys.unraisablehook = sys.unraisablehook, failed.append
    try:
        manager.push_trace("root")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):  # the second finds an empty stack
                _thread.start_new_thread(manager.pop_trace, ())
            await_true(lambda: not spanguard.open_spans())
    finally:
        sys.unraisablehook = hook
    assert failed == []


@pytest.mark.parametrize("depth", [0, 1, 2, 5, 1_000])
def test_any_depth_has_a_line(depth: int) -> None:
    """A stack that is less deep than asked for still has a line."""
    found: list[Any] = []
    bare(lambda: found.append(user_site(depth)))
    assert found[0].line > 0


NOBODY = """
import atexit, ctypes, functools
import spanguard
manager = spanguard.TraceStateManager(scope="process")
junk = {"traceparent": "junk"}
calls = lambda: [
    manager.pop_trace,
    manager.close,
    spanguard.traced_span("left").__enter__,
    spanguard.close_open_spans,
    spanguard.traced(print),
    functools.partial(spanguard.TraceContext.from_headers, junk),
    functools.partial(spanguard.guard().end_trace, "unknown"),
    functools.partial(spanguard.CustomTraceManager().end_custom_trace, "unknown"),
]
for call in calls():
    ctypes.PYFUNCTYPE(ctypes.py_object)(call)()
for call in calls():
    atexit.register(call)
print("here")
"""


def test_what_exit_and_c_call_raises_nothing(store: Store) -> None:
    """Functions of ours that atexit or C calls find no frame above them, and go on."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NOBODY],
        env={**os.environ, "MLFLOW_TRACKING_URI": store.uri},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0
    assert "here" in done.stdout
    assert "Error" not in done.stderr, done.stderr


@pytest.mark.parametrize("name", [None, 7, [], "", "a" * 10_000])
def test_a_module_of_any_name_has_lines(store: Store, name: Any) -> None:
    """Code without a module, or in one of a strange name, is the user's."""
    code = "with spanguard.traced_span('x'): at = spanguard.open_spans()[0].opened_at"
    module: dict[str, Any] = {"spanguard": spanguard, "__name__": name}
    exec(compile(code, "odd.py", "exec"), module)
    assert module["at"] == "odd.py:1 in <module>"
