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

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

from mlflow.entities import Span, Trace
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from rich.tree import Tree

__all__ = ["TraceTree", "duration"]

_GUIDE = 4  # columns that one level of the tree takes
_INDENT = " " * 9  # of what stands below a name
_MAX_NAME_CHARS = 60
_MAX_DETAIL_CHARS = 160
_MAX_PAYLOAD_CHARS = 400
_MAX_LABEL_COLUMN = 64
_MIN_COLUMNS = 40  # what is nested so deep that less is left is counted, not drawn

_STYLES = {"OK": "green", "ERROR": "bold red"}
_MARKS = {"OK": "✓", "ERROR": "✗"}
_ASCII = str.maketrans("✓✗•…µ", "+x-.u")


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
        yield _Picture(options, payloads=self._payloads, fold=self._fold).draw(self._trace)


# -- the spans as a forest ---------------------------------------------------------------------


class _Node:
    """A span, or the stand-in for a parent that is not there, and what is below it."""

    __slots__ = ("children", "count", "is_calm", "note", "span")

    def __init__(self, span: Span | None, note: str = "") -> None:
        self.span = span
        self.note = note
        self.children: list[_Node] = []
        self.count = 0  # spans below
        self.is_calm = False  # nothing to see, here or below


def _forest(spans: Iterable[Span]) -> list[_Node]:
    """Return the roots, everything else below them, whatever the parent ids say."""
    nodes = [_Node(span) for span in sorted(spans, key=_start)]
    known: dict[str, _Node] = {}
    for node in nodes:
        known.setdefault(_of(node).span_id, node)
    roots: list[_Node] = []
    missing: dict[str, _Node] = {}
    for node in nodes:
        parent_id = _of(node).parent_id
        if parent_id is None:
            roots.append(node)
        elif parent_id in known:
            known[parent_id].children.append(node)
        else:
            if parent_id not in missing:
                missing[parent_id] = _Node(None, f"(missing parent {parent_id})")
                roots.append(missing[parent_id])
            missing[parent_id].children.append(node)
    roots += _circles(nodes, roots, known)
    _sum_up(roots)
    return roots


def _circles(nodes: list[_Node], roots: list[_Node], known: dict[str, _Node]) -> list[_Node]:
    """Cut each circle of parents where it started, and return what was cut loose."""
    reached = {id(node) for node in _walk(roots)}
    circle = _Node(None, "(parents in a circle)")
    for node in nodes:
        if id(node) not in reached:
            known[str(_of(node).parent_id)].children.remove(node)
            circle.children.append(node)
            reached |= {id(below) for below in _walk([node])}
    return [circle] if circle.children else []


def _sum_up(roots: list[_Node]) -> None:
    for node in reversed(list(_walk(roots))):
        node.count = sum(child.count + (child.span is not None) for child in node.children)
        node.is_calm = (
            node.span is not None
            and _status(node.span) == "OK"
            and not _outcome(node.span)
            and all(child.is_calm for child in node.children)
        )


def _walk(roots: list[_Node]) -> Iterator[_Node]:
    """Yield parents before their children. No recursion: a trace may be thousands deep."""
    waiting = list(reversed(roots))
    while waiting:
        node = waiting.pop()
        yield node
        waiting += reversed(node.children)


def _of(node: _Node) -> Span:
    assert node.span is not None
    return node.span


# -- the picture -------------------------------------------------------------------------------


class _Picture:
    """One drawing of a trace, for one width and one character set."""

    def __init__(self, options: ConsoleOptions, *, payloads: bool, fold: int | None) -> None:
        self._width = options.max_width
        self._ascii = options.ascii_only
        self._payloads = payloads
        self._fold = fold
        self._column = 0

    def draw(self, trace: Trace) -> Tree:
        spans = list(trace.data.spans)
        roots = _forest(spans)
        self._column = self._label_column(roots)
        tree = Tree(self._header(trace, spans), guide_style="dim")
        waiting = [(root, 1, tree) for root in reversed(roots)]
        while waiting:
            node, depth, parent = waiting.pop()
            branch = parent.add(self._line(node, depth))
            if self._is_folded(node, depth):
                continue
            if node.children and self._is_too_deep(depth + 1):
                branch.add(self._text(f"({_spans(node.count)} nested deeper)", "dim"))
                continue
            waiting += [(child, depth + 1, branch) for child in reversed(node.children)]
        return tree

    def _label_column(self, roots: list[_Node]) -> int:
        """Return the column at which all labels have ended, so that durations stand in line."""
        widest = 0
        waiting = [(root, 1) for root in roots]
        while waiting:
            node, depth = waiting.pop()
            if node.span is not None:
                widest = max(widest, _GUIDE * depth + cell_len(self._label(node.span).plain))
            if not self._is_folded(node, depth) and not self._is_too_deep(depth + 1):
                waiting += [(child, depth + 1) for child in node.children]
        return min(widest, _MAX_LABEL_COLUMN)

    def _is_folded(self, node: _Node, depth: int) -> bool:
        deep = self._fold is not None and depth >= self._fold
        return deep and node.is_calm and bool(node.children)

    def _is_too_deep(self, depth: int) -> bool:
        return depth > 2 and self._width - _GUIDE * depth < _MIN_COLUMNS

    # -- lines

    def _header(self, trace: Trace, spans: list[Span]) -> Text:
        info = trace.info
        state = str(getattr(info.state, "value", info.state))
        errors = sum(_status(span) == "ERROR" for span in spans)
        parts = [
            Text.assemble("trace ", (_one_line(info.trace_id, 100), "bold")),
            Text(_one_line(state, 20), _STYLES.get(state, "yellow")),
            Text(duration(_trace_duration(trace, spans)), "cyan"),
            Text(_spans(len(spans))),
        ]
        if errors:
            parts.append(Text(f"{errors} ERROR", _STYLES["ERROR"]))
        return self._fit(Text("  ").join(parts))

    def _line(self, node: _Node, depth: int) -> Text:
        span = node.span
        if span is None:
            return self._text(node.note, "yellow")
        line = self._label(span)
        line.append(" " * (self._column - _GUIDE * depth - cell_len(line.plain)))
        line.append(f"  {duration(_duration(span)):>9}", "cyan")
        outcome = _outcome(span)
        if outcome and outcome != "error":  # the status has said that already
            line.append(f"  {_one_line(outcome, 30)}", "yellow")
        self._append_detail(line, node, depth)
        for title, shown in _payloads(span) if self._payloads else ():
            line.append(f"\n{_INDENT}{title}: ", "dim")
            line.append(shown)
        return self._fit(line)

    def _label(self, span: Span) -> Text:
        status = _status(span)
        style = _STYLES.get(status, "yellow")
        label = Text()
        label.append(f"{_MARKS.get(status, '•')} {status:<6} ", style)
        label.append(_one_line(span.name, _MAX_NAME_CHARS), "bold" if status == "ERROR" else "")
        if span.span_type and span.span_type != "UNKNOWN":
            label.append(f"  {_one_line(span.span_type, 30)}", "dim")
        return label

    def _append_detail(self, line: Text, node: _Node, depth: int) -> None:
        """Say what went wrong where: on the same line if there is room, else below the name."""
        span = _of(node)
        style = "red" if _status(span) == "ERROR" else "dim"
        columns = self._width - _GUIDE * depth
        opened_at = _opened_at(span)
        detail = Text(opened_at or _failure(span), style)
        if self._is_folded(node, depth):
            detail = Text(f"{_spans(node.count)} below, all OK", "dim")
        if not detail.plain:
            return
        if cell_len(line.plain) + 2 + cell_len(detail.plain) <= columns:
            line.append("  ")
        else:
            line.append("\n" + _INDENT)
            if not opened_at:  # a line of code is not cut, but wrapped
                detail.truncate(max(columns - len(_INDENT), _MIN_COLUMNS), overflow="ellipsis")
        line.append_text(detail)

    def _text(self, text: str, style: str) -> Text:
        return self._fit(Text(text, style))

    def _fit(self, text: Text) -> Text:
        """Replace what a terminal without Unicode cannot show."""
        if self._ascii:
            text.plain = text.plain.translate(_ASCII)  # of equal length: the styles stay in place
        return text


# -- reading a span ----------------------------------------------------------------------------


def _start(span: Span) -> int:
    return span.start_time_ns if isinstance(span.start_time_ns, int) else 0


def _status(span: Span) -> str:
    if span.end_time_ns is None:
        return "OPEN"
    code = span.status.status_code
    return str(getattr(code, "value", code))


def _duration(span: Span) -> int | None:
    if span.end_time_ns is None or not isinstance(span.start_time_ns, int):
        return None
    return int(span.end_time_ns - span.start_time_ns)


def _trace_duration(trace: Trace, spans: list[Span]) -> int | None:
    for span in spans:
        if span.parent_id is None and _duration(span) is not None:
            return _duration(span)
    recorded = trace.info.execution_duration
    return None if recorded is None else int(recorded) * 1_000_000


def _attribute(span: Span, key: str) -> str:
    """Return an attribute as text, "" if there is none or it cannot be read."""
    try:
        value = span.get_attribute(key)
    except Exception:  # what others wrote need not be JSON
        return ""
    return "" if value is None else str(value)


def _outcome(span: Span) -> str:
    outcome = _attribute(span, "spanguard.outcome")
    return "" if outcome == "ok" else outcome


def _opened_at(span: Span) -> str:
    opened_at = _attribute(span, "spanguard.opened_at")
    return f"opened at {_one_line(_short_site(opened_at), _MAX_DETAIL_CHARS)}" if opened_at else ""


def _short_site(site: str) -> str:
    """Shorten the path of a `path:line in function`: relative to here, or its last two parts."""
    place, separator, function = site.rpartition(" in ")
    path = PurePath(place)
    if not separator or not path.is_absolute():
        return site
    try:
        short = str(path.relative_to(os.getcwd()))
    except (ValueError, OSError):
        short = str(PurePath("…", *path.parts[-2:]))
    return f"{short} in {function}"


def _failure(span: Span) -> str:
    """Return the type and the first line of the message of what failed."""
    kind, message = _attribute(span, "error_type"), _attribute(span, "error_message")
    if not kind:
        kind, message = _exception_event(span)
    if not kind and _status(span) == "ERROR":
        message = span.status.description or ""
    return _one_line(f"{kind}: {message}" if kind and message else kind or message)


def _exception_event(span: Span) -> tuple[str, str]:
    for event in reversed(span.events):
        if event.name in ("exception", "expected_exception"):
            attributes = event.attributes or {}
            kind = attributes.get("exception.type", "")
            return str(kind), str(attributes.get("exception.message", ""))
    return "", ""


def _payloads(span: Span) -> Iterator[tuple[str, str]]:
    """Yield what a span holds, by title, as one cut line each."""
    for title, payload in (("inputs", span.inputs), ("outputs", span.outputs)):
        if payload is not None:
            yield title, _one_line(_as_json(payload), _MAX_PAYLOAD_CHARS)
    for key, value in span.attributes.items():
        if not key.startswith("mlflow."):
            yield _one_line(key), _one_line(_as_json(value), _MAX_PAYLOAD_CHARS)


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except Exception:
        return str(value)


# -- words -------------------------------------------------------------------------------------


def duration(nanoseconds: int | None) -> str:
    """Return a duration as people read it; None is a span that has not ended.

    >>> [duration(ns) for ns in (870_000, 12_340_000, 1_234_000_000, 125_000_000_000)]
    ['870 µs', '12.3 ms', '1.23 s', '2 min 5 s']
    >>> duration(None)
    'still open'
    """
    if nanoseconds is None:
        return "still open"
    if nanoseconds < 0:
        return f"-{duration(-nanoseconds)}"
    if nanoseconds < 999_500:
        return f"{nanoseconds / 1e3:.0f} µs"
    if nanoseconds < 999_500_000:
        return f"{_three_digits(nanoseconds / 1e6)} ms"
    if nanoseconds < 59_950_000_000:
        return f"{_three_digits(nanoseconds / 1e9)} s"
    minutes, seconds = divmod(round(nanoseconds / 1e9), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _three_digits(number: float) -> str:
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"


def _spans(count: int) -> str:
    return "1 span" if count == 1 else f"{count} spans"


def _one_line(text: Any, limit: int = _MAX_DETAIL_CHARS) -> str:
    """Return the first line, cut, with control characters made visible: names are data."""
    first = str(text).strip().partition("\n")[0].rstrip()
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in first[: limit + 1])
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"
