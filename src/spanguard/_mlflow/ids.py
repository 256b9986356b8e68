"""Ids: of the operating system's randomness, or chosen."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

from mlflow.tracing import provider as _provider_module
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator

from spanguard._mlflow.optional import optional
from spanguard._mlflow.provider import initialized_provider
from spanguard._mlflow.spans import recording_span

__all__ = ["OwnIds", "give_own_ids", "mlflow_trace_id_of", "otel_trace_id_of", "trace_id_chosen"]


make_trace_id = optional("mlflow.tracing.utils", "generate_mlflow_trace_id_from_otel_trace_id")


# -- ids ---------------------------------------------------------------------------------------


_random_numbers: list[int] = []  # drawn beforehand: for each id alone it takes half a microsecond


def _random_number() -> int:
    """Return 64 bits of the operating system's randomness, not all zero."""
    while True:
        try:
            number = _random_numbers.pop()  # one step: no two threads get the same
        except IndexError:
            _random_numbers.extend(struct.unpack("256Q", os.urandom(256 * 8)))
        else:
            if number:
                return number


def start_afresh_in_child() -> None:
    """In a forked child: use none of the numbers that the parent uses."""
    _random_numbers.clear()


class OwnIds(RandomIdGenerator):
    """Ids that neither heed `random.seed()` in user code nor change what it draws next.

    OpenTelemetry's own draws from the `random` module: two runs with one seed share their ids,
    and the second replaces the first in the store (test_mlflow_contract.py).
    """

    def generate_span_id(self) -> int:
        return _random_number()

    def generate_trace_id(self) -> int:
        return _random_number() << 64 | _random_number()


def give_own_ids(provider: object) -> None:
    """Let a provider draw `OwnIds`, unless it has a generator that somebody has chosen for it."""
    generator = getattr(provider, "id_generator", None)
    if type(generator) is RandomIdGenerator:
        # The generator itself, not the provider's: the tracers that are made hold it as well.
        cast("Any", generator).__class__ = OwnIds


# -- a chosen trace id -------------------------------------------------------------------------

# None, or the id that the next root gets, in a list that is empty once one has it.
_wanted_trace_id: ContextVar[list[int] | None] = ContextVar(
    "spanguard_wanted_trace_id", default=None
)


class _ChosenIds(IdGenerator):
    """Gives out the wanted trace id where there is one, else what the wrapped generator gives."""

    def __init__(self, wrapped: IdGenerator) -> None:
        self._wrapped = wrapped

    def generate_span_id(self) -> int:
        return self._wrapped.generate_span_id()

    def generate_trace_id(self) -> int:
        wanted = _wanted_trace_id.get()
        try:
            return wanted.pop() if wanted else self._wrapped.generate_trace_id()
        except IndexError:  # a thread that shares the context was quicker
            return self._wrapped.generate_trace_id()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def is_trace_id_random(self) -> bool:
        return _wanted_trace_id.get() is None and self._wrapped.is_trace_id_random()


def _choose_ids(owner: Any) -> None:
    generator = getattr(owner, "id_generator", None)
    if generator is not None and not isinstance(generator, _ChosenIds):
        owner.id_generator = _ChosenIds(generator)


@contextmanager
def trace_id_chosen(hex_id: str) -> Iterator[None]:
    """Give the next root that starts in this context the given OpenTelemetry trace id.

    That root only: others that start inside the same call of MLflow's get ids of their own.
    Where the seam is missing the id is not taken: see `otel_trace_id_of`.
    """
    # Looked at for each start: MLflow replaces its provider, and others may replace the
    # generator. The SDK caches tracers and each has a generator of its own; older ones make a
    # tracer for each call, with the provider's.
    provider = initialized_provider()
    tracer = provider.get_tracer(_provider_module.__name__)
    _choose_ids(provider)
    _choose_ids(getattr(tracer, "_tracer", tracer))
    wanted = [int(hex_id, 16)]
    token = _wanted_trace_id.set(wanted)
    try:
        yield
    finally:
        wanted.clear()  # also for the contexts that were copied from this one
        _wanted_trace_id.reset(token)


def otel_trace_id_of(span: object) -> str | None:
    """Return the OpenTelemetry trace id of a span that records, as 32 digits; else None."""
    otel = recording_span(span)
    return f"{otel.get_span_context().trace_id:032x}" if otel is not None else None


def mlflow_trace_id_of(otel_trace_id: int) -> str:
    """Return the id that MLflow gives to a trace with this OpenTelemetry trace id."""
    if make_trace_id is None:
        return f"tr-{otel_trace_id:032x}"
    return str(make_trace_id(otel_trace_id))
