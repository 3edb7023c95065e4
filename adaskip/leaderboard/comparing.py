"""Places methods at equal measured time: the line of a method's plans, and who is in front."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, nan
from typing import Any, Protocol, TypeVar

from adaskip.leaderboard.values import Interval
from adaskip.profiling.intervals import bootstrap


class Placed(Protocol):
    """What is compared of a plan."""

    @property
    def method(self) -> str: ...  # noqa: D102

    @property
    def speed(self) -> float: ...  # noqa: D102

    @property
    def gap(self) -> float: ...  # noqa: D102

    @property
    def by_row(self) -> Mapping[str, float]: ...  # noqa: D102

    @property
    def by_round(self) -> Mapping[int, Sequence[float]]: ...  # noqa: D102


P = TypeVar("P", bound=Placed)


def at_speed(plans: Iterable[Placed], method: str, speed: float) -> dict[str, float] | None:
    """The gaps by row of a method at a measured acceleration, between its plans on both sides.

    Linear in the acceleration from plan to plan, the dense model being one: it is as fast as 1 and
    loses nothing, nor does it at anything slower. A plan that another one of the method beats is
    none of them: nobody would take it.

    Args:
        plans: of all methods.
        method: whose.
        speed: the acceleration.

    Returns:
        None beyond the fastest plan.
    """
    own = unbeaten([plan for plan in plans if plan.method == method])
    if not own or own[-1].speed < speed:
        return None
    if speed <= 1:
        return dict.fromkeys(own[0].by_row, 0.0)
    above = next(e for e in own if e.speed >= speed)
    below = [e for e in own if 1 < e.speed < speed]
    low = below[-1].by_row if below else dict.fromkeys(above.by_row, 0.0)
    start = below[-1].speed if below else 1.0
    share = (speed - start) / (above.speed - start)
    return {name: low[name] + share * (gap - low[name]) for name, gap in above.by_row.items()}


def unbeaten(plans: Iterable[P]) -> list[P]:
    """Those of some plans of which none other is as fast and loses as little, slowest first."""
    kept: list[P] = []
    for plan in sorted(plans, key=lambda plan: (-plan.speed, plan.gap)):
        if not kept or plan.gap < kept[-1].gap:
            kept.append(plan)
    return kept[::-1]


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
