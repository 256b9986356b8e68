"""How a stored trace is drawn, whatever is in it."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import mlflow
import pytest
from mlflow.entities import Span, SpanStatus, SpanStatusCode, Trace, TraceData
from rich.console import Console

import spanguard
from spanguard import traced_span
from spanguard.render import TraceTree
from spanguard.render._facts import duration
from tests.store import Store


def draw(trace: Trace, *, width: int = 200, encoding: str = "utf-8", **options: Any) -> list[str]:
    """Return the lines of the picture, as a pipe of that encoding gets them."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    Console(file=file, width=width).print(TraceTree(trace, **options))
    return raw.getvalue().decode(encoding).splitlines()


def only(trace: Trace, *names: str) -> Trace:
    """Return a trace with some of its spans, as a store has it that lost the others."""
    kept = [span for span in trace.data.spans if span.name in names]
    return Trace(trace.info, TraceData(spans=kept))


@pytest.fixture
def family(store: Store) -> Trace:
    """A stored trace: root > (first > grandchild), second."""
    with traced_span("root", span_type="CHAIN", inputs={"secret": "s3cret"}):
        with traced_span("first"):
            with traced_span("grandchild"):
                pass
        with traced_span("second"):
            pass
    return store.trace()


def test_one_line_per_span_below_a_header(family: Trace) -> None:
    header, *lines = draw(family)
    assert header.startswith(f"trace {family.info.trace_id}  OK  ")
    assert header.endswith("  4 spans")
    assert [line.split(" OK ")[0] for line in lines] == [
        "└── ✓",
        "    ├── ✓",
        "    │   └── ✓",
        "    └── ✓",
    ]
    assert [line.split()[-3] for line in lines] == ["CHAIN", "first", "grandchild", "second"]


def test_durations_stand_in_line(family: Trace) -> None:
    _, *lines = draw(family)
    assert len({len(line) for line in lines}) == 1


def test_children_come_in_the_order_they_started(store: Store) -> None:
    base = 1_700_000_000_000_000_000
    with traced_span("root", start_time_ns=base):
        for name, start in (("late", 300), ("early", 100), ("middle", 200)):
            with traced_span(name, start_time_ns=base + start):
                pass
    names = [line.split()[3] for line in draw(store.trace())[2:]]
    assert names == ["early", "middle", "late"]


def test_no_payload_is_shown_unless_asked_for(family: Trace) -> None:
    assert "s3cret" not in "\n".join(draw(family))
    assert 'inputs: {"secret": "s3cret"}' in "\n".join(draw(family, payloads=True))


def test_an_error_shows_its_type_and_the_first_line_of_its_message(store: Store) -> None:
    with pytest.raises(ValueError):
        with traced_span("root"):
            raise ValueError(f"first line{'.' * 500}\nsecond line")
    header, line = draw(store.trace(), width=1000)
    assert "1 ERROR" in header
    assert "└── ✗ ERROR  root" in line
    assert "ValueError: first line..." in line
    assert line.endswith("…")
    assert "second" not in line


def test_an_error_of_mlflows_own_api_shows_too(store: Store) -> None:
    with pytest.raises(ZeroDivisionError):
        with mlflow.start_span("fluent"):
            1 / 0
    assert draw(store.trace())[1].endswith("ZeroDivisionError: division by zero")


def test_an_error_without_exception_shows_its_description(store: Store) -> None:
    with traced_span("root") as span:
        span.set_status(SpanStatus(SpanStatusCode.ERROR, "quota used up"))
    assert draw(store.trace())[1].endswith("quota used up")


def test_an_expected_exception_is_ok_and_says_so(store: Store) -> None:
    with pytest.raises(KeyError):
        with traced_span("root", expected=KeyError):
            raise KeyError("gone")
    line = draw(store.trace())[1]
    assert "✓ OK" in line
    assert line.endswith("expected  KeyError: 'gone'")


def test_an_orphan_shows_the_line_that_opened_it(store: Store, client: mlflow.MlflowClient) -> None:
    with pytest.warns(spanguard.OrphanedSpanWarning):
        with traced_span("root") as root:
            client.start_span("leaked", root.trace_id, root.span_id)
    line = draw(store.trace())[2]
    assert "✗ ERROR  leaked" in line
    assert "orphaned  opened at …/render/test_render.py:" in line
    assert line.endswith(" in test_an_orphan_shows_the_line_that_opened_it")


def test_the_line_that_leaked_is_never_cut(store: Store, client: mlflow.MlflowClient) -> None:
    with pytest.warns(spanguard.OrphanedSpanWarning):
        with traced_span("root") as root:
            client.start_span("leaked", root.trace_id, root.span_id)
    drawn = " ".join(" ".join(draw(store.trace(), width=60)).split())
    assert "in test_the_line_that_leaked_is_never_cut" in drawn


def test_a_missing_parent_is_named_and_keeps_its_children(family: Trace) -> None:
    (first,) = (span for span in family.data.spans if span.name == "first")
    lines = draw(only(family, "root", "grandchild"))
    assert f"└── (missing parent {first.span_id})" in lines
    assert "    └── ✓ OK     grandchild" in lines[-1]


def test_a_missing_root_keeps_everything(family: Trace) -> None:
    lines = draw(only(family, "first", "grandchild", "second"))
    assert sum("(missing parent" in line for line in lines) == 1
    assert [line.split()[-3] for line in lines[2:]] == ["first", "grandchild", "second"]


def test_a_trace_without_spans_is_a_header(family: Trace) -> None:
    (header,) = draw(only(family))
    assert "0 spans" in header


def test_markup_in_names_is_text(store: Store) -> None:
    with traced_span("[red]not markup[/red] :smile:", span_type="[b]"):
        with traced_span("[/]"):
            pass
    lines = draw(store.trace())
    assert "[red]not markup[/red] :smile:  [b]" in lines[1]
    assert "[/]" in lines[2]


def test_control_characters_in_names_do_not_reach_the_terminal(store: Store) -> None:
    with traced_span("a\x1b[2J\tb\nsecond line"):
        pass
    line = draw(store.trace())[1]
    assert "a\\x1b[2J\\tb" in line
    assert "\x1b" not in line


def test_long_names_are_cut(store: Store) -> None:
    with traced_span("x" * 500):
        pass
    assert "x" * 59 + "…  " in draw(store.trace())[1]


def test_a_terminal_without_unicode_gets_ascii(store: Store) -> None:
    with pytest.raises(ValueError):
        with traced_span("root"):
            with traced_span("child"):
                pass
            raise ValueError
    lines = draw(store.trace(), encoding="ascii")
    assert "`-- x ERROR  root" in lines[1]
    assert "`-- + OK     child" in lines[2]


def test_a_calm_branch_folds_and_an_error_does_not(store: Store) -> None:
    with traced_span("root"):
        for name in ("calm", "rough"):
            with traced_span(name):
                try:
                    with traced_span(f"below {name}"):
                        if name == "rough":
                            raise ValueError("seen")
                except ValueError:
                    pass
    lines = draw(store.trace(), fold=1)
    assert [line.split()[-2] for line in lines if "below, all" in line] == ["all"]
    assert any("calm" in line and line.endswith("1 span below, all OK") for line in lines)
    assert any("✗ ERROR  below rough" in line for line in lines)
    assert not any("below calm" in line for line in lines)


def test_a_very_deep_trace_is_counted_where_it_gets_too_narrow(store: Store) -> None:
    blocks = [traced_span(f"level {number}") for number in range(40)]
    for block in blocks:
        block.__enter__()
    for block in reversed(blocks):
        block.__exit__(None, None, None)
    lines = draw(store.trace(), width=100)
    assert max(map(len, lines)) <= 100
    assert lines[-1].endswith("spans nested deeper)")
    assert len(draw(store.trace(), width=400)) == 41


# -- what no store should hold, but some do ----------------------------------------------------


@dataclass
class Stub:
    """A span with what the picture reads of one, for values that MLflow would not store."""

    name: str
    span_id: str
    parent_id: str | None
    start_time_ns: Any = 1
    end_time_ns: Any = 1_000_001
    span_type: str = "UNKNOWN"
    code: SpanStatusCode = SpanStatusCode.OK
    inputs: Any = None
    outputs: Any = None
    events: Any = ()

    @property
    def status(self) -> SpanStatus:
        return SpanStatus(self.code)

    @property
    def attributes(self) -> dict[str, Any]:
        return {}

    def get_attribute(self, key: str) -> Any:
        raise ValueError("not JSON")


def with_spans(trace: Trace, *spans: Stub | Span) -> Trace:
    return Trace(trace.info, TraceData(spans=list(spans)))  # type: ignore[arg-type]


def test_parents_in_a_circle_are_cut_open(family: Trace) -> None:
    circle = [Stub("a", "1", "3"), Stub("b", "2", "1"), Stub("c", "3", "2")]
    lines = draw(with_spans(family, *circle, Stub("alone", "4", "4"), Stub("root", "5", None)))
    assert [line.split()[-3] for line in lines if "✓" in line] == ["root", "a", "b", "c", "alone"]
    assert sum("(parents in a circle)" in line for line in lines) == 1


def test_a_span_that_has_not_ended_is_still_open(family: Trace) -> None:
    line = draw(with_spans(family, Stub("slow", "1", None, end_time_ns=None)))[1]
    assert "• OPEN   slow" in line
    assert line.endswith("still open")


def test_an_unset_status_is_shown_as_it_is(family: Trace) -> None:
    unset = Stub("quiet", "1", None, code=SpanStatusCode.UNSET)
    assert "• UNSET  quiet" in draw(with_spans(family, unset))[1]


def test_two_spans_of_one_id_are_both_drawn(family: Trace) -> None:
    lines = draw(with_spans(family, Stub("one", "1", None), Stub("two", "1", None)))
    assert len(lines) == 3


def test_times_that_make_no_sense_do_not_stop_the_picture(family: Trace) -> None:
    strange = [Stub("back", "1", None, 2_000_000, 1), Stub("none", "2", None, None, 5)]
    lines = draw(with_spans(family, *strange))
    assert any(line.endswith("-2.00 ms") for line in lines)


@pytest.mark.parametrize(
    ("nanoseconds", "words"),
    [
        (0, "0 µs"),
        (999_499, "999 µs"),
        (999_500, "1.00 ms"),
        (99_940_000, "99.9 ms"),
        (99_960_000, "100 ms"),
        (999_600_000, "1.00 s"),
        (59_940_000_000, "59.9 s"),
        (59_960_000_000, "1 min 0 s"),
        (3_600_000_000_000, "1 h 0 min"),
        (180_000_000_000_000, "2 d 2 h"),
        (None, "still open"),
    ],
)
def test_durations_in_words(nanoseconds: int | None, words: str) -> None:
    assert duration(nanoseconds) == words


def test_a_picture_warns_of_nothing(family: Trace) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(family, payloads=True)
