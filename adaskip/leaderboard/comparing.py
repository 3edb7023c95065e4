"""Compares methods at equal measured time, row by row: gaps between plans, differences, shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import isfinite, nan
from statistics import fmean
from typing import Any, Protocol, TypeVar

from adaskip.leaderboard.values import Beside, Interval, Verdict
from adaskip.profiling.intervals import bootstrap, paired_interval


class Placed(Protocol):
    """What is compared of a plan."""

    @property
    def method(self) -> str: ...  # noqa: D102

    @property
    def speed(self) -> float: ...  # noqa: D102

    @property
    def ends(self) -> Interval: ...  # noqa: D102

    @property
    def gap(self) -> float: ...  # noqa: D102

    @property
    def by_row(self) -> Mapping[str, float]: ...  # noqa: D102


P = TypeVar("P", bound=Placed)


def at_speed(
    plans: Iterable[Placed],
    method: str,
    speed: float,
    *,
    by: Callable[[Placed], float] = lambda plan: plan.speed,
) -> dict[str, float] | None:
    """The gaps by row of a method at a measured acceleration, between its plans on both sides.

    Linear in the acceleration from plan to plan, the dense model being one: it is as fast as 1 and
    loses nothing, nor does it at anything slower. A plan that another one of the method beats is
    none of them: nobody would take it.

    Args:
        plans: of all methods.
        method: whose.
        speed: the acceleration.
        by: how fast a plan is, if not as fast as measured by the median.

    Returns:
        None beyond the fastest plan.
    """
    own = unbeaten([plan for plan in plans if plan.method == method], by)
    if not own or by(own[-1]) < speed:
        return None
    if speed <= 1:
        return dict.fromkeys(own[0].by_row, 0.0)
    above = next(e for e in own if by(e) >= speed)
    below = [e for e in own if 1 < by(e) < speed]
    low = below[-1].by_row if below else dict.fromkeys(above.by_row, 0.0)
    start = by(below[-1]) if below else 1.0
    share = (speed - start) / (by(above) - start)
    return {name: low[name] + share * (gap - low[name]) for name, gap in above.by_row.items()}


def unbeaten(plans: Iterable[P], by: Callable[[P], float] = lambda plan: plan.speed) -> list[P]:
    """Those of some plans of which none other is as fast and loses as little, slowest first."""
    kept: list[P] = []
    for plan in sorted(plans, key=lambda plan: (-by(plan), plan.gap)):
        if not kept or plan.gap < kept[-1].gap:
            kept.append(plan)
    return kept[::-1]


def beside(own: Mapping[str, float], other: Mapping[str, float]) -> Beside:
    """A plan's gaps by row beside another method's at the same measured time."""
    mine, theirs = fmean(own.values()), fmean(other.values())
    share = mine / theirs if theirs > 0 else None
    pairs = [(own[name], value) for name, value in other.items()]
    interval = None if share is None else ratio_interval(pairs)
    return Beside(theirs, mine - theirs, paired_interval(own, other), share, interval)


def steadily(
    found: Beside, at_ends: Iterable[tuple[Mapping[str, float] | None, Mapping[str, float] | None]]
) -> Beside:
    """The same comparison, which says nothing unless all would say so at the ends of times.

    Args:
        found: at the medians.
        at_ends: gaps by row of the one and of the other there; None of what may not be as fast at
            all, which has nothing that speaks for it.
    """

    def told(own: Mapping[str, float] | None, other: Mapping[str, float] | None) -> Verdict:
        if own is None:
            return "worse"
        return "better" if other is None else beside(own, other).verdict

    # Most say nothing at the medians, and need no bootstrap at the ends.
    steady = not found.verdict or all(told(*pair) == found.verdict for pair in at_ends)
    return replace(found, steady=steady)


def over_plan(entry: Placed, among: Sequence[Placed], method: str) -> Beside | None:
    """A plan beside another method at the plan's measured acceleration; None beyond its fastest.

    What is said of it holds at both ends of that acceleration's interval, with all of the other
    method's plans at either end of theirs.
    """
    other = at_speed(among, method, entry.speed)
    if other is None:
        return None
    ends = product(entry.ends, (_slowest, _fastest))
    return steadily(
        beside(entry.by_row, other),
        ((entry.by_row, at_speed(among, method, speed, by=by)) for speed, by in ends),
    )


def at_equal_speed(plans: Sequence[Placed], method: str, base: str, speed: float) -> Beside | None:
    """A method beside another one at an acceleration; None where either has no plan as fast.

    What is said of it holds with all plans of each at either end of their intervals.
    """
    own, other = (at_speed(plans, name, speed) for name in (method, base))
    if own is None or other is None:
        return None
    owns, others = (
        [at_speed(plans, name, speed, by=by) for by in (_slowest, _fastest)]
        for name in (method, base)
    )
    return steadily(beside(own, other), product(owns, others))


def _slowest(plan: Placed) -> float:
    return plan.ends[0]


def _fastest(plan: Placed) -> float:
    return plan.ends[1]


def ratio_interval(pairs: Sequence[tuple[float, float]]) -> Interval | None:
    """The 95 % bootstrap interval of a ratio of sums over rows.

    Args:
        pairs: of each row what is added above and below the line.

    Returns:
        None with fewer than two rows, or where some draws have nothing to divide by.
    """
    if len(pairs) < 2:
        return None
    low, high = bootstrap(pairs, _ratio)
    return (low, high) if isfinite(low) and isfinite(high) else None


def _ratio(drawn: Any) -> Any:
    """Ratios of sums: NaN throughout where some have nothing to divide by."""
    own, other = drawn[..., 0].sum(axis=1), drawn[..., 1].sum(axis=1)
    return own / other if other.min() > 0 else own * nan


def fronts(plans: Sequence[Placed]) -> list[bool]:
    """Of each plan, whether none is as fast and loses as little; the dense model counts as one."""
    places = [(e.speed, e.gap) for e in plans]

    def beaten(own: tuple[float, float]) -> bool:
        return any(
            other != own and other[0] >= own[0] and other[1] <= own[1]
            for other in [*places, (1.0, 0.0)]
        )

    return [not beaten(place) for place in places]
