"""LLM-Drop: attention or FFN sublayers that turn the residual stream least are not computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from transformers import PreTrainedModel
from typing_extensions import override

from adaskip.importance import Importance, check_importance
from adaskip.plan import EMPTY_PLAN, KINDS, Kind, SkipPlan, Step
from adaskip.policy import SkipPolicy, register


@dataclass
class LLMDrop(SkipPolicy):
    """Skips the `n_skip` sublayers of highest similarity among those of some kinds.

    The similarity is `cos(x, y)` of the residual stream before and after a sublayer, residual add
    included, seen once on the dense model. Nothing compensates for what is skipped. The calibration
    costs one forward per warm-up prompt.

    Attributes:
        importance: what `learn_importance` learned about the model.
        n_skip: sublayers to skip, 0 to as many as there are of those kinds.

    Source: LLM-Drop (arXiv 2406.15786): attention drop, MLP drop, joint layer drop.
    Differs: every request weighs the same, however long it is; there, every token does.
    """

    budget: ClassVar[Literal["layers", "sublayers"]] = "sublayers"
    kinds: ClassVar[tuple[Kind, ...]] = KINDS

    importance: Importance = field(repr=False)
    n_skip: int
    _plan: SkipPlan = field(init=False, repr=False, default=EMPTY_PLAN)

    @classmethod
    @override
    def most(cls, n_layers: int) -> int:
        return n_layers * len(cls.kinds)

    @override
    def bind(self, n_layers: int) -> None:
        self.importance.check_layers(n_layers)
        super().bind(n_layers)
        ranking = [s for s in self.importance.ranking() if s.kind in self.kinds]
        self._plan = SkipPlan(dict.fromkeys(ranking[: self.n_skip]))

    @override
    def check_model(self, model: PreTrainedModel) -> None:
        check_importance(self.importance, "LLM-Drop").check_model(model)

    @override
    def plan(self, step: Step) -> SkipPlan:
        return self._plan


@register("LLMDROP")
@dataclass
class JointDrop(LLMDrop):
    """LLM-Drop over attention and FFN in one ranking."""


@register("LLMDROP_ATTN")
@dataclass
class AttentionDrop(LLMDrop):
    """LLM-Drop over attention alone."""

    kinds: ClassVar[tuple[Kind, ...]] = ("attn",)


@register("LLMDROP_FFN")
@dataclass
class FFNDrop(LLMDrop):
    """LLM-Drop over FFNs alone."""

    kinds: ClassVar[tuple[Kind, ...]] = ("ffn",)
