"""Any value in any argument of any face: nothing raises, and every trace is readable."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import mlflow
import numpy
import pytest

import spanguard
from spanguard import (
    CustomTraceManager,
    TraceStateManager,
    current_span,
    guard,
    trace_batch,
    traced,
    traced_span,
)
from spanguard._base.values import number_of
from tests.store import Store
from tests.whole.hostile import HOSTILE, refusing


@pytest.fixture(autouse=True)
def lenient() -> Iterator[None]:
    """What is wrong with an argument is a warning here, and there are thousands."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Sweep:
    """Tries calls with hostile values, among good traces, and takes down what raised."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._raised: list[str] = []
        self._recorded: set[str] = set()
        self.hostile: str = ""

    def values(self) -> Iterator[Callable[[], Any]]:
        """Yield what makes each hostile value, and record a good trace now and then."""
        for number, (name, make) in enumerate(HOSTILE.items()):
            self.hostile = name
            if number % 4 == 0:
                with traced_span(f"good {number}", inputs={"n": number}) as good:
                    good.set_outputs(number)
                self.recorded(good)
            yield make

    def tries(self, what: str, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Make a call that must not raise, and return what it returns."""
        try:
            return call(*args, **kwargs)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._raised.append(f"{what}, {self.hostile}: {_shown(error)}")
            return None

    def recorded(self, span: Any) -> None:
        """Take note of a span whose trace must be in the store."""
        if isinstance(span, mlflow.entities.LiveSpan):
            self._recorded.add(span.trace_id)
        else:
            self._raised.append(f"{self.hostile}: nothing was recorded")

    def check(self) -> None:
        """Nothing raised, nothing is left open or active, and every trace can be read."""
        assert not self._raised, "\n".join([f"{len(self._raised)} failed", *self._raised])
        assert not spanguard.open_spans()
        assert mlflow.get_current_active_span() is None
        readable = {trace.info.trace_id for trace in self._store.traces()}
        assert len(self._recorded) > 20
        lost = self._recorded - readable
        assert not lost, f"{len(lost)} of {len(self._recorded)} traces are not readable"
        assert self._store.rows() == len(readable)


@pytest.fixture
def sweep(store: Store) -> Iterator[Sweep]:
    """A sweep; what it recorded is checked at the test's end."""
    made = Sweep(store)
    yield made
    made.check()


def _shown(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "spanguard" in frame.filename] or frames
    return f"{type(error).__name__} at {ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}"


# -- traced_span -------------------------------------------------------------------------------

ARGUMENTS = (
    "name",
    "trace_id",
    "request_id",
    "parent_id",
    "client",
    "span_type",
    "inputs",
    "attributes",
    "tags",
    "metadata",
    "experiment_id",
    "run_id",
    "session_id",
    "user",
    "links",
    "start_time_ns",
    "otel_trace_id",
    "new_trace",
    "expected",
    "strict",
    "description",
    "log_level",
    "trace_destination",
    "sampling_ratio_override",
    "self",
    "args",
    "unknown",
)


OF_A_TRACE = (
    "name",
    "client",
    "tags",
    "metadata",
    "experiment_id",
    "run_id",
    "session_id",
    "user",
    "otel_trace_id",
)

PLACES: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "alone": lambda value: (value,),
    "client": lambda value: (value, "name"),
    "type": lambda value: ("name", value),
    "attributes": lambda value: ("name", "TOOL", value),
    "after a name": lambda value: ("name", value, value, value),
    "name": lambda value: (None, value),
    "trace": lambda value: (None, "name", value),
    "parent": lambda value: (None, "name", None, value),
    "everywhere": lambda value: (value, value, value, value, value),
}

WITH_AND_WITHOUT_CLIENT = pytest.mark.parametrize("given", [False, True], ids=["", "client"])


@WITH_AND_WITHOUT_CLIENT
def test_any_value_as_an_argument_of_a_child(sweep: Sweep, given: bool) -> None:
    """Whatever an argument of a span below another is, it is recorded."""
    client = {"client": mlflow.MlflowClient()} if given else {}
    for make in sweep.values():
        with traced_span("root") as root:
            for argument in ARGUMENTS:
                if argument != "new_trace":
                    asked = {"name": argument, **client, argument: make()}
                    sweep.tries(argument, _open, **asked)
        sweep.recorded(root)


@WITH_AND_WITHOUT_CLIENT
def test_any_value_as_an_argument_of_a_root(sweep: Sweep, given: bool) -> None:
    """Whatever an argument that means something to a trace is, the trace can be read."""
    client = {"client": mlflow.MlflowClient()} if given else {}
    for make in sweep.values():
        for argument in ("name", "client"):
            asked = {"name": argument, **client, argument: make()}
            sweep.recorded(sweep.tries(argument, _open, **asked))
        everywhere = {argument: make() for argument in OF_A_TRACE}
        sweep.recorded(sweep.tries("all", _open, **{**everywhere, **client}))


def test_any_value_in_any_place(sweep: Sweep) -> None:
    """Positional arguments are asked for their types before they are taken for anything."""
    for make in sweep.values():
        with traced_span("root") as root:
            for place, form in PLACES.items():
                sweep.recorded(sweep.tries(place, _open, *form(make())))
        sweep.recorded(root)


def _open(*args: Any, **kwargs: Any) -> Any:
    with traced_span(*args, **kwargs) as span:
        pass
    return span


# -- the proxy's setters -----------------------------------------------------------------------

SETTERS: dict[str, Callable[[Any, Any], Any]] = {
    "set_inputs": lambda span, value: span.set_inputs(value),
    "set_outputs": lambda span, value: span.set_outputs(value),
    "set_attribute": lambda span, value: span.set_attribute("key", value),
    "set_attribute key": lambda span, value: span.set_attribute(value, 1),
    "set_attribute usage": lambda span, value: span.set_attribute(
        "mlflow.chat.tokenUsage", {"input_tokens": value, "total_tokens": value}
    ),
    "set_attributes": lambda span, value: span.set_attributes(value),
    "set_attributes item": lambda span, value: span.set_attributes({"key": value}),
    "set_span_type": lambda span, value: span.set_span_type(value),
    "set_description": lambda span, value: span.set_description(value),
    "set_log_level": lambda span, value: span.set_log_level(value),
    "set_status": lambda span, value: span.set_status(value),
    "set_status description": lambda span, value: span.set_status("ERROR", value),
    "add_event": lambda span, value: span.add_event(value),
    "add_event by name": lambda span, value: span.add_event(value, value, value),
    "add_event attributes": lambda span, value: span.add_event("event", value),
    "add_event timestamp": lambda span, value: span.add_event("event", timestamp=value),
    "add_event name": lambda span, value: span.add_event(event(name=value)),
    "add_event key": lambda span, value: span.add_event(event(attributes=pairs(value, 1))),
    "add_event value": lambda span, value: span.add_event(event(attributes={"key": value})),
    "add_event values": lambda span, value: span.add_event(event(attributes={"key": [value, 1]})),
    "add_event whole": lambda span, value: span.add_event(event(attributes=value)),
    "add_event when": lambda span, value: span.add_event(event(timestamp=value)),
    "add_link": lambda span, value: span.add_link(value),
    "add_link ids": lambda span, value: span.add_link(link(value, value, None)),
    "add_link attributes": lambda span, value: span.add_link(link(attributes=value)),
    "add_link value": lambda span, value: span.add_link(link(attributes={"key": value})),
    "add_link key": lambda span, value: span.add_link(link(attributes=pairs(value, 1))),
    "record_exception": lambda span, value: span.record_exception(value),
    "record_exception message": lambda span, value: span.record_exception(ValueError(value)),
    "end outputs": lambda span, value: span.end(value),
    "end attributes": lambda span, value: span.end(attributes=value),
    "end status": lambda span, value: span.end(status=value),
    "end time": lambda span, value: span.end(end_time_ns=value),
}


def event(**fields: Any) -> Any:
    return mlflow.entities.SpanEvent(**{"name": "event", **fields})


def link(trace_id: Any = "tr-" + "1" * 32, span_id: Any = "1" * 16, attributes: Any = None) -> Any:
    kind = getattr(mlflow.entities, "Link", None)  # 3.10 has none
    return kind(trace_id, span_id, attributes) if kind is not None else None


def pairs(key: Any, value: Any) -> Any:
    """Return a dict under a key; where that has no hash, nothing can be."""
    try:
        return {key: value}
    except BaseException:
        return {}


ENDS = [setter for setter in SETTERS if setter.startswith("end")]


@pytest.mark.parametrize("api", ["ours", "fluent"])
def test_any_value_for_a_setter(sweep: Sweep, api: str) -> None:
    """No setter of a span raises, whatever it is given and whichever API opened the span."""
    for make in sweep.values():
        with traced_span("root") as root:
            with _span(api) as span:
                for setter, write in SETTERS.items():
                    if setter not in ENDS:
                        sweep.tries(setter, write, span, make())
            for setter in ENDS:
                with _span(api) as span:
                    sweep.tries(setter, SETTERS[setter], span, make())
        sweep.recorded(root)


@contextmanager
def _span(api: str) -> Iterator[Any]:
    if api == "ours":
        with traced_span("child") as span:
            yield span
    else:
        with mlflow.start_span("child"):
            yield current_span()


# -- managers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["context", "process"])
def test_any_value_for_push_and_pop(sweep: Sweep, scope: Any) -> None:
    """What is pushed can be popped, whatever came along, and a handle may be anything."""
    manager = TraceStateManager(scope=scope)
    pops = [
        lambda value: manager.pop_trace(outputs=value),
        lambda value: manager.pop_trace(attributes=value),
        lambda value: manager.pop_trace(attributes={"key": value}),
        lambda value: manager.pop_trace(status=value),
        lambda value: manager.pop_trace(error=value),
    ]
    for make in sweep.values():
        root = sweep.tries("push", manager.push_trace, "root", client=make())
        sweep.recorded(root)
        for number, pop in enumerate(pops):
            sweep.tries("push", manager.push_trace, make(), inputs=make(), expected=make())
            assert sweep.tries("pop by handle", manager.pop_trace, make()) is None
            sweep.tries(f"pop {number}", pop, make())
        sweep.tries("pop", manager.pop_trace, root)
        odd = sweep.tries("manager", TraceStateManager, make(), strict=False)
        with odd.trace("odd"):
            pass
        sweep.tries("close", odd.close, make())


def test_any_value_for_a_custom_trace(sweep: Sweep) -> None:
    """Ids, and all that comes along with them, may be anything."""
    for make in sweep.values():
        manager = CustomTraceManager(make(), strict=False)
        number = len(HOSTILE)
        given = {"inputs": make(), "tags": make(), "user": make(), "attributes": make()}
        span = sweep.tries("start", manager.start_custom_trace, make(), make(), **given)
        sweep.recorded(span)
        for name in ("get_active_trace", "generate_trace_id", "end_custom_trace"):
            call = getattr(manager, name)
            sweep.tries(name, call, make(), *([make()] if name.startswith("gen") else []))
        sweep.tries("trace_id_for", spanguard.trace_id_for, make())
        for custom_id in manager.active_traces:
            ending = {"outputs": make(), "attributes": make(), "status": make()}
            sweep.tries("end", manager.end_custom_trace, custom_id, **ending)
        custom_id = f"{sweep.hostile} {number}"
        block = {"custom_trace_id": custom_id, "span_type": make(), "name": make()}
        with sweep.tries("block", manager.custom_trace, "ada", make(), **block) as span:
            sweep.recorded(span)
        odd = CustomTraceManager(id_factory=make())
        sweep.tries("id_factory", odd.generate_trace_id, "ada", "job")


def test_any_value_as_a_custom_id(sweep: Sweep) -> None:
    """A custom id of any kind starts a trace, finds it and ends it."""
    manager = CustomTraceManager()
    for make in sweep.values():
        span = sweep.tries(
            "start", manager.start_custom_trace, "ada", "job", custom_trace_id=make()
        )
        sweep.recorded(span)
        sweep.tries("end", manager.end_custom_trace, span.get_attribute("custom_trace_id"))
    assert not manager.active_traces


# -- guarded clients ---------------------------------------------------------------------------


def test_any_value_for_a_guarded_client(sweep: Sweep) -> None:
    """Its four methods take anything where an id, a payload, a status or a time belongs."""
    client = guard()
    starts = ("span_type", "inputs", "attributes", "start_time_ns", "links")
    ends = ("outputs", "attributes", "status", "end_time_ns")
    for make in sweep.values():
        given = {name: make() for name in (*starts, "tags", "experiment_id", "run_id")}
        root = sweep.tries("start_trace", client.start_trace, make(), **given)
        sweep.recorded(root)
        steps = [
            sweep.tries("start_span", client.start_span, make(), root.trace_id, make()),
            sweep.tries(
                "start_span",
                client.start_span,
                "step",
                root.trace_id,
                root.span_id,
                **{name: make() for name in starts},
            ),
        ]
        sweep.tries("start_span", client.start_span, "lost", make(), make()).end()
        sweep.tries("end_span", client.end_span, make(), make())
        sweep.tries("end_span", client.end_span, root.trace_id, make())
        sweep.tries("end_trace", client.end_trace, make())
        for step in steps:
            last = {name: make() for name in ends}
            sweep.tries("end_span", client.end_span, make(), step.span_id, **last)
        last = {name: make() for name in ends}
        sweep.tries("end_trace", client.end_trace, root.trace_id, **last)
        odd = sweep.tries("guard", guard, make(), strict=False, ambient=make())
        span = odd.start_trace("odd", new_trace=make())
        sweep.recorded(span)
        odd.end_trace(span.trace_id)


# -- batches, decorators and the rest ----------------------------------------------------------


def test_any_value_for_a_batch(sweep: Sweep) -> None:
    """What is no choice between two is refused before anything opens; the rest is recorded."""
    for make in sweep.values():
        given = {"span_type": make(), "attributes": make(), "progress": make(), "strict": False}
        batch = sweep.tries(
            "batch",
            trace_batch,
            [make()],
            lambda item: item,
            name=make(),
            item_name=make(),
            expected=make(),
            **given,
        )
        assert batch.success_rate == 1.0
        for choice in ("on_error", "max_in_flight"):
            sweep.tries(choice, _set_and_undo, _batch_with, {choice: make()})


def _batch_with(choice: dict[str, Any]) -> Any:
    return nullcontext(trace_batch([1], lambda item: item, name="batch", **choice))


DECORATOR = (
    "attributes",
    "capture_inputs",
    "capture_outputs",
    "client",
    "description",
    "expected",
    "links",
    "log_level",
    "max_items",
    "name",
    "output_reducer",
    "redact",
    "span_type",
    "tags",
    "trace_destination",
    "unknown",
)


def test_any_value_for_a_decorator(sweep: Sweep) -> None:
    """A traced function or generator runs, whatever `traced` was given."""
    for make in sweep.values():
        with traced_span("root") as root:
            for option in DECORATOR:
                work = sweep.tries(option, _traced, lambda value: value, {option: make()})
                value = make()
                assert sweep.tries(option, work, value) is value
                steps = sweep.tries(option, _traced, _one_step, {option: make()})
                assert [*sweep.tries(option, steps, value)][0] is value
        sweep.recorded(root)
        everything = {option: make() for option in ("tags", "span_type", "attributes")}
        sweep.tries("root", _traced(lambda value: value, everything), make())


def _traced(function: Callable[[Any], Any], options: dict[str, Any]) -> Any:
    return traced(**options, strict=False)(function)


def _one_step(value: Any) -> Iterator[Any]:
    yield value


SETTINGS: dict[str, Callable[[Any], Any]] = {
    "scope": lambda value: nullcontext(TraceStateManager(scope=value)),
    "watch": spanguard.watch,
    "strict": spanguard.strict,
    "value_chars": lambda value: spanguard.limits(value_chars=value),
    "message_chars": lambda value: spanguard.limits(message_chars=value),
    "attributes": lambda value: spanguard.limits(attributes=value),
    "exit_seconds": lambda value: spanguard.limits(exit_seconds=value),
}


def test_a_setting_refuses_what_it_is_not_made_for_by_a_value_error(sweep: Sweep) -> None:
    """`limits`, `watch`, `strict` and a manager's scope raise ValueError, and nothing else."""
    for make in sweep.values():
        for name, setting in SETTINGS.items():
            sweep.tries(name, _set_and_undo, setting, make())


def _set_and_undo(setting: Callable[[Any], Any], value: Any) -> None:
    try:
        with setting(value):
            pass
    except ValueError:
        pass


def test_any_value_as_headers(sweep: Sweep) -> None:
    """What a stranger sends is read, or it is no context."""
    for make in sweep.values():
        for headers in (make(), [make()], [(make(), make())], {"traceparent": make()}):
            context = sweep.tries("headers", spanguard.TraceContext.from_headers, headers)
            assert not context


def test_any_value_for_what_looks_after_the_process(sweep: Sweep) -> None:
    """What flushes, lists and closes takes anything for a time, a status or a signal."""
    for make in sweep.values():
        sweep.tries("open_spans", spanguard.open_spans, make())
        sweep.tries("close_open_spans", spanguard.close_open_spans, make())
        unhandled = make() if number_of(make()) is None else -1  # some are numbers of signals
        sweep.tries("signals", spanguard.install_signal_handlers, unhandled)
        sweep.tries("signals", spanguard.install_signal_handlers, [unhandled])
    for value in (10**5000, float("nan"), "soon", refusing("__float__")(), numpy.array([1, 2])):
        sweep.tries("flush", spanguard.flush, value)
