"""What is done in a batch, and its spans in the store."""

from __future__ import annotations

from mlflow.entities import Span

from tests.store import Store


def invert(n: int) -> float:
    return 12 / n


def children(store: Store, root: str = "batch") -> list[Span]:
    """Return the spans directly below the batch's span by item id."""
    spans = store.trace().data.spans
    (top,) = [span for span in spans if span.name == root]
    below = [span for span in spans if span.parent_id == top.span_id]
    return sorted(below, key=lambda span: int(span.get_attribute("item_id")))


def root_of(store: Store) -> Span:
    (root,) = [span for span in store.trace().data.spans if span.parent_id is None]
    return root
