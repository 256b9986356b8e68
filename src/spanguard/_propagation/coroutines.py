"""Coroutines that are a generator's kind of object: awaited step by step."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

from spanguard._base.proxies import ObjectProxy
from spanguard._process.dropped import is_inside_tracing, put_aside
from spanguard._propagation.generators import Opens, Writes, run_steps, steps_of

__all__ = ["TracedCoroutine", "TracedGeneratorCoroutine"]


class TracedCoroutine(ObjectProxy):
    """A coroutine that runs under its own span, from its first step on."""

    def __init__(
        self,
        coroutine: object,
        open_: Opens,
        write: Writes,
    ) -> None:
        super().__init__(coroutine)
        self._self_parts: tuple[Opens, Writes] | None = (open_, write)
        self._self_abandoned: list[bool] = []
        self._self_run: Generator[Any, Any, Any] | None = None

    def __await__(self) -> Any:
        # Not kept here: `await f()` drops this proxy and goes on with what it gets.
        return self._self_runner()

    def _self_runner(self) -> Generator[Any, Any, Any]:
        if self._self_parts is None:  # a coroutine runs once: let it say so itself
            return steps_of(self.__wrapped__)
        (open_, write), self._self_parts = self._self_parts, None
        return run_steps(self.__wrapped__, open_, write, self._self_abandoned)

    def send(self, value: object) -> Any:
        run = self._self_run
        if run is None:
            run = self._self_run = self._self_runner()
        return run.send(value)

    def __next__(self) -> Any:
        return self.send(None)

    def throw(self, *exception: Any) -> Any:
        if self._self_run is None:
            return self.__wrapped__.throw(*exception)
        return self._self_run.throw(*exception)

    def close(self) -> None:
        if self._self_run is None:
            self.__wrapped__.close()
        else:
            self._self_run.close()

    def __del__(self) -> None:
        run = getattr(self, "_self_run", None)
        if run is not None and run.gi_frame is not None and not sys.is_finalizing():
            self._self_abandoned.append(True)
            if is_inside_tracing():
                put_aside(run.close)
            else:
                run.close()


class TracedGeneratorCoroutine(TracedCoroutine):
    """The same for a generator that is awaitable by `types.coroutine`."""

    def __iter__(self) -> TracedGeneratorCoroutine:
        return self
