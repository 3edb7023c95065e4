"""AdaSkip: the sublayers of highest IO similarity, learned offline and extended online."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from adaskip.budget import SELECTS, Select, check_acceleration, sublayers_for
from adaskip.errors import AdaskipError, unknown_name
from adaskip.importance import GAINS, Gain, Importance, check_importance
from adaskip.numbers import is_whole
from adaskip.plan import EMPTY_PLAN, Phase, SkipPlan, Step, Sublayer
from adaskip.policy import SkipPolicy, register
from adaskip.recorders import Span, StepStats, median
from adaskip.sublayer_times import SublayerTimes


@dataclass
class _Window:
    """What one request has shown in its first decode steps, and what is skipped because of it.

    Attributes:
        plan: what its decode steps skip.
        ffns: those that ran in these steps.
        seen: per decode step their similarity, gain and weight: [rows, batch].
        is_full: whether all steps were seen, and the extension is known.
        extension: the FFNs skipped in addition.
    """

    plan: SkipPlan
    ffns: tuple[Sublayer, ...] = ()
    seen: list[tuple[Tensor, ...]] = field(default_factory=list)
    is_full: bool = False
    extension: SkipPlan = EMPTY_PLAN


@register("ADA")
@dataclass
class AdaSkip(SkipPolicy):
    """Skips the `n_skip` sublayers of highest offline similarity; online, more FFNs per request.

    Online: over the first `window` decode steps of a request, similarity and gain of every FFN
    that still runs are averaged; afterwards those whose similarity reaches `threshold` are skipped
    as well, with the gain just learned, for the rest of the request. In a batch, the sequences
    decide together: their mean.

    Attributes:
        importance: what `learn_importance` learned about the model.
        n_skip: sublayers to skip, 0 to 2L; attention and FFN compete in one pool. None if
            `acceleration` says it.
        online: whether the extension is on. Off by default: the same sublayers in every request,
            whatever stands beside it in a batch, also under assisted decoding. The experiments
            switch it on, as the paper does.
        window: decode steps to observe.
        gain: how a skipped sublayer is compensated; see `Importance`. None leaves the residual.
        acceleration: in place of `n_skip`, the ratio of dense to skipped time to reach by the
            offline sublayers; see `adaskip.budget`.
        times: what `acceleration` reckons with, from `measured_times` of the phase, context length
            and batch that matter.
        select: with `acceleration`, "rank" or "knapsack".

    Source: AdaSkip (arXiv 2501.02336), algorithms 1 and 2; METHOD, "Policies".
    Differs from the released code: the extension works. There, its threshold is reset to 1.0 by
    every prompt and it never fires; `online=False` reproduces that.
    """

    budget: ClassVar[Literal["layers", "sublayers"]] = "sublayers"

    importance: Importance = field(repr=False)
    n_skip: int | None = None
    online: bool = False
    window: int = 20
    gain: Gain | None = "token"
    acceleration: float | None = None
    times: SublayerTimes | None = field(repr=False, default=None)
    select: Select = "rank"
    _fixed: SkipPlan = field(init=False, repr=False, default=EMPTY_PLAN)
    _windows: dict[int, _Window] = field(init=False, repr=False, default_factory=dict)
    _latest: _Window | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        check_importance(self.importance, "AdaSkip")
        if self.gain is not None and self.gain not in GAINS:
            raise AdaskipError(f"Gain {self.gain!r} is unknown; choose 'norm', 'token' or None.")
        if not is_whole(self.window) or self.window < 1:
            raise AdaskipError(
                f"A window of {self.window!r} decode steps is none; take a whole number from 1 up."
            )
        if (self.n_skip is None) == (self.acceleration is None):
            raise AdaskipError(
                "AdaSkip takes one budget: n_skip (sublayers) or acceleration (a ratio), got "
                f"n_skip={self.n_skip!r} and acceleration={self.acceleration!r}."
            )
        if self.acceleration is not None:
            check_acceleration(self.acceleration)
        if self.select not in SELECTS:
            raise unknown_name("select", str(self.select), SELECTS)

    @override
    def bind(self, n_layers: int) -> None:
        self.importance.check_layers(n_layers)
        if self.acceleration is not None and self.times is None:
            raise AdaskipError(
                "AdaSkip reckons an acceleration with what the sublayers take: give "
                "times=measured_times(model, phase, context) of the phase and context that matter."
            )
        super().bind(n_layers)
        self._fixed = SkipPlan({s: self.importance.gain(s, self.gain) for s in self.chosen()})
        self._windows, self._latest = {}, None

    @override
    def check_model(self, model: PreTrainedModel) -> None:
        self.importance.check_model(model)

    def chosen(self) -> tuple[Sublayer, ...]:
        """The sublayers that are skipped at every step, by budget and offline importance."""
        if self.acceleration is None or self.times is None:
            return self.importance.ranking()[: self.n_skip]
        return sublayers_for(self.importance, self.times, self.acceleration, self.select)

    @property
    @override
    def stepwise(self) -> bool:
        return self.online and self.n_skip != 0 and self.scope != "prefill"

    @property
    def threshold(self) -> float:
        """The lowest offline similarity of those chosen, which an FFN has to reach online.

        By rank, that is the N-th largest one.
        """
        return min((self.importance.similarity[s] for s in self.chosen()), default=float("inf"))

    @property
    def extension(self) -> SkipPlan:
        """The FFNs skipped in addition in the request of the latest step."""
        return EMPTY_PLAN if self._latest is None else self._latest.extension

    @override
    def plan(self, step: Step) -> SkipPlan:
        window = self._latest = self._windows.get(step.request)
        return self._fixed if window is None or step.phase is Phase.PREFILL else window.plan

    @override
    def watch(self, step: Step) -> frozenset[Span]:
        if not self.stepwise or step.phase is Phase.PREFILL:
            return frozenset()
        window = self._windows.get(step.request)
        waiting = window is None or not window.is_full
        return frozenset({"ffn"}) if waiting else frozenset()

    @override
    def observe(self, step: Step, stats: StepStats) -> None:
        window = self._latest = self._windows.setdefault(step.request, _Window(self._fixed))
        stats = stats.select("ffn")
        if window.is_full or not stats.rows:
            return
        ffns = tuple(Sublayer(layer, "ffn") for layer, _ in stats.rows)
        if ffns != window.ffns:
            # At first, or after steps of another block, in which others ran.
            window.ffns, window.seen = ffns, []
        # Sequences that have ended are padding; the others decide.
        kept = (stats.similarity(), stats.gain(), stats.weights()[None])
        window.seen.append(tuple(values.flatten(1) for values in kept))
        if len(window.seen) >= self.window:
            window.extension = self._extended(window.seen[-self.window :], ffns)
            window.is_full, window.plan = True, self._fixed | window.extension

    @override
    def memory(self, request: int) -> _Window | None:
        window = self._windows.get(request)
        return None if window is None else replace(window, seen=list(window.seen))

    @override
    def resume(self, request: int, memory: object) -> None:
        if isinstance(memory, _Window) and self.stepwise:
            # The memory may be of an earlier block, with another budget.
            plan = self._fixed | memory.extension
            self._windows[request] = replace(memory, plan=plan, seen=list(memory.seen))

    @override
    def forget(self, request: int) -> None:
        self._windows.pop(request, None)

    def _extended(self, seen: list[tuple[Tensor, ...]], ffns: Sequence[Sublayer]) -> SkipPlan:
        """What the window's statistics add to the plan, with one read from the device."""
        similarities, gains, weights = (torch.cat(v, dim=1) for v in zip(*seen, strict=True))
        similarity = (similarities * weights).sum(dim=1) / weights.sum()
        if self.gain == "token":
            gain = median(gains, weights[0])
        else:
            gain = (gains * weights).sum(dim=1) / weights.sum()
        learned = torch.stack([similarity, gain]).tolist()
        threshold = self.threshold
        return SkipPlan(
            {
                ffn: None if self.gain is None else g
                for ffn, s, g in zip(ffns, *learned, strict=True)
                if s >= threshold
            }
        )
