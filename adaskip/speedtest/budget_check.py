"""Whether `AdaSkip(acceleration=...)` is as fast as it says: predicted against measured ratio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from adaskip.budget import SELECTS, check_acceleration
from adaskip.entering import skipping
from adaskip.learning import learn_importance
from adaskip.plan import Phase
from adaskip.policies import AdaSkip
from adaskip.profiling.calibration import measure_sublayers, random_prompt
from adaskip.profiling.interleaving import Ratio, by_turns, per_round
from adaskip.profiling.timing import RequestTimes, growing_cache, time_request
from adaskip.speedtest.measurement import Row, Study, if_it_fits, option
from adaskip.speedtest.record import Key, Point

_WARMUP_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Budget(Study):
    """Whether a budget that is given as an acceleration is kept."""

    kind: ClassVar[str] = "budget"
    title: ClassVar[str] = "Predicted and measured ratio of AdaSkip(acceleration=...)"

    contexts: tuple[int, ...] = option((1024, 4096), "prompt lengths in tokens")
    rounds: int = option(5, "requests of each kind that count")
    ratios: tuple[float, ...] = option((1.15, 1.3), "accelerations to ask for")

    @override
    def check(self) -> None:
        super().check()
        for ratio in self.ratios:
            check_acceleration(ratio)

    @override
    def points(self, missing: Sequence[Key]) -> Iterator[Point]:
        model = self.open()
        counts = {"n_steps": self.new_tokens, "rounds": self.rounds}
        for key in missing:

            def measured(key: Key = key) -> Point:
                return {"rows": check_budgets(model, key["context"], self.ratios, **counts)}

            yield if_it_fits(key, measured)


def check_budgets(
    model: PreTrainedModel, context: int, ratios: Sequence[float], *, n_steps: int, rounds: int
) -> list[Row]:
    """Predicts from sublayer times measured first, then measures dense and skipped by turns.

    Args:
        model: outside of `skipping(...)`.
        context: prompt tokens.
        ratios: acceleration ratios to try, each in both phases and with both selections.
        n_steps: decode steps per request.
        rounds: requests of each kind that count.
    """
    importance = learn_importance(model, [random_prompt(model, _WARMUP_TOKENS)])
    times = measure_sublayers(
        model, context, n_steps=n_steps, make_cache=growing_cache, progress=True
    )
    policies = [
        (phase, AdaSkip(importance, acceleration=ratio, times=times[phase], select=s, online=False))
        for phase in Phase
        for ratio in ratios
        for s in SELECTS
    ]
    ids = random_prompt(model, context)
    names = ["dense", *(f"{phase} {p.acceleration} {p.select}" for phase, p in policies)]
    kinds = {
        name: partial(_request, model, ids, n_steps, kind)
        for name, kind in zip(names, [None, *policies], strict=True)
    }
    for warm_up in kinds.values():
        warm_up()
    taken = list(by_turns(kinds, rounds=rounds, baselines=["dense"], title=f"{context} tokens"))
    seconds = {phase: partial(RequestTimes.seconds, phase=phase) for phase in Phase}
    return [
        _row(phase, policy, *(per_round(taken, label, seconds[phase]) for label in ("dense", name)))
        for name, (phase, policy) in zip(names[1:], policies, strict=True)
    ]


def _request(
    model: PreTrainedModel, ids: Tensor, n_steps: int, kind: tuple[Phase, AdaSkip] | None
) -> RequestTimes:
    context = nullcontext() if kind is None else skipping(model, kind[1], scope=kind[0].value)
    # A prefill is measured without the decode steps that would follow.
    steps = 1 if kind is not None and kind[0] is Phase.PREFILL else n_steps
    with context:
        return time_request(model, ids, steps, make_cache=growing_cache)


def _row(phase: Phase, policy: AdaSkip, dense: Sequence[float], own: Sequence[float]) -> Row:
    """Predicted and measured ratio; seconds of each round, dense and with the policy."""
    chosen, times = policy.chosen(), policy.times
    assert times is not None  # noqa: S101 - given above
    predicted = times.speedup(chosen)
    measured = Ratio.paired(dense, own)
    return {
        "phase": str(phase),
        "context": times.context,
        "select": policy.select,
        "asked": policy.acceleration,
        "attn": sum(s.kind == "attn" for s in chosen),
        "ffn": sum(s.kind == "ffn" for s in chosen),
        "predicted": predicted,
        "measured": asdict(measured),
        "off_points": 100 * (measured.median - predicted),
    }
