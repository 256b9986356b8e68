"""Where spans that end leave the traced code: nothing is done with them in its thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from opentelemetry.sdk.trace import ReadableSpan

from spanguard._mlflow.outgoing import Outgoing, read_task
from spanguard._mlflow.takeover import Place

__all__ = ["SpanStage"]


class Intake(Protocol):
    """What a stage hands its spans to."""

    def note(self, stage: SpanStage, span: ReadableSpan) -> None:
        """Take a span that has ended. Takes no lock, and never waits."""

    def take_over(self) -> None:
        """Take out of MLflow's memory what has ended, with parts of traces that go on."""

    def take(self, found: Outgoing | list[Outgoing] | Callable[[], Any]) -> None:
        """Take what MLflow's exporter makes of the spans."""

    def start(self) -> None:
        """See to it that the threads run."""

    def await_stored(self, seconds: float) -> bool:
        """Wait until all is stored, at most so long; tell whether it is."""
        ...


# How long the end of MLflow's own flush waits, which knows no limit.
_FLUSH_SECONDS = 300.0


class SpanStage:
    """Stands between one processor of MLflow's and its exporter: see `takeover.Stage`."""

    def __init__(self, place: Place, intake: Intake) -> None:
        self.place = place
        self._intake = intake

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is not None and span.context.trace_flags.sampled:
            self._intake.note(self, span)

    def force_flush(self, timeout_millis: float = 30_000) -> bool:
        self._intake.take_over()
        return True

    def shutdown(self) -> None:
        self._intake.take_over()

    def put(self, task: Any) -> None:
        self._intake.take(read_task(task, self.place.destination))

    def flush(self, terminate: bool = False) -> None:
        self._intake.take_over()
        if not terminate:  # else the provider is replaced, and what it has goes on as before
            self._intake.await_stored(_FLUSH_SECONDS)

    def is_active(self) -> bool:
        return False

    def activate(self) -> None:
        self._intake.start()
