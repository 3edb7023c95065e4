"""Chooses what is replaced so that a predicted time meets a budget at the least loss."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from tqdm import tqdm
from transformers import PreTrainedModel

from adaskip.budget import check_acceleration
from adaskip.errors import AdaskipError, unknown_name
from adaskip.fingerprint import model_fingerprint
from adaskip.fitting import Moments, check_rank
from adaskip.plan import Phase, SkipPlan, Sublayer
from adaskip.profiling.calibration import linear_seconds, measured_times
from adaskip.replacements import Linear, Replacement
from adaskip.search.losses import Losses, Row
from adaskip.streams import Sublayers, measuring
from adaskip.sublayer_times import SublayerTimes

Menu = Literal["gain", "linear"]
MENU: tuple[Menu, ...] = get_args(Menu)
_SINKS, _RIDGE = 4, 1e-3


@dataclass(frozen=True)
class _Budget:
    """What a plan has to save.

    Attributes:
        times: of the dense model.
        target: seconds to save.
        cost: seconds that what takes a sublayer's place costs.
    """

    times: SublayerTimes
    target: float
    cost: float

    def saved(self, chosen: Iterable[Sublayer]) -> float:
        """Seconds that replacing these sublayers saves."""
        return sum(self.times.seconds[sublayer] - self.cost for sublayer in chosen)

    def speedup(self, chosen: Iterable[Sublayer]) -> float:
        """Dense time over the predicted one."""
        return self.times.total / (self.times.total - self.saved(chosen))


def search_plan(
    model: PreTrainedModel,
    calibration: Iterable[Row],
    *,
    acceleration: float = 1.2,
    phase: Phase | str = Phase.PREFILL,
    context: int | None = None,
    batch: int = 1,
    kv_share: float | None = None,
    replacements: Sequence[Menu] = MENU,
    rank: int | None = None,
    times: SublayerTimes | None = None,
    exchanges: int = 24,
    source: str = "",
    progress: bool = False,
) -> SkipPlan:
    """The plan that reaches an acceleration at the least loss it finds.

    Sublayers are chosen one by one, by the loss they add per second they save: the divergence
    `KL(dense || plan)` over the answer tokens of the calibration rows, with gains in their place.
    Stale losses wait in a heap; only the one on top is computed anew. Afterwards chosen sublayers
    are exchanged for others while that helps. Linear maps, if they are on the menu, are fitted
    last, in depth order, on the streams that the plan itself produces.

    Args:
        model: a causal language model of a supported family, outside of `skipping()`.
        calibration: `(prompt ids, answer ids)` each; apart from what the plan is tested on.
        acceleration: ratio of dense to predicted time to reach, 1 or more.
        phase: "prefill" or "decode", in which it is reached.
        context: prompt tokens at which times count; by default the longest calibration prompt.
        batch: sequences at which times count.
        kv_share: the largest share of the dense keys and values that may be held; None for any.
        replacements: what may take a sublayer's place: "gain", "linear" or both; with both, linear
            maps are used and their time counts.
        rank: of linear maps; None for full ones.
        times: of the sublayers, in place of measured ones.
        exchanges: candidates tried in exchange at most.
        source: what the rows are, kept in the plan.
        progress: whether to show a progress bar.

    Returns:
        The plan with the model's fingerprint; `about` has the budget, the predicted acceleration,
        the loss in nats per answer token, and what the search computed, in forwards of a row.

    Raises:
        AdaskipError: an argument is wrong, a row has no answer, or the budget cannot be reached.

    Source: lazy greedy as in SLEB (arXiv 2402.09025) and BlockPruner (2406.10594), here by loss per
    time, with exchange; METHOD, "Search".
    """
    check_acceleration(acceleration)
    _check(model, replacements, rank, kv_share)
    rows = list(calibration)
    sublayers = Sublayers(model)
    with measuring(model):
        losses = Losses(sublayers, rows)
        if times is None:
            times = measured_times(model, phase, context or losses.longest_prompt, batch=batch)
        linear = "linear" in replacements
        cost = linear_seconds(model, times, rank) if linear else 0.0
        budget = _Budget(times, times.total * (1 - 1 / acceleration), cost)
        _check_reach(budget, acceleration)
        _choose(losses, budget, kv_share, progress)
        _exchange(losses, budget, kv_share, exchanges)
        if linear:
            _fit(losses, rank)
        loss = losses.loss({})
    about: dict[str, str | float | None] = {
        "acceleration": float(acceleration),
        "phase": str(times.phase),
        "context": times.context,
        "batch": times.batch,
        "predicted acceleration": budget.speedup(losses.plan),
        "loss": loss,
        "forwards": round(losses.forwards, 1),
        "calibration": source or f"{len(rows)} rows",
    }
    return SkipPlan(losses.plan, fingerprint=model_fingerprint(model), about=about)


def _check(
    model: PreTrainedModel, replacements: Sequence[str], rank: int | None, kv_share: float | None
) -> None:
    for name in [replacements] if isinstance(replacements, str) else replacements:
        if name not in MENU:
            raise unknown_name("replacement", str(name), MENU)
    if isinstance(replacements, str) or not replacements:
        raise AdaskipError(
            f"replacements is {replacements!r}; give a sequence of {', '.join(MENU)}."
        )
    check_rank(rank, model.config.get_text_config(decoder=True).hidden_size)
    if kv_share is not None and not 0 < kv_share <= 1:
        raise AdaskipError(f"A kv_share of {kv_share!r} is none; give a number above 0, up to 1.")


def _check_reach(budget: _Budget, acceleration: float) -> None:
    """Refuses a budget that replacing everything worth it does not reach, and names the best."""
    worth = [s for s, t in budget.times.seconds.items() if t > budget.cost]
    if budget.saved(worth) < budget.target:
        raise AdaskipError(
            f"An acceleration of {acceleration} cannot be reached in {budget.times.phase} at "
            f"{budget.times.context} tokens; with these replacements the best is "
            f"{budget.speedup(worth):.2f}. Give less."
        )


def _met(losses: Losses, budget: _Budget, kv_share: float | None) -> bool:
    n_layers = budget.times.n_layers
    n_attention = sum(sublayer.kind == "attn" for sublayer in losses.plan)
    holds = kv_share is None or n_layers - n_attention <= kv_share * n_layers
    return holds and budget.saved(losses.plan) >= budget.target


@dataclass(frozen=True, order=True)
class _Candidate:
    """A sublayer that may be chosen next; the smallest is the best.

    Attributes:
        score: loss it adds, per second that replacing it saves.
        position: in the model's depth, for ties.
        n_chosen: sublayers that were chosen when this was computed.
        sublayer: it.
        gain: what takes its place.
        loss: of the plan with it.
    """

    score: float
    position: int
    n_chosen: int
    sublayer: Sublayer = field(compare=False)
    gain: float = field(compare=False)
    loss: float = field(compare=False)


def _candidate(losses: Losses, budget: _Budget, sublayer: Sublayer, base: float) -> _Candidate:
    """A sublayer under the plan so far, whose loss is `base`."""
    gain = losses.gain(sublayer)
    loss = losses.loss({sublayer: gain})
    score = (loss - base) / (budget.times.seconds[sublayer] - budget.cost)
    return _Candidate(score, sublayer.position, len(losses.plan), sublayer, gain, loss)


def _choose(losses: Losses, budget: _Budget, kv_share: float | None, progress: bool) -> None:
    """Lazy greedy, until the budget is met."""
    worth = [s for s, t in budget.times.seconds.items() if t > budget.cost]
    base = 0.0
    heap = [
        _candidate(losses, budget, sublayer, base)
        for sublayer in tqdm(worth, "first losses", disable=not progress)
    ]
    heapq.heapify(heap)
    while not _met(losses, budget, kv_share):
        if kv_share is not None and budget.saved(losses.plan) >= budget.target:
            # The time is met, keys and values are not: attention alone helps.
            heap = [candidate for candidate in heap if candidate.sublayer.kind == "attn"]
            heapq.heapify(heap)
        if not heap:
            raise AdaskipError(
                f"A kv_share of {kv_share} cannot be reached: with these replacements attention "
                "takes no less time. Leave it out, or allow gains only."
            )
        best = heapq.heappop(heap)
        if best.n_chosen < len(losses.plan):
            heapq.heappush(heap, _candidate(losses, budget, best.sublayer, base))
            continue
        losses.accept({best.sublayer: best.gain})
        base = best.loss


def _exchange(losses: Losses, budget: _Budget, kv_share: float | None, tries: int) -> None:
    """Swaps a chosen sublayer for another one while that lowers the loss and the budget holds."""
    base, improved = losses.loss({}), True
    while improved and tries > 0:
        improved = False
        # Those whose return helps most come first.
        gains = {s: losses.loss({}, dropped=s) for s in losses.plan}
        for dropped in sorted(gains, key=lambda s: (gains[s], s.position)):
            for taken in _others(losses, budget, dropped, kv_share):
                if tries <= 0 or gains[dropped] >= base:
                    break
                tries -= 1
                replacement: Mapping[Sublayer, Replacement] = {taken: losses.gain(taken)}
                loss = losses.loss(replacement, dropped=dropped)
                if loss < base:
                    losses.accept(replacement, dropped=dropped)
                    base, improved = loss, True
                    break
            if improved:
                break


def _others(
    losses: Losses, budget: _Budget, dropped: Sublayer, kv_share: float | None
) -> list[Sublayer]:
    """What may take a chosen sublayer's part, its neighbours first."""
    left = budget.saved(losses.plan) - budget.saved([dropped])
    found = [
        s
        for s in budget.times.seconds
        if s not in losses.plan
        and left + budget.saved([s]) >= budget.target
        and (kv_share is None or s.kind == dropped.kind or s.kind == "attn")
    ]
    return sorted(found, key=lambda s: (abs(s.position - dropped.position), s.position))


def _fit(losses: Losses, rank: int | None) -> None:
    """Puts linear maps in the place of the gains, in depth order."""
    for sublayer in sorted(losses.plan):
        pairs = losses.pairs(sublayer)
        moments = Moments(pairs[0][0])
        for x, delta in pairs:
            moments.add(x[_SINKS:], delta[_SINKS:])
        fitted: Linear = moments.solve(rank, _RIDGE)
        losses.accept({sublayer: fitted})
