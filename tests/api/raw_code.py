"""What raw code works with: a client that writes down its calls, copied ids, values to refuse."""

from __future__ import annotations

from typing import Any

from mlflow import MlflowClient

# A client of a server asks it nothing when it is made.
ELSEWHERE = "http://elsewhere:5000"


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


def copy_of(text: str) -> str:
    copied = text.encode().decode()
    assert copied is not text
    return copied


class Recording(MlflowClient):
    """A client that writes down how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def start_trace(self, **kwargs: Any) -> Any:  # type: ignore[override]
        self.calls.append(("start_trace", kwargs))
        return super().start_trace(**kwargs)

    def start_span(self, **kwargs: Any) -> Any:  # type: ignore[override]
        self.calls.append(("start_span", kwargs))
        return super().start_span(**kwargs)

    def end_span(self, **kwargs: Any) -> None:  # type: ignore[override]
        self.calls.append(("end_span", kwargs))
        super().end_span(**kwargs)

    def end_trace(self, **kwargs: Any) -> None:  # type: ignore[override]
        self.calls.append(("end_trace", kwargs))
        super().end_trace(**kwargs)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


EACH_ONCE = ["start_trace", "start_span", "end_span", "end_trace"]
