"""Who wants statistics of which forward, and gets them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from adaskip.plan import Scope, Step
from adaskip.policy import SkipPolicy
from adaskip.recorders import Recorder, Span, StepRecording


class Watchers:
    """The recorders of a session, and its policy where that is in scope.

    Args:
        recorders: want statistics of any forward.
        policy: wants them of those in scope.
        scope: of the session.
    """

    def __init__(self, recorders: Sequence[Recorder], policy: SkipPolicy, scope: Scope) -> None:
        self._recorders = recorders
        self._policy = policy
        self._scope = scope
        # Those of the present forward, and what each wants.
        self._now: list[tuple[Recorder, frozenset[Span]]] = []

    def of(self, step: Step) -> list[tuple[Recorder, frozenset[Span]]]:
        """Who wants statistics of a forward, and which."""
        in_scope = self._scope in ("e2e", step.phase)
        asked = (*self._recorders, *((self._policy,) if in_scope else ()))
        return [(each, wanted) for each in asked if (wanted := each.watch(step))]

    def recording(self, step: Step, real: Callable[[], Tensor | None]) -> StepRecording | None:
        """A place for the statistics of the coming forward; None if nobody wants any.

        Args:
            step: of the forward.
            real: tells which of its tokens are no padding; asked only if somebody watches.
        """
        self._now = self.of(step)
        if not self._now:
            return None
        spans = frozenset[Span]().union(*(wanted for _, wanted in self._now))
        return StepRecording(spans, step.tokens, real())

    def tell(self, step: Step, recording: StepRecording) -> None:
        """Hands out what was recorded of a forward."""
        stats = recording.finish()
        if stats is None:
            return
        for recorder, wanted in self._now:
            own = stats.select(*wanted)
            if own.rows:
                recorder.observe(step, own)
