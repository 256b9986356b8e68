"""What a person sees: MLflow's own page, in a browser, of traces in a real store."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

import spanguard
from spanguard import traced_span
from tests.store import Store, await_true

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

# The colours of the elements with nothing but a span's name in them, by name.
COLOURS = """
JSON.stringify(Object.fromEntries(
  [...document.querySelectorAll("*")]
    .filter(element => element.children.length === 0 && NAMES.includes(element.textContent.trim()))
    .map(element => [element.textContent.trim(), getComputedStyle(element).color])
))
"""


@contextlib.contextmanager
def running(command: list[str], **options: Any) -> Iterator[None]:
    """Run a command for as long as the block lasts, and stop it with all that it has started."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **options,
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


@contextlib.contextmanager
def serving(store: Store) -> Iterator[str]:
    """Serve a store by `mlflow server` on loopback; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--backend-store-uri", store.uri, "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with running(command, cwd=store.path.parent):
        await_true(lambda: answers(f"{url}/health"), seconds=180)
        yield url


def answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(urllib.request.urlopen(url, timeout=10).status == 200)
    return False


@contextlib.contextmanager
def browsing(profile: Path, url: str) -> Iterator[ClientConnection]:
    """Open a page in a browser without a window; yield the connection to its debugger."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", "--window-size=1500,900", f"--user-data-dir={profile}"]
    command += ["--remote-debugging-port=0", url]
    with running(command):
        where = profile / "DevToolsActivePort"
        await_true(lambda: where.exists() and len(where.read_text().split()) == 2, seconds=60)
        debugger = f"http://127.0.0.1:{where.read_text().split()[0]}/json"
        await_true(lambda: answers(debugger) and pages(debugger), seconds=60)
        with connect(pages(debugger)[0], max_size=None) as page:
            yield page


def pages(debugger: str) -> list[str]:
    targets = json.load(urllib.request.urlopen(debugger, timeout=10))
    return [t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page"]


def colours(page: ClientConnection, names: list[str]) -> dict[str, str]:
    """Return the colour of each of the names that the page shows."""
    expression = COLOURS.replace("NAMES", json.dumps(names))
    page.send(
        json.dumps({"id": 1, "method": "Runtime.evaluate", "params": {"expression": expression}})
    )
    answer = json.loads(page.recv(timeout=30))
    found: dict[str, str] = json.loads(answer["result"]["result"]["value"])
    return found


def is_red(colour: str) -> bool:
    red, green, blue = (float(part) for part in colour.strip("rgba()").split(",")[:3])
    return red > 150 and green < 100 and blue < 120


def a_trace_of_all_kinds() -> tuple[str, set[str], set[str]]:
    """Record a trace; return its id, and the names of what failed and of what did not."""
    with pytest.warns(spanguard.OrphanedSpanWarning), traced_span("the root") as root:
        with contextlib.suppress(KeyError), traced_span("an expected one", expected=KeyError):
            raise KeyError
        with contextlib.suppress(ValueError), traced_span("a failed one"):
            raise ValueError
        with traced_span("one set by hand") as span:
            span.set_status("ERROR")
        with traced_span("a good one"):
            pass
        left = traced_span("an orphan")
        left.__enter__()
    failed = {"a failed one", "one set by hand", "an orphan"}
    return root.trace_id, failed, {"the root", "an expected one", "a good one"}


def test_the_page_paints_red_what_failed_and_nothing_else(store: Store, tmp_path: Path) -> None:
    """In the browser the names of failed spans are red, and those of all others are not."""
    trace_id, failed, well = a_trace_of_all_kinds()
    (trace,) = store.traces()
    experiment = trace.info.experiment_id
    with serving(store) as url:
        address = f"{url}/#/experiments/{experiment}/traces?selectedEvaluationId={trace_id}"
        with browsing(tmp_path / "profile", address) as page:
            names = sorted(failed | well)
            await_true(lambda: colours(page, names).keys() == failed | well, seconds=120)
            shown = colours(page, names)
    assert {name for name, colour in shown.items() if is_red(colour)} == failed
