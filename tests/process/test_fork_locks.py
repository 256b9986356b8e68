"""A forked child waits for no lock that a thread of its parent held: of ours or of others.

Each test runs a script in a process of its own, which forks; a child that hangs is ended by an
alarm, and says where it hung.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing

import pytest

from tests.process.forking import run
from tests.store import Store, outcome, status

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

# One thread holds every lock there is while the process forks: of modules, classes, objects, of
# the import system, whoever made them. Only those cannot be held that the fork itself holds.
HOLD_EVERY_LOCK = """
import _thread, gc, importlib

begin, done, end = [_thread.allocate_lock() for _ in range(3)]
for lock in (begin, done, end):
    lock.acquire()
IMPORTED = ("dbruntime", "IPython", "pyspark", "litellm", "langchain_core", "sqlite3", "json")

def hold_all():
    while True:
        begin.acquire()
        found = gc.get_objects()
        locks = [one for one in found if type(one) in (_thread.LockType, _thread.RLock)]
        held = [one for one in locks if one.acquire(False)]
        names = [importlib._bootstrap._get_module_lock(name) for name in IMPORTED]
        for one in names:
            one.acquire()
        done.release()
        end.acquire()
        for one in held + names:
            one.release()
        del found, locks, one
        counts.append(len(held))
        done.release()

counts = []
_thread.start_new_thread(hold_all, ())

def hold():
    begin.release()
    done.acquire()

def let_go():
    end.release()
    done.acquire()

manager, shared = TraceStateManager(), TraceStateManager(scope="process")
ids = spanguard.CustomTraceManager()

def work(name):
    with traced_span(name, inputs={"n": 1}) as span:
        span.set_attribute("k", {"v": 1})
        span.add_event(mlflow.entities.SpanEvent("seen"))
        with mlflow.start_span("fluent"):
            manager.push_trace("pushed")
            shared.push_trace("shared")
            shared.pop_trace()
            manager.pop_trace()
    with ids.custom_trace("user", name):
        assert carry(lambda: current_span().name)() == current_span().name
    assert open_spans() == []
    stored()
"""


@pytest.mark.parametrize("provider", ["of MLflow", "of the process"])
@pytest.mark.parametrize("parent", ["has traced", "has only imported"])
def test_the_child_waits_for_no_lock_that_a_thread_held(
    store: Store, provider: str, parent: str
) -> None:
    """A child opens, ends and stores spans of every face though all locks were held."""
    isolated = "true" if provider == "of MLflow" else "false"
    run(
        HOLD_EVERY_LOCK
        + f"""
if {parent == "has traced"}:
    work("parent")
assert forked(lambda: work("child")) == 0
assert counts[0] > 50, counts
work("parent again")
""",
        store,
        MLFLOW_USE_DEFAULT_TRACER_PROVIDER=isolated,
    )
    traces = store.traces()
    names = {trace.data.spans[0].name for trace in traces if len(trace.data.spans) == 4}
    assert names >= {"child", "parent again"}
    assert {status(span) for trace in traces for span in trace.data.spans} == {"OK"}


def test_the_child_goes_on_with_what_its_parent_has_open(store: Store) -> None:
    """The child leaves blocks of the parent and writes on their spans, though all was held."""
    run(
        HOLD_EVERY_LOCK
        + """
with traced_span("root") as root, mlflow.start_span("fluent") as fluent:
    with traced_span("step") as span:
        pid = os.fork()
        if pid == 0:
            for one in (root, fluent, span):
                one.set_attributes({"by": "child"})
                one.add_event(mlflow.entities.SpanEvent("child"))
if pid == 0:
    work("child")
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
""",
        store,
    )
    traces = {trace.data.spans[0].name: trace.data.spans for trace in store.traces()}
    assert len(traces["child"]) == 4
    assert [span.name for span in traces["root"]] == ["root", "fluent", "step"]
    assert not any(span.get_attribute("by") or span.events for span in traces["root"])
    assert {status(span) for span in traces["root"]} == {"OK"}


def test_the_childs_signal_handler_waits_for_no_lock_that_a_thread_held(store: Store) -> None:
    """SIGTERM closes and stores what the child has open, though all locks were held."""
    run(
        HOLD_EVERY_LOCK
        + """
import signal, time
spanguard.install_signal_handlers()
work("parent")

def child():
    warnings.simplefilter("ignore")
    traced_span("open in the child").__enter__()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

assert forked(child) == -signal.SIGTERM
""",
        store,
    )
    (span,) = (
        span
        for trace in store.traces()
        for span in trace.data.spans
        if span.name == "open in the child"
    )
    assert (status(span), outcome(span)) == ("ERROR", "orphaned")


def test_the_childs_recording_waits_for_no_lock_that_a_thread_held(store: Store) -> None:
    """A test that records its spans may fork in the middle of it."""
    run(
        HOLD_EVERY_LOCK
        + """
from spanguard.testing import record_spans

with record_spans() as spans:
    step("parent")
    def child():
        step("child")
        assert "child" in [span.name for span in spans]
    assert forked(child) == 0
    assert [span.name for span in spans] == ["parent"]
""",
        store,
    )


# -- the import system's locks -------------------------------------------------------------------

# A module that one thread is in the middle of, for as long as the file `go` is not there.
SLOW_MODULE = """
import pathlib, time

pathlib.Path("slow.py").write_text(
    "import pathlib, time\\n"
    "half = True\\n"
    "pathlib.Path('begun').touch()\\n"
    "while not pathlib.Path('go').exists():\\n"
    "    time.sleep(0.01)\\n"
    "whole = True\\n"
)
sys.path.insert(0, os.getcwd())

def import_it():
    import slow

def import_in_thread():
    thread = threading.Thread(target=import_it, daemon=True)
    thread.start()
    while not pathlib.Path("begun").exists():
        time.sleep(0.01)
    return thread
"""


def test_the_child_imports_what_a_thread_never_got_done(store: Store) -> None:
    """A program that runs inside an import may fork workers that import it."""
    run(
        SLOW_MODULE
        + """
import_in_thread()

def child():
    import slow
    assert slow.half
    step("child")
    stored()

assert forked(child) == 0
assert forked(child) == 0
""",
        store,
    )
    assert len(store.traces()) == 2


def test_the_child_has_whole_what_a_thread_was_importing(store: Store) -> None:
    """A fork waits for a thread that is half-way through a module."""
    run(
        SLOW_MODULE
        + """
thread = import_in_thread()
threading.Timer(0.5, pathlib.Path("go").touch).start()

def child():
    import slow
    assert slow.whole

assert forked(child) == 0
thread.join()
assert sys.modules["slow"].whole
""",
        store,
    )


def test_a_child_that_is_forked_inside_an_import_gets_it_done(store: Store) -> None:
    """A module that forks at its top: the child is inside its import, and goes on with it."""
    run(
        SLOW_MODULE
        + """
pathlib.Path("forks.py").write_text(
    "import os, pathlib, threading, time\\n"
    "pathlib.Path('begun').touch()\\n"
    "while not pathlib.Path('waits').exists():\\n"
    "    time.sleep(0.01)\\n"
    "time.sleep(0.2)\\n"
    "pid = os.fork()\\n"
    "import forks\\n"
)

def import_forks():
    while not pathlib.Path("begun").exists():
        time.sleep(0.01)
    pathlib.Path("waits").touch()
    import forks

thread = threading.Thread(target=import_forks, daemon=True)
thread.start()
step("parent")
import forks
if forks.pid == 0:
    code = 9
    try:
        results = []
        again = threading.Thread(target=lambda: results.append(__import__("forks")), daemon=True)
        again.start()
        again.join(20)
        assert results == [forks]
        step("child")
        stored()
        code = 0
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(forks.pid, 0)[1]) == 0
thread.join()
""",
        store,
    )
    assert sorted(store.spans()) == ["child", "parent"]


# -- threads that are inside the store -----------------------------------------------------------


def test_a_fork_waits_for_a_thread_that_is_inside_sqlite(store: Store) -> None:
    """The child stores its spans, and the database is whole, where a thread was writing on it."""
    run(
        """
import time
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

step("parent")
stored()
(engine,) = SqlAlchemyStore._engine_map.values()
inside = threading.Event()

def write():
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        connection.exec_driver_sql("CREATE TABLE written (n)")
        inside.set()
        time.sleep(0.5)
        connection.commit()

def child():
    step("child")
    stored()

thread = threading.Thread(target=write)
thread.start()
inside.wait()
assert forked(child) == 0
thread.join()
step("parent again")
stored()
""",
        store,
    )
    assert sorted(store.spans()) == ["child", "parent", "parent again"]
    with closing(sqlite3.connect(store.path)) as connection:
        assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]


def test_forks_of_two_threads_at_once_all_go_through(store: Store) -> None:
    """Two threads that fork at the same time wait for each other, not for ever."""
    run(
        """
step("parent")
stored()
codes = []

def fork_some():
    for _ in range(3):
        codes.append(forked(lambda: step("child")))

threads = [threading.Thread(target=fork_some) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
assert codes == [0] * 6, codes
step("parent again")
stored()
""",
        store,
    )
