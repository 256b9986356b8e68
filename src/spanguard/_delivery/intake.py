"""From the spans that end to the traces that wait: in a thread of its own, and in bounds."""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from mlflow.entities import Span
from opentelemetry.sdk.trace import ReadableSpan

from spanguard._base.findings import contained
from spanguard._delivery.counts import Counts, Delivery
from spanguard._delivery.overflow import Overflow
from spanguard._delivery.settings import Settings
from spanguard._delivery.stage import SpanStage
from spanguard._delivery.writer import Writer
from spanguard._mlflow.outgoing import Destination, Outgoing
from spanguard._mlflow.takeover import Place

__all__ = ["TraceIntake"]


# As MLflow does: a trace that goes on for longer sends what has ended meanwhile.
PART_SECONDS = 5.0
# So many spans are taken over at a time, and so many may end before the thread is woken.
_AT_A_TIME, _RING_AFTER = 2_000, 256
_MAX_BEGUN = 10_000


@dataclass
class _Held:
    """The ended spans of a trace that goes on, not sent yet."""

    since: float
    first: Outgoing
    spans: list[Span] = field(default_factory=list)


class TraceIntake:
    """Takes over what has ended, and gives it to the writers. See `stage.Intake`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.counts = Counts()
        self._ended: deque[tuple[SpanStage, ReadableSpan]] = deque()
        self._numbers = itertools.count(1)
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._taking = threading.RLock()  # re-entrant: a signal handler may end a trace meanwhile
        self._held: dict[str, _Held] = {}
        self._begun: OrderedDict[str, None] = OrderedDict()  # of which the store has a part
        self._writers: dict[Destination, Writer] = {}
        self._thread: threading.Thread | None = None
        self._is_over = False
        self._overflow = Overflow(self)

    def stage(self, place: Place) -> SpanStage:
        """Return what stands at a processor of MLflow's."""
        self.start()
        return SpanStage(place, self)

    # -- in the thread that ends a span ----------------------------------------------------------

    def note(self, stage: SpanStage, span: ReadableSpan) -> None:
        self._ended.append((stage, span))
        if self.settings.durable:
            self._put_on_disk(stage, span)
        if next(self._numbers) % _RING_AFTER == 0:
            self._bell.put(None)  # re-entrant, other than an Event: no lock of Python's own

    def _put_on_disk(self, stage: SpanStage, span: ReadableSpan) -> None:
        with contained("putting a span on disk"):
            if span.parent is None:
                self._take_ended()
            else:
                self._overflow.note_open(stage.place.destination, span)

    # -- in the intake's thread, and in those that wait for the store ----------------------------

    def start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._run, name="spanguard-delivery", daemon=True)
            try:
                thread.start()
                self._thread = thread
            except RuntimeError:  # Python 3.12.1 starts no threads any more at exit
                self._thread = None

    def _run(self) -> None:
        while not self._is_over:
            self._await_bell()
            with contained("taking over what has ended"):
                self._take_ended()
                self._send_parts(PART_SECONDS)
                self._overflow.tend()

    def _await_bell(self) -> None:
        try:
            self._bell.get(timeout=self.settings.interval_seconds)
            while True:
                self._bell.get_nowait()
        except Empty:
            pass

    def take_over(self) -> None:
        self._take_ended()
        self._send_parts(0.0)

    def _take_ended(self) -> None:
        with self._taking:
            while batch := self._next_ended():
                try:
                    for stage, spans in _by_stage(batch):
                        with contained("taking spans out of MLflow's memory"):
                            stage.place.export(spans)
                except BaseException:  # Ctrl-C: whoever comes next takes them
                    self._ended.extendleft(reversed(batch))
                    raise

    def _next_ended(self) -> list[tuple[SpanStage, ReadableSpan]]:
        batch: list[tuple[SpanStage, ReadableSpan]] = []
        try:
            while len(batch) < _AT_A_TIME:
                batch.append(self._ended.popleft())  # others append meanwhile: no iterator lasts
        except IndexError:
            pass
        return batch

    def take(self, found: Outgoing | list[Outgoing] | Callable[[], Any]) -> None:
        with self._taking:
            if isinstance(found, Outgoing):
                self._take_whole(found)
            elif isinstance(found, list):
                for part in found:
                    held = self._held.setdefault(part.trace_id, _Held(time.monotonic(), part))
                    held.spans.extend(part.spans)
            else:
                found()

    def _take_whole(self, item: Outgoing) -> None:
        held = self._held.pop(item.trace_id, None)
        if item.trace_id in self._begun:
            del self._begun[item.trace_id]
            unsent = {span.span_id for span in held.spans} if held else set()
            item.spans = [span for span in item.spans if span.span_id in unsent]
        self.counts.begin(item.trace_id, item.size)
        if self.settings.durable:
            self._overflow.put_on_disk(item)
        self.writer_to(item.destination).put(item)

    @property
    def _linger_seconds(self) -> float:
        return self.settings.interval_seconds if self.settings.durable else 0.0

    def _send_parts(self, older_than: float) -> None:
        """Send the ended spans of traces that go on, or are another process's to end."""
        with self._taking:
            latest = time.monotonic() - older_than
            for trace_id in [id for id, held in self._held.items() if held.since <= latest]:
                held = self._held.pop(trace_id)
                part = held.first
                part.spans = held.spans
                part.size *= max(len(held.spans), 1)
                self._begun[trace_id] = None
                if len(self._begun) > _MAX_BEGUN:
                    self._begun.popitem(last=False)
                self.counts.begin_part(part, part.size)
                self.writer_to(part.destination).put(part)

    def writer_to(self, destination: Destination) -> Writer:
        """Return who stores at a destination."""
        writer = self._writers.get(destination)
        if writer is None:
            writer = Writer(
                destination, self.counts, self.settings.batch_traces, self._overflow.forget
            )
            writer.linger_seconds = self._linger_seconds
            self._writers[destination] = writer
        return writer

    # -- waiting, and the end --------------------------------------------------------------------

    def await_stored(self, seconds: float) -> bool:
        for writer in self.writers:
            writer.start()
            writer.hurry()
        counts = self.counts
        with counts.changed:
            traces, parts = list(counts.pending), list(counts.parts)
            from_disk = counts.spilled > 0  # which come one by one: all that is pending, then

            def is_done() -> bool:
                return not (
                    any(trace in counts.pending for trace in traces)
                    or any(part in counts.parts for part in parts)
                    or (from_disk and (counts.spilled or counts.pending))
                )

            return counts.changed.wait_for(is_done, max(seconds, 0.0))

    def finish(self, *, is_stored: bool) -> int:
        """Put on disk what will not be stored any more; return how many traces that are."""
        if not is_stored:
            self.take_over()
        return self._overflow.close(give_up=not is_stored)

    @property
    def writers(self) -> list[Writer]:
        return list(self._writers.values())

    def report(self) -> Delivery:
        """Return what became of each trace that has ended."""
        just_ended = sum(span.parent is None for _, span in list(self._ended))
        return self.counts.report(just_ended)

    def change(self, settings: Settings) -> None:
        """Go on with other settings."""
        self.settings = settings
        for writer in self.writers:
            writer.batch_traces = settings.batch_traces
            writer.linger_seconds = self._linger_seconds
        self._bell.put(None)


def _by_stage(
    batch: list[tuple[SpanStage, ReadableSpan]],
) -> Iterator[tuple[SpanStage, list[ReadableSpan]]]:
    for stage, pairs in itertools.groupby(batch, key=lambda pair: pair[0]):
        yield stage, [span for _, span in pairs]
