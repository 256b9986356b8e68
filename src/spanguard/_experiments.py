"""Whether an experiment exists: asked once per id, and never for long."""

from __future__ import annotations

from functools import partial

from spanguard import _mlflow, _store
from spanguard._payload import clean_text
from spanguard.exceptions import InvalidSpanArgumentError

__all__ = ["check"]

# (tracking URI, experiment id) -> exists. Bounded: ids come from configuration, but not always.
_MAX_REMEMBERED = 1_000
_known: dict[tuple[str, str], bool] = {}


def check(experiment_id: object, span_name: str) -> InvalidSpanArgumentError | None:
    """Return a finding if an experiment does not exist: MLflow would lose the whole trace.

    If the store does not answer in two seconds, the id is taken as good for this once.
    """
    if not isinstance(experiment_id, str):
        return _finding(experiment_id, span_name)
    if _mlflow.is_recording():  # a test without a store
        return None
    key = (_mlflow.tracking_uri(), experiment_id)
    if key not in _known:
        exists = partial(_mlflow.experiment_exists, experiment_id)
        answer = _store.ask("looking up an experiment", exists)
        if answer is None:
            return None
        if len(_known) >= _MAX_REMEMBERED:
            _known.clear()
        _known[key] = answer
    if _known[key]:
        return None
    del _known[key]  # it may be created yet
    return _finding(experiment_id, span_name)


def _finding(experiment_id: object, span_name: str) -> InvalidSpanArgumentError:
    shown = clean_text(experiment_id, 100)
    return InvalidSpanArgumentError(
        f"There is no experiment with the id {shown!r}: MLflow would lose the trace of span "
        f"{span_name!r}. It goes to the active experiment. Pass the id of an experiment as a "
        "string.",
        span_name=span_name,
    )
