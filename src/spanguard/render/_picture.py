"""A trace drawn as a tree for a terminal."""

from __future__ import annotations

from mlflow.entities import Span, Trace
from rich.cells import cell_len
from rich.console import ConsoleOptions
from rich.text import Text
from rich.tree import Tree

from spanguard.render._facts import (
    MAX_NAME_CHARS,
    count_of,
    duration,
    duration_of,
    failure,
    one_line,
    opened_at_of,
    outcome_of,
    payloads_of,
    status_of,
    trace_duration,
)
from spanguard.render._tree import Node, forest, of

__all__ = ["Picture"]


_GUIDE = 4  # columns that one level of the tree takes
_INDENT = " " * 9  # of what stands below a name
_MAX_LABEL_COLUMN = 64
_MIN_COLUMNS = 40  # what is nested so deep that less is left is counted, not drawn

_STYLES = {"OK": "green", "ERROR": "bold red"}
_MARKS = {"OK": "✓", "ERROR": "✗"}
_ASCII = str.maketrans("✓✗•…µ", "+x-.u")


class Picture:
    """One drawing of a trace, for one width and one character set."""

    def __init__(self, options: ConsoleOptions, *, payloads: bool, fold: int | None) -> None:
        self._width = options.max_width
        self._ascii = options.ascii_only
        self._payloads = payloads
        self._fold = fold
        self._column = 0

    def draw(self, trace: Trace) -> Tree:
        spans = list(trace.data.spans)
        roots = forest(spans)
        self._column = self._label_column(roots)
        tree = Tree(self._header(trace, spans), guide_style="dim")
        waiting = [(root, 1, tree) for root in reversed(roots)]
        while waiting:
            node, depth, parent = waiting.pop()
            branch = parent.add(self._line(node, depth))
            if self._is_folded(node, depth):
                continue
            if node.children and self._is_too_deep(depth + 1):
                branch.add(self._text(f"({count_of(node.count)} nested deeper)", "dim"))
                continue
            waiting += [(child, depth + 1, branch) for child in reversed(node.children)]
        return tree

    def _label_column(self, roots: list[Node]) -> int:
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

    def _is_folded(self, node: Node, depth: int) -> bool:
        deep = self._fold is not None and depth >= self._fold
        return deep and node.is_calm and bool(node.children)

    def _is_too_deep(self, depth: int) -> bool:
        return depth > 2 and self._width - _GUIDE * depth < _MIN_COLUMNS

    # -- lines

    def _header(self, trace: Trace, spans: list[Span]) -> Text:
        info = trace.info
        state = str(getattr(info.state, "value", info.state))
        errors = sum(status_of(span) == "ERROR" for span in spans)
        parts = [
            Text.assemble("trace ", (one_line(info.trace_id, 100), "bold")),
            Text(one_line(state, 20), _STYLES.get(state, "yellow")),
            Text(duration(trace_duration(trace, spans)), "cyan"),
            Text(count_of(len(spans))),
        ]
        if errors:
            parts.append(Text(f"{errors} ERROR", _STYLES["ERROR"]))
        return self._fit(Text("  ").join(parts))

    def _line(self, node: Node, depth: int) -> Text:
        span = node.span
        if span is None:
            return self._text(node.note, "yellow")
        line = self._label(span)
        line.append(" " * (self._column - _GUIDE * depth - cell_len(line.plain)))
        line.append(f"  {duration(duration_of(span)):>9}", "cyan")
        outcome = outcome_of(span)
        if outcome and outcome != "error":  # the status has said that already
            line.append(f"  {one_line(outcome, 30)}", "yellow")
        self._append_detail(line, node, depth)
        for title, shown in payloads_of(span) if self._payloads else ():
            line.append(f"\n{_INDENT}{title}: ", "dim")
            line.append(shown)
        return self._fit(line)

    def _label(self, span: Span) -> Text:
        status = status_of(span)
        style = _STYLES.get(status, "yellow")
        label = Text()
        label.append(f"{_MARKS.get(status, '•')} {status:<6} ", style)
        label.append(one_line(span.name, MAX_NAME_CHARS), "bold" if status == "ERROR" else "")
        if span.span_type and span.span_type != "UNKNOWN":
            label.append(f"  {one_line(span.span_type, 30)}", "dim")
        return label

    def _append_detail(self, line: Text, node: Node, depth: int) -> None:
        """Say what went wrong where: on the same line if there is room, else below the name."""
        span = of(node)
        style = "red" if status_of(span) == "ERROR" else "dim"
        columns = self._width - _GUIDE * depth
        opened_at = opened_at_of(span)
        detail = Text(opened_at or failure(span), style)
        if self._is_folded(node, depth):
            detail = Text(f"{count_of(node.count)} below, all OK", "dim")
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
