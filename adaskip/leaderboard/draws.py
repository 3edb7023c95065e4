"""How sure a comparison at equal measured time is: bootstrap over test rows and rounds together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import isfinite
from statistics import fmean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaskip.chance import SEED
from adaskip.leaderboard.comparing import Placed, at_speed
from adaskip.leaderboard.values import MIN_ROUNDS, Beside, Interval
from adaskip.profiling.intervals import central, draws

Floats = NDArray[np.float64]


class Drawn(NamedTuple):
    """A gap in every draw, and whether the plan or method is as fast there."""

    gaps: Floats
    reached: NDArray[np.bool_]


class Draws:
    """Plans in many draws, with replacement, of test rows and of rounds of times.

    Rows are drawn alike for all plans, and rounds for all that took turns in them, so that what
    makes a row hard or a round slow for all cancels. Predicted speeds are the same in all draws.

    Args:
        plans: of all methods, each with the gaps of the same rows.
    """

    def __init__(self, plans: Sequence[Placed]) -> None:
        self.plans = plans
        self._drawn: dict[tuple[int, int], NDArray[np.int64]] = {}
        # Of each method's plans their speeds and gaps, as `_sorted` has them.
        self._placed: dict[str, tuple[Floats, Floats]] = {}

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        return draws(len(self.plans[0].by_row))

    def over_plan(self, plan: Placed, method: str) -> Beside | None:
        """A plan beside a method at the plan's measured acceleration; None beyond its fastest."""
        other = at_speed(self.plans, method, plan.speed)
        if other is None:
            return None
        gaps = self._gaps(plan.by_row)
        own = Drawn(gaps, np.full(gaps.shape, fill_value=True))
        drawn = self._line(method, self._speeds(plan))
        few = _are_seldom_timed([plan, *self._of(method)])
        return _beside(plan.by_row, other, own, drawn, few=few)

    def at_equal_speed(self, method: str, base: str, speed: float) -> Beside | None:
        """A method beside another one at an acceleration; None where either has none as fast."""
        own, other = (at_speed(self.plans, name, speed) for name in (method, base))
        if own is None or other is None:
            return None
        drawn = [self._line(name, np.array([speed])) for name in (method, base)]
        few = _are_seldom_timed([*self._of(method), *self._of(base)])
        return _beside(own, other, drawn[0], drawn[1], few=few)

    def interval_at(self, method: str, speed: float) -> Interval | None:
        """That of a method's gap at an acceleration; None with fewer than two rows."""
        if len(self.plans[0].by_row) < 2:
            return None
        return central(self._line(method, np.array([speed])).gaps)

    def _of(self, method: str) -> list[Placed]:
        return [plan for plan in self.plans if plan.method == method]

    def _gaps(self, by_row: Mapping[str, float]) -> Floats:
        """Mean gap in every draw of rows."""
        values = np.array([by_row[name] for name in self.plans[0].by_row])
        means: Floats = values[self._rows].mean(axis=1)
        return means

    def _speeds(self, plan: Placed) -> Floats:
        """Median acceleration in every draw of rounds."""
        if not plan.by_round:
            return np.full(len(self._rows), plan.speed)
        drawn = [np.array(r)[self._rounds(s, len(r))] for s, r in plan.by_round.items()]
        medians: Floats = np.median(np.concatenate(drawn, axis=1), axis=1)
        return medians

    def _rounds(self, sitting: int, n: int) -> NDArray[np.int64]:
        """Which rounds of a sitting every draw has."""
        key = sitting, n
        if key not in self._drawn:
            self._drawn[key] = draws(n, seed=(SEED, *key))
        return self._drawn[key]

    def _line(self, method: str, at: Floats) -> Drawn:
        """What a method loses at an acceleration in every draw; see `at_speed`.

        Where it has no plan as fast it is told to lose what its fastest does.
        """
        if method not in self._placed:
            self._placed[method] = self._sorted(self._of(method))
        speeds, gaps = self._placed[method]
        return _on_line(speeds, gaps, np.broadcast_to(at, len(speeds)))

    def _sorted(self, plans: Sequence[Placed]) -> tuple[Floats, Floats]:
        """Speeds and gaps in every draw, slowest first: [draws, plans] each.

        Of equally fast plans the one that loses least comes last.
        """
        speeds = np.stack([self._speeds(plan) for plan in plans], axis=1)
        gaps = np.stack([self._gaps(plan.by_row) for plan in plans], axis=1)
        order = np.lexsort((-gaps, speeds), axis=1)
        return np.take_along_axis(speeds, order, axis=1), np.take_along_axis(gaps, order, axis=1)


def _are_seldom_timed(plans: Sequence[Placed]) -> bool:
    """Whether one of some plans has times of too few rounds."""
    rounds = (sum(map(len, plan.by_round.values())) for plan in plans)
    return any(0 < n < MIN_ROUNDS for n in rounds)


def _on_line(speeds: Floats, gaps: Floats, at: Floats) -> Drawn:
    """A method's line at an acceleration in every draw.

    Args:
        speeds: of its plans, slowest first: [draws, plans].
        gaps: theirs.
        at: the acceleration: [draws].
    """
    at = at[:, None]
    least = np.minimum.accumulate(gaps[:, ::-1], axis=1)[:, ::-1]
    unbeaten = gaps < np.pad(least[:, 1:], ((0, 0), (0, 1)), constant_values=np.inf)
    above = unbeaten & (speeds >= at)
    reached: NDArray[np.bool_] = np.any(above, axis=1, keepdims=True)
    last = speeds.shape[1] - 1
    following = np.where(reached, above.argmax(axis=1, keepdims=True), last)
    below = unbeaten & (speeds < at) & (speeds > 1)
    before = last - below[:, ::-1].argmax(axis=1, keepdims=True)
    # Before the first plan there is the dense model.
    begins = below.any(axis=1, keepdims=True)
    start = np.where(begins, np.take_along_axis(speeds, before, axis=1), 1.0)
    low = np.where(begins, np.take_along_axis(gaps, before, axis=1), 0.0)
    end, high = (np.take_along_axis(each, following, axis=1) for each in (speeds, gaps))
    length = np.where(end > start, end - start, 1.0)
    share = np.where(reached, np.clip((at - start) / length, 0.0, 1.0), 1.0)
    return Drawn((low + share * (high - low))[:, 0], reached[:, 0])


def _beside(
    mine: Mapping[str, float], theirs: Mapping[str, float], own: Drawn, other: Drawn, *, few: bool
) -> Beside:
    """A plan's or method's gaps by row beside another method's at the same measured time.

    In a draw in which one of the two is not as fast nothing speaks for it.

    Args:
        mine: at the medians of times.
        theirs: likewise.
        own: in all draws.
        other: likewise.
        few: whether times are of too few rounds.
    """

    def told(drawn: Floats, equal: float) -> Floats:
        drawn = np.where(own.reached, drawn, np.maximum(drawn, equal))
        return np.where(other.reached, drawn, np.minimum(drawn, equal))

    gap, base = fmean(mine.values()), fmean(theirs.values())
    positive = other.gaps > 0
    ratios = np.where(positive, own.gaps, np.inf) / np.where(positive, other.gaps, 1.0)
    with np.errstate(invalid="ignore"):
        # Infinite where the other loses nothing in too many draws: there is no share then.
        ends = central(told(ratios, 1.0))
    enough = len(mine) > 1
    return Beside(
        gap=base,
        difference=gap - base,
        interval=central(told(own.gaps - other.gaps, 0.0)) if enough else None,
        share=gap / base if base > 0 else None,
        share_interval=ends if enough and base > 0 and all(map(isfinite, ends)) else None,
        few=few,
    )
