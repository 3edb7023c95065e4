"""A plan given from outside."""

from __future__ import annotations

from typing_extensions import override

from adaskip.errors import AdaskipError
from adaskip.plan import SkipPlan, Step
from adaskip.policies.base import SkipPolicy


class FixedSkipping(SkipPolicy):
    """Applies one given plan at every step.

    Args:
        plan: the plan; `SkipPlan()` skips nothing.
    """

    def __init__(self, plan: SkipPlan) -> None:
        self._plan = plan

    def __repr__(self) -> str:
        return f"FixedSkipping({', '.join(map(str, self._plan.gains)) or 'nothing'})"

    @override
    def bind(self, n_layers: int) -> None:
        outside = [str(s) for s in self._plan.gains if not 0 <= s.layer < n_layers]
        if outside:
            raise AdaskipError(
                f"The plan skips {', '.join(outside)}, but the model's layers are 0 to "
                f"{n_layers - 1}."
            )
        super().bind(n_layers)

    @override
    def plan(self, step: Step) -> SkipPlan:
        return self._plan
