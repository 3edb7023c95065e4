"""ShortGPT: the whole layers that turn the residual stream least are not computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedModel
from typing_extensions import override

from adaskip.importance import Importance, check_importance
from adaskip.plan import SkipPlan, Step
from adaskip.policy import SkipPolicy, layer_plan, register


@register("SHORTGPT")
@dataclass
class ShortGPT(SkipPolicy):
    """Skips the `n_skip` layers of least block influence at every step.

    A layer's block influence is `1 - cos(x, y)` of the residual stream before and after it, the
    mean over tokens. The calibration costs one forward per warm-up prompt.

    Attributes:
        importance: what `learn_importance` learned about the model, whole layers included.
        n_skip: full layers to skip, 0 to L.

    Source: ShortGPT (arXiv 2403.03853), block influence.
    Differs: every request weighs the same, however long it is; there, every token does.
    """

    importance: Importance = field(repr=False)
    n_skip: int

    @override
    def bind(self, n_layers: int) -> None:
        self.importance.check_layers(n_layers)
        self.importance.layer_ranking()
        super().bind(n_layers)

    @override
    def check_model(self, model: PreTrainedModel) -> None:
        check_importance(self.importance, "ShortGPT").check_model(model)

    @override
    def plan(self, step: Step) -> SkipPlan:
        return layer_plan(tuple(sorted(self.importance.layer_ranking()[: self.n_skip])))
