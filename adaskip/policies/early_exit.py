"""Early Exit: the last layers are never computed."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from adaskip.plan import SkipPlan, Step
from adaskip.policy import SkipPolicy, check_budget, layer_plan, register


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
    def bind(self, n_layers: int) -> None:
        check_budget("Early Exit", self.n_skip, n_layers, "full layers")
        super().bind(n_layers)

    @override
    def plan(self, step: Step) -> SkipPlan:
        return layer_plan(tuple(range(self.n_layers - self.n_skip, self.n_layers)))
