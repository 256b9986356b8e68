"""Payloads that MLflow cannot take: replaced, not lost, and the trace stays readable."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import io
import json
import threading
import uuid
from pathlib import Path
from typing import Any

import mlflow
import numpy
import pandas
import pydantic
import pytest

import spanguard
from spanguard import traced_span
from spanguard._record.payload import clean
from tests.store import Store, own_attributes, status


class RaisingRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class RaisingStr:
    def __str__(self) -> str:
        raise RuntimeError("no str")


class ExitingRepr:
    def __repr__(self) -> str:
        raise SystemExit(9)


class RecursiveStr:
    def __str__(self) -> str:
        return str(self)

    __repr__ = __str__


class NoText:
    def __repr__(self) -> str:
        return 17  # type: ignore[return-value]


class RaisingItems(dict):  # type: ignore[type-arg]
    def items(self) -> Any:
        raise RuntimeError("no items")


class RaisingIter(list):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        raise RuntimeError("no iteration")


class RaisingAttribute:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


class RaisingClass:
    @property
    def __class__(self) -> Any:
        raise RuntimeError("no class")


class RaisingHash:
    def __hash__(self) -> int:
        raise RuntimeError("no hash")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no eq")


class LyingStr(str):
    def __str__(self) -> str:
        raise RuntimeError("no str")

    def isascii(self) -> bool:
        raise RuntimeError("no isascii")


class Colour(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    ONE = 1


@dataclasses.dataclass
class Node:
    name: str
    next: Any = None


class Model(pydantic.BaseModel):
    name: str
    items: list[Any] = []


def circular_list() -> Any:
    value: list[Any] = [1]
    value.append(value)
    return value


def circular_dict() -> Any:
    value: dict[str, Any] = {"a": 1}
    value["self"] = {"again": value}
    return value


def circular_dataclass() -> Any:
    node = Node("a")
    node.next = node
    return node


def circular_model() -> Any:
    model = Model(name="a")
    model.items.append(model)
    return model


def deep(depth: int) -> Any:
    value: Any = "bottom"
    for _ in range(depth):
        value = [value]
    return value


def deep_dict(depth: int) -> Any:
    value: Any = "bottom"
    for _ in range(depth):
        value = {"k": value}
    return value


def wide_shared() -> Any:
    """One list referenced from everywhere: exponential if it is written out."""
    value: Any = ["x"]
    for _ in range(40):
        value = [value, value]
    return value


HOSTILE: dict[str, Any] = {
    "raising repr": RaisingRepr,
    "raising str": RaisingStr,
    "exiting repr": ExitingRepr,
    "recursive str": RecursiveStr,
    "repr no text": NoText,
    "raising items": lambda: RaisingItems(a=1),
    "raising iteration": lambda: RaisingIter([1]),
    "raising attribute": RaisingAttribute,
    "raising class": RaisingClass,
    "raising hash": RaisingHash,
    "lying str": lambda: LyingStr("abc"),
    "nested raising repr": lambda: {"a": [RaisingRepr()]},
    "raising key": lambda: {RaisingRepr(): 1},
    "tuple key": lambda: {(1, 2): "x"},
    "none key": lambda: {None: 1, True: 2, 1.5: 3},
    "colliding keys": lambda: {1: "int", "1": "str"},
    "frozenset key": lambda: {frozenset({1}): 1},
    "huge int key": lambda: {10**5000: 1},
    "bytes key": lambda: {b"k": 1},
    "surrogate key": lambda: {"\ud800": 1},
    "surrogate": lambda: "a\ud800b",
    "surrogate pair halves": lambda: ["\udc00", {"x": "\ud83d"}],
    "nul": lambda: "a\x00b",
    "emoji": lambda: "👩‍👩‍👧‍👦" * 10,
    "circular list": circular_list,
    "circular dict": circular_dict,
    "circular dataclass": circular_dataclass,
    "circular model": circular_model,
    "deep list": lambda: deep(10_000),
    "deep dict": lambda: deep_dict(10_000),
    "deep 150": lambda: deep(150),
    "shared": wide_shared,
    "huge int": lambda: 10**5000,
    "negative huge int": lambda: -(10**5000),
    "int 65 bits": lambda: 2**64,
    "int 70 bits nested": lambda: {"a": [2**70]},
    "nan": lambda: float("nan"),
    "infinity": lambda: [float("inf"), float("-inf")],
    "complex": lambda: 1 + 2j,
    "decimal": lambda: decimal.Decimal("1.10"),
    "bytes": lambda: b"\xff\xfe\x00",
    "bytearray": lambda: bytearray(b"\xff"),
    "memoryview": lambda: memoryview(b"abc"),
    "set": lambda: {1, 2, 3},
    "set of hostile": lambda: {RaisingRepr()},
    "generator": lambda: (i for i in range(3)),
    "lambda": lambda: lambda: 1,
    "class": lambda: RaisingRepr,
    "module": lambda: json,
    "lock": threading.Lock,
    "open file": io.BytesIO,
    "exception": lambda: ValueError("x"),
    "datetime": lambda: datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
    "uuid": uuid.uuid4,
    "path": lambda: Path("x"),
    "enum": lambda: [Colour.RED, Number.ONE],
    "dataclass": lambda: Node("a", Node("b")),
    "pydantic": lambda: Model(name="m", items=[Node("a")]),
    "numpy": lambda: {"a": numpy.arange(3), "s": numpy.float64(1.5), "i": numpy.int64(3)},
    "numpy nan": lambda: numpy.float64("nan"),
    "pandas": lambda: pandas.DataFrame({"a": [1]}),
    "namedtuple": lambda: collections.namedtuple("P", "x y")(1, 2),
    "ordered dict": lambda: collections.OrderedDict(a=1),
    "counter": lambda: collections.Counter("aab"),
    "chain map": lambda: collections.ChainMap({"a": 1}),
    "large string": lambda: "x" * 50_000_000,
    "large list": lambda: list(range(1_000_000)),
    "many keys": lambda: {str(n): n for n in range(300_000)},
    "not implemented": lambda: NotImplemented,
    "ellipsis": lambda: ...,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_value_everywhere(store: Store, name: str) -> None:
    make = HOSTILE[name]
    with traced_span("root", inputs=make(), attributes={"given": make()}) as root:
        root.set_attribute("set", make())
        root.set_outputs(make())
        with traced_span("child", inputs={"v": make()}, attributes={"given": [make()]}) as child:
            child.set_inputs(make())
            child.set_attributes({"a": make(), "b": {"deeper": make()}})
            child.set_outputs((make(),))
    trace = store.trace()
    assert [status(span) for span in trace.data.spans] == ["OK", "OK"]
    for span in trace.data.spans:
        assert span.inputs is not None
        assert span.outputs is not None
        assert span.end_time_ns is not None


@pytest.mark.parametrize("name", ["raising repr", "circular dict", "deep list", "surrogate"])
def test_a_hostile_value_through_a_client(
    store: Store, client: mlflow.MlflowClient, name: str
) -> None:
    make = HOSTILE[name]
    with traced_span("root", client=client, inputs=make(), attributes={"a": make()}):
        with traced_span("child", client=client, inputs=make(), attributes={"a": make()}):
            pass
    assert len(store.trace().data.spans) == 2


@pytest.mark.parametrize("name", ["raising repr", "surrogate", "nul", "huge int", "emoji"])
def test_a_hostile_value_as_name_tag_and_metadata(store: Store, name: str) -> None:
    value = HOSTILE[name]()
    text = value if isinstance(value, str) else "name"
    with traced_span(text, tags={"t": value, text: 1}, metadata={"m": value}, user=value):
        pass
    trace = store.trace()
    assert "t" in trace.info.tags
    assert "m" in trace.info.trace_metadata


PLAIN = [
    None,
    True,
    0,
    -1.5,
    "text",
    "ünïcödé",
    [],
    {},
    [1, [2, {"a": None}]],
    {"a": {"b": [1, 2.5, "x", False]}},
    2**62,
]


@pytest.mark.parametrize("value", PLAIN, ids=str)
def test_a_plain_value_passes_untouched(value: Any) -> None:
    assert clean(value) is value


@pytest.mark.parametrize(
    ("value", "recorded"),
    [
        (Node("a"), {"name": "a", "next": None}),
        (Model(name="m"), {"name": "m", "items": []}),
        (2**64, str(2**64)),
        ({1: "int", "1": "str"}, {"1": "int", "1'": "str"}),
        ({None: 1, True: 2}, {"null": 1, "true": 2}),
        ({(1, 2): 3}, {"(1, 2)": 3}),
        ("a\ud800b", "a\\ud800b"),
        (Number.ONE, 1),
        ((1, 2), (1, 2)),
        (collections.OrderedDict(a=1), {"a": 1}),
    ],
    ids=str,
)
def test_what_a_value_is_recorded_as(value: Any, recorded: Any) -> None:
    assert clean(value) == recorded


def test_replacements_say_what_was_there() -> None:
    assert clean(circular_list()) == [1, "[spanguard: circular reference]"]
    assert "raised RuntimeError" in clean(RaisingRepr())
    assert "RaisingRepr" in clean([1, RaisingRepr(), 2])[1]
    assert clean([1, RaisingRepr(), 2])[::2] == [1, 2]
    assert "deeper than 100" in json.dumps(clean(deep(500)))


def test_a_keyboard_interrupt_in_a_repr_is_the_users(store: Store) -> None:
    class Interrupted:
        def __repr__(self) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with traced_span("root", inputs={1, Interrupted()}):
            pytest.fail("the block must not run")
    assert status(store.spans()["root"]) == "ERROR"
    assert spanguard.open_spans() == []


def test_a_value_that_another_thread_changes(store: Store) -> None:
    shared: dict[str, Any] = {str(n): n for n in range(2_000)}
    stop = threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            shared[f"k{number % 500}"] = number
            shared.pop(f"k{(number + 250) % 500}", None)
            number += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        with traced_span("root"):
            for number in range(30):
                with traced_span(f"span {number}", inputs=shared):
                    pass
    finally:
        stop.set()
        thread.join()
    assert len(store.trace().data.spans) == 31


# -- caps --------------------------------------------------------------------------------------


def test_a_large_value_is_cut_and_says_so(store: Store) -> None:
    with traced_span("root", inputs="x" * 3_000_000):
        pass
    recorded = store.spans()["root"].inputs
    assert len(recorded) < spanguard.MAX_VALUE_CHARS + 100
    assert recorded.endswith("characters cut]")


def test_a_large_container_keeps_its_first_items() -> None:
    with spanguard.limits(value_chars=1_000):
        recorded = clean(list(range(10_000)))
        assert recorded[:3] == [0, 1, 2]
        assert recorded[-1].endswith("more items left out]")
        recorded = clean({str(n): n for n in range(10_000)})
        assert recorded["0"] == 0
        assert recorded["[spanguard]"].endswith("more entries left out")
        assert len(json.dumps(clean({"a": "x" * 5000, "b": "y" * 5000}))) < 1_300


@pytest.mark.parametrize("count", [95, 96, 97, 124, 128, 200, 1000])
def test_any_number_of_attributes_keeps_the_trace_readable(store: Store, count: int) -> None:
    with traced_span("root", attributes={f"a{n}": n for n in range(count)}) as root:
        root.set_outputs("done")
    span = store.spans()["root"]
    own = own_attributes(span)
    folded = own.pop("spanguard.more_attributes", {})
    assert {**own, **folded} == {f"a{n}": n for n in range(count)}
    assert (len(own), span.outputs) == (min(count, spanguard.MAX_ATTRIBUTES), "done")


def test_attributes_set_one_by_one_over_the_cap(store: Store) -> None:
    with pytest.raises(ValueError):
        with traced_span("root") as root:
            for number in range(150):
                root.set_attribute(f"a{number}", number)
            root.set_attribute("a0", "again")
            raise ValueError("bad")
    span = store.spans()["root"]
    assert span.get_attribute("a0") == "again"
    assert span.get_attribute("error") == "bad"
    assert span.get_attribute("spanguard.more_attributes")["a149"] == 149


def test_the_cap_on_attributes_is_settable(store: Store) -> None:
    with spanguard.limits(attributes=3):
        with traced_span("root", attributes={f"a{n}": n for n in range(5)}):
            pass
    own = own_attributes(store.spans()["root"])
    assert own == {"a0": 0, "a1": 1, "a2": 2, "spanguard.more_attributes": {"a3": 3, "a4": 4}}


def test_the_cap_on_messages_is_settable(store: Store) -> None:
    with spanguard.limits(message_chars=10), pytest.raises(ValueError), traced_span("root"):
        raise ValueError("x" * 100)
    assert store.spans()["root"].get_attribute("error").startswith("x" * 10 + "[")


def test_caps_are_restored_after_a_block() -> None:
    before = spanguard.Limits()
    with spanguard.limits(value_chars=5) as caps:
        assert caps.value_chars == 5
    from spanguard._base.config import current_limits

    assert current_limits() == before


@pytest.mark.parametrize(
    "bad", [{"value_chars": 0}, {"message_chars": "9"}, {"attributes": 97}, {"attributes": True}]
)
def test_a_cap_that_makes_no_sense_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        spanguard.limits(**bad)


def test_a_long_name_is_cut(store: Store) -> None:
    with traced_span("n" * 10_000):
        pass
    assert store.trace().info.tags["mlflow.traceName"].startswith("n" * 250)


def test_no_payload_gets_into_a_log_line(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    from spanguard._base import findings

    findings.reraise_internal = False

    class Client(mlflow.MlflowClient):
        def end_trace(self, **kwargs: Any) -> None:  # type: ignore[override]
            raise RuntimeError("hunter2")

    with traced_span("root", client=Client(), inputs={"password": "hunter2"}):
        pass
    assert any(record.name == "spanguard" for record in caplog.records)
    assert "hunter2" not in caplog.text
    # And the span has ended all the same.
    assert status(store.trace().data.spans[0]) == "OK"
