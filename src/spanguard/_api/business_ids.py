"""Traces under business ids: the ids that other systems know them by."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any

from mlflow.entities import LiveSpan, Trace

from spanguard import _mlflow
from spanguard._base.blocks import Block
from spanguard._base.config import is_strict
from spanguard._base.findings import contained, settle
from spanguard._base.site import user_site
from spanguard._base.values import is_a, is_the_users, kind_name
from spanguard._lifecycle import chosen_ids
from spanguard._lifecycle.handle import OpenedSpan
from spanguard._lifecycle.opening import open_span
from spanguard._lifecycle.request import SpanRequest
from spanguard._mlflow import store
from spanguard._process import registry
from spanguard._process.ambient import OverlappingAmbient
from spanguard._record.payload import (
    MAX_LABEL_CHARS,
    as_mapping,
    clean_labels,
    clean_text,
    shortened,
    whole_text,
)
from spanguard.exceptions import (
    DuplicateTraceIdError,
    InvalidSpanArgumentError,
    SpanguardError,
    UnknownSpanError,
)

__all__ = ["CustomTraceManager", "trace_id_for"]

CUSTOM_TRACE_ID = "custom_trace_id"

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

# Before the id: so a hash made for something else is never a trace id of ours.
_DOMAIN = "spanguard:custom_trace_id:"


def trace_id_for(custom_trace_id: str) -> str:
    """Return the MLflow trace id that a business id maps to, without asking anyone.

    `tr-`, then the first 32 hexadecimal digits (128 bits) of the SHA-256 of the UTF-8 text
    `spanguard:custom_trace_id:` followed by the id. No key, no salt: any system can compute it, in
    a shell by `printf 'spanguard:custom_trace_id:%s' "$id" | sha256sum | cut -c1-32`. The digits
    are the OpenTelemetry trace id, too. Lone surrogates and NULs, which no store takes, are read
    as what is written for them: `\\udc80`, `\\x00`.

    >>> import spanguard
    >>> spanguard.trace_id_for("order-42")
    'tr-a1d82f31dc228e1635c54d7eac5425d0'
    """
    return _mlflow.mlflow_trace_id_of(int(_otel_trace_id(whole_text(custom_trace_id)), 16))


def _otel_trace_id(custom_id: str) -> str:
    return hashlib.sha256((_DOMAIN + custom_id).encode()).hexdigest()[:32]


# Of all managers, held for a look into one. Re-entrant: a finalizer may end a trace meanwhile.
_lock = threading.RLock()


def _renew_lock_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock_in_child)


class CustomTraceManager:
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

    def __init__(
        self,
        client: Any = None,
        *,
        id_factory: Callable[[Any, Any], str] | None = None,
        strict: bool | None = None,
    ) -> None:
        self._client = client
        self._id_factory = id_factory
        self._strict = strict
        # By custom id, of all threads and tasks; None: about to start. What another API ended is
        # in it until the next look.
        self._traces: dict[str, OpenedSpan | None] = {}

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

    def _generate(self, user_id: Any, operation: Any) -> tuple[str, list[SpanguardError]]:
        if self._id_factory is None:
            return _generated(user_id, operation), []
        try:
            made = self._id_factory(user_id, operation)
        except BaseException as error:
            if is_the_users(error):
                raise
            finding = InvalidSpanArgumentError(
                f"The id_factory raised {kind_name(error)}; an id was generated. Let it "
                "return a text for any user id and operation."
            )
            return _generated(user_id, operation), [finding]
        return _read_id(made, "What the id_factory returned", user_id, operation)

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
        _, opened = self._start(user_id, operation, custom_trace_id, attributes)
        opened.activate(kind=OverlappingAmbient)
        return opened.proxy  # type: ignore[return-value]

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
        opened = self._take(whole_text(custom_trace_id))
        if opened is None:
            findings: list[SpanguardError] = [_unknown(custom_trace_id)]
            strict = self._strict
        else:
            findings = opened.write_last(outputs, attributes, status)
            findings += opened.close()
            strict = opened.strict
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
        self, user_id: Any, operation: Any, given: Any, attributes: dict[str, Any]
    ) -> tuple[str, OpenedSpan]:
        """Start a trace under the wanted id, or one with a suffix; not active yet."""
        if given is None:
            wanted, findings = self._generate(user_id, operation)
        else:
            wanted, findings = _read_id(given, "The custom_trace_id", user_id, operation)
        request_for = partial(self._request, user_id, operation, attributes)
        custom_id, request = wanted, request_for(wanted)
        if not self._claim(custom_id, request):
            if is_strict(request.strict):
                findings.append(_duplicate(wanted, "nothing was started"))
                settle(findings, strict=True, raised=None, site=user_site(2))
            # Not counted up: the id with _2 may be another order's. If this one is in use as
            # well, open_span gives the trace an id that does not derive from it.
            custom_id = f"{wanted}_{_random_digits()}"
            request = request_for(custom_id)
            findings.append(_duplicate(wanted, f"the trace is {_shown(custom_id)}"))
        request.findings += findings
        return custom_id, self._open(custom_id, request)

    def _request(
        self, user_id: Any, operation: Any, given: dict[str, Any], custom_id: str
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
                "otel_trace_id": _otel_trace_id(custom_id),
                "new_trace": True,
            },
        )
        ignored = [key for key in _DECIDED_BY_THE_ID if key in given]
        if ignored:
            request.findings.append(_not_to_choose(ignored, custom_id))
        return request

    def _claim(self, custom_id: str, request: SpanRequest) -> bool:
        """Take an id for a trace that is about to start; False if one has it, here or stored."""
        with _lock:
            self._forget_ended()
            if custom_id in self._traces:
                return False
            self._traces[custom_id] = None
        is_free = False
        try:
            is_free = chosen_ids.reserve(request)
        finally:
            if not is_free:
                self._traces.pop(custom_id, None)
        return is_free

    def _open(self, custom_id: str, request: SpanRequest) -> OpenedSpan:
        try:
            opened = open_span(request, activate=False)
        except BaseException:
            self._traces.pop(custom_id, None)
            raise
        if not _mlflow.is_noop(opened.live):
            with contained("recording a client request id"):
                _mlflow.set_client_request_id(opened.live.trace_id, _client_request_id(custom_id))
        with _lock:
            self._traces[custom_id] = opened
        return opened

    def _take(self, custom_id: str) -> OpenedSpan | None:
        """Take an open trace off the manager. Exactly one caller gets it, in whatever thread."""
        with _lock:
            opened = self._traces.get(custom_id)
            if opened is None:
                return None
            del self._traces[custom_id]
        return opened if opened.is_open else None

    def _let_go(self, custom_id: str, opened: OpenedSpan) -> None:
        with _lock:
            if self._traces.get(custom_id) is opened:
                del self._traces[custom_id]

    def _forget_ended(self) -> None:
        """Let go of what another API has ended. Call it locked."""
        for custom_id, opened in list(self._traces.items()):
            if opened is not None and not opened.is_open:
                self._let_go(custom_id, opened)

    # -- looking

    def get_active_trace(self, custom_trace_id: str) -> LiveSpan | None:
        """Return the root span of the open trace that this manager started under an id, or None."""
        opened = self._traces.get(whole_text(custom_trace_id))
        return opened.proxy if opened is not None and opened.is_open else None  # type: ignore[return-value]

    @property
    def active_traces(self) -> Mapping[str, LiveSpan]:
        """The root spans of the open traces by custom id, read-only, as it is now.

        A trace leaves it when it ends, by whatever API.
        """
        traces = list(self._traces.items())
        active: Any = {key: one.proxy for key, one in traces if one is not None and one.is_open}
        return MappingProxyType(active)

    def find_trace(self, custom_trace_id: str) -> Trace | None:
        """Return the stored trace with an id, whichever process started it, or None.

        One look-up by `trace_id_for`. Where that finds nothing, the newest trace of all
        experiments with the tag `custom_trace_id`: one that could not have the derived id, or that
        another tool tagged. A trace that has just ended in this process is handed to the store
        first; one that is open is not in the store (`get_active_trace` has it). None, too, if the
        store fails or does not answer in 30 seconds; the logger `spanguard` says so. Never raises.
        """
        custom_id = whole_text(custom_trace_id)
        return store.read("finding a trace by its custom id", partial(_find, custom_id))


class CustomTraceBlock(Block[LiveSpan]):
    """The with-block of `CustomTraceManager.custom_trace`."""

    __slots__ = ("_asked", "_manager", "_started")

    def __init__(self, manager: CustomTraceManager, asked: tuple[Any, Any, Any, Any]) -> None:
        self._manager = manager
        self._asked: tuple[Any, Any, Any, Any] | None = asked
        self._started: tuple[str, OpenedSpan] | None = None

    def __enter__(self) -> LiveSpan:
        asked, self._asked = self._asked, None
        if asked is None:
            raise RuntimeError(
                "This block has been entered before. Make a new one for each: "
                "manager.custom_trace(...)."
            )
        self._started = self._manager._start(*asked)
        opened = self._started[1]
        opened.activate()
        return opened.proxy  # type: ignore[return-value]

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        started, self._started = self._started, None
        if started is not None:
            custom_id, opened = started
            self._manager._let_go(custom_id, opened)
            opened.finish(exc)


# -- ids ---------------------------------------------------------------------------------------


def _generated(user_id: Any, operation: Any) -> str:
    now = datetime.now(timezone.utc)
    return f"{whole_text(user_id)}_{whole_text(operation)}_{now:%Y%m%d%H%M%S}_{_random_digits()}"


def _random_digits() -> str:
    return uuid.uuid4().hex[:8]  # not of `random`, which user code may seed


def _read_id(
    given: Any, what: str, user_id: Any, operation: Any
) -> tuple[str, list[SpanguardError]]:
    """Read an id that a user has given; a generated one where there is nothing in it."""
    custom_id = whole_text(given) if given is not None else ""
    if custom_id and is_a(given, str):
        return custom_id, []
    custom_id = custom_id or _generated(user_id, operation)
    finding = InvalidSpanArgumentError(
        f"{what} is no text with at least one character; the trace is {_shown(custom_id)}. "
        "Use a string."
    )
    return custom_id, [finding]


def _client_request_id(custom_id: str) -> str:
    is_short = len(custom_id) <= _mlflow.MAX_CLIENT_REQUEST_ID_CHARS
    return custom_id if is_short else trace_id_for(custom_id)


def _shown(custom_id: Any) -> str:
    return repr(clean_text(custom_id, 100))


def _duplicate(custom_id: str, instead: str) -> DuplicateTraceIdError:
    return DuplicateTraceIdError(
        f"The custom trace id {_shown(custom_id)} is in use by another trace, open or stored; "
        f"{instead}. Use an id for one trace only.",
        span_name=clean_text(custom_id),
        trace_id=trace_id_for(custom_id),
    )


def _not_to_choose(given: list[str], custom_id: str) -> InvalidSpanArgumentError:
    return InvalidSpanArgumentError(
        f"{', '.join(given)} of the custom trace {_shown(custom_id)} cannot be chosen: its id "
        "decides. Recorded as attributes. Use traced_span() for a span of your choice, or pass "
        "attributes={...}.",
        span_name=clean_text(custom_id),
    )


def _unknown(custom_trace_id: Any) -> UnknownSpanError:
    return UnknownSpanError(
        f"This manager has no open trace with the custom id {_shown(custom_trace_id)}: it has "
        "ended, or was not started here. Nothing was done. End each trace once, by the id in its "
        f"attribute {CUSTOM_TRACE_ID!r}.",
        span_name=clean_text(custom_trace_id),
        trace_id=trace_id_for(custom_trace_id),
    )


def _find(custom_id: str) -> Trace | None:
    if not custom_id:
        return None
    number = int(_otel_trace_id(custom_id), 16)
    if registry.has_just_ended(number):
        _mlflow.flush_everything()
    found = store.get_trace(_mlflow.mlflow_trace_id_of(number))
    if found is None:
        found = store.find_by_tag(CUSTOM_TRACE_ID, shortened(custom_id, MAX_LABEL_CHARS))
    return found
