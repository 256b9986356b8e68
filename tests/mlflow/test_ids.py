"""Ids: no seed repeats one, and no draw of the user's is used up for one."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator

import mlflow
import pytest

import spanguard
from spanguard import TraceStateManager, guard, traced, traced_span
from tests.processes import run_script
from tests.store import Store


@pytest.fixture(autouse=True)
def _the_seed_is_this_tests_own() -> Iterator[None]:
    state = random.getstate()
    yield
    random.setstate(state)


def ours() -> None:
    with traced_span("root"), traced_span("child"):
        pass


def pushed() -> None:
    manager = TraceStateManager()
    manager.push_trace("root")
    manager.push_trace("child")
    manager.close("OK")


def guarded() -> None:
    client = guard()
    root = client.start_trace("root")
    child = client.start_span("child", root.trace_id, root.span_id)
    client.end_span(root.trace_id, child.span_id)
    client.end_trace(root.trace_id)


def raw() -> None:
    client = mlflow.MlflowClient()
    root = client.start_trace("root")
    child = client.start_span("child", root.trace_id, root.span_id)
    client.end_span(root.trace_id, child.span_id)
    client.end_trace(root.trace_id)


def fluent() -> None:
    with mlflow.start_span("root"), mlflow.start_span("child"):
        pass


def decorated() -> None:
    @mlflow.trace(name="root")
    def root() -> None:
        traced(name="child")(lambda: None)()

    root()


FACES = [ours, pushed, guarded, raw, fluent, decorated]


@pytest.mark.parametrize("open_two", FACES)
def test_a_seed_repeats_no_id(open_two: Callable[[], None], store: Store) -> None:
    """Requests that seed alike are traces of their own, whichever API opens the first span."""
    for _ in range(3):
        random.seed(7)
        open_two()
    traces = store.traces()
    assert [len(trace.data.spans) for trace in traces] == [2, 2, 2]
    assert len({span.span_id for trace in traces for span in trace.data.spans}) == 6


@pytest.mark.parametrize("open_two", FACES)
def test_no_draw_of_the_users_is_used_up(open_two: Callable[[], None]) -> None:
    """What a user draws is the same with spans between the draws and without."""
    random.seed(7)
    expected = [random.random() for _ in range(3)]
    random.seed(7)
    drawn = []
    for _ in range(3):
        open_two()
        drawn.append(random.random())
    assert drawn == expected


def test_children_that_seed_alike_stand_side_by_side(store: Store) -> None:
    """A seeded step of a job does not replace its sibling."""
    with traced_span("root"):
        for number in range(5):
            random.seed(7)
            with traced_span(f"step {number}"), mlflow.start_span(f"part {number}"):
                pass
    assert len(store.trace().data.spans) == 11


@pytest.mark.parametrize(
    "undo",
    [
        mlflow.tracing.reset,
        lambda: mlflow.set_experiment("another"),
        lambda: (mlflow.tracing.disable(), mlflow.tracing.enable()),
    ],
    ids=["reset", "set_experiment", "disable and enable"],
)
def test_a_provider_that_mlflow_makes_anew_draws_own_ids_from_its_first_span_on(
    undo: Callable[[], object], store: Store
) -> None:
    """A raw first span on a new provider, which no span of ours has noticed, is no exception."""
    for _ in range(2):
        ours()
        spanguard.flush()
        undo()
        random.seed(7)
        raw()
    assert len(store.traces()) == 4


FIRST_SPANS = {
    "ours": "with spanguard.traced_span('root'): pass",
    "fluent": "with mlflow.start_span('root'), spanguard.traced_span('child'): pass",
    "raw": "c = mlflow.MlflowClient(); c.end_trace(c.start_trace('root').trace_id)",
    "bridged": "provider = mlflow.tracing.provider; provider._get_tracer('x')\n"
    "with provider.provider.get().get_tracer('y').start_as_current_span('root'): pass",
}


@pytest.mark.parametrize("first", FIRST_SPANS)
def test_a_second_run_of_a_seeded_script_keeps_the_first_ones_traces(
    first: str, store: Store
) -> None:
    """The very first span of a process has an id of its own, whichever API opens it."""
    script = f"import random\nimport mlflow, spanguard\nrandom.seed(7)\n{FIRST_SPANS[first]}"
    script += "\nassert spanguard.flush(60)"
    for _ in range(2):
        done = run_script(script, store)
        assert done.returncode == 0, done.stderr
    assert len(store.traces()) == 2


def test_spanguard_that_is_imported_late_takes_over_what_is_there(store: Store) -> None:
    """A provider, and a tracer of it, that are older than the import draw own ids after it."""
    script = """
        import random, mlflow
        mlflow.MlflowClient()
        mlflow.tracing.provider._get_tracer("x")
        import spanguard
        random.seed(7)
        with mlflow.start_span("root"): pass
        assert spanguard.flush(60)
        """
    for _ in range(2):
        assert run_script(script, store).returncode == 0
    assert len(store.traces()) == 2


GLOBAL = """
import itertools, random
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator

class Counted(IdGenerator):
    numbers = itertools.count({start})
    def generate_span_id(self): return next(self.numbers)
    def generate_trace_id(self): return next(self.numbers)

trace.set_tracer_provider(TracerProvider({generator}))
users = trace.get_tracer("user's")
import mlflow, spanguard
random.seed(7)
with spanguard.traced_span("ours") as span, users.start_as_current_span("theirs") as theirs:
    with mlflow.start_span("fluent") as fluent:
        ids = span.span_id, f"{{theirs.get_span_context().span_id:016x}}", fluent.span_id
print(*ids, int(span.trace_id[3:], 16))
assert spanguard.flush(60)
"""


def test_a_generator_of_the_users_own_is_left_alone(store: Store) -> None:
    """Ids that the user's provider chooses stay the user's choice."""
    done = run_script(
        GLOBAL.format(generator="id_generator=Counted()", start=1),
        store,
        MLFLOW_USE_DEFAULT_TRACER_PROVIDER="false",
    )
    assert done.stdout.split() == ["0" * 15 + digit for digit in "234"] + ["1"], done.stderr


def test_a_provider_of_the_users_with_opentelemetrys_own_generator_draws_own_ids(
    store: Store,
) -> None:
    """The process's provider is seeded by nobody either, nor are tracers made before of it."""
    script = GLOBAL.format(generator="", start=1)
    runs = [run_script(script, store, MLFLOW_USE_DEFAULT_TRACER_PROVIDER="false") for _ in "ab"]
    assert len({id for run in runs for id in run.stdout.split()}) == 8, runs[0].stderr


def test_threads_draw_ids_of_their_own() -> None:
    """No two of many threads that draw at a time get the same."""
    from spanguard._mlflow.ids import OwnIds

    ids = OwnIds()
    drawn: list[list[int]] = []

    def draw() -> None:
        drawn.append([draw_one() for _ in range(2_000) for draw_one in draws])

    draws = (ids.generate_span_id, ids.generate_trace_id)
    threads = [threading.Thread(target=draw) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [number for some in drawn for number in some]
    assert len(set(numbers)) == len(numbers) == 32_000
    assert all(number.bit_length() <= 128 for number in numbers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forked_children_draw_ids_of_their_own(store: Store) -> None:
    """Children of one parent, and the parent after them, share none of what it had drawn."""
    done = run_script(
        """
        import os, sys
        import spanguard
        from spanguard._mlflow.ids import OwnIds
        ids = OwnIds()
        ids.generate_span_id()
        def draw():
            sys.stdout.write("".join(f"{ids.generate_span_id():016x}\\n" for _ in range(50)))
            sys.stdout.flush()
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                draw()
                os._exit(0)
            os.waitpid(pid, 0)
        draw()
        """,
        store,
    )
    drawn = done.stdout.split()
    assert len(drawn) == len(set(drawn)) == 200, done.stderr
