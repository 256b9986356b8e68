"""`flush` says True only of what is stored, waits no longer than it may, and says what is lost."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterator

import mlflow
import pytest
from mlflow import MlflowClient

import spanguard
from spanguard import traced_span
from spanguard._base import findings
from spanguard.exceptions import TraceLostWarning
from tests import servers
from tests.processes import run_script
from tests.store import Store

IN_PLACE = not hasattr(
    __import__("mlflow.tracing.processor.base_mlflow").tracing.processor.base_mlflow,
    "_batch_processor_registry",
)


def ours(name: str = "root") -> None:
    with traced_span(name, inputs="a secret"), traced_span(f"{name}'s child"):
        pass


def raw(name: str = "root") -> None:
    client = MlflowClient()
    root = client.start_trace(name, inputs={"q": "a secret"})
    client.end_trace(root.trace_id)


def fluent(name: str = "root") -> None:
    with mlflow.start_span(name) as span:
        span.set_inputs("a secret")


@contextlib.contextmanager
def refusing(store: Store, what: str = "trace_info", when: str = "1") -> Iterator[None]:
    """Let the database refuse new rows in a table, by a trigger."""
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as database:
        database.execute(
            f"create trigger refuse before insert on {what} when {when} "
            "begin select raise(abort, 'no more of these'); end"
        )
        yield
        database.execute("drop trigger refuse")


def flush(seconds: float = 60.0) -> tuple[bool, list[str]]:
    """Flush; return the answer and the warnings, also of a line that has warned before."""
    findings.forget_sites()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = spanguard.flush(seconds)
    return answer, [str(w.message) for w in caught if issubclass(w.category, TraceLostWarning)]


def lost_of(told: list[str]) -> int:
    (text,) = told
    (count,) = re.findall(r"^(\d+) traces are not in the store", text)
    return int(count)


@pytest.mark.parametrize("open_and_end", [ours, raw, fluent])
@pytest.mark.parametrize("table", ["trace_info", "spans", "trace_tags"])
def test_what_the_database_refuses_is_counted(
    table: str, open_and_end: Callable[..., None], store: Store
) -> None:
    """Whichever part of a trace is refused and whichever API opened it: False, and how many."""
    ours("before")
    assert flush() == (True, [])
    with refusing(store, table):
        for number in range(3):
            open_and_end(f"refused {number}")
        answer, told = flush()
    # Spans that the database refuses may still get into MLflow's artifact of the whole trace.
    missing = 4 - len(store.traces(flush=False))
    assert missing == 3 or table == "spans"
    assert (answer, [lost_of([text]) for text in told]) == (not missing, [missing][:missing])


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_what_a_server_refuses_is_counted(status: int) -> None:
    """A server that takes nothing makes flush() say False, with MLflow's reason."""
    with servers.answering(status) as uri:
        mlflow.set_tracking_uri(uri)
        for number in range(3):
            ours(f"root {number}")
        answer, told = flush()
    assert (answer, lost_of(told)) == (False, 3)
    assert str(status) in told[0]


def test_of_good_and_bad_traces_only_the_bad_are_counted(store: Store) -> None:
    """The count is that of the traces which are missing in the store."""
    ours("first")
    assert flush()[0]
    with refusing(store, "trace_tags", "new.key = 'kind' and new.value = 'bad'"):
        for _ in range(4):
            for kind in ("good", "bad"):
                with traced_span("root", tags={"kind": kind}), traced_span("child"):
                    pass
            answer, told = flush()
            assert (answer, lost_of(told)) == (False, 1)
    whole = [t for t in store.traces(flush=False) if t.info.tags.get("kind") == "good"]
    assert len(whole) == 4


def test_a_loss_is_told_once_and_the_answer_stays_until_the_store_takes_a_trace(
    store: Store,
) -> None:
    """Asking again makes no lost trace stored; a store that works again makes flush() True."""
    ours("before")
    assert flush() == (True, [])
    with refusing(store):
        ours("lost")
        answer, told = flush()
        assert (answer, lost_of(told)) == (False, 1)
        assert [flush(), flush()] == [(False, [])] * 2
    assert flush() == (False, [])
    ours("after")
    assert flush() == (True, [])


def test_no_payload_gets_into_the_reason(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database quotes the row that it refuses; the warning does not."""
    monkeypatch.setenv("MLFLOW_ASYNC_TRACE_LOGGING_MAX_WORKERS", "1")  # spans, then their trace
    ours("before")
    assert flush()[0]
    with refusing(store, "trace_tags", "new.key = 'kind'"):
        with traced_span("lost", inputs="a secret", tags={"kind": "a secret"}):
            pass
        _, told = flush()
    assert "1 traces are not in the store" in told[0]
    assert not re.search("secret|INSERT|parameters", told[0]), told
    assert "Error" in told[0]


def test_a_deleted_database_file_is_noticed(store: Store) -> None:
    """What is written to a file that is gone is not stored."""
    ours("before")
    assert flush()[0]
    os.remove(store.path)
    for number in range(20):
        ours(f"root {number}")
    answer, told = flush()
    assert (answer, lost_of(told)) == (False, 20)


def test_a_full_disk_is_noticed(store: Store) -> None:
    """A process that may write no more bytes says so."""
    done = run_script(
        """
        import os, resource
        import mlflow, spanguard
        from spanguard import traced_span
        with traced_span("first"): pass
        assert spanguard.flush(60)
        size = os.path.getsize("mlflow.db")
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        for number in range(20):
            with traced_span("root", inputs="x" * 10_000): pass
        print(spanguard.flush(60))
        """,
        store,
    )
    assert done.stdout.split() == ["False"], done.stderr
    lost = re.findall(r"TraceLostWarning: (\d+) traces are not in the store", done.stderr)
    assert int(lost[0]) == 21 - len(store.traces())


STARTS = {
    "ours": "with spanguard.traced_span('root'): pass",
    "raw": "client.start_trace('root')",
    "fluent": "with mlflow.start_span('root'): pass",
}


@pytest.mark.parametrize("start", STARTS)
def test_a_start_that_failed_is_counted(start: str, store: Store) -> None:
    """A trace that could not begin is not stored either, whichever API began it."""
    done = run_script(
        f"""
        import contextlib, pathlib
        import mlflow, spanguard
        client = mlflow.MlflowClient()
        pathlib.Path("other.db").write_bytes(b"this is no database" * 1000)
        mlflow.set_tracking_uri("sqlite:///other.db")
        with contextlib.suppress(Exception):
            {STARTS[start]}
        print(spanguard.flush(60))
        """,
        store,
    )
    assert done.stdout.split() == ["False"], done.stderr
    (told,) = re.findall(r"TraceLostWarning: (.*)", done.stderr)
    assert told.startswith("1 traces are not in the store"), told
    assert "file is not a database" in told


def test_sqlite_that_was_locked_for_long_has_lost_some_and_they_are_counted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waited for too long is gone, and what came in is not counted."""
    # One worker: several that write one trace's row at a time may drop a span without a word.
    monkeypatch.setenv("MLFLOW_ASYNC_TRACE_LOGGING_MAX_WORKERS", "1")
    ours("before")
    assert flush()[0]
    database = sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
    database.execute("begin exclusive")
    release = threading.Timer(28, database.execute, ["commit"])
    release.start()
    for number in range(8 if IN_PLACE else 20):
        if IN_PLACE and number == 1:
            release.join()
        ours(f"root {number}")
    release.join()
    answer, told = flush()
    database.close()
    assert not answer
    assert lost_of(told) == (9 if IN_PLACE else 21) - len(store.traces(flush=False))


def test_a_full_export_queue_is_noticed(store: Store) -> None:
    """MLflow drops what finds no room; flush() knows how many traces that are."""
    done = run_script(
        """
        import spanguard
        from spanguard import traced_span
        with traced_span("first"): pass
        assert spanguard.flush(60)
        for number in range(200):
            with traced_span("root"): pass
        print(spanguard.flush(60))
        """,
        store,
        MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE="5",
        MLFLOW_ENABLE_ASYNC_TRACE_LOGGING="true",
    )
    assert done.stdout.split() == ["False"], done.stderr
    lost = re.findall(r"TraceLostWarning: (\d+) traces are not in the store", done.stderr)
    # Some of what MLflow drops was half there: readable, but without its name and tags.
    assert 201 - len(store.traces()) <= int(lost[0]) <= 200


# -- how long ----------------------------------------------------------------------------------

HUNG = """
import sys, threading, time
import mlflow, spanguard
from spanguard import traced_span
mlflow.set_tracking_uri(sys.argv[1] if len(sys.argv) > 1 else URI)
"""


@pytest.mark.parametrize("timeout", [None, float("inf"), 1e12, 10**400, 30, 30.0, True])
def test_any_number_is_a_timeout(timeout: float | None, store: Store) -> None:
    """Numbers that no lock can wait for are as long as it takes."""
    ours()
    assert spanguard.flush(timeout)


@pytest.mark.parametrize("timeout", [0, -1, float("-inf"), -(10**400)])
def test_no_time_at_all_is_a_timeout(timeout: float) -> None:
    """What is not there yet is not waited for, and nothing raises."""
    ours()
    assert spanguard.flush(timeout) in (True, False)
    assert spanguard.flush(60)


@pytest.mark.parametrize("timeout", ["soon", float("nan"), object(), [3]])
def test_what_is_no_number_is_told_and_stands_for_the_default(timeout: object) -> None:
    """A timeout that cannot be read does not raise, and is not taken for none."""
    ours()
    with pytest.warns(spanguard.SpanguardWarning, match="timeout of flush"):
        assert spanguard.flush(timeout)  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [float("inf"), 1e12, 10**400])
def test_the_exit_may_wait_as_long_as_it_takes(seconds: float, store: Store) -> None:
    """A process that is told to wait for ever stores what is open when it is terminated."""
    done = run_script(
        f"""
        import os, signal, time
        import spanguard
        inf = float("inf")
        spanguard.limits(exit_seconds={seconds!r})
        spanguard.install_signal_handlers()
        spanguard.traced_span("root").__enter__()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        """,
        store,
    )
    assert done.returncode == -15, done.stderr
    assert "Error" not in done.stderr
    assert store.spans()["root"].get_attribute("spanguard.orphaned_by") == "SIGTERM"


@pytest.mark.skipif(IN_PLACE, reason="an end waits for the store itself on this MLflow")
def test_many_flushes_of_a_hung_store_share_one_thread(store: Store) -> None:
    """Thirty that nobody answers leave no thread each, and each is back in time."""
    with servers.hung() as uri:
        done = run_script(
            f"""
            import threading, time
            import mlflow, spanguard
            mlflow.set_tracking_uri({uri!r})
            spanguard.limits(exit_seconds=0)
            with spanguard.traced_span("root"): pass
            spanguard.flush(0.05)
            before = threading.active_count()
            begun = time.monotonic()
            answers = {{spanguard.flush(0.05) for _ in range(30)}}
            print(answers, threading.active_count() - before, time.monotonic() - begun < 30)
            """,
            store,
        )
    answers, threads, in_time = done.stdout.split()
    assert (answers, in_time) == ("{False}", "True"), done.stderr
    assert int(threads) <= 0
    assert done.stderr.count("still on their way") == 2  # once for each line that flushes


def test_flushes_of_many_threads_are_all_true(store: Store) -> None:
    """Each waits for what had ended before it, also where another one's turn is under way."""
    answers: list[bool] = []

    def work(number: int) -> None:
        for part in range(5):
            ours(f"root {number} {part}")
            answers.append(spanguard.flush(60))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 30
    assert len(store.traces()) == 30


# -- an OTLP endpoint --------------------------------------------------------------------------

OTLP = """
import mlflow, spanguard
from spanguard import CustomTraceManager, traced_span
client = mlflow.MlflowClient()
with traced_span("plain"), traced_span("child"):
    pass
with traced_span("tagged", tags={"team": "sales"}):
    pass
root = client.start_trace("raw", tags={"team": "sales"})
client.end_trace(root.trace_id)
CustomTraceManager().start_custom_trace("ada", "pay", custom_trace_id="order-42")
spanguard.close_open_spans("OK")
print(spanguard.flush(60))
import os
os._exit(0)
"""


def otlp(collector: servers.Collector) -> dict[str, str]:
    return {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": collector.uri,
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
    }


def test_an_otlp_endpoint_has_what_flush_says(store: Store) -> None:
    """Where only OTLP is set up, all is sent when flush() is back, tags and business ids too."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    with servers.collecting(store.path.parent) as collector:
        done = run_script(OTLP, store, **otlp(collector))
        assert done.stdout.split() == ["True"], done.stderr
        spans = collector.spans()
    assert set(spans) == {"plain", "child", "tagged", "raw", "order-42"}
    assert "BoundedAttributes" not in done.stderr
    for name, tag in [("tagged", "team"), ("raw", "team"), ("order-42", "custom_trace_id")]:
        assert spans[name][f"mlflow.traceTag.{tag}"], name


def test_an_otlp_endpoint_that_refuses_is_told(store: Store) -> None:
    """What an OTLP endpoint does not take is not stored."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    with servers.collecting(store.path.parent, status=400) as collector:
        done = run_script(OTLP, store, **otlp(collector))
    assert done.stdout.split() == ["False"], done.stderr
    assert "4 traces are not in the store" in done.stderr
