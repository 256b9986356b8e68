"""Run a script in a process of its own, which forks; in its children nothing may hang."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import spanguard
from tests.store import Store

PREAMBLE = """
import faulthandler, os, sys, threading, warnings

hold = let_go = lambda: None  # last before a fork, and first after it in the parent
os.register_at_fork(  # before anybody else registers
    # The alarm's thread is not in the child, which would wait for it.
    before=lambda: (faulthandler.cancel_dump_traceback_later(), hold()),
    after_in_parent=lambda: let_go(),
    # What the child hangs at is on stderr then.
    after_in_child=lambda: faulthandler.dump_traceback_later(ALARM_SECONDS, exit=True),
)
ALARM_SECONDS = 30

import mlflow, spanguard
from spanguard import TraceStateManager, carry, current_span, open_spans, traced_span

warnings.simplefilter("error", spanguard.SpanguardWarning)

def forked(work, leave=os._exit):
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            work()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            leave(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def step(name):
    with traced_span(name):
        pass

def stored():
    # Where it is not, some thread hangs: it says where.
    assert spanguard.flush(20) or faulthandler.dump_traceback()
"""


def run(script: str, store: Store, *, interval: int = 100, **variables: str) -> str:
    """Run a script that forks, on a store; return what it prints. Nothing in it may fail."""
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": store.uri,
        "MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS": str(interval),
        "PYTHONPATH": str(Path(spanguard.__file__).parent.parent),
        **variables,
    }
    finished = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr, finished.stderr
    return finished.stdout
