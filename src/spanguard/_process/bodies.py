"""What is ambient inside a generator's body, kept between its steps."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from spanguard._base.settings import SettingBlock, context_settings
from spanguard._mlflow.active import ActiveState, active_state
from spanguard._process.ambient import pushed
from spanguard._process.strands import Work, work_here

__all__ = ["BodyContext"]


# Whose body runs in this context.
_body_here: ContextVar[BodyContext | None] = ContextVar("spanguard_body", default=None)


class BodyContext:
    """What is ambient inside a generator's body, and how strict it is, kept between its steps.

    Entered for each step and left after it: the consumer never sees the body's spans, whichever
    task or thread takes the next step, and the body finds its own again. One step at a time. The
    body is a strand of its own: it runs on after a span that was open when it began.
    """

    __slots__ = (
        "_body",
        "_body_variables",
        "_consumer",
        "_consumer_variables",
        "work",
    )

    def __init__(self) -> None:
        self._body: ActiveState | None = None
        self._body_variables: tuple[Any, ...] = ()
        self.work = Work(moves=True)

    def __enter__(self) -> None:
        self._consumer = active_state()
        self._consumer_variables = _variables()
        self.work.begin_step()
        if self._body is not None:
            self._body.restore()
            _set_variables(*self._body_variables)
        _body_here.set(self)

    def __exit__(self, *exc_info: object) -> None:
        if _body_here.get() is not self:
            # The collector closes a step that was never finished, in whatever context it runs:
            # what is active there is not the step's to change.
            return
        self._body_variables = _variables()
        self._body = active_state()  # after what goes with it: see __enter__
        self._consumer.restore()
        _set_variables(*self._consumer_variables)


def _variables() -> tuple[object, tuple[SettingBlock, ...], Work | None, BodyContext | None]:
    return pushed.get(), context_settings.get(), work_here.get(), _body_here.get()


def _set_variables(
    innermost: object,
    settings: tuple[SettingBlock, ...],
    work: Work | None,
    body: BodyContext | None,
) -> None:
    pushed.set(innermost)
    context_settings.set(settings)
    work_here.set(work)
    _body_here.set(body)
