"""Scripts in processes of their own: for what happens at a process's start, fork and end."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import spanguard
from tests.store import Store


def run_script(
    script: str, store: Store, *, seconds: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end against the test's store; what it printed is in the result."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={
            **os.environ,
            "MLFLOW_TRACKING_URI": store.uri,
            "PYTHONPATH": os.pathsep.join(
                [str(Path(spanguard.__file__).parent.parent), str(Path(__file__).parent.parent)]
            ),
            **environment,
        },
        cwd=store.path.parent,
        capture_output=True,
        encoding="utf-8",
        timeout=seconds,
        check=False,
    )
