"""The decorator: what callers see is unchanged, and what it is told is done."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import inspect
import pickle
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import traced, traced_span
from tests.store import Store, outcome

# -- the function stays the function -----------------------------------------------------------


@traced
def module_level(a: int, b: int = 2) -> int:
    """Add."""
    return a + b


class Owner:
    @traced
    def method(self, x: int) -> int:
        return x

    @property
    @traced
    def below(self) -> int:
        return 5

    @traced
    @property
    def above(self) -> int:
        return 6


def test_signature_name_and_documentation_are_kept() -> None:
    assert module_level.__name__ == "module_level"
    assert module_level.__doc__ == "Add."
    assert module_level.__wrapped__(1) == 3  # type: ignore[attr-defined]
    assert str(inspect.signature(module_level)) == "(a: 'int', b: 'int' = 2) -> 'int'"
    assert inspect.isfunction(module_level)
    assert module_level.__qualname__ == "module_level"


def test_pickling_by_name() -> None:
    assert pickle.loads(pickle.dumps(module_level)) is module_level
    assert copy.copy(module_level) is module_level
    assert copy.deepcopy(module_level) is module_level
    bound = pickle.loads(pickle.dumps(Owner().method))
    assert bound(3) == 3


def test_a_wrong_call_is_pythons_own_error(store: Store) -> None:
    for args, kwargs in (((), {}), ((1, 2, 3), {}), ((1,), {"c": 1})):
        with pytest.raises(TypeError) as ours:
            module_level(*args, **kwargs)
        with pytest.raises(TypeError) as pythons:
            module_level.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]
        assert str(ours.value) == str(pythons.value)


def test_properties(store: Store) -> None:
    assert (Owner().below, Owner().above) == (5, 6)
    assert sorted(store.spans()) == ["above", "below"]


def test_a_context_variable_set_inside_is_set_outside() -> None:
    variable: ContextVar[int] = ContextVar("variable", default=0)

    @traced
    def sets() -> None:
        variable.set(1)

    @traced
    async def sets_async() -> None:
        variable.set(2)

    @traced
    def steps() -> Iterator[int]:
        variable.set(3)
        yield 1

    sets()
    assert variable.get() == 1

    async def main() -> int:
        await sets_async()
        return variable.get()

    assert asyncio.run(main()) == 2
    next(steps())
    assert variable.get() == 3


def test_lambdas_builtins_and_nested_functions(store: Store) -> None:
    assert traced(lambda x: x + 1)(1) == 2
    assert traced(len)([1, 2]) == 2
    spans = store.spans()
    assert spans["<lambda>"].inputs == {"x": 1}
    assert spans["len"].outputs == 2


def test_recursion_nests(store: Store) -> None:
    @traced
    def down(n: int) -> int:
        return n if n == 0 else down(n - 1)

    down(3)
    spans = store.trace().data.spans
    assert len(spans) == 4
    assert [span.inputs["n"] for span in spans] == [3, 2, 1, 0]


def test_a_class_stays_a_class(store: Store) -> None:
    @traced
    @dataclasses.dataclass
    class Point:
        x: int

        def shift(self, by: int) -> int:
            return self.x + by

        @classmethod
        def origin(cls) -> Any:
            return cls(0)

        @staticmethod
        def helper(v: int) -> int:
            return v

        def _private(self) -> int:
            return 1

    class Sub(Point):
        def own(self) -> int:
            return self.shift(1)

    assert isinstance(Point, type)
    assert isinstance(Point.origin(), Point)
    assert dataclasses.asdict(Sub(3)) == {"x": 3}
    assert (Sub(1).own(), Point.helper(4), Point(1)._private()) == (2, 4, 1)
    assert sorted(store.spans()) == ["Point.helper", "Point.origin", "Point.shift"]
    assert store.spans()["Point.shift"].inputs == {"by": 1}


def test_it_nests_with_blocks_and_fluent_spans(store: Store) -> None:
    @traced
    def inner() -> None:
        with mlflow.start_span("fluent"):
            pass

    with traced_span("outer"):
        inner()
    spans = store.spans()
    assert spans["inner"].parent_id == spans["outer"].span_id
    assert spans["fluent"].parent_id == spans["inner"].span_id


# -- options -----------------------------------------------------------------------------------


def test_what_is_captured(store: Store) -> None:
    @traced
    def everything(a: int, /, b: int, *rest: int, c: int = 3, **words: Any) -> int:
        return a

    everything(1, 2, 7, 8, d=4)
    assert store.spans()["everything"].inputs == {
        "a": 1,
        "b": 2,
        "rest": [7, 8],
        "c": 3,
        "words": {"d": 4},
    }


def test_what_is_not_captured(store: Store) -> None:
    @traced(capture_inputs=False, capture_outputs=False)
    def nothing(a: int) -> int:
        return a

    @traced(capture_inputs=["a"])
    def some(a: int, b: int) -> int:
        return a

    nothing(1)
    some(1, 2)
    spans = store.spans()
    assert (spans["nothing"].inputs, spans["nothing"].outputs) == (None, None)
    assert spans["some"].inputs == {"a": 1}


def test_options_of_the_span(store: Store) -> None:
    @traced("named", span_type="TOOL", attributes={"k": 1}, tags={"t": 1}, expected=(KeyError,))
    def work() -> None:
        raise KeyError("expected")

    with pytest.raises(KeyError):
        work()
    trace = store.trace()
    (span,) = trace.data.spans
    assert (span.name, span.span_type, outcome(span)) == ("named", "TOOL", "expected")
    assert trace.info.tags["t"] == "1"
    with spanguard.strict(), traced_span("root"), pytest.raises(KeyError):
        work()  # tags of a function that runs as a child are no finding: they are for its traces


def test_a_decorator_swap_from_mlflow(store: Store) -> None:
    from mlflow.entities.trace_location import MlflowExperimentLocation

    other = mlflow.MlflowClient().create_experiment("other")

    @traced(
        name="f",
        span_type="LLM",
        attributes={"a": 1},
        output_reducer=sum,
        trace_destination=MlflowExperimentLocation(other),
    )
    def numbers() -> Iterator[int]:
        yield from (1, 2, 3)

    assert list(numbers()) == [1, 2, 3]
    assert traced(func=lambda: 4, name="g")() == 4
    trace = next(t for t in store.traces() if t.data.spans[0].name == "f")
    assert trace.info.experiment_id == other
    assert trace.data.spans[0].outputs == 6
    with pytest.warns(spanguard.SpanguardWarning, match="sampling_ratio_overide"):
        traced(sampling_ratio_overide=0.5)  # type: ignore[call-overload]


SECRET = "correct-horse-battery-staple"


def test_redaction(store: Store) -> None:
    def redact(name: str, value: Any) -> Any:
        return "***" if name in ("password", "return") else value

    @traced(redact=redact)
    def login(user: str, password: str) -> str:
        return password

    assert login("ada", SECRET) == SECRET
    span = store.spans()["login"]
    assert span.inputs == {"user": "ada", "password": "***"}
    assert span.outputs == "***"
    assert SECRET.encode() not in store.path.read_bytes()


def test_a_redactor_that_raises_leaks_nothing(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    def redact(name: str, value: Any) -> Any:
        raise ValueError(f"cannot redact {value}")

    @traced(redact=redact)
    def login(password: str) -> str:
        return password

    @traced(redact=redact)
    def stream(password: str) -> Iterator[str]:
        yield password

    assert login(SECRET) == SECRET
    assert list(stream(SECRET)) == [SECRET]
    assert "ValueError" in store.spans()["login"].inputs["password"]
    store_files = store.path.parent.glob(store.path.name + "*")
    assert all(SECRET.encode() not in path.read_bytes() for path in store_files)
    assert SECRET not in caplog.text


def test_an_output_reducer_that_raises(store: Store) -> None:
    def reducer(items: list[Any]) -> Any:
        raise ValueError(SECRET)

    @traced(output_reducer=reducer)
    def numbers() -> Iterator[int]:
        yield 1

    assert list(numbers()) == [1]
    assert store.spans()["numbers"].outputs == [1]


def test_a_coroutine_can_be_a_task_and_is_awaited_once(store: Store) -> None:
    @traced
    async def work(x: int) -> int:
        await asyncio.sleep(0)
        return x

    async def main() -> None:
        assert await asyncio.create_task(work(1)) == 1  # type: ignore[arg-type]
        assert await asyncio.wait_for(work(2), 5) == 2
        assert await asyncio.gather(work(3), work(4)) == [3, 4]
        once = work(5)
        assert await once == 5
        with pytest.raises(RuntimeError, match="already awaited"):
            await once

    asyncio.run(main())
    assert len(store.traces()) == 5
