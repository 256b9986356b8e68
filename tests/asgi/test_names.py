"""What MLflow's list of traces shows of a request: its name, and how it went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlflow
import pytest
from starlette.applications import Starlette
from starlette.routing import Host, Mount, Route, Router
from starlette.staticfiles import StaticFiles

from spanguard._base import findings
from tests.asgi.wire import (
    answering,
    call,
    echo,
    endpoint,
    fastapi_app,
    previews,
    request,
    requests,
    scope,
)
from tests.store import Store

# -- names -------------------------------------------------------------------------------------


def starlette_app() -> Starlette:
    deeper = Starlette(routes=[Route("/a/{x:int}", endpoint)])
    mounted = Mount("/m/{k}", routes=[Route("/n/{o}", endpoint), Mount("/deeper", app=deeper)])
    return Starlette(
        routes=[
            Route("/items/{item}", endpoint),
            Route("/p/{path:path}/end", endpoint),
            mounted,
            Host("other.test", app=Router([Route("/h/{h}", endpoint)])),
            Mount("/", app=StaticFiles(directory=".")),
        ]
    )


NAMES = {
    fastapi_app: [
        ("GET", "/items/7", "GET /items/{item_id}"),
        ("GET", "/items/no-number", "GET /items/{item_id}"),
        ("POST", "/items/7", "POST /items/{item_id}"),
        ("GET", "/items/7/", "GET"),
        ("GET", "/api/v1/things/3", "GET /api/v1/things/{thing}"),
        ("GET", "/api/v1/orgs/o/3/z", "GET /api/v1/orgs/{org}/{thing}/z"),
        ("GET", "/api/v1/orgs/3/3/z", "GET /api/v1/orgs/{org}/{thing}/z"),
        ("GET", "/sub/acme/a/3", "GET /sub/{tenant}/a/{x}"),
        ("GET", "/sub/acme/none/3", "GET /sub/{tenant}/{path}"),
        ("GET", "/fast/q/1", "GET /fast/q/{q}"),
        ("GET", "/static/mlflow.db", "GET /static/{path}"),
        ("GET", "/docs", "GET /docs"),
        ("GET", "/wp-admin", "GET"),
        ("BREW", "/wp-admin", "HTTP"),
    ],
    starlette_app: [
        ("GET", "/items/7", "GET /items/{item}"),
        ("GET", "/p/a/b/c/end", "GET /p/{path}/end"),
        ("GET", "/m/1/n/2", "GET /m/{k}/n/{o}"),
        ("GET", "/m/1/deeper/a/7", "GET /m/{k}/deeper/a/{x}"),
        ("GET", "/m/1/deeper/a/007", "GET"),  # 7 is not found in it
        ("GET", "/m/1/none", "GET /m/{k}/{path}"),
        ("GET", "/wp-admin", "GET /{path}"),
    ],
}


@pytest.mark.parametrize("make", NAMES, ids=lambda make: make.__name__)
def test_a_trace_is_named_by_method_and_route(store: Store, make: Callable[[], Any]) -> None:
    """What strangers try does not become as many names."""
    app = make()
    for method, path, _ in NAMES[make]:
        call(app, scope(path, method=method))
    found = {}
    for trace in store.traces():
        (span,) = trace.data.spans
        assert trace.info.tags["mlflow.traceName"] == span.name
        assert (span.get_attribute("http.route") or "") == span.name.partition(" ")[2]
        asked = span.get_attribute("http.request.method"), span.get_attribute("url.path")
        found[asked] = span.name
    assert found == {(method, path): name for method, path, name in NAMES[make]}


def test_without_a_router_a_trace_is_named_by_its_path(store: Store) -> None:
    """Unless nothing was found there: it may be anything then."""
    for code, path in ((200, "/plain"), (503, "/plain"), (404, "/wp-admin")):
        call(answering(code), scope(path))
    assert [span.name for span in requests(store)] == ["GET /plain", "GET /plain", "GET"]
    assert trace_names(store) == {"GET /plain", "GET"}


def trace_names(store: Store) -> set[str]:
    return {trace.info.tags["mlflow.traceName"] for trace in store.traces()}


def test_a_root_path_is_not_part_of_the_route(store: Store) -> None:
    call(fastapi_app(), scope("/gate/sub/acme/a/3", root_path="/gate"))
    assert request(store).name == "GET /sub/{tenant}/a/{x}"


def test_another_router_gives_names_by_a_function(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that gives none, or fails, leaves the usual one."""
    monkeypatch.setattr(findings, "reraise_internal", False)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["template"] = "/things/<id>"
        await answering()(scope, receive, send)

    for name in (
        lambda scope: f"call {scope['template']}",
        lambda scope: None,
        lambda scope: 1 / 0,
    ):
        call(app, scope("/things/7"), name=name)
    names = [span.name for span in requests(store)]
    assert names == ["call /things/<id>", "GET /things/7", "GET /things/7"]
    assert trace_names(store) == set(names)


def test_a_trace_that_was_renamed_keeps_its_name(store: Store) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        mlflow.update_current_trace(tags={"mlflow.traceName": "mine"})
        await fastapi_app()(scope, receive, send)

    call(app, scope("/items/7"))
    assert (request(store).name, trace_names(store)) == ("GET /items/{item_id}", {"mine"})


# -- what MLflow's list shows ------------------------------------------------------------------


@pytest.mark.parametrize("make", [fastapi_app, starlette_app])
def test_the_list_tells_requests_apart(store: Store, make: Callable[[], Any]) -> None:
    """A trace's previews are method and path, as they were asked for, and the status."""
    app = make()
    for method, path in (("GET", "/items/7"), ("GET", "/items/8"), ("POST", "/items/8")):
        call(app, scope(path, method=method))
    call(answering(204), scope("/ask", method="POST"))
    assert previews(store) == [
        ("GET /items/7", "200"),
        ("GET /items/8", "200"),
        ("POST /items/8", "405"),
        ("POST /ask", "204"),
    ]


def test_the_list_shows_how_a_request_failed(store: Store) -> None:
    """Without a status the response's preview is what went wrong."""

    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError("secret")

    async def say_nothing(scope: Any, receive: Any, send: Any) -> None:
        pass

    with pytest.raises(LookupError):
        call(fail)
    call(say_nothing)
    call(answering(503))
    assert previews(store) == [
        ("GET /", "LookupError"),
        ("GET /", "no response was sent"),
        ("GET /", "503"),
    ]


def test_the_list_shows_inputs_and_outputs_where_there_are_any(store: Store) -> None:
    """What a request's span has for inputs and outputs says more than a path and a status."""
    call(echo, scope(method="POST"), {"type": "http.request", "body": b"hi"}, capture_bodies=True)
    assert previews(store) == [('"hi"', '"hi"')]


def test_the_list_shows_what_the_endpoint_says(store: Store) -> None:
    """Previews that the endpoint sets stay."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        mlflow.update_current_trace(request_preview="mine", response_preview="mine too")
        await answering()(scope, receive, send)

    call(app)
    assert previews(store) == [("mine", "mine too")]


def test_a_path_of_any_length_and_kind_is_shown(store: Store) -> None:
    """What strangers ask for neither costs the trace nor fills the list."""
    call(answering(404), scope("/" + "x" * 100_000))
    call(answering(404), {**scope(), "path": "/\ud800"})
    (long, _), (odd, _) = previews(store)
    assert long is not None and len(long) < 400
    assert odd == "GET /\\ud800"
