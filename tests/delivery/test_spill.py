"""Traces on disk: none is lost where the store is down, the process ends, or dies."""

from __future__ import annotations

import json
import os
import stat
import textwrap
from pathlib import Path
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner

import spanguard
from spanguard import traced_span
from spanguard._delivery import spill
from spanguard._delivery.replay import ReplayError, replay_file, spill_files
from spanguard.cli import main
from tests.delivery.tables import tables_of
from tests.delivery.test_bounds import await_true
from tests.delivery.test_deliver import two_spans
from tests.delivery.test_rows import store_at
from tests.delivery.varied import record
from tests.processes import run_script
from tests.servers import answering, hung
from tests.store import Store

pytestmark = pytest.mark.versions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spilled"


def replayed(folder: Path, *options: str) -> str:
    result = CliRunner().invoke(main, ["replay", str(folder), *options])
    assert result.exit_code == 0, result.output
    return result.output


def test_what_a_dead_store_does_not_take_goes_to_disk_and_from_there_to_the_store(
    store: Store, folder: Path
) -> None:
    with answering(503) as uri:
        mlflow.set_tracking_uri(uri)
        spanguard.deliver(spill=folder, interval_seconds=0.05, batch_traces=5)
        for number in range(30):
            two_spans(number)
        await_true(lambda: spanguard.delivery().spilled >= 25)
        report = spanguard.delivery()
        assert report.recorded == 30
        assert report.spilled + report.pending == 30
    (path,) = spill_files(folder)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_what_is_on_disk_is_stored_by_itself_when_the_store_is_back(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spanguard._delivery import overflow
    from spanguard._mlflow import sql_delivery
    from tests.delivery.test_bounds import locked

    monkeypatch.setattr(overflow, "_DOWN_SECONDS", 0.1)
    monkeypatch.setattr(sql_delivery, "_PRAGMAS", ("foreign_keys = ON", "busy_timeout = 50"))
    spanguard.deliver(spill=folder, interval_seconds=0.05, batch_traces=5)
    two_spans(0)
    assert spanguard.flush(30)
    with locked(store):
        for number in range(1, 30):
            two_spans(number)
        await_true(lambda: spanguard.delivery().spilled >= 20)
    assert len(store.traces()) == 30
    report = spanguard.delivery()
    assert (report.stored, report.spilled, report.pending) == (30, 0, 0)


def test_what_an_exit_cannot_store_is_replayed_once(store: Store, folder: Path) -> None:
    with hung() as uri:
        done = run_script(
            f"""
            import mlflow, spanguard
            from spanguard import traced_span
            spanguard.limits(exit_seconds=1)
            mlflow.set_tracking_uri({uri!r})
            spanguard.deliver(spill={str(folder)!r}, interval_seconds=0.05)
            for number in range(50):
                with traced_span("root", inputs=number, experiment_id="0"):
                    with traced_span("child"): pass
            """,
            store,
        )
        assert done.returncode == 0, done.stderr
        assert "50 traces are on disk, for `spanguard replay`" in done.stderr
    assert "50 traces stored" in replayed(folder, "--store", store.uri, "--keep")
    assert len(store.traces()) == 50
    before = tables_of(store.path)
    replayed(folder, "--store", store.uri)
    assert tables_of(store.path) == before
    assert spill_files(folder) == []


def test_what_comes_from_disk_has_the_same_rows(
    tmp_path: Path, template: Path, folder: Path
) -> None:
    path = store_at(tmp_path / "straight", template)
    spanguard.deliver()
    record(mlflow.MlflowClient())
    assert spanguard.flush(60)
    expected = tables_of(path)
    other = store_at(tmp_path / "by-disk", template)
    spanguard.deliver(spill=folder, durable=True, interval_seconds=3_600)
    record(mlflow.MlflowClient())
    _die()
    assert f"{len(expected['trace_info'])} traces stored" in replayed(folder)
    found = tables_of(other)
    assert found.keys() == expected.keys()
    for table, rows in expected.items():
        for one, wanted in zip(found[table], rows, strict=True):
            assert one == wanted, table


def _die() -> None:
    """Forget what is in memory and let go of the file, as a killed process does."""
    from spanguard._delivery import deliver

    intake = deliver._intake
    assert intake is not None
    for writer in intake.writers:
        writer.stop()
    file = intake._overflow._file
    assert file is not None and file._descriptor is not None
    os.close(file._descriptor)
    intake._overflow._file = None


def killed(store: Store, folder: Path, script: str) -> None:
    lines = [
        "import os, mlflow, spanguard",
        "from spanguard import traced_span",
        f"spanguard.deliver(spill={str(folder)!r}, durable=True, interval_seconds=60)",
        textwrap.dedent(script),
        "os.kill(os.getpid(), 9)",
    ]
    done = run_script("\n".join(lines), store)
    assert done.returncode == -9, done.stderr


def test_a_process_that_is_killed_has_lost_no_trace_that_had_ended(
    store: Store, folder: Path
) -> None:
    killed(
        store,
        folder,
        """
        for number in range(200):
            with traced_span("root"), traced_span("child"): pass
        """,
    )
    assert "200 traces stored" in replayed(folder)
    traces = store.traces()
    assert len(traces) == 200
    assert all(len(trace.data.spans) == 2 for trace in traces)
    assert spill_files(folder) == []


def test_a_trace_that_was_open_then_is_finished_as_orphaned_by_the_crash(
    store: Store, folder: Path
) -> None:
    killed(
        store,
        folder,
        """
        root = traced_span("root", inputs={"q": 1}, tags={"team": "blue"}); root.__enter__()
        middle = traced_span("middle"); middle.__enter__()
        with traced_span("ended"): pass
        """,
    )
    assert "1 of them were open when their process died" in replayed(folder)
    trace = store.trace()
    spans = {span.name: span for span in trace.data.spans}
    assert spans.keys() == {"root", "middle", "ended"}
    assert trace.info.state.value == "ERROR"
    assert trace.info.tags["team"] == "blue"
    assert spans["ended"].status.status_code.value == "OK"
    assert spans["ended"].parent_id == spans["middle"].span_id
    for name in ("root", "middle"):
        span: Any = spans[name]
        assert span.status.status_code.value == "ERROR"
        assert span.attributes["spanguard.outcome"] == "orphaned"
        assert span.attributes["spanguard.orphaned_by"] == "crash"
        assert [event.name for event in span.events] == ["exception"]
        assert span.end_time_ns == spans["ended"].end_time_ns
    assert spans["root"].inputs == {"q": 1}


def test_a_line_that_a_crash_has_cut_off_costs_no_other(store: Store, folder: Path) -> None:
    killed(store, folder, 'with traced_span("root"): pass')
    (path,) = spill_files(folder)
    with path.open("ab") as file:
        file.write(b'{"kind": "trace", "id": "tr-')
    replayed(folder)
    assert [span.name for span in store.trace().data.spans] == ["root"]


def test_a_file_that_a_live_process_has_is_left_alone(store: Store, folder: Path) -> None:
    spanguard.deliver(spill=folder, durable=True, interval_seconds=3_600)
    with traced_span("root"):
        pass
    (path,) = spill_files(folder)
    result = CliRunner().invoke(main, ["replay", str(folder)])
    assert result.exit_code == 1
    assert "in use by a process that is alive" in result.output
    assert path.exists()
    assert spanguard.flush(30)
    assert len(store.traces()) == 1


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "no file of this version"),
        ([{"kind": "file", "format": 99}], "no file of this version"),
    ],
)
def test_a_file_of_another_version_is_not_read(
    folder: Path, lines: list[dict[str, Any]], said: str
) -> None:
    folder.mkdir()
    path = folder / "spanguard-1-aa.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ReplayError, match=said):
        replay_file(path)
    result = CliRunner().invoke(main, ["replay", str(folder)])
    assert result.exit_code == 2
    assert said in result.output


def test_a_folder_that_cannot_be_written_to_is_an_error_at_once(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(OSError, match="cannot be written to"):
        spanguard.deliver(spill=in_the_way / "below")
    assert spanguard.delivery().recorded == 0
    result = CliRunner().invoke(main, ["replay", str(tmp_path / "none")])
    assert result.exit_code == 2


def test_a_full_disk_is_counted(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: object) -> int:
        raise OSError(28, "No space left on device")

    with hung() as uri:
        mlflow.set_tracking_uri(uri)
        spanguard.deliver(spill=folder, interval_seconds=0.05, max_pending_bytes=50_000)
        monkeypatch.setattr(spill.os, "write", full)
        for number in range(20):
            two_spans(number)
        await_true(lambda: spanguard.delivery().dropped > 5)
        monkeypatch.undo()


def test_a_password_is_not_written_down(store: Store, folder: Path) -> None:
    from spanguard._mlflow.on_disk import uri_without_password

    written = uri_without_password("postgresql://me:secret@host/db")
    assert "secret" not in written
