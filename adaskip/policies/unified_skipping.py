"""Unified Skipping: layers at regular distances."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from adaskip.plan import SkipPlan, Step
from adaskip.policy import SkipPolicy, layer_plan, register


@register("US")
@dataclass
class UnifiedSkipping(SkipPolicy):
    """Skips the layers `1 + k * floor(L / n_skip)` for k in 0 .. n_skip - 1 at every step.

    Attributes:
        n_skip: full layers to skip, 0 to L - 1.

    Source: Unified Layer Skipping (arXiv 2404.06954); METHOD, "Policies".
    Differs from the released code: skips exactly `n_skip` layers. There, the layers with
    `i % (L // n_skip) == 1` are more than `n_skip` where `n_skip` does not divide L.
    """

    n_skip: int

    @classmethod
    @override
    def most(cls, n_layers: int) -> int:
        return n_layers - 1

    @override
    def plan(self, step: Step) -> SkipPlan:
        distance = self.n_layers // self.n_skip if self.n_skip else 0
        return layer_plan(tuple(1 + k * distance for k in range(self.n_skip)))
