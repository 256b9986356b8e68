"""`spanguard check`: what is installed, and whether spanguard can work with it."""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import mlflow

from spanguard import __version__
from spanguard._mlflow.seam import Seam
from spanguard._mlflow.seam_check import MISSING, NOT_IN_THIS_VERSION, OK, state_of
from spanguard._mlflow.seams import SEAMS

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["as_json", "draw", "look"]


_PACKAGES = ("mlflow", "opentelemetry-sdk", "sqlalchemy", "wrapt")

# What decides on what is recorded, where it goes, and how long that is waited for.
_SETTINGS = (
    "SPANGUARD_STRICT",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_TRACING_DESTINATION",
    "MLFLOW_TRACE_SAMPLING_RATIO",
    "MLFLOW_USE_DEFAULT_TRACER_PROVIDER",
    "MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT",
    "MLFLOW_TRACE_TIMEOUT_SECONDS",
    "MLFLOW_TRACE_BUFFER_MAX_SIZE",
    "MLFLOW_TRACE_BUFFER_TTL_SECONDS",
    "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING",
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE",
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_WORKERS",
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS",
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_SPAN_BATCH_SIZE",
    "MLFLOW_ASYNC_TRACE_LOGGING_RETRY_TIMEOUT",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_ALLOW_FILE_STORE",
    "MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_SDK_DISABLED",
)


@dataclass(frozen=True)
class Report:
    """What `spanguard check` found."""

    versions: dict[str, str]
    store: str
    settings: dict[str, str]
    seams: tuple[tuple[Seam, str], ...]

    def in_state(self, state: str) -> list[Seam]:
        """Return the seams that were found so."""
        return [seam for seam, found in self.seams if found == state]

    @property
    def is_usable(self) -> bool:
        """Whether nothing is missing that spanguard cannot do without."""
        return not any(seam.is_needed for seam in self.in_state(MISSING))


def look() -> Report:
    """Look at what is installed and set. Opens no store and starts no tracing."""
    return Report(
        versions={
            "spanguard": __version__,
            "python": f"{platform.python_version()} ({platform.platform()})",
            **{package: _version(package) for package in _PACKAGES},
        },
        store=_store(),
        settings={
            name: without_secrets(os.environ[name]) for name in _SETTINGS if name in os.environ
        },
        seams=tuple((seam, state_of(seam)) for seam in SEAMS),
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _store() -> str:
    try:
        return without_secrets(mlflow.get_tracking_uri())
    except Exception as error:  # noqa: BLE001 - a setting that MLflow refuses: that is worth a line, no more
        return f"unknown: {type(error).__name__}"


_SECRET = re.compile(r"(?i)([?&;][^=&;]*(?:pass|pwd|token|secret|key)[^=&;]*=)[^&;]*")


def without_secrets(uri: str) -> str:
    """Return a URI without the user and password in it, and without secrets in its query."""
    return _SECRET.sub(r"\1***", re.sub(r"://.*@", "://***@", uri))


# -- to read -----------------------------------------------------------------------------------


def as_json(report: Report) -> str:
    """Return the report for programs."""
    seams = [{**asdict(seam), "state": state} for seam, state in report.seams]
    return json.dumps({**vars(report), "seams": seams, "is_usable": report.is_usable}, indent=2)


_STYLES = {OK: "green", MISSING: "bold red", NOT_IN_THIS_VERSION: "dim"}


def draw(report: Report, console: Console) -> None:
    """Print the report for people, and for a bug report."""
    facts = {**report.versions, "store": report.store}
    for name, value in facts.items():
        _line(console, f"{name:<18}{value}")
    _line(console, "\nsettings" if report.settings else "\nsettings: none, all at their defaults")
    for name, value in report.settings.items():
        _line(console, f"  {name}={value}")
    counts = ", ".join(f"{len(report.in_state(state))} {state}" for state in _STYLES)
    _line(console, f"\nnames of MLflow's and OpenTelemetry's that may change: {counts}")
    for seam, state in report.seams:
        _line(console, f"  {state:<20}{seam.path}", _STYLES[state])
    _verdict(report, console)


def _verdict(report: Report, console: Console) -> None:
    missing = report.in_state(MISSING)
    if missing:
        _line(console, "\nmissing:")
    for seam in missing:
        kind = "needed" if seam.is_needed else "lost"
        _line(console, f"  {seam.path}, used by {seam.needed_by}; {kind}: {seam.without}")
    if not report.is_usable:
        _line(console, "\nspanguard cannot work with this MLflow.", "bold red")
    elif missing:
        _line(console, "\nspanguard works, without what is said to be lost.", "yellow")
    else:
        _line(console, "\nNothing is missing.", "green")


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
