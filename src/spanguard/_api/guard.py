"""Existing code on the raw client, made safe in the line where the client is made."""

from __future__ import annotations

from mlflow.tracking import MlflowClient

from spanguard._api.guarded_client import GuardedClient

__all__ = ["guard"]


def guard(
    client: MlflowClient | None = None, *, strict: bool | None = None, ambient: bool = False
) -> GuardedClient:
    """Guard code that uses MLflow's client by hand: change this line, and nothing else.

    What comes back is the client, through a transparent proxy. Its `start_trace`, `start_span`,
    `end_span` and `end_trace` take what MLflow's take and return what MLflow's return; all else
    passes through. What those four promise:

    - An end closes open descendants first, as ERROR and `orphaned` with the line that opened
      them. So the trace is always readable.
    - `start_trace` inside an active span, whichever API opened that, joins its trace as a child,
      unless `new_trace=True`. `end_trace` with the id it gave ends just that child.
    - `parent_id=None` is the active span, where that is in the trace, else the trace's root.
    - A recorded error stays an error. A status that MLflow does not know is one.
    - A double end, an unknown id, a parent that ended or is in another trace: mended, and told.
    - `request_id` is another name for `trace_id`.

    Nothing here raises into your code, except in strict mode: then a broken rule raises its
    error, a start before anything opens, an end after everything is recorded; in an `except`
    clause the span above raises at its end, if the exception is over by then. Otherwise it is one
    warning per line. What is open lives until it ends, also when the client is dropped. As a
    with-block, the client closes at the block's end what it has left open: with the block's
    exception if there is one, else as orphans. Where blocks of one client overlap, the last does.

    Args:
        client: the client to guard; methods of it that are not MLflow's own are called. Without
            one, a client is made when something but the four is asked of it: a broken store does
            not show here.
        strict: overrides `strict()` and the environment for what this client opens and ends.
        ambient: make what it opens the active span until it ends, so that fluent spans,
            autologging and further `start_trace` nest under it. Raw code is explicit about
            parents, so the default is no.

    >>> import spanguard
    >>> client = spanguard.guard()
    >>> root = client.start_trace("job")
    >>> step = client.start_span("step", root.trace_id, root.span_id)
    >>> client.end_span(root.trace_id, step.span_id, outputs=42)
    >>> client.end_trace(root.trace_id)
    """
    return GuardedClient(client, strict, ambient)
