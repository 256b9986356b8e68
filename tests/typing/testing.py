"""What type checkers see of `spanguard.testing`. Never run: mypy --strict and pyright read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlflow.entities import Trace
from typing_extensions import assert_type

from spanguard import OpenSpan
from spanguard.testing import no_open_spans, record_spans
from spanguard.testing._leaks import SpansLeftOpenError
from spanguard.testing._recorded import RecordedSpan, RecordedSpans

with record_spans() as spans:
    assert_type(spans, RecordedSpans)
assert_type(spans[0], RecordedSpan)
assert_type(spans.one("a").outcome, str)
assert_type(spans.one("a").user_attributes, dict[str, Any])
assert_type(spans.names, list[str])
assert_type(spans.roots, list[RecordedSpan])
assert_type(spans.by_name("a"), list[RecordedSpan])
assert_type(spans.children("a"), list[RecordedSpan])
assert_type(spans.parent(spans[0]), RecordedSpan | None)
assert_type(spans.tree(), str)
assert_type(spans.traces, list[Trace])
with no_open_spans():
    pass


@no_open_spans()
def decorated(value: int) -> str:
    return str(value)


assert_type(decorated(1), str)
left = SpansLeftOpenError()
assert isinstance(left, AssertionError)
assert_type(left.spans, Sequence[OpenSpan])
