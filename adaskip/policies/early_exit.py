"""Early Exit: the last layers are never computed."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from adaskip.plan import SkipPlan, Step
from adaskip.policy import SkipPolicy, layer_plan, register


@register("EE")
@dataclass
class EarlyExit(SkipPolicy):
    """Skips layers `L - n_skip .. L - 1` at every step.

    Attributes:
        n_skip: full layers to skip, 0 to L.

    Source: AdaSkip (arXiv 2501.02336), baselines; METHOD, "Policies".
    """

    n_skip: int

    @override
    def plan(self, step: Step) -> SkipPlan:
        return layer_plan(tuple(range(self.n_layers - self.n_skip, self.n_layers)))
