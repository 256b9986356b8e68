"""Traces under business ids: the ids that other systems know them by."""

from __future__ import annotations

import sys
from functools import partial
from types import TracebackType
from typing import Any

from mlflow.entities import LiveSpan, Trace

from spanguard._api.active_traces import ActiveTraces
from spanguard._api.custom_ids import (
    CUSTOM_TRACE_ID,
    duplicate,
    find,
    generated,
    not_to_choose,
    otel_trace_id,
    quoted,
    random_digits,
    read_id,
    unknown,
)
from spanguard._base.blocks import Block
from spanguard._base.config import is_strict
from spanguard._base.findings import settle
from spanguard._base.interrupts import is_the_users
from spanguard._base.site import user_site
from spanguard._base.values import kind_name
from spanguard._lifecycle.handle import SpanHandle
from spanguard._lifecycle.request import SpanRequest
from spanguard._mlflow import store
from spanguard._process.ambient import OverlappingAmbient
from spanguard._record.payload import MAX_LABEL_CHARS, as_mapping, clean_labels
from spanguard._record.text import shortened, whole_text
from spanguard.exceptions import InvalidSpanArgumentError, SpanguardError

__all__ = ["CustomTraceManager"]


# What `traced_span` takes, and means the same for a custom trace (issue 9, 32).
_OF_A_SPAN = (
    "attributes",
    "expected",
    "experiment_id",
    "inputs",
    "links",
    "metadata",
    "run_id",
    "span_type",
    "start_time_ns",
    "strict",
    "tags",
    "user",
)
_DECIDED_BY_THE_ID = (
    "client",
    "name",
    "new_trace",
    "otel_trace_id",
    "parent_id",
    "request_id",
    "trace_id",
)


class CustomTraceManager(ActiveTraces):
    """Traces that are started, ended and found by ids of your own: an order's, a job's.

    The custom id is the name of the trace, its root's attribute `custom_trace_id`, its tag of
    that name, and its client request id. All of them can be searched for. The MLflow trace id is
    derived from it (`trace_id_for`), so `find_trace` is one look-up, from any process.

    A custom id names one trace. One that is in use, here or in the store, gets a suffix
    (`order-42_1f9c03ab`) and a warning; in strict mode `DuplicateTraceIdError`, before anything
    opens. So read the id that a trace really has from its span:
    `span.get_attribute("custom_trace_id")`. The store is asked at each start, which takes a round
    trip; if it has not answered in 2 seconds the id counts as free, and while it goes on not
    answering no other start waits for it.

    Ids may hold anything. Where MLflow has no room for a long one, it is shortened: the name and
    the tag to 4,000 characters, the client request id, from 51 characters on, to
    `trace_id_for(id)`. The attribute and the derived id stand for the whole.

    What is open when the process ends is closed as an orphan; when the manager and the span are
    dropped before, as abandoned.

    Args:
        client: an MLflow client whose `start_*` and `end_*` are to be called.
        id_factory: `id_factory(user_id, operation)` makes the ids, instead of
            `generate_trace_id`. Where it raises or returns no text, that makes one after all, with
            a warning; in strict mode `InvalidSpanArgumentError`.
        strict: overrides `strict()` and the environment for this manager's spans.

    >>> import spanguard
    >>> manager = spanguard.CustomTraceManager()
    >>> with manager.custom_trace("ada", "checkout", custom_trace_id="order-42") as span:
    ...     span.set_outputs("paid")
    >>> manager.find_trace("order-42").data.spans[0].outputs
    'paid'
    """

    # -- ids

    def generate_trace_id(self, user_id: Any, operation: Any) -> str:
        """Make a custom id: `{user_id}_{operation}_{YYYYmmddHHMMSS, UTC}_{8 random hex digits}`.

        Or what the manager's `id_factory` makes.

        Raises:
            InvalidSpanArgumentError: in strict mode, where the `id_factory` fails.

        >>> import spanguard
        >>> made = spanguard.CustomTraceManager().generate_trace_id("ada", "checkout")
        >>> made.startswith("ada_checkout_2")
        True
        """
        custom_id, findings = self._generate(user_id, operation)
        if findings:
            settle(findings, strict=self._strict, raised=None, site=user_site(2))
        return custom_id

    def _generate(self, user_id: object, operation: object) -> tuple[str, list[SpanguardError]]:
        if self._id_factory is None:
            return generated(user_id, operation), []
        try:
            made = self._id_factory(user_id, operation)
        except BaseException as error:
            if is_the_users(error):
                raise
            finding = InvalidSpanArgumentError(
                f"The id_factory raised {kind_name(error)}; an id was generated. Let it "
                "return a text for any user id and operation."
            )
            return generated(user_id, operation), [finding]
        return read_id(made, "What the id_factory returned", user_id, operation)

    # -- starting and ending

    def start_custom_trace(
        self,
        /,
        user_id: Any,
        operation: Any,
        *,
        custom_trace_id: str | None = None,
        **attributes: Any,
    ) -> LiveSpan:
        """Start a trace under a custom id, and return its root span.

        It is a trace of its own, also inside another, and the ambient span of this context until
        it ends: other spans nest under it. It may be ended in any thread or task, and before
        traces that were started after it; those stay as they are.

        Args:
            user_id: recorded as the attribute `user_id` and as the trace's user.
            operation: recorded as the attribute `operation`.
            custom_trace_id: the id; a generated one, if not given.
            attributes: what `traced_span` takes means the same here: `span_type`, `inputs`,
                `attributes`, `tags`, `metadata`, `experiment_id`, `run_id`, `session_id`, `user`,
                `links`, `start_time_ns`, `expected`, `strict`. All else are attributes of the span,
                and so is `session_id`. The custom id decides on the name and the place of the
                trace: `name`, `parent_id` and the like are attributes, with a warning.

        Raises:
            DuplicateTraceIdError, InvalidSpanArgumentError: in strict mode, before anything opens.

        >>> import spanguard
        >>> manager = spanguard.CustomTraceManager()
        >>> span = manager.start_custom_trace("ada", "import", custom_trace_id="job-7", rows=3)
        >>> list(manager.active_traces)
        ['job-7']
        >>> manager.end_custom_trace("job-7", outputs="done")
        """
        _, handle = self._start(user_id, operation, custom_trace_id, attributes)
        handle.activate(kind=OverlappingAmbient)
        return handle.proxy  # type: ignore[return-value]

    def end_custom_trace(
        self,
        custom_trace_id: str,
        *,
        outputs: Any = None,
        attributes: dict[str, Any] | None = None,
        status: Any = None,
    ) -> None:
        """End the trace that this manager started under an id, what is open in it first.

        In whatever thread or task. An id that no open trace of this manager has: nothing is done,
        and a warning.

        Raises:
            UnknownSpanError, OrphanedSpanError, TraceLostError: in strict mode, after everything
                is closed.
        """
        handle = self._take(whole_text(custom_trace_id))
        if handle is None:
            findings: list[SpanguardError] = [unknown(custom_trace_id)]
            strict = self._strict
        else:
            findings = handle.write_last(outputs, attributes, status)
            findings += handle.close()
            strict = handle.strict
        if findings:
            settle(findings, strict=strict, raised=sys.exc_info()[1], site=user_site(2))

    def custom_trace(
        self,
        /,
        user_id: Any,
        operation: Any,
        *,
        custom_trace_id: str | None = None,
        **attributes: Any,
    ) -> CustomTraceBlock:
        """Start a trace for the length of a with-block; the exception that leaves it decides.

        Takes what `start_custom_trace` takes, and raises the same. Works with `async with` too.

        >>> import spanguard
        >>> manager = spanguard.CustomTraceManager()
        >>> with manager.custom_trace("ada", "checkout", amount=3) as span:
        ...     span.get_attribute("amount")
        3
        """
        return CustomTraceBlock(self, (user_id, operation, custom_trace_id, attributes))

    def _start(
        self, user_id: object, operation: object, given: object, attributes: dict[str, object]
    ) -> tuple[str, SpanHandle]:
        """Start a trace under the wanted id, or one with a suffix; not active yet."""
        if given is None:
            wanted, findings = self._generate(user_id, operation)
        else:
            wanted, findings = read_id(given, "The custom_trace_id", user_id, operation)
        request_for = partial(self._request, user_id, operation, attributes)
        custom_id, request = wanted, request_for(wanted)
        if not self._claim(custom_id, request):
            if is_strict(request.strict):
                findings.append(duplicate(wanted, "nothing was started"))
                settle(findings, strict=True, raised=None, site=user_site(2))
            # Not counted up: the id with _2 may be another order's. If this one is in use as
            # well, open_handle gives the trace an id that does not derive from it.
            custom_id = f"{wanted}_{random_digits()}"
            request = request_for(custom_id)
            findings.append(duplicate(wanted, f"the trace is {quoted(custom_id)}"))
        request.findings += findings
        return custom_id, self._open(custom_id, request)

    def _request(
        self, user_id: object, operation: object, given: dict[str, object], custom_id: str
    ) -> SpanRequest:
        more = {key: value for key, value in given.items() if key not in _OF_A_SPAN}
        asked = {key: given[key] for key in _OF_A_SPAN if given.get(key) is not None}
        label = shortened(custom_id, MAX_LABEL_CHARS)
        named = {CUSTOM_TRACE_ID: custom_id, "user_id": user_id, "operation": operation}
        request = SpanRequest(
            (),
            **{
                "user": user_id,
                "session_id": given.get("session_id"),
                "strict": self._strict,
                **asked,
                "name": label,
                "client": self._client,
                "attributes": {
                    **named,
                    **as_mapping(asked.get("attributes", {})),
                    **more,
                    CUSTOM_TRACE_ID: custom_id,
                },
                "tags": {**clean_labels(asked.get("tags", {})), CUSTOM_TRACE_ID: label},
                "otel_trace_id": otel_trace_id(custom_id),
                "new_trace": True,
            },
        )
        ignored = [key for key in _DECIDED_BY_THE_ID if key in given]
        if ignored:
            request.findings.append(not_to_choose(ignored, custom_id))
        return request

    def find_trace(self, custom_trace_id: str) -> Trace | None:
        """Return the stored trace with an id, whichever process started it, or None.

        One look-up by `trace_id_for`. Where that finds nothing, the newest trace of all
        experiments with the tag `custom_trace_id`: one that could not have the derived id, or that
        another tool tagged. A trace that has just ended in this process is handed to the store
        first; one that is open is not in the store (`get_active_trace` has it). None, too, if the
        store fails or does not answer in 30 seconds; the logger `spanguard` says so. Never raises.
        """
        custom_id = whole_text(custom_trace_id)
        return store.read("finding a trace by its custom id", partial(find, custom_id))


class CustomTraceBlock(Block[LiveSpan]):
    """The with-block of `CustomTraceManager.custom_trace`."""

    __slots__ = ("_asked", "_manager", "_started")

    def __init__(
        self, manager: CustomTraceManager, asked: tuple[object, object, object, dict[str, object]]
    ) -> None:
        self._manager = manager
        self._asked: tuple[object, object, object, dict[str, object]] | None = asked
        self._started: tuple[str, SpanHandle] | None = None

    def __enter__(self) -> LiveSpan:
        asked, self._asked = self._asked, None
        if asked is None:
            raise RuntimeError(
                "This block has been entered before. Make a new one for each: "
                "manager.custom_trace(...)."
            )
        self._started = self._manager._start(*asked)
        handle = self._started[1]
        handle.activate()
        return handle.proxy  # type: ignore[return-value]

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        started, self._started = self._started, None
        if started is not None:
            custom_id, handle = started
            self._manager._let_go(custom_id, handle)
            handle.finish(exc)
