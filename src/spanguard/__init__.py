"""Safe spans for MLflow's low-level tracing client: they always close, once, in order.

`with traced_span(...)` around code, `TraceStateManager` for push and pop. The README has the
first steps, docs/ the manual; each name here has its own documentation.
"""

from spanguard._api import at_fork as _at_fork  # noqa: F401 - what a forked child begins with
from spanguard._api.batch import trace_batch
from spanguard._api.batch_result import BatchResult, ItemOutcome
from spanguard._api.business_ids import CustomTraceManager
from spanguard._api.custom_ids import trace_id_for
from spanguard._api.guard import guard
from spanguard._api.manager import TraceStateManager
from spanguard._api.traced import traced
from spanguard._api.traced_span import current_span, traced_span
from spanguard._base.config import (
    MAX_ATTRIBUTES,
    MAX_MESSAGE_CHARS,
    MAX_VALUE_CHARS,
    Limits,
    limits,
    strict,
)
from spanguard._base.open_span import OpenSpan
from spanguard._delivery.counts import Delivery
from spanguard._delivery.deliver import deliver, delivery
from spanguard._process.flush import flush
from spanguard._process.reports import close_open_spans, open_spans
from spanguard._process.signals import install_signal_handlers
from spanguard._process.watchdog import watch
from spanguard._propagation.carry import carry
from spanguard._propagation.context import TraceContext, capture
from spanguard.exceptions import (
    DuplicateTraceIdError,
    EmptyTraceStackError,
    InvalidParentError,
    InvalidSpanArgumentError,
    OrphanedSpanError,
    OrphanedSpanWarning,
    SpanAlreadyEndedError,
    SpanguardError,
    SpanguardWarning,
    SpanOrderError,
    TraceLostError,
    UnknownSpanError,
)

__version__ = "0.1.0"

__all__ = [
    "MAX_ATTRIBUTES",
    "MAX_MESSAGE_CHARS",
    "MAX_VALUE_CHARS",
    "BatchResult",
    "CustomTraceManager",
    "Delivery",
    "DuplicateTraceIdError",
    "EmptyTraceStackError",
    "InvalidParentError",
    "InvalidSpanArgumentError",
    "ItemOutcome",
    "Limits",
    "OpenSpan",
    "OrphanedSpanError",
    "OrphanedSpanWarning",
    "SpanAlreadyEndedError",
    "SpanOrderError",
    "SpanguardError",
    "SpanguardWarning",
    "TraceContext",
    "TraceLostError",
    "TraceStateManager",
    "UnknownSpanError",
    "__version__",
    "capture",
    "carry",
    "close_open_spans",
    "current_span",
    "deliver",
    "delivery",
    "flush",
    "guard",
    "install_signal_handlers",
    "limits",
    "open_spans",
    "strict",
    "trace_batch",
    "trace_id_for",
    "traced",
    "traced_span",
    "watch",
]
