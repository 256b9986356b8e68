"""The one log line about a failure of MLflow's says the cure, and never a payload."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import mlflow
import pytest
from mlflow.tracing import provider
from opentelemetry.sdk.trace import SpanProcessor
from sqlalchemy.exc import OperationalError

import spanguard
from spanguard._base import findings
from tests.store import Store

PROGRAM = """
import logging, os, sys
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
logging.basicConfig(format="%(name)s: %(message)s")
import spanguard
for number in range(3):
    {program}
print("went on")
"""

STARTS = {
    "a block": "with spanguard.traced_span('x', inputs='a payload'): pass",
    "a function": "spanguard.traced(lambda x: x)('a payload')",
    "a guarded client": "spanguard.guard().start_trace('x', inputs='a payload')",
    "a manager": "spanguard.TraceStateManager().push_trace('x', inputs='a payload')",
}
LOOKS_UP = {
    "an experiment": "with spanguard.traced_span('x', experiment_id='7'): pass",
    "a trace id": "with spanguard.traced_span('x', otel_trace_id='7' * 32): pass",
    "a custom id": "spanguard.CustomTraceManager().find_trace('a payload')",
}


def lines(program: str, uri: str, **environment: str) -> list[str]:
    """Return what spanguard logs in a program of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.format(program=program), uri],
        env={**os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.stdout == "went on\n", done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("spanguard: ")]


@pytest.mark.parametrize("program", STARTS.values(), ids=STARTS)
def test_a_start_that_fails_says_what_mlflow_says(program: str) -> None:
    """A driver that is missing is named, once, with neither payload nor password."""
    found = lines(program, "mysql+spanguardless://me:secret@127.0.0.1/traces")
    (line,) = [line for line in found if "starting a span failed" in line]
    assert "spanguardless" in line
    for line in found:  # at the exit one more says how many traces are lost
        assert "payload" not in line
        assert "secret" not in line


@pytest.mark.parametrize("program", LOOKS_UP.values(), ids=LOOKS_UP)
def test_a_look_up_that_fails_says_what_mlflow_says(program: str) -> None:
    """A server that cannot be reached is named, in one line that can be read."""
    found = [
        line for line in lines(program, "http://127.0.0.1:1") if "up" in line or "find" in line
    ]
    assert len(found) == 1
    assert "127.0.0.1" in found[0]
    assert "refused" in found[0]
    assert "payload" not in found[0]
    assert len(found[0]) < 1_200


@pytest.mark.skipif(
    int(mlflow.__version__.split(".")[1]) < 13, reason="this MLflow takes a file store as it is"
)
def test_a_file_store_that_is_refused_says_the_cure(tmp_path: Path) -> None:
    """MLflow's message about its file store names the variable at its end."""
    found = lines(STARTS["a block"], tmp_path.as_uri())
    (line,) = [line for line in found if "starting a span failed" in line]
    assert "MLFLOW_ALLOW_FILE_STORE=true" in line


class Refusing(SpanProcessor):
    """Of the user's, beside MLflow's own."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        raise mlflow.MlflowException("the collector says: renew the key")


def test_a_flush_that_fails_says_what_mlflow_says(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes a flush fail is said in the log."""
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "true")
    monkeypatch.setattr(findings, "reraise_internal", False)
    with spanguard.traced_span("root"):
        pass
    provider.provider.get().add_span_processor(Refusing())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not spanguard.flush(10)
    assert "handing over failed with MlflowException" in caplog.text
    assert "renew the key" in caplog.text


def test_the_values_of_a_query_are_not_logged(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a database refuses is said without the statement and what it was given."""
    monkeypatch.setattr(findings, "reraise_internal", False)
    refused = OperationalError("INSERT INTO t", {"inputs": "a payload"}, Exception("disk is full"))
    wrapped = mlflow.MlflowException(f"could not: {refused}")
    findings.internal_error("looking", refused, quoted=True)
    findings.internal_error("looking", wrapped, quoted=True)
    assert len(caplog.messages) == 2
    for line in caplog.messages:
        assert "disk is full" in line
        assert "payload" not in line


class Custom(Exception):
    pass


@pytest.mark.parametrize("error", [ValueError("a payload"), Custom("a payload")], ids=repr)
def test_the_message_of_another_exception_is_not_logged(
    error: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what MLflow and its database layer say is quoted."""
    monkeypatch.setattr(findings, "reraise_internal", False)
    findings.internal_error("looking", error, quoted=True)
    assert type(error).__qualname__ in caplog.text
    assert "payload" not in caplog.text


def test_a_long_message_is_cut_in_the_middle(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a long message both ends are said."""
    monkeypatch.setattr(findings, "reraise_internal", False)
    caplog.set_level(logging.WARNING)
    error = mlflow.MlflowException("first \ud800\n" + "x" * 100_000 + " last")
    findings.internal_error("looking", error, quoted=True)
    assert re.search(r"first \\ud800 x+ … x+ last", caplog.text)
    assert len(caplog.messages[0]) < 1_200
    assert spanguard.flush(30)
