"""Arguments as other libraries take them are understood, and what does not fit is told."""

from __future__ import annotations

from typing import Any

import mlflow
import pytest
from mlflow.entities import SpanEvent
from opentelemetry.trace import SpanContext, Status, StatusCode

import spanguard
from spanguard import CustomTraceManager, TraceStateManager, guard, traced, traced_span
from spanguard.exceptions import InvalidSpanArgumentWarning
from tests.store import Store, outcome, status

told = pytest.warns(InvalidSpanArgumentWarning)

# -- OpenTelemetry's setters -------------------------------------------------------------------


def test_an_event_by_its_name_and_attributes(store: Store) -> None:
    """`add_event` takes what OpenTelemetry's takes, and MLflow's event."""
    with traced_span("span") as span:
        writing: Any = span
        writing.add_event("retry", {"n": 1})
        writing.add_event("again", attributes={"n": 2}, timestamp=1_700_000_000_000_000_000)
        writing.add_event(name="named")
        writing.add_event(SpanEvent("event", attributes={"n": 3}))
    events = {event.name: event for event in store.spans()["span"].events}
    assert list(events) == ["retry", "again", "named", "event"]
    assert [dict(event.attributes) for event in events.values()] == [
        {"n": 1},
        {"n": 2},
        {},
        {"n": 3},
    ]
    assert events["again"].timestamp == 1_700_000_000_000_000_000


@pytest.mark.parametrize(
    "given",
    [("ERROR", "why"), (StatusCode.ERROR, "why"), (Status(StatusCode.ERROR, "why"),)],
    ids=["text", "code", "status"],
)
def test_a_status_with_its_description(store: Store, given: Any) -> None:
    """`set_status` takes a description, and OpenTelemetry's statuses."""
    with traced_span("span") as span:
        writing: Any = span
        writing.set_status(*given)
    recorded = store.spans()["span"].status
    assert (recorded.status_code.value, recorded.description) == ("ERROR", "why")


def test_a_link_by_the_context_of_a_span(store: Store) -> None:
    """`add_link` takes OpenTelemetry's context and attributes, as well as MLflow's link."""
    pytest.importorskip("mlflow.entities.link")
    with traced_span("span") as span:
        writing: Any = span
        writing.add_link(SpanContext(0x11, 0x22, is_remote=False), {"why": "retry"})
    (link,) = store.spans()["span"].links
    assert (link.trace_id, link.span_id) == (f"tr-{0x11:032x}", f"{0x22:016x}")
    assert link.attributes == {"why": "retry"}


MISFITS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "inputs: too many": ("set_inputs", (1, 2), {}),
    "inputs: none": ("set_inputs", (), {}),
    "outputs: unknown": ("set_outputs", (1,), {"mask": True}),
    "attribute: no value": ("set_attribute", ("key",), {}),
    "attribute: unknown": ("set_attribute", ("key", 1), {"type": "int"}),
    "attributes: by name": ("set_attributes", (), {"key": 1}),
    "span type: none": ("set_span_type", (), {}),
    "description: too many": ("set_description", ("a", "b"), {}),
    "log level: unknown": ("set_log_level", ("INFO",), {"logger": "x"}),
    "event: too many": ("add_event", ("e", {}, None, 4, 5), {}),
    "link: none": ("add_link", (), {}),
    "status: none": ("set_status", (), {}),
    "status: too many": ("set_status", ("ERROR", "why", 3), {}),
    "exception: as OpenTelemetry": ("record_exception", (ValueError("bad"),), {"escaped": True}),
    "end: as OpenTelemetry": ("end", (), {"end_time": 1}),
    "end: too many": ("end", (1, {}, "OK", None, 5), {}),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_setter_that_is_called_wrongly_is_told(store: Store, misfit: str) -> None:
    """A wrong number of arguments, or an unknown one, is a warning that names the setter."""
    setter, args, kwargs = MISFITS[misfit]
    with traced_span("span") as span:
        with pytest.warns(InvalidSpanArgumentWarning, match=rf"{setter}\(\)"):
            assert getattr(span, setter)(*args, **kwargs) is None
    assert store.spans()["span"].end_time_ns is not None


def test_what_fits_of_a_wrong_call_is_recorded(store: Store) -> None:
    """The rest is ignored."""
    with traced_span("span") as span:
        writing: Any = span
        with told:
            writing.set_outputs("done", mask=True)
        with told:
            writing.set_attribute("key", 1, 2)
        with told:
            writing.record_exception(ValueError("bad"), attributes={"n": 1})
    stored = store.spans()["span"]
    assert (stored.outputs, stored.get_attribute("key"), status(stored)) == ("done", 1, "ERROR")


def test_a_wrong_call_raises_in_strict_mode_when_the_span_closes(store: Store) -> None:
    """As for all that is wrong with a setter: the work it stands in is not cut short."""
    done = []
    with pytest.raises(spanguard.InvalidSpanArgumentError, match="set_inputs"):
        with traced_span("span", strict=True) as span:
            span.set_inputs(1, 2)  # type: ignore[call-arg]
            done.append(True)
    assert done == [True]
    assert store.spans()["span"].inputs == 1


# -- mlflow.start_span's arguments -------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_a_name_a_type_and_attributes(store: Store, strict: bool) -> None:
    """A string first is the name, and what follows is what follows in `mlflow.start_span`."""
    place: Any = traced_span
    with place("fetch", "RETRIEVER", {"k": 1}, strict=strict):
        with place("rank", "RERANKER", attributes={"k": 2}, strict=strict):
            pass
    spans = store.spans()
    assert {name: (s.span_type, s.get_attribute("k")) for name, s in spans.items()} == {
        "fetch": ("RETRIEVER", 1),
        "rank": ("RERANKER", 2),
    }


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        (("a", "TOOL", {}, "b"), {}, "too many"),
        (("a", "TOOL"), {"span_type": "LLM"}, "given twice"),
        (("a", "TOOL"), {"name": "b"}, "given twice"),
        ((17, "a"), {}, "starts no spans"),
        (({}, "a"), {}, "starts no spans"),
    ],
    ids=str,
)
def test_what_is_wrong_with_the_places_is_told(
    store: Store, args: Any, kwargs: Any, match: str
) -> None:
    """And a span is recorded all the same; in strict mode nothing opens."""
    with pytest.warns(InvalidSpanArgumentWarning, match=match):
        with traced_span(*args, **kwargs):
            pass
    with pytest.raises(spanguard.InvalidSpanArgumentError, match=match):
        with traced_span(*args, **kwargs, strict=True):
            pass
    assert len(store.trace().data.spans) == 1


def test_a_guarded_client_that_is_none_is_told(store: Store) -> None:
    """`guard()` of something else is a guard of MLflow's own client."""
    with pytest.warns(InvalidSpanArgumentWarning, match="starts no spans"):
        client: Any = guard("sqlite:///x.db")  # type: ignore[arg-type]
    client.end_trace(client.start_trace("root").trace_id)
    assert store.spans()["root"].end_time_ns is not None


# -- experiments by name -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a name", "2024", 'it\'s "so"', "ünïcödé"])
@pytest.mark.parametrize("face", ["block", "guard", "manager", "custom", "traced"])
def test_an_experiment_by_its_name(store: Store, face: str, name: str) -> None:
    """A name that exists is understood, and told; the trace goes there."""
    wanted = mlflow.create_experiment(name)
    with pytest.warns(InvalidSpanArgumentWarning, match="is the name"):
        _record(face, experiment_id=name)
    assert store.trace().info.experiment_id == wanted


@pytest.mark.parametrize("name", ["no such name", "deleted", "99", "", "a\ud800", "x" * 600])
def test_an_experiment_that_is_none(store: Store, name: str) -> None:
    """An unknown name or id, and what was deleted: the active experiment takes the trace."""
    mlflow.MlflowClient().delete_experiment(mlflow.create_experiment("deleted"))
    with pytest.warns(InvalidSpanArgumentWarning, match="There is no experiment"):
        _record("block", experiment_id=name)
    assert store.trace().info.experiment_id == "0"


def test_a_deleted_experiment_by_its_id(store: Store) -> None:
    """It takes no traces: the active experiment takes this one."""
    gone = mlflow.create_experiment("deleted")
    mlflow.MlflowClient().delete_experiment(gone)
    with pytest.warns(InvalidSpanArgumentWarning, match="There is no experiment"):
        _record("block", experiment_id=gone)
    assert store.trace().info.experiment_id == "0"


def test_an_experiment_that_comes_to_be(store: Store) -> None:
    """A name that was unknown is looked up again."""
    with told:
        _record("block", experiment_id="late")
    wanted = mlflow.create_experiment("late")
    _record("block", experiment_id="late")
    assert [trace.info.experiment_id for trace in store.traces()] == ["0", wanted]


def _record(face: str, **given: Any) -> None:
    if face == "block":
        with traced_span("root", **given):
            pass
    elif face == "guard":
        client = guard()
        client.end_trace(client.start_trace("root", **given).trace_id)
    elif face == "manager":
        manager = TraceStateManager()
        manager.push_trace("root", **given)
        manager.pop_trace()
    elif face == "custom":
        with CustomTraceManager().custom_trace("ada", "job", **given):
            pass
    else:
        kind = mlflow.entities.trace_location.MlflowExperimentLocation
        traced(lambda: None, trace_destination=kind(given["experiment_id"]))()


# -- custom traces -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["block", "start"])
def test_a_custom_trace_takes_what_a_span_takes(store: Store, how: str) -> None:
    """Payloads, tags, type, user and the like mean what they mean for `traced_span`."""
    manager = CustomTraceManager()
    experiment_id = mlflow.create_experiment("shop")
    given: dict[str, Any] = {
        "custom_trace_id": "order-42",
        "inputs": {"cart": 7},
        "tags": {"tier": "gold", "custom_trace_id": "mine"},
        "metadata": {"region": "eu"},
        "span_type": "CHAIN",
        "user": "eve",
        "session_id": "s-1",
        "experiment_id": experiment_id,
        "attributes": {"total": 3, "custom_trace_id": "mine"},
        "rows": 5,
    }
    if how == "block":
        with manager.custom_trace("ada", "checkout", **given):
            pass
    else:
        manager.start_custom_trace("ada", "checkout", **given)
        manager.end_custom_trace("order-42")
    trace = store.trace()
    (root,) = trace.data.spans
    assert (root.inputs, root.span_type) == ({"cart": 7}, "CHAIN")
    assert trace.info.experiment_id == experiment_id
    assert trace.info.tags["tier"] == "gold"
    assert trace.info.tags["custom_trace_id"] == "order-42"
    metadata = trace.info.trace_metadata
    assert metadata["region"] == "eu"
    assert metadata["mlflow.trace.user"] == "eve"
    assert metadata["mlflow.trace.session"] == "s-1"
    own = {k: v for k, v in root.attributes.items() if not k.startswith("mlflow.")}
    assert own == {
        "custom_trace_id": "order-42",
        "user_id": "ada",
        "operation": "checkout",
        "total": 3,
        "rows": 5,
        "session_id": "s-1",
    }


def test_what_is_expected_of_a_custom_trace(store: Store) -> None:
    """`expected` and `strict` are the span's, not the manager's."""
    manager = CustomTraceManager()
    with pytest.raises(KeyError):
        with manager.custom_trace("ada", "x", expected=KeyError):
            raise KeyError("k")
    with pytest.raises(spanguard.OrphanedSpanError):
        with manager.custom_trace("ada", "y", strict=True):
            mlflow.MlflowClient().start_span(
                "left", spanguard.current_span().trace_id, spanguard.current_span().span_id
            )
    assert outcome(store.traces()[0].data.spans[0]) == "expected"


def test_what_its_id_decides_is_told(store: Store) -> None:
    """The place and the name of a custom trace cannot be chosen: told, and kept as attributes."""
    with pytest.warns(InvalidSpanArgumentWarning, match="parent_id"):
        with CustomTraceManager().custom_trace("ada", "x", parent_id="abc"):
            pass
    assert store.trace().data.spans[0].get_attribute("parent_id") == "abc"


# -- pop_trace(error=...) ----------------------------------------------------------------------

ERRORS: dict[str, BaseException] = {
    "error": ValueError("bad"),
    "expected": KeyError("k"),
    "interrupted": KeyboardInterrupt(),
    "closed_early": GeneratorExit(),
    "ok": SystemExit(0),
}


@pytest.mark.parametrize("expected_outcome", ERRORS)
@pytest.mark.parametrize("scope", ["context", "process"])
def test_a_span_is_popped_as_an_exception_would_have_ended_it(
    store: Store, scope: Any, expected_outcome: str
) -> None:
    """Status, outcome, attributes and event are those of a block that the exception left."""
    error = ERRORS[expected_outcome]
    manager = TraceStateManager(scope=scope)
    span = manager.push_trace("popped", expected=KeyError)
    assert manager.pop_trace(span, error=error, outputs="so far") is span
    with pytest.raises(type(error)):
        with manager.trace("left", expected=KeyError):
            raise error
    popped, left = store.spans()["popped"], store.spans()["left"]
    assert outcome(popped) == outcome(left) == expected_outcome
    assert popped.outputs == "so far"
    assert popped.status == left.status
    assert [e.name for e in popped.events] == [e.name for e in left.events]
    for key in ("error", "error_type", "error_message"):
        assert popped.get_attribute(key) == left.get_attribute(key)


@pytest.mark.filterwarnings("ignore::spanguard.SpanguardWarning")
@pytest.mark.parametrize("given", ["it broke", ValueError, 17])
def test_an_error_that_is_no_exception(store: Store, given: Any) -> None:
    """Its text is recorded as one: whoever gives an error does not mean that all went well."""
    manager = TraceStateManager()
    manager.push_trace("span")
    manager.pop_trace(error=given)
    stored = store.spans()["span"]
    assert (status(stored), stored.get_attribute("error")) == ("ERROR", str(given))


# -- payloads that raise what is no Exception --------------------------------------------------


class Odd(BaseException):
    """What no `except Exception` takes."""


class Payload:
    """A value whose text raises."""

    def __init__(self, error: type[BaseException]) -> None:
        self._error = error

    def __repr__(self) -> str:
        raise self._error


def _returned(value: Any) -> None:
    assert traced(name="span")(lambda: value)() is value


def _popped(value: Any) -> None:
    manager = TraceStateManager()
    manager.push_trace("span")
    manager.pop_trace(outputs=value)


def _guarded(value: Any) -> None:
    client = guard()
    client.end_trace(client.start_trace("span").trace_id, outputs=value)


def _customised(value: Any) -> None:
    manager = CustomTraceManager()
    manager.start_custom_trace("ada", "x", custom_trace_id="span")
    manager.end_custom_trace("span", outputs=value)


def _ended(value: Any) -> None:
    TraceStateManager().push_trace("span").end(value)


LAST_WRITES = [_returned, _popped, _guarded, _customised, _ended]


@pytest.mark.parametrize("error", [Odd, SystemExit, GeneratorExit, RuntimeError])
@pytest.mark.parametrize("write", LAST_WRITES)
def test_what_a_results_repr_raises_is_contained(
    store: Store, write: Any, error: type[BaseException]
) -> None:
    """Whatever it is, the span ends well, and the output says what there was."""
    write(Payload(error))
    stored = store.spans()["span"]
    assert status(stored) == "OK"
    assert f"raised {error.__name__}" in str(stored.outputs)


@pytest.mark.parametrize("write", LAST_WRITES)
def test_an_interrupt_in_a_results_repr_passes_and_the_span_has_ended(
    store: Store, write: Any
) -> None:
    """Ctrl-C is the user's: it reaches them, and leaves nothing open."""
    with pytest.raises(KeyboardInterrupt):
        write(Payload(KeyboardInterrupt))
    assert spanguard.open_spans() == []
    assert status(store.spans()["span"]) == "ERROR"
