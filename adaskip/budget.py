"""How many sublayers to skip, told in terms of speed: METHOD, "Budget by acceleration ratio"."""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import PretrainedConfig

from adaskip.errors import AdaskipError, unknown_name
from adaskip.importance import Importance
from adaskip.numbers import is_finite
from adaskip.plan import SkipPlan, Sublayer
from adaskip.sublayer_times import SublayerTimes
from adaskip.summary import kept_tokens

Select = Literal["rank", "knapsack"]
SELECTS: tuple[Select, ...] = get_args(Select)
# Times are compared as whole picoseconds, in which sums do not depend on their order.
_UNIT = 1e-12
# Sums of seconds and of shares, and their ratios, are compared up to their rounding.
ROUNDING = 1e-9


def sublayers_for(
    importance: Importance, times: SublayerTimes, acceleration: float, select: Select = "rank"
) -> tuple[Sublayer, ...]:
    """The sublayers to skip for an acceleration ratio, least important first.

    Args:
        importance: what `learn_importance` learned about the model.
        times: per-sublayer times of the phase, context length and batch that matter.
        acceleration: the ratio alpha of dense to skipped time, 1 or more.
        select: "rank": by similarity, until the predicted ratio is reached. "knapsack": of all
            sets that reach it, the one of the smallest sum of (1 - similarity).

    Returns:
        The fewest leading sublayers of the ranking, or the best set, with predicted ratio
        `times.speedup(...)` of at least `acceleration`.

    Raises:
        AdaskipError: the ratio is no number from 1 up or cannot be reached, times and importance
            are of different models, or `select` is unknown.

    Source: AdaSkip (arXiv 2501.02336), acceleration ratio; METHOD, "Budget by acceleration ratio".
    """
    if select not in SELECTS:
        raise unknown_name("select", str(select), SELECTS)
    check_acceleration(acceleration)
    if times.n_layers != importance.n_layers:
        raise AdaskipError(
            f"The times are of a model of {times.n_layers} layers, the importance profile of one "
            f"of {importance.n_layers}; measure the times of the profile's model."
        )
    target = _target(times, acceleration)
    if target <= 0:
        return ()
    choose = _cheapest if select == "knapsack" else _leading
    return choose(importance, times, target)


def check_acceleration(acceleration: object) -> None:
    """Raises an `AdaskipError` unless an acceleration ratio is a finite number, 1 or more."""
    if not is_finite(acceleration) or acceleration < 1:
        raise AdaskipError(
            f"An acceleration of {acceleration!r} is none; give a ratio of times, a number from 1 "
            "up, e.g. 1.2."
        )


def reaches(speedup: float, acceleration: float) -> bool:
    """Whether a predicted ratio of times is the one that is asked for, or more."""
    return speedup >= acceleration * (1 - ROUNDING)


def dense_tokens(config: PretrainedConfig, context: int) -> list[int]:
    """Tokens whose keys and values each layer holds at a context: a sliding one those it sees."""
    text: Any = config.get_text_config(decoder=True)
    return [kept_tokens(text, layer, context) for layer in range(text.num_hidden_layers)]


def kv_share(plan: SkipPlan, config: PretrainedConfig, context: int) -> float:
    """The share of the dense keys and values that a plan holds at a context of so many tokens."""
    dense, windows = dense_tokens(config, context), plan.windows
    skipped = set(plan.layers("attn"))
    held = [
        windows[layer].held(context) if layer in windows else own
        for layer, own in enumerate(dense)
        if layer not in skipped
    ]
    return sum(held) / sum(dense)


def _leading(importance: Importance, times: SublayerTimes, target: int) -> tuple[Sublayer, ...]:
    """As many sublayers of the ranking as it takes to save `target` units."""
    ranking = importance.ranking()
    saved = 0
    for count, sublayer in enumerate(ranking, start=1):
        saved += _units(times.seconds[sublayer])
        if saved >= target:
            return ranking[:count]
    raise AssertionError("unreachable: the target was checked against all sublayers")


def _target(times: SublayerTimes, acceleration: float) -> int:
    """The time to save, `T * (1 - 1 / alpha)`, in units."""
    highest = times.speedup(times.seconds) if times.saved(times.seconds) < times.total else None
    # Each of the times was rounded: a ratio that some of them reach exactly is to be reached.
    target = _units(times.total * (1 - 1 / acceleration)) - len(times.seconds)
    if target > sum(map(_units, times.seconds.values())):
        limit = "" if highest is None else f"; skipping every sublayer gives {highest:.2f}"
        raise AdaskipError(
            f"An acceleration of {acceleration} cannot be reached in {times.phase} at "
            f"{times.context} tokens{limit}. Give less."
        )
    return target


def _cheapest(importance: Importance, times: SublayerTimes, target: int) -> tuple[Sublayer, ...]:
    """The set that saves `target` units at the least loss of similarity.

    Exact: sublayer by sublayer, every set is kept that no other one beats in both time saved and
    similarity lost. As layers of one kind take the same time, those are few.
    """
    # By time saved (all at or above the target count as the target): loss and members.
    best: dict[int, tuple[float, tuple[Sublayer, ...]]] = {0: (0.0, ())}
    for sublayer in importance.ranking():
        gained = _units(times.seconds[sublayer])
        lost = 1 - importance.similarity[sublayer]
        for saved, (loss, members) in list(best.items()):
            reached = min(saved + gained, target)
            if reached not in best or best[reached][0] > loss + lost:
                best[reached] = (loss + lost, (*members, sublayer))
        best = _undominated(best)
    return best[target][1]


def _undominated(
    sets: dict[int, tuple[float, tuple[Sublayer, ...]]],
) -> dict[int, tuple[float, tuple[Sublayer, ...]]]:
    """Without the sets that save no more than another one and lose no less."""
    kept = {}
    lowest = float("inf")
    for saved in sorted(sets, reverse=True):
        if sets[saved][0] < lowest:
            lowest = sets[saved][0]
            kept[saved] = sets[saved]
    return kept


def _units(seconds: float) -> int:
    return round(seconds / _UNIT)
