"""MLflow's own client, told from one whose calls do more: a subclass, a double, a patched one.

What its four calls do at the start and the end of a span we do ourselves, and for less. They have
to be called only where that is not all.
"""

from __future__ import annotations

from mlflow.tracking import MlflowClient

from spanguard._mlflow.known_code import names_of_function

__all__ = ["is_plain_client"]


# What each of the four names, in the MLflows that are known.
_KNOWN = {
    "start_trace": (
        "mlflow get_current_active_span MlflowException trace_id BAD_REQUEST start_span_no_context",
        "mlflow get_current_active_span MlflowException trace_id BAD_REQUEST TraceMetadataKey "
        "SOURCE_RUN start_span_no_context",  # from 3.14 on
    ),
    "start_span": (
        "NO_OP_SPAN_TRACE_ID NoOpSpan MlflowException INVALID_PARAMETER_VALUE InMemoryTraceManager "
        "get_instance get_span_from_id RESOURCE_DOES_NOT_EXIST start_span_no_context",
    ),
    "end_trace": (
        "NO_OP_SPAN_TRACE_ID InMemoryTraceManager get_instance get_root_span_id get_trace "
        "MlflowException RESOURCE_DOES_NOT_EXIST info status TraceStatus end_statuses "
        "INVALID_PARAMETER_VALUE get_span_from_id end",
    ),
    "end_span": ("InMemoryTraceManager get_instance get_span_from_id end",),
}

_calls = {name: vars(MlflowClient).get(name) for name in _KNOWN}
_is_known = all(names_of_function(call) in _KNOWN[name] for name, call in _calls.items())


def is_plain_client(client: object) -> bool:
    """Tell whether a client is MLflow's own, and its calls are what they were."""
    if type(client) is not MlflowClient or not _is_known:
        return False
    of_class, of_client = vars(MlflowClient), vars(client)
    return all(
        of_class.get(name) is call and name not in of_client for name, call in _calls.items()
    )
