"""Settings: a plain call is the process's, a with-block its context's from its first step on."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

import spanguard
from spanguard import Limits, limits, strict, traced, watch
from spanguard._base import config
from spanguard._base.config import current_limits, is_strict
from spanguard._process import watchdog
from tests.store import await_true

pytestmark = pytest.mark.pythons


def elsewhere() -> tuple[bool, int]:
    """Return what a context sees that has entered no block."""
    return contextvars.Context().run(here)


def here() -> tuple[bool, int]:
    return is_strict(), current_limits().value_chars


DEFAULT = (False, spanguard.MAX_VALUE_CHARS)
CHANGED = (True, 7)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    watch(None)
    config._process_setting = None
    config._set_process_limits(None)
    assert elsewhere() == DEFAULT


# -- blocks ------------------------------------------------------------------------------------


def plain_with() -> None:
    with strict(), limits(value_chars=7) as caps:
        assert (*here(), caps.value_chars) == (*CHANGED, 7)


def of_a_stack() -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(strict())
        stack.enter_context(limits(value_chars=7))
        assert here() == CHANGED


def returned_by_a_helper() -> None:
    def settings() -> Any:
        return strict()

    with settings(), (lambda: limits(value_chars=7))():
        assert here() == CHANGED


def chosen_by_an_expression(wanted: bool = True) -> None:
    with strict() if wanted else contextlib.nullcontext():
        with contextlib.nullcontext() if not wanted else limits(value_chars=7):
            assert here() == CHANGED


def of_a_context_manager() -> None:
    @contextlib.contextmanager
    def careful() -> Iterator[None]:
        with strict(), limits(value_chars=7):
            yield

    with careful():
        assert here() == CHANGED


def called_by_partial() -> None:
    with functools.partial(strict)(), functools.partial(limits, value_chars=7)():
        assert here() == CHANGED


def with_many_arguments() -> None:
    with strict(enabled=True):
        with limits(
            value_chars=7,
            message_chars=None,
            attributes=None,
            exit_seconds=None,
        ):
            assert here() == CHANGED


def in_a_coroutine() -> None:
    async def main() -> None:
        with strict(), limits(value_chars=7):
            await asyncio.sleep(0)
            assert here() == CHANGED

    asyncio.run(main())


def left_by_an_exception() -> None:
    with contextlib.suppress(ZeroDivisionError), strict(), limits(value_chars=7):
        1 / 0


BLOCKS = [
    plain_with,
    of_a_stack,
    returned_by_a_helper,
    chosen_by_an_expression,
    of_a_context_manager,
    called_by_partial,
    with_many_arguments,
    in_a_coroutine,
    left_by_an_exception,
]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("process", [DEFAULT, (True, 9)])
def test_no_other_context_sees_a_block_at_any_instruction(
    block: Callable[[], None], process: tuple[bool, int]
) -> None:
    """At each instruction of the code around a block, another thread sees the process's setting."""
    strict(process[0])
    limits(value_chars=process[1])
    seen: list[tuple[bool, int]] = []

    def look(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename != __file__:
            return None
        frame.f_trace_opcodes = True
        if frame.f_code.co_name not in ("here", "elsewhere"):
            seen.append(elsewhere())
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        block()
    finally:
        sys.settrace(before)
    assert len(seen) > 10
    assert set(seen) == {process}
    assert here() == process


# -- plain calls -------------------------------------------------------------------------------


class Holder:
    setting: Any = None


HOLDER = Holder()


def as_a_statement() -> None:
    strict()
    limits(value_chars=7)


def kept_in_names() -> list[Any]:
    first = strict()
    second = limits(value_chars=7)
    return [first, second]


def kept_in_an_attribute() -> None:
    HOLDER.setting = strict()
    vars(HOLDER)["caps"] = limits(value_chars=7)


def kept_in_a_list() -> list[Any]:
    return [strict(), limits(value_chars=7)]


def kept_in_containers() -> Any:
    return {"strict": (strict(), []), "caps": {"caps": [limits(value_chars=7)]}}


def by_a_helper() -> None:
    def settings() -> Any:
        strict()
        return limits(value_chars=7)

    settings()


def by_lambdas() -> None:
    (lambda: strict())()
    set_caps = lambda: limits(value_chars=7)  # noqa: E731
    set_caps()


def by_partials_and_maps() -> None:
    functools.partial(strict)()
    for _ in map(lambda n: limits(value_chars=n), [7]):  # noqa: C417
        pass


def passed_to_who_ignores_it() -> None:
    print(strict(), limits(value_chars=7))


def in_a_thread() -> None:
    for target in (strict, functools.partial(limits, value_chars=7)):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()


def at_a_prompt() -> None:
    for line in ("strict()", "limits(value_chars=7)"):
        exec(compile(line, "<prompt>", "single"), {"strict": strict, "limits": limits})


PLAIN = [
    as_a_statement,
    kept_in_names,
    kept_in_an_attribute,
    kept_in_a_list,
    kept_in_containers,
    by_a_helper,
    by_lambdas,
    by_partials_and_maps,
    passed_to_who_ignores_it,
    in_a_thread,
    at_a_prompt,
]


@pytest.mark.parametrize("call", PLAIN)
def test_a_plain_call_is_in_force_for_the_process_afterwards(call: Callable[[], Any]) -> None:
    """Whatever becomes of the result, if it is no block the process is set."""
    kept = call()
    assert (here(), elsewhere()) == (CHANGED, CHANGED)
    del kept


def test_a_block_of_what_was_set_plainly_takes_it_back() -> None:
    """`setting = strict()`, and `with setting:` afterwards: in force until the block's end."""
    setting, caps = strict(), limits(value_chars=7)
    assert elsewhere() == CHANGED
    with setting, caps:
        assert (here(), elsewhere()) == (CHANGED, DEFAULT)
    assert (here(), elsewhere()) == (DEFAULT, DEFAULT)


def test_a_later_plain_call_outlasts_a_block_of_an_earlier_one() -> None:
    """Leaving a block takes back nothing that was set since."""
    setting = strict(False)
    strict()
    with setting:
        assert not is_strict()
    assert is_strict()


# -- at the same time --------------------------------------------------------------------------


def test_two_threads_in_blocks_never_make_a_third_strict() -> None:
    """Blocks that come and go leave a lenient thread lenient, and the process as it was."""
    stop = threading.Event()
    seen: set[tuple[bool, int]] = set()

    def loop(enabled: bool) -> None:
        for _ in range(3_000):
            with strict(enabled), limits(value_chars=7):
                pass

    def look() -> None:
        while not stop.is_set():
            seen.add(here())
            with contextlib.suppress(IndexError):
                spanguard.TraceStateManager().pop_trace()  # strict would raise

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        watcher = threading.Thread(target=look)
        loops = [threading.Thread(target=loop, args=(enabled,)) for enabled in (True, False, True)]
        for thread in (watcher, *loops):
            thread.start()
        for thread in loops:
            thread.join()
        stop.set()
        watcher.join()
    finally:
        sys.setswitchinterval(before)
    assert seen == {DEFAULT}
    assert elsewhere() == DEFAULT


MAKERS: list[Callable[[], Any]] = [
    lambda: strict(),
    lambda: strict(False),
    lambda: limits(value_chars=7),
    lambda: limits(value_chars=8),
    lambda: watch(100),
    lambda: watch(200),
]


def watchdog_limit() -> float | None:
    running = watchdog._watchdog
    return running.seconds if running is not None else None


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("apart", [False, True], ids=["one context", "contexts of their own"])
def test_blocks_may_be_left_in_any_order(order: tuple[int, ...], apart: bool) -> None:
    """However blocks overlap, in one context or several, all is as before when all are left."""
    for makers in itertools.product(MAKERS[:2], MAKERS[2:4], MAKERS[4:]):
        blocks = [contextlib.ExitStack() for _ in range(3)]
        contexts = [contextvars.copy_context() if apart else None for _ in range(3)]

        def run(number: int, step: Callable[[], Any], contexts: Any = contexts) -> None:
            (contexts[number].run if apart else lambda call: call())(step)

        for number, block in enumerate(blocks):
            for make in makers[number:] + makers[:number]:
                run(number, lambda b=block, m=make: b.enter_context(m()))  # type: ignore[misc]
        for number in order:
            run(number, blocks[number].close)
        assert (here(), elsewhere(), watchdog_limit()) == (DEFAULT, DEFAULT, None)


def test_the_shortest_of_overlapping_watch_blocks_is_in_force() -> None:
    """A block elsewhere neither ends nor loosens the watch of another one."""
    first, second = watch(200), watch(300)
    one, another = contextvars.copy_context(), contextvars.copy_context()
    one.run(first.__enter__)
    another.run(second.__enter__)
    assert watchdog_limit() == 200
    one.run(first.__exit__, None, None, None)
    assert watchdog_limit() == 300
    another.run(second.__exit__, None, None, None)
    assert watchdog_limit() is None
    with watch(200), watch(300):
        assert watchdog_limit() == 300
    await_true(lambda: watchdog_limit() is None)


@pytest.mark.parametrize("seconds", [1e12, 10**400])
def test_any_number_of_seconds_may_be_watched(seconds: float) -> None:
    """Numbers that no lock can wait for are as long as it takes, and the watchdog lives."""
    with watch(seconds):
        (thread,) = (t for t in threading.enumerate() if t.name == "spanguard-watchdog")
        thread.join(0.2)
        assert thread.is_alive()


@pytest.mark.parametrize("order", list(itertools.permutations(range(2))), ids=str)
def test_kept_settings_that_become_blocks_leave_nothing(order: tuple[int, ...]) -> None:
    """Two that were set plainly and then entered are both taken back, in whatever order."""
    for make in (strict, lambda: limits(value_chars=7), lambda: watch(100)):
        first = make()  # type: ignore[operator]
        second = make()  # type: ignore[operator]
        for block in (first, second):
            block.__enter__()
        for number in order:
            (first, second)[number].__exit__(None, None, None)
        assert (here(), elsewhere(), watchdog_limit()) == (DEFAULT, DEFAULT, None)


def test_many_plain_calls_do_not_pile_up() -> None:
    """Setting the process again and again holds on to no earlier setting."""
    for number in range(1_000):
        strict(number % 2 == 0)
        limits(value_chars=number + 1)
        limits(message_chars=number + 1)
    marks = [config._process_setting, config._process_limits]
    depths = []
    for mark in marks:
        depth = 0
        while mark is not None:
            mark, depth = mark.under, depth + 1
        depths.append(depth)
    assert max(depths) <= 2
    assert current_limits() == Limits(value_chars=1_000, message_chars=1_000)


def test_tasks_have_settings_of_their_own() -> None:
    """A task's block is not its neighbour's, whoever leaves first; a child task inherits it."""

    async def one(number: int) -> tuple[list[int], int]:
        seen = []
        with limits(value_chars=10 + number):
            for _ in range(number):
                await asyncio.sleep(0)
                seen.append(current_limits().value_chars)
            inherited = await asyncio.create_task(asyncio.to_thread(lambda: here()[1]))
        return seen, inherited

    async def main() -> Any:
        return await asyncio.gather(*(one(number) for number in (5, 3, 4)))

    for number, (seen, inherited) in zip((5, 3, 4), asyncio.run(main()), strict=True):
        assert seen == [10 + number] * number
        assert inherited == 10 + number
    assert here() == DEFAULT


def test_a_block_in_a_traced_generator_is_not_its_consumers() -> None:
    """Between its steps the consumer has its own settings, and the body finds its own again."""

    @traced
    def numbers() -> Iterator[tuple[bool, int]]:
        with strict(), limits(value_chars=7):
            yield here()
            yield here()

    for seen in numbers():
        assert (seen, here()) == (CHANGED, DEFAULT)


# -- blocks that nobody leaves -------------------------------------------------------------------


def test_what_a_dropped_block_had_set_is_in_force_no_longer() -> None:
    """Whatever held a block open and was thrown away: its context is as before."""
    with spanguard.strict():
        attachment = spanguard.capture().attach()
    attachment.__enter__()
    caps, strictness, watching = limits(value_chars=7), strict(), watch(open_longer_than=50)
    for setting in (caps, strictness, watching):
        setting.__enter__()
    assert here() == CHANGED
    del attachment, caps, setting, strictness, watching
    assert here() == DEFAULT
    assert watchdog._limit_in_force() is None


def test_what_a_block_has_set_is_in_force_in_its_tasks_to_their_end() -> None:
    async def looks(seen: list[tuple[bool, int]]) -> None:
        await asyncio.sleep(0)
        seen.append(here())

    async def main() -> list[tuple[bool, int]]:
        seen: list[tuple[bool, int]] = []
        with strict(), limits(value_chars=7):
            task = asyncio.create_task(looks(seen))
        await task
        return seen

    assert asyncio.run(main()) == [CHANGED]
