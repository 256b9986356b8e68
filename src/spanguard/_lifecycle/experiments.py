"""Which experiment is meant, and whether it exists: asked once for each, and never for long."""

from __future__ import annotations

from functools import partial

from spanguard._base.values import text_of
from spanguard._mlflow import destination, recording, store
from spanguard._record.text import clean_text
from spanguard.exceptions import InvalidSpanArgumentError

__all__ = ["read"]


# (tracking URI, what was given) -> the id. Bounded: ids come from configuration, but not always.
_MAX_REMEMBERED = 1_000
_known: dict[tuple[str, str], str] = {}


def read(
    experiment_id: object, span_name: str
) -> tuple[str | None, InvalidSpanArgumentError | None]:
    """Return the id of an experiment, and what is wrong with what was given for it.

    A name is understood. No id where there is no such experiment: MLflow would lose the whole
    trace. If the store does not answer in two seconds, what was given is taken for this once.
    """
    given = text_of(experiment_id)
    if not given:
        return None, _unknown(experiment_id, span_name)
    if recording.is_recording():  # a test without a store
        return given, None
    key = (destination.tracking_uri(), given)
    found = _known.get(key)
    if found is None:
        answer = store.ask("looking up an experiment", partial(_find, given))
        if answer is None:
            return given, None
        if not answer:  # not remembered: it may be created yet
            return None, _unknown(given, span_name)
        if len(_known) >= _MAX_REMEMBERED:
            _known.clear()
        found = _known[key] = answer[0]
    return found, None if found == given else _by_name(given, found, span_name)


def _find(given: str) -> list[str]:
    found = destination.find_experiment(clean_text(given))
    return [] if found is None else [found]


def _unknown(experiment_id: object, span_name: str) -> InvalidSpanArgumentError:
    shown = clean_text(experiment_id, 100)
    return InvalidSpanArgumentError(
        f"There is no experiment with the id {shown!r}: MLflow would lose the trace of span "
        f"{span_name!r}. It goes to the active experiment. Pass the id of an experiment as a "
        "string.",
        span_name=span_name,
    )


def _by_name(given: str, found: str, span_name: str) -> InvalidSpanArgumentError:
    return InvalidSpanArgumentError(
        f"experiment_id of span {span_name!r} is the name {clean_text(given, 100)!r}; its trace "
        f"goes to the experiment of that name, {found!r}. Pass this id.",
        span_name=span_name,
    )
