"""A stored trace as nodes, also where parents are missing or go in circles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mlflow.entities import Span

from spanguard.render._facts import outcome_of, start, status_of

__all__ = ["Node", "forest", "of"]


class Node:
    """A span, or the stand-in for a parent that is not there, and what is below it."""

    __slots__ = ("children", "count", "is_calm", "note", "span")

    def __init__(self, span: Span | None, note: str = "") -> None:
        self.span = span
        self.note = note
        self.children: list[Node] = []
        self.count = 0  # spans below
        self.is_calm = False  # nothing to see, here or below


def forest(spans: Iterable[Span]) -> list[Node]:
    """Return the roots, everything else below them, whatever the parent ids say."""
    nodes = [Node(span) for span in sorted(spans, key=start)]
    known: dict[str, Node] = {}
    for node in nodes:
        known.setdefault(of(node).span_id, node)
    roots: list[Node] = []
    missing: dict[str, Node] = {}
    for node in nodes:
        parent_id = of(node).parent_id
        if parent_id is None:
            roots.append(node)
        elif parent_id in known:
            known[parent_id].children.append(node)
        else:
            if parent_id not in missing:
                missing[parent_id] = Node(None, f"(missing parent {parent_id})")
                roots.append(missing[parent_id])
            missing[parent_id].children.append(node)
    roots += _circles(nodes, roots, known)
    _sum_up(roots)
    return roots


def _circles(nodes: list[Node], roots: list[Node], known: dict[str, Node]) -> list[Node]:
    """Cut each circle of parents where it started, and return what was cut loose."""
    reached = {id(node) for node in _walk(roots)}
    circle = Node(None, "(parents in a circle)")
    for node in nodes:
        if id(node) not in reached:
            known[str(of(node).parent_id)].children.remove(node)
            circle.children.append(node)
            reached |= {id(below) for below in _walk([node])}
    return [circle] if circle.children else []


def _sum_up(roots: list[Node]) -> None:
    for node in reversed(list(_walk(roots))):
        node.count = sum(child.count + (child.span is not None) for child in node.children)
        node.is_calm = (
            node.span is not None
            and status_of(node.span) == "OK"
            and not outcome_of(node.span)
            and all(child.is_calm for child in node.children)
        )


def _walk(roots: list[Node]) -> Iterator[Node]:
    """Yield parents before their children. No recursion: a trace may be thousands deep."""
    waiting = list(reversed(roots))
    while waiting:
        node = waiting.pop()
        yield node
        waiting += reversed(node.children)


def of(node: Node) -> Span:
    assert node.span is not None
    return node.span
