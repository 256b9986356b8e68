"""What is taken from a request: its trace, its id, and what is recorded of it."""

from __future__ import annotations

import asyncio
from typing import Any

import mlflow
import pytest

import spanguard
from spanguard import current_span, traced_span
from spanguard.asgi._messages import MAX_BODY_BYTES
from spanguard.exceptions import InvalidSpanArgumentWarning
from tests.asgi.wire import REMOTE, Wire, answering, call, echo, request, requests, scope
from tests.store import Store, own_attributes

REMOTE_TRACE = "tr-0af7651916cd43dd8448eb211c80319c"


def stored_bytes(store: Store) -> bytes:
    spanguard.flush(60)
    return b"".join(path.read_bytes() for path in store.path.parent.glob("mlflow.db*"))


# -- traceparent -------------------------------------------------------------------------------


def continued(header: str | None, **options: Any) -> tuple[Wire, list[str]]:
    """Call with a traceparent; return what the server saw, and the trace in the endpoint."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        span = current_span()
        seen.append(span.trace_id if span is not None else "")
        with traced_span("inside"):
            pass
        await answering()(scope, receive, send)

    headers = [(b"traceparent", header.encode("latin-1"))] if header is not None else []
    return call(app, scope(headers=headers), **options), seen


def test_a_callers_trace_is_continued(store: Store) -> None:
    wire, seen = continued(REMOTE)
    assert seen == [REMOTE_TRACE]
    spans = store.spans()
    assert spans["GET /"].parent_id == "b7ad6b7169203331"
    assert spans["GET /"].trace_id == REMOTE_TRACE
    assert spans["inside"].parent_id == spans["GET /"].span_id
    assert wire.headers["traceparent"] == REMOTE.replace("b7ad6b7169203331", spans["GET /"].span_id)
    assert current_span() is None


def test_a_callers_trace_in_this_process_is_continued(store: Store) -> None:
    with traced_span("caller") as caller:
        header = spanguard.capture().to_headers()["traceparent"]
        # In a thread, as a server has it: nothing is ambient there.
        thread = asyncio.to_thread(continued, header)
        asyncio.run(thread)
    spans = store.spans()
    assert spans["GET /"].parent_id == caller.span_id
    assert spans["inside"].parent_id == spans["GET /"].span_id


def test_a_client_that_gives_back_a_traceparent_does_not_cost_the_trace(store: Store) -> None:
    """The trace has ended here, and waits in MLflow's buffer for its batch."""
    first, _ = continued(None)
    second, _ = continued(first.headers["traceparent"])
    trace = store.trace()
    assert trace.info.state.value == "OK"
    names = sorted(span.name for span in trace.data.spans)
    assert names == ["GET /", "GET /", "inside", "inside"]
    assert first.headers["traceparent"][:35] == second.headers["traceparent"][:35]


def test_a_traceparent_that_is_junk_is_ignored(store: Store) -> None:
    junk = [
        "",
        "junk",
        REMOTE.upper() + "-",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "\xe9" * 10,
        "0" * 60_000,
    ]
    with pytest.warns(InvalidSpanArgumentWarning, match="traceparent"):
        for header in junk:
            continued(header)
    assert [span.name for span in requests(store)] == ["GET /"] * len(junk)


def test_a_stranger_is_not_trusted_where_that_is_said(store: Store) -> None:
    wire, seen = continued(REMOTE, trust_traceparent=False)
    assert seen == [store.trace().info.trace_id] != [REMOTE_TRACE]
    assert wire.headers["traceparent"][3:35] != REMOTE[3:35]


def test_a_callers_decision_not_to_record_is_shared(store: Store) -> None:
    wire, _ = continued(REMOTE[:-1] + "0")
    assert wire.sent[0]["status"] == 200
    assert wire.headers.get("traceparent", "-00").endswith("-00")  # MLflow 3.10 knows of none
    assert store.rows() == 0


def test_the_message_of_an_application_is_not_changed(store: Store) -> None:
    """And where it sets one of our headers itself, that one stays."""
    start = {"type": "http.response.start", "status": 200, "headers": [(b"Traceparent", b"mine")]}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start)
        await send({"type": "http.response.body"})

    wire = call(app)
    assert start["headers"] == [(b"Traceparent", b"mine")]
    assert [name for name, _ in wire.sent[0]["headers"]] == [b"Traceparent", b"x-request-id"]


# -- the request id ----------------------------------------------------------------------------


def identified(*given: str, **options: Any) -> Wire:
    headers = [(b"X-Request-ID", value.encode("latin-1")) for value in given]
    return call(answering(), scope(headers=headers), **options)


def recorded_ids(store: Store) -> tuple[Any, Any]:
    trace = store.trace()
    return trace.data.spans[0].get_attribute("http.request.id"), trace.info.client_request_id


def test_a_request_id_is_taken_recorded_and_given_out(store: Store) -> None:
    wire = identified(" order-7:retry/2 ")
    assert wire.headers["x-request-id"] == "order-7:retry/2"
    assert recorded_ids(store) == ("order-7:retry/2", "order-7:retry/2")
    query = "client_request_id = 'order-7:retry/2'"
    assert len(mlflow.search_traces(filter_string=query, return_type="list")) == 1


def test_a_request_id_that_is_missing_or_junk_is_replaced(store: Store) -> None:
    junk = ["", " ", "a b", "a'b", 'a"b', "<script>", "\xe9", "a\tb", "$(x)"]
    made = {identified(value).headers["x-request-id"] for value in junk}
    made.add(identified().headers["x-request-id"])
    assert len(made) == len(junk) + 1
    for value in made:
        assert (len(value), int(value, 16) > 0) == (32, True)
    assert {trace.info.client_request_id for trace in store.traces()} == made


def test_a_long_request_id_is_cut(store: Store) -> None:
    """And kept out of MLflow's column, which takes 50 characters on some databases."""
    assert identified("x" * 500).headers["x-request-id"] == "x" * 128
    assert recorded_ids(store) == ("x" * 128, None)


def test_an_applications_own_request_id_stays_and_is_recorded(store: Store) -> None:
    wire = call(answering(headers=[(b"X-Request-Id", b"mine")]))
    assert wire.sent[0]["headers"][:1] == [(b"X-Request-Id", b"mine")]
    assert [name for name, _ in wire.sent[0]["headers"]] == [b"X-Request-Id", b"traceparent"]
    assert recorded_ids(store) == ("mine", "mine")


def test_the_header_of_the_request_id_can_be_named(store: Store) -> None:
    headers = [(b"x-correlation-id", b"abc")]
    wire = call(answering(), scope(headers=headers), request_id_header="X-Correlation-ID")
    assert wire.headers["x-correlation-id"] == "abc"
    assert recorded_ids(store) == ("abc", "abc")


def test_without_a_header_there_is_no_request_id(store: Store) -> None:
    wire = identified("abc", request_id_header=None)
    assert "x-request-id" not in wire.headers
    assert recorded_ids(store) == (None, None)


# -- what is recorded --------------------------------------------------------------------------


def posted(body: bytes, **options: Any) -> Wire:
    headers = [(b"authorization", b"Bearer s3cr3t"), (b"x-api-key", b"s3cr3t")]
    given = scope("/login", headers=headers, query_string=b"token=s3cr3t")
    parts = [
        {"type": "http.request", "body": body[:3], "more_body": True},
        {"type": "http.request", "body": body[3:]},
    ]
    return call(echo, given, *parts, **options)


def test_nothing_of_headers_query_bodies_and_address_is_recorded(store: Store) -> None:
    posted(b'{"password": "s3cr3t"}')
    assert own_attributes(request(store)).keys() == {
        "http.request.method",
        "url.path",
        "http.request.id",
        "http.response.status_code",
    }
    assert (request(store).inputs, request(store).outputs) == (None, None)
    assert b"s3cr3t" not in stored_bytes(store)
    assert b"203.0.113.7" not in stored_bytes(store)


def test_headers_are_recorded_when_asked_for(store: Store) -> None:
    call(
        answering(headers=[(b"X-Cache", b"hit"), (b"x-other", b"o")]),
        scope(headers=[(b"Accept", b"a"), (b"accept", b"b"), (b"x-tenant", b"t")]),
        capture_headers=["accept", "X-Cache"],
    )
    found = own_attributes(request(store))
    assert {name: value for name, value in found.items() if ".header." in name} == {
        "http.request.header.accept": ["a", "b"],
        "http.response.header.x-cache": ["hit"],
    }


def test_bodies_are_recorded_when_asked_for(store: Store) -> None:
    limit = MAX_BODY_BYTES
    cases: list[tuple[bytes, Any]] = [
        (b'{"a": [1, "\xc3\xa9"]}', {"a": [1, "é"]}),  # MLflow reads JSON as such
        (b'{"a": ', '{"a": '),
        (b"\x89PNG", "[spanguard: 4 bytes that are no text]"),
        (b"x" * (limit - 1) + b"\xc3\xa9", "x" * (limit - 1) + "[spanguard: 1 bytes cut]"),
    ]
    for body, _ in cases:
        posted(body, capture_bodies=True)
    found = requests(store)
    assert [span.inputs for span in found] == [expected for _, expected in cases]
    assert [span.outputs for span in found] == [expected for _, expected in cases]


def test_inputs_and_outputs_of_the_endpoint_stay(store: Store) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        span = current_span()
        assert span is not None
        span.set_inputs("mine")
        span.set_outputs("mine too")
        await echo(scope, receive, send)

    call(app, None, {"type": "http.request", "body": b"{}"}, capture_bodies=True)
    assert (request(store).inputs, request(store).outputs) == ("mine", "mine too")
