"""A policy within the phases of its scope: the plan of a step, and what it depends on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from adaskip.plan import EMPTY_PLAN, Phase, Scope, SkipPlan, Step
from adaskip.policy import SkipPolicy


@dataclass(frozen=True)
class ScopedPolicy:
    """What a scope leaves of a policy's plans.

    Attributes:
        policy: whose plans.
        scope: the phases they apply to.
    """

    policy: SkipPolicy
    scope: Scope

    @property
    def steps_matter(self) -> bool:
        """Whether the plan is another one in prefill and decode, or from step to step."""
        return self.scope == "decode" or self.policy.stepwise

    def phase_matters(self, step: Step) -> bool:
        """Whether the plan of a forward is another one in the other phase."""
        if self.steps_matter or self.scope != "e2e":
            return self.steps_matter
        first, second = (self.policy.plan(replace(step, phase=phase)) for phase in Phase)
        return first != second

    def plan(self, step: Step, prefill_plan: SkipPlan) -> SkipPlan:
        """The plan of a forward.

        Args:
            step: which.
            prefill_plan: what the prefill of its request skipped.
        """
        if self.scope == "prefill" and step.phase is Phase.DECODE:
            # Skipped attention has no KV to go back to, so what prefill skipped stays skipped.
            return prefill_plan
        plan = self.policy.plan(step)
        outside = self.scope == "decode" and step.phase is Phase.PREFILL
        return EMPTY_PLAN if outside else plan
