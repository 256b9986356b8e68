"""What `traced` is told: names, what is captured, what `@mlflow.trace` takes, and mistakes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlflow
import pytest
from mlflow.entities.trace_location import MlflowExperimentLocation

import spanguard
from spanguard import TraceStateManager, current_span, traced, traced_span
from spanguard._lifecycle.arguments import SpanArguments
from spanguard._lifecycle.request import SpanRequest
from tests.store import Store


def work(user: str, password: str = "secret") -> str:
    return user


# -- names, in every place -------------------------------------------------------------------------

NAMINGS: dict[str, Callable[[Any], Any]] = {
    "by name": lambda f: traced(name="n")(f),
    "in place": lambda f: traced("n")(f),
    "of the function, by name": lambda f: traced(f, name="n"),
    "of the function, in place": lambda f: traced(f, "n"),
    "with func=": lambda f: traced(func=f, name="n"),
    "with None first": lambda f: traced(None, "n")(f),
    "as @mlflow.trace": lambda f: traced(f, "n", "TOOL", {"k": 1}),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_name_is_taken_wherever_it_is_given(store: Store, naming: str) -> None:
    """A name works as first or second argument, by position or by keyword."""
    with spanguard.strict():
        function = NAMINGS[naming](work)
    assert function("ada") == "ada"
    (span,) = store.trace().data.spans
    assert span.name == "n"
    if naming == "as @mlflow.trace":
        assert (span.span_type, span.get_attribute("k")) == ("TOOL", 1)


def test_two_names_are_told() -> None:
    """`traced("n", "TOOL")` does not silently make a name of the type."""
    with pytest.warns(spanguard.SpanguardWarning, match="two names"):
        traced("n", "TOOL")


# -- what is captured ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", ["user", ["user"], ("user",), {"user"}, frozenset({"user"}), {"user": 1}.keys()]
)
def test_captured_names_may_come_as_any_collection_or_as_one_string(
    store: Store, names: Any
) -> None:
    """One name need not be put into a list."""
    traced(work, capture_inputs=names)("ada")
    assert store.trace().data.spans[0].inputs == {"user": "ada"}


@pytest.mark.parametrize("given", [None, 17, 2.5, [1, 2], object(), b"user"])
def test_what_is_no_name_captures_nothing_and_is_told(store: Store, given: Any) -> None:
    """A value that cannot be meant never lets an argument through that was not to be recorded."""
    with pytest.warns(spanguard.SpanguardWarning, match="capture_inputs"):
        function = traced(work, capture_inputs=given)
    assert function("ada") == "ada"
    assert store.trace().data.spans[0].inputs is None


def test_a_name_that_no_parameter_has_is_told(store: Store) -> None:
    """A misspelt parameter records nothing, and is not silent about it."""
    with pytest.warns(spanguard.SpanguardWarning, match="usr"):
        traced(capture_inputs=["usr", "password"])(work)("ada")
    assert store.trace().data.spans[0].inputs == {"password": "secret"}

    def takes_words(a: int, **words: Any) -> None: ...

    with spanguard.strict():
        traced(takes_words, capture_inputs=["a", "words"])
        with pytest.raises(spanguard.InvalidSpanArgumentError):
            traced(takes_words, capture_inputs=["b"])


# -- what cannot be traced -------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [17, "".join, [1], object(), int, str, property(), ValueError])
def test_whatever_is_given_is_given_back(thing: Any) -> None:
    """What is nothing to trace is left as it is, with a warning, and nothing is raised."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced_thing = traced()(thing)
    assert traced_thing is thing or callable(traced_thing)
    told = [str(w.message) for w in caught if issubclass(w.category, spanguard.SpanguardWarning)]
    assert bool(told) == (type(thing) in (int, list, object) or thing in (int, str))


def test_a_misspelt_argument_is_told() -> None:
    """Lenient mode ignores it with a warning, strict mode raises."""
    with pytest.warns(spanguard.SpanguardWarning, match="capture_input,? ?"):
        traced(capture_input=False)(work)  # type: ignore[call-overload]
    with spanguard.strict(), pytest.raises(spanguard.InvalidSpanArgumentError, match="span_typ"):
        traced(span_typ="TOOL")  # type: ignore[call-overload]


# -- a warning that is an error --------------------------------------------------------------------

EXTRAS: dict[str, Any] = {
    "log_level": "BOGUS",
    "links": ["no link"],
    "sampling_ratio_override": 7,
    "span_type": object(),
    "expected": 17,
    "attributes": [1],
}


def run(function: Any) -> Any:
    if inspect.iscoroutinefunction(function):
        coroutine = function()
        with pytest.raises(StopIteration) as stop:
            coroutine.send(None)
        return stop.value.value
    if inspect.isgeneratorfunction(function):
        return list(function())
    return function()


def function() -> int:
    return 1


async def coroutine() -> int:
    return 1


def generator() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize("argument", EXTRAS)
@pytest.mark.parametrize("kind", [function, coroutine, generator])
def test_a_warning_turned_into_an_error_leaves_nothing_open(
    store: Store, kind: Any, argument: str
) -> None:
    """With `-W error` a wrong argument may raise, but the span is closed (issue 9, A4)."""
    if argument in ("log_level", "links") and not hasattr(mlflow.entities, "SpanLogLevel"):
        pytest.skip("this MLflow ignores it")
    function = traced(**{argument: EXTRAS[argument]})(kind)  # type: ignore[call-overload]
    with warnings.catch_warnings():
        warnings.simplefilter("error", spanguard.SpanguardWarning)
        with pytest.raises(spanguard.SpanguardWarning):
            run(function)
    assert spanguard.open_spans() == []
    assert current_span() is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(function) in (1, [1])
    assert {s.status.status_code.value for t in store.traces() for s in t.data.spans} >= {"OK"}


# -- a swap of @mlflow.trace -----------------------------------------------------------------------


@contextmanager
def sampled(monkeypatch: pytest.MonkeyPatch, ratio: str) -> Iterator[None]:
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", ratio)
    mlflow.tracing.reset()
    yield
    monkeypatch.delenv("MLFLOW_TRACE_SAMPLING_RATIO")


def body() -> int:
    with traced_span("child"):
        return 1


async def async_body() -> int:
    return body()


def generating_body() -> Iterator[int]:
    yield body()


async def async_generating_body() -> AsyncIterator[int]:
    yield body()


def call(function: Any) -> None:
    result = function()
    if inspect.isgenerator(result):
        list(result)
    elif inspect.isawaitable(result) or inspect.isasyncgen(result):
        step: Any = result.__anext__() if inspect.isasyncgen(result) else result
        with pytest.raises(StopIteration):
            step.send(None)
        if inspect.isasyncgen(result):
            with pytest.raises(StopAsyncIteration):
                result.__anext__().send(None)


BODIES = [body, async_body, generating_body, async_generating_body]


@pytest.mark.parametrize("everywhere", ["0.0", "1.0"])
@pytest.mark.parametrize("ratio", [0, 0.0, 1, 1.0, None])
@pytest.mark.parametrize("kind", BODIES)
def test_the_sampling_ratio_is_that_of_the_function(
    store: Store, monkeypatch: pytest.MonkeyPatch, kind: Any, ratio: Any, everywhere: str
) -> None:
    """`sampling_ratio_override` samples as under `@mlflow.trace`, the children along with it."""
    with sampled(monkeypatch, everywhere):
        call(traced(sampling_ratio_override=ratio)(kind))
        recorded = float(everywhere if ratio is None else ratio) == 1.0
        assert [len(t.data.spans) for t in store.traces()] == ([2] if recorded else [])
        call(traced(kind))
        assert len(store.traces()) == recorded + (everywhere == "1.0")


def test_a_ratio_samples_a_part(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the traces are whole, and half are not there; children go with their roots."""
    with sampled(monkeypatch, "1.0"):
        half = traced(sampling_ratio_override=0.5)(body)
        for _ in range(60):
            half()
        with traced_span("root", sampling_ratio_override=0.0):
            half()
        with traced_span("root"):
            half()
        traces = store.traces()
        assert 5 < len(traces) < 56
        assert {len(trace.data.spans) for trace in traces} == {2, 3}


def test_a_ratio_that_is_none_is_told(store: Store) -> None:
    """A ratio beyond 0 to 1 is ignored, with a warning."""
    for ratio in (1.5, -1, "half", True, float("nan")):
        with pytest.warns(spanguard.SpanguardWarning, match="sampling_ratio_override"):
            with traced_span("span", sampling_ratio_override=ratio):  # type: ignore[arg-type]
                pass
        spanguard._base.findings.forget_sites()
    assert len(store.traces()) == 5


@pytest.fixture
def elsewhere() -> str:
    return str(mlflow.MlflowClient().create_experiment("elsewhere"))


@pytest.mark.parametrize("kind", BODIES)
def test_a_decorated_function_goes_to_its_destination(
    store: Store, elsewhere: str, kind: Any
) -> None:
    """`trace_destination` says where a trace goes that the call starts; below one it is ignored."""
    function = traced(trace_destination=MlflowExperimentLocation(elsewhere))(kind)
    with spanguard.strict():
        call(function)
        with traced_span("root"):
            call(function)
    assert sorted(t.info.experiment_id for t in store.traces()) == ["0", elsewhere]


def test_a_span_and_a_push_go_to_their_destination(store: Store, elsewhere: str) -> None:
    """`traced_span` and managers take `trace_destination` as `mlflow.start_span` does."""
    destination = MlflowExperimentLocation(elsewhere)
    with spanguard.strict(), traced_span("a", trace_destination=destination):
        with pytest.raises(spanguard.InvalidSpanArgumentError):
            traced_span("child", trace_destination=destination).__enter__()
    manager = TraceStateManager()
    manager.push_trace("b", trace_destination=destination)
    manager.pop_trace()
    with traced_span("c", trace_destination=destination, experiment_id="0"):
        pass
    found = {t.data.spans[0].name: t.info.experiment_id for t in store.traces()}
    assert found == {"a": elsewhere, "b": elsewhere, "c": "0"}
    with pytest.warns(spanguard.SpanguardWarning, match="trace_destination"):
        with traced_span("d", trace_destination="elsewhere"):
            pass


def test_description_and_log_level_of_a_span(store: Store) -> None:
    """`traced_span` takes what `mlflow.start_span` takes."""
    with spanguard.strict(), traced_span("span", description="why", log_level="WARNING"):
        pass
    traced(work, description="why", log_level="WARNING")("ada")
    for trace in store.traces():
        (span,) = trace.data.spans
        if hasattr(mlflow.entities, "SpanLogLevel"):
            assert span.attributes["mlflow.spanLogLevel"] == 30
            assert "why" in span.attributes.values()


# -- outputs ---------------------------------------------------------------------------------------


def sets_outputs(how: str) -> None:
    span: Any = current_span() if how == "ours" else mlflow.get_current_active_span()
    span.set_outputs({"own": 1})


async def sets_async(how: str) -> str:
    sets_outputs(how)
    return "returned"


def sets(how: str) -> str:
    sets_outputs(how)
    return "returned"


def sets_generating(how: str) -> Iterator[str]:
    sets_outputs(how)
    yield "returned"


@pytest.mark.parametrize("how", ["ours", "MLflow's"])
@pytest.mark.parametrize("kind", [sets, sets_async, sets_generating])
def test_outputs_that_the_body_sets_win(store: Store, kind: Any, how: str) -> None:
    """An explicit set_outputs() wins over the return value, as in MLflow, by whichever handle."""
    call(lambda: traced(kind)(how))
    assert store.trace().data.spans[0].outputs == {"own": 1}


def test_outputs_that_are_set_to_none_do_not_win(store: Store) -> None:
    """As in MLflow, None counts as not set."""

    @traced
    def sets_none() -> int:
        current_span().set_outputs(None)  # type: ignore[union-attr]
        return 5

    sets_none()
    assert store.trace().data.spans[0].outputs == 5


# -- signatures ------------------------------------------------------------------------------------


def test_help_shows_what_a_span_takes() -> None:
    """`inspect.signature(traced_span)` and `help()` name every argument, the name first."""
    parameters = list(inspect.signature(traced_span).parameters.values())
    assert parameters[0].name == "name" and parameters[0].default is inspect.Parameter.empty
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    read = inspect.signature(SpanRequest.__init__).parameters.values()
    assert {p.name for p in parameters} == {p.name for p in read if p.kind is p.KEYWORD_ONLY}
    assert "sampling_ratio_override" in inspect.signature(traced).parameters


def test_type_checkers_know_every_argument() -> None:
    """What type checkers are told is what is read (tests/typing has what they make of it)."""
    read = inspect.signature(SpanRequest.__init__).parameters.values()
    known = {p.name for p in read if p.kind is p.KEYWORD_ONLY} - {"name"}
    assert set(SpanArguments.__annotations__) == known
