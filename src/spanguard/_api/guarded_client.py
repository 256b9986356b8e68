"""The client that `guard()` gives back: MLflow's, its four calls protected."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import wrapt
from mlflow.entities import LiveSpan
from mlflow.tracking import MlflowClient

from spanguard._api import destination
from spanguard._api.held import Found, Home, find_parent, find_span, find_trace, is_given_out
from spanguard._base.config import is_strict
from spanguard._base.findings import contained, settle
from spanguard._base.open_span import OpenSpan
from spanguard._base.site import Site, user_site
from spanguard._base.values import is_a, truth_of
from spanguard._lifecycle.findings import left_open_finding
from spanguard._lifecycle.handle import SpanHandle
from spanguard._lifecycle.opening import open_handle
from spanguard._lifecycle.request import SpanRequest, no_client
from spanguard._mlflow import starting
from spanguard._process.dropped import is_put_aside
from spanguard.exceptions import SpanguardError

if TYPE_CHECKING:

    class _ClientProxy(MlflowClient):
        __wrapped__: MlflowClient

        def __init__(self, wrapped: object) -> None: ...
else:
    _ClientProxy = wrapt.BaseObjectProxy
from spanguard._api.guarded_calls import GuardedSpan, LateClient, TraceRequest, id_of, starts_spans

__all__ = ["GuardedClient"]


class GuardedClient(_ClientProxy):
    """An MLflow client by delegation, whose spans always close. Made by `guard()`."""

    _self_ambient: bool
    _self_home: Home

    def __init__(self, client: Any, strict: bool | None, ambient: bool) -> None:
        ambient = bool(truth_of(ambient))
        if is_a(client, GuardedClient):  # guarding once is enough
            strict = client._self_home.strict if strict is None else strict
            ambient = ambient or client._self_ambient
            client = client._self_home.client
        elif client is not None and not starts_spans(client):
            settle([no_client(client, "guard()")], strict=strict, raised=None, site=user_site(2))
            client = None
        super().__init__(LateClient() if client is None else client)
        self._self_ambient = ambient
        self._self_home = Home(client, strict)
        self._self_blocks: list[None] = []  # one of each entered: appending is atomic
        self._self_is_told_where = False

    # -- starting

    def start_trace(
        self,
        name: str,
        span_type: str = "UNKNOWN",
        inputs: Any = None,
        attributes: dict[str, Any] | None = None,
        tags: dict[str, Any] | None = None,
        experiment_id: str | None = None,
        start_time_ns: int | None = None,
        run_id: str | None = None,
        links: list[Any] | None = None,
        *,
        new_trace: bool = False,
    ) -> LiveSpan:
        """Start a trace; inside an active span a child in its trace, unless `new_trace`.

        Tags go to the trace that is joined. An experiment or a run that is not the joined
        trace's own is a finding.

        Raises:
            InvalidSpanArgumentError: in strict mode, before anything opens; also where this
                client was made for another tracking URI than the one that traces go to.
        """
        request = TraceRequest(
            (),
            name=name,
            client=self._self_home.client,
            span_type=span_type,
            inputs=inputs,
            attributes=attributes,
            tags=tags,
            experiment_id=experiment_id,
            start_time_ns=start_time_ns,
            run_id=run_id,
            links=links,
            new_trace=new_trace,
            strict=self._self_home.strict,
        )
        self._self_tell_where(request)
        handle = open_handle(request, activate=False)
        return self._self_hold(handle, None, starts_trace=True)

    def start_span(
        self,
        name: str,
        trace_id: str | None = None,
        parent_id: str | None = None,
        span_type: str = "UNKNOWN",
        inputs: Any = None,
        attributes: dict[str, Any] | None = None,
        start_time_ns: int | None = None,
        links: list[Any] | None = None,
        *,
        request_id: str | None = None,
    ) -> LiveSpan:
        """Start a span; without a parent under the active span of that trace, else its root.

        A parent that ended, is unknown or belongs to another trace: the trace's root; where the
        trace is over, a new one.

        Raises:
            InvalidParentError, InvalidSpanArgumentError: in strict mode, before anything opens.
        """
        trace_id = id_of(request_id if trace_id is None else trace_id)
        parent_id = id_of(parent_id)
        parent: SpanHandle | None = None
        with contained("finding the parent of a span"):
            parent = find_parent(self._self_home, trace_id, parent_id)
        request = SpanRequest(
            (),
            name=name,
            trace_id=trace_id if parent is None else None,
            parent_id=parent_id if parent is None else None,
            client=self._self_home.client,
            span_type=span_type,
            inputs=inputs,
            attributes=attributes,
            start_time_ns=start_time_ns,
            links=links,
            strict=self._self_home.strict,
        )
        handle = open_handle(request, activate=False, parent=parent)
        return self._self_hold(handle, trace_id, starts_trace=handle.is_root)

    def _self_tell_where(self, request: SpanRequest) -> None:
        """Find, once, that this client looks elsewhere than its traces go."""
        if self._self_is_told_where:
            return
        with contained("comparing tracking URIs"):
            finding = destination.elsewhere(self._self_home.client, request.name)
            if finding is not None:
                request.findings.append(finding)
                # Strict mode opens nothing: it has to refuse the next trace as well.
                self._self_is_told_where = not is_strict(self._self_home.strict)

    def _self_hold(self, handle: SpanHandle, asked: object, *, starts_trace: bool) -> LiveSpan:
        if starting.is_noop(handle.live):
            self._self_home.has_failed_start = True
            return handle.proxy  # type: ignore[return-value]
        with contained("holding an open span"):
            if self._self_ambient:
                handle.activate()
            held = self._self_home.hold(handle, asked, starts_trace=starts_trace)
            same = asked if is_given_out(asked) and held.is_in(asked) else held.trace_id
            handle.proxy = GuardedSpan(handle, same)
        return handle.proxy  # type: ignore[return-value]

    # -- ending

    def end_span(
        self,
        trace_id: str | None = None,
        span_id: str | None = None,
        outputs: Any = None,
        attributes: dict[str, Any] | None = None,
        status: Any = "OK",
        end_time_ns: int | None = None,
        *,
        request_id: str | None = None,
    ) -> None:
        """End a span, its open descendants first. A status of OK does not undo an ERROR.

        Raises:
            OrphanedSpanError, SpanAlreadyEndedError, UnknownSpanError, InvalidSpanArgumentError,
            TraceLostError: in strict mode, after everything is recorded.
        """
        trace_id = id_of(request_id if trace_id is None else trace_id)
        span_id = id_of(span_id)
        self._self_end(
            lambda: find_span(self._self_home, trace_id, span_id),
            (outputs, attributes, status, end_time_ns),
        )

    def end_trace(
        self,
        trace_id: str | None = None,
        outputs: Any = None,
        attributes: dict[str, Any] | None = None,
        status: Any = "OK",
        end_time_ns: int | None = None,
        *,
        request_id: str | None = None,
    ) -> None:
        """End what `start_trace` opened: a trace, or the child that joined one.

        The id from the span that `start_trace` returned means that very span. An equal id from
        elsewhere means the innermost one that is open in that trace, of this thread or task
        before others. The root of a block or a manager is theirs to end.

        Raises:
            OrphanedSpanError, SpanAlreadyEndedError, UnknownSpanError, InvalidSpanArgumentError,
            TraceLostError: in strict mode, after everything is recorded.
        """
        trace_id = id_of(request_id if trace_id is None else trace_id)
        self._self_end(
            lambda: find_trace(self._self_home, trace_id),
            (outputs, attributes, status, end_time_ns),
        )

    def _self_end(
        self, find: Callable[[], Found], last: tuple[object, object, object, object]
    ) -> None:
        handle: SpanHandle | None = None
        findings: list[SpanguardError] = []
        with contained("ending a span by its ids"):
            handle, finding = find()
            if finding is not None:
                findings.append(finding)
            if handle is not None:
                findings += handle.end(*last)
                if handle.entry is None:
                    self._self_home.drop_ended()
        strict = self._self_home.strict
        if findings and handle is not None:
            handle.tell(findings, handle.strict if strict is None else strict, user_site(2))
        elif findings:
            settle(findings, strict=strict, raised=sys.exc_info()[1], site=user_site(2))

    # -- as a block. Not a Block: wrapt's proxies and abstract classes do not go together.

    def __enter__(self) -> GuardedClient:
        self._self_blocks.append(None)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._self_blocks.pop()
        if self._self_blocks:  # another thread's, or one around this one
            return
        if is_put_aside(lambda: self._self_close_left(exc), self._self_home.last_thread()):
            return
        findings: list[SpanguardError] = []
        with contained("closing what a block left open"):
            findings += self._self_close_left(exc)
        if findings:
            settle(findings, strict=self._self_home.strict, raised=exc, site=user_site(2))

    async def __aenter__(self) -> GuardedClient:
        return self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(exc_type, exc, traceback)

    def _self_close_left(self, raised: BaseException | None) -> list[SpanguardError]:
        """Close all that is open, last opened first: children start after their parents."""
        findings: list[SpanguardError] = []
        closed: list[tuple[OpenSpan, Site]] = []
        outermost: SpanHandle | None = None
        for held in reversed(list(self._self_home.open.values())):
            handle = held.handle
            if not handle.is_open:
                continue
            outermost = handle
            if raised is not None:
                findings += handle.close(raised)
            else:
                closed += handle.close_as_orphan("the end of guard()'s block")
        self._self_home.drop_ended()
        if outermost is not None:
            found = f"The block of guard() ended with {len(closed)} open"
            findings += left_open_finding(outermost, closed, found)
        return findings

    # -- how the proxy behaves as an object

    def __copy__(self) -> GuardedClient:
        client = copy.copy(self._self_home.client)
        return GuardedClient(client, self._self_home.strict, self._self_ambient)

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardedClient:
        client = copy.deepcopy(self._self_home.client, memo)
        return GuardedClient(client, self._self_home.strict, self._self_ambient)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A guarded client cannot be pickled: it answers for spans that are open in this "
            "process. Make one where it is used: guard()."
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self.__reduce__()
