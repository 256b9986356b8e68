"""A stored trace as a picture in the terminal: one line per span, and what went wrong with it.

>>> import mlflow
>>> from rich.console import Console
>>> import spanguard
>>> from spanguard.render import TraceTree
>>> with spanguard.traced_span("fetch"):
...     pass
>>> spanguard.flush()
True
>>> trace = mlflow.search_traces(return_type="list")[0]
>>> Console().print(TraceTree(trace))  # doctest: +ELLIPSIS
trace tr-...  OK  ...  1 span
└── ✓ OK     fetch  ...
"""

from __future__ import annotations

from mlflow.entities import Trace
from rich.console import Console, ConsoleOptions, RenderResult

from spanguard.render._picture import Picture

__all__ = ["TraceTree"]


class TraceTree:
    """Draw a stored trace as a tree: print it with a `rich.console.Console`.

    Children come in the order they started. A span whose parent is not in the trace hangs below
    a `(missing parent)` line, spans that are each other's parents below `(parents in a circle)`.

    Args:
        trace: what `mlflow.get_trace` or `mlflow.search_traces` returned.
        payloads: show inputs, outputs and attributes too. Otherwise no payload is shown.
        fold: draw a branch in which all went well down to this level only; the root is level 1.
    """

    def __init__(self, trace: Trace, *, payloads: bool = False, fold: int | None = None) -> None:
        self._trace = trace
        self._payloads = payloads
        self._fold = fold

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Picture(options, payloads=self._payloads, fold=self._fold).draw(self._trace)
