"""SkipDecode: later tokens skip more of the early layers."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from typing_extensions import override

from adaskip.errors import AdaskipError
from adaskip.numbers import is_whole
from adaskip.plan import SkipPlan, Step
from adaskip.policy import SkipPolicy, layer_plan, register


@register("SD")
@dataclass
class SkipDecode(SkipPolicy):
    """Skips layers 1 .. n, never layer 0; n grows with the decode steps of the request.

    With scope "prefill", n is `n_skip`. Otherwise `n(t) = min(n_skip, ceil(t / horizon *
    (n_skip - 1)) + 1)`, with t the decode steps already taken (0 in prefill and at the first).

    Attributes:
        n_skip: full layers to skip at most, 0 to L - 1.
        horizon: answer length of the task in tokens, over which n grows to `n_skip`.

    Source: SkipDecode (arXiv 2307.02628) as AdaSkip's experiments use it; METHOD, "Policies".
    Differs from the released code: t starts anew with each request. There, an E2E prefill uses the
    previous request's count, and crashes.
    """

    n_skip: int
    horizon: int = 512

    @classmethod
    @override
    def most(cls, n_layers: int) -> int:
        return n_layers - 1

    @override
    def bind(self, n_layers: int) -> None:
        if not is_whole(self.horizon) or self.horizon < 1:
            raise AdaskipError(
                f"SkipDecode's horizon is {self.horizon!r}; it takes a whole number of tokens, 1 "
                "or more."
            )
        super().bind(n_layers)

    @property
    @override
    def stepwise(self) -> bool:
        return self.scope != "prefill" and self.n_skip > 1

    @override
    def plan(self, step: Step) -> SkipPlan:
        n = self.n_skip
        if self.scope != "prefill":
            n = min(n, ceil(step.decode_steps / self.horizon * (n - 1)) + 1)
        return layer_plan(tuple(range(1, n + 1)))
