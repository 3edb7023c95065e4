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
        if not isinstance(plan, SkipPlan):
            raise AdaskipError(
                f"FixedSkipping applies a SkipPlan, not a {type(plan).__name__}; write "
                "FixedSkipping(SkipPlan({Sublayer(3, 'ffn'): None}))."
            )
        self._plan = plan

    def __repr__(self) -> str:
        return f"FixedSkipping({', '.join(map(str, self._plan.gains)) or 'nothing'})"

    @override
    def bind(self, n_layers: int) -> None:
        self._plan.check(n_layers)
        super().bind(n_layers)

    @override
    def plan(self, step: Step) -> SkipPlan:
        return self._plan
