"""The way out: whatever ends a process, its open spans are closed and stored, in bounded time.

Real child processes end in each way with three spans open; the store shows what arrived.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import spanguard
from tests import servers
from tests.processes import run_script
from tests.store import Store, outcome, status

pytestmark = pytest.mark.pythons

PREAMBLE = """
import os, signal, sys, threading, time
import mlflow, spanguard
from spanguard import TraceStateManager, traced_span

# As in a terminal: what a shell started in the background ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

def leave_three_open():
    global block, manager
    block = traced_span("root")
    root = block.__enter__()
    with traced_span("finished"):
        pass
    manager = TraceStateManager()
    manager.push_trace("pushed")
    mlflow.MlflowClient().start_span("raw", root.trace_id, root.span_id)
    print("open", flush=True)
"""


def start(script: str, store: Store) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": store.uri,
        "MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS": "5000",  # MLflow's default
        "PYTHONPATH": str(Path(spanguard.__file__).parent.parent),
    }
    path = store.path.with_name("script.py")
    path.write_text(PREAMBLE + textwrap.dedent(script), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def run(script: str, store: Store) -> tuple[int, str]:
    process = start(script, store)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


# Python dies of an unhandled Ctrl-C (-2), but forgets it and exits with 1 where anything evaluates
# a string at exit, as SQLAlchemy does when it stores something of a kind for the first time.
INTERRUPTED = (-signal.SIGINT, 1)

WAYS_OUT = {
    "return": ("leave_three_open()", 0, None),
    "sys.exit": ("leave_three_open(); sys.exit(3)", 3, None),
    "unhandled exception": ("leave_three_open(); {}['nothing']", 1, "KeyError"),
    "SIGINT": (
        "leave_three_open(); os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
        INTERRUPTED,
        "KeyboardInterrupt",
    ),
    "SIGTERM": (
        "spanguard.install_signal_handlers(); leave_three_open(); "
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
        -signal.SIGTERM,
        None,
    ),
    "exception in a thread": (
        """
        def work():
            leave_three_open()
            raise ValueError("in a thread")
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        """,
        0,
        "ValueError",
    ),
    "end of a multiprocessing child": (
        """
        import multiprocessing
        child = multiprocessing.get_context("fork").Process(target=leave_three_open)
        child.start()
        child.join()
        sys.exit(child.exitcode)
        """,
        0,
        None,
    ),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_what_is_open_at_the_end_of_a_process_is_closed_and_stored(way: str, store: Store) -> None:
    script, code, raised = WAYS_OUT[way]
    returned, errors = run(script, store)
    assert returned in (code if isinstance(code, tuple) else (code,)), errors
    spans = store.spans()
    assert set(spans) == {"root", "finished", "pushed", "raw"}
    assert (status(spans["finished"]), outcome(spans["finished"])) == ("OK", "ok")
    for name in ("root", "pushed", "raw"):
        assert (status(spans[name]), outcome(spans[name])) == ("ERROR", "orphaned"), name
        by = "SIGTERM" if way == "SIGTERM" else "exit"
        assert spans[name].get_attribute("spanguard.orphaned_by") == by
        assert spans[name].get_attribute("spanguard.opened_at").endswith("in leave_three_open")
        assert spans[name].get_attribute("error_type") == raised
    assert store.trace().info.state.value == "ERROR"


def test_a_process_leaves_a_dead_server_within_the_bound(store: Store) -> None:
    # The time limit of run() is the test: MLflow alone would retry for minutes.
    returned, errors = run(
        """
        import socket
        listener = socket.socket()  # takes connections and never answers
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        mlflow.set_tracking_uri(f"http://127.0.0.1:{listener.getsockname()[1]}")
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "300"
        spanguard.limits(exit_seconds=1)
        if mlflow.__version__.startswith("3.10."):
            traced_span("root").__enter__()  # an end before the exit would wait in place
        else:
            leave_three_open()
        sys.exit(5)
        """,
        store,
    )
    assert returned == 5, errors
    assert "did not take all spans within the 1 seconds" in errors


def test_a_signal_goes_on_to_the_handler_that_was_there_before(store: Store) -> None:
    returned, errors = run(
        """
        def before(number, frame):
            assert spanguard.open_spans() == []
            sys.exit(7)
        signal.signal(signal.SIGTERM, before)
        assert spanguard.install_signal_handlers()
        assert spanguard.install_signal_handlers()  # twice is once
        leave_three_open()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        """,
        store,
    )
    assert returned == 7, errors
    spans = store.spans()
    assert spans["pushed"].get_attribute("spanguard.orphaned_by") == "SIGTERM"


def test_a_signal_that_meets_a_held_lock_is_handled_when_it_is_free(store: Store) -> None:
    returned, errors = run(
        """
        from mlflow.tracing.trace_manager import InMemoryTraceManager
        spanguard.install_signal_handlers()
        leave_three_open()
        with InMemoryTraceManager.get_instance()._lock:
            os.kill(os.getpid(), signal.SIGTERM)
            print("the handler has returned", flush=True)
        time.sleep(60)
        """,
        store,
    )
    assert returned == -signal.SIGTERM, errors
    assert status(store.spans()["root"]) == "ERROR"


def test_handlers_are_refused_from_other_threads_and_leave_ignored_signals_ignored(
    store: Store,
) -> None:
    returned, errors = run(
        """
        import warnings
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert spanguard.install_signal_handlers([signal.SIGHUP])
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answers = [spanguard.install_signal_handlers([signal.SIGKILL])]
            thread = threading.Thread(
                target=lambda: answers.append(spanguard.install_signal_handlers())
            )
            thread.start()
            thread.join()
        assert answers == [False, False]
        assert ["SIGKILL" in str(w.message) for w in caught] == [True, False]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        """,
        store,
    )
    assert returned == 0, errors


@pytest.mark.parametrize("undone", ["mlflow.tracing.reset()", "mlflow.tracing.disable()"])
def test_an_exit_with_nothing_to_store_says_nothing(undone: str, store: Store) -> None:
    returned, errors = run(f"with traced_span('x'): pass\nspanguard.flush()\n{undone}", store)
    assert returned == 0
    assert "did not take" not in errors


def test_the_exception_of_a_thread_is_told_to_the_hook_before_and_to_its_own_spans_only(
    store: Store,
) -> None:
    returned, errors = run(
        """
        def before(args):
            print("told of", args.exc_type.__name__, file=sys.stderr)
        threading.excepthook = before
        def work(raised):
            traced_span(str(raised)).__enter__()
            raise raised
        with traced_span("main"):
            for raised in (ValueError("fails"), SystemExit(0)):
                thread = threading.Thread(target=work, args=(raised,))
                thread.start()
                thread.join()
        """,
        store,
    )
    assert (returned, errors.count("told of")) == (0, 2), errors
    spans = store.spans()
    assert spans["fails"].get_attribute("error_message") == "fails"
    assert spans["0"].get_attribute("error_type") is None
    assert (status(spans["main"]), spans["main"].get_attribute("error_type")) == ("OK", None)


def test_spans_of_threads_that_still_work_are_not_closed_too_early(store: Store) -> None:
    returned, errors = run(
        """
        def work():
            with traced_span("job"):
                is_open.set()
                main.join()
                time.sleep(0.2)
        main, is_open = threading.main_thread(), threading.Event()
        threading.Thread(target=work).start()
        is_open.wait()
        """,
        store,
    )
    assert returned == 0, errors
    span = store.spans()["job"]
    assert (status(span), outcome(span)) == ("OK", "ok")


LATE = {
    "in a thread, after the main thread has ended": """
        import spanguard, threading, time
        def work():
            main.join()
            trace_something()
        main = threading.main_thread()
        threading.Thread(target=work).start()
    """,
    "in an exit hook that is older than the import": """
        atexit.register(lambda: trace_something())
        import spanguard
    """,
    "in an exit hook that is younger than the import": """
        import spanguard
        atexit.register(lambda: trace_something())
    """,
    "in an exit hook that is older than earlier spans": """
        atexit.register(lambda: trace_something())
        import spanguard
        with spanguard.traced_span("early"):
            pass
    """,
    "in two exit hooks around earlier spans": """
        import spanguard
        atexit.register(lambda: trace_something())
        with spanguard.traced_span("early"):
            pass
        atexit.register(lambda: open_something())
    """,
}
NO_THREADS_AT_EXIT = (3, 12) <= sys.version_info < (3, 12, 2)


@pytest.mark.skipif(NO_THREADS_AT_EXIT, reason="this Python starts no threads at exit")
@pytest.mark.parametrize("when", LATE)
def test_spans_that_are_opened_very_late_are_stored(when: str, store: Store) -> None:
    """However late a span is opened and ended, the store has it, and nothing is said to fail."""
    done = run_script(
        """
import atexit
def trace_something():
    import mlflow
    from spanguard import traced_span
    with traced_span("late"), mlflow.start_span("below"):
        pass
def open_something():
    from spanguard import traced_span
    traced_span("left open").__enter__()
"""
        + textwrap.dedent(LATE[when]),
        store,
        MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS="5000",
    )
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr and "Error" not in done.stderr, done.stderr
    early = {"early"} if "early" in LATE[when] else set()
    left = {"left open"} if "open_something" in LATE[when] else set()
    assert set(store.spans()) == {"late", "below"} | early | left


@pytest.mark.skipif(NO_THREADS_AT_EXIT, reason="this Python starts no threads at exit")
def test_late_spans_wait_for_a_dead_server_once(store: Store) -> None:
    """Many that end after the exit's own wait do not each wait for it again."""
    with servers.hung() as uri:
        done = run_script(
            f"""
            import atexit
            def trace_something():
                from spanguard import traced_span
                for _ in range(60):
                    with traced_span("late"):
                        pass
            atexit.register(trace_something)
            import mlflow, spanguard
            mlflow.set_tracking_uri({uri!r})
            mlflow.environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT.set(300)
            spanguard.limits(exit_seconds=1)
            if mlflow.__version__.startswith("3.10."):
                mlflow.set_tracking_uri({store.uri!r})  # an end waits for the server itself
            """,
            store,
            seconds=60,
        )
    assert done.returncode == 0, done.stderr


def test_the_wait_at_exit_is_checked() -> None:
    for wrong in (-1, "soon", float("nan")):
        with pytest.raises(ValueError, match="exit_seconds"):
            spanguard.limits(exit_seconds=wrong)  # type: ignore[arg-type]
