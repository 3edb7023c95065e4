"""Linear maps that are not judged by the rows they were fitted on.

A full map has as many numbers as some thousand tokens can tell, so on its own rows it loses less
than it will on others, and a search would take it for better than it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adaskip.fitting import Moments
from adaskip.plan import Sublayer
from adaskip.replacements import Linear, Replacement


class CrossFitted:
    """A linear map fitted on all rows, and for each row one fitted on the others.

    Args:
        moments: of each row.
        rank: of the maps; None for full ones.
        ridge: as `fit_linears` takes it.

    Raises:
        AdaskipError: all rows together have too few tokens.
    """

    def __init__(self, moments: Sequence[Moments], rank: int | None, ridge: float) -> None:
        self._moments = moments
        self._settings = rank, ridge
        # By the row that was left out; None for the map of all.
        self._maps: dict[int | None, Linear] = {}
        Moments.joined(moments).check()

    @property
    def whole(self) -> Linear:
        """The map of all rows, which goes into a plan."""
        return self.without(None)

    def without(self, row: int | None) -> Linear:
        """The map of all rows but one; of all, where the others have too few tokens."""
        if row not in self._maps:
            others = [m for number, m in enumerate(self._moments) if number != row]
            joined = Moments.joined(others or self._moments)
            alone = row is not None and (not others or not joined.are_enough)
            self._maps[row] = self.whole if alone else joined.solve(*self._settings)
        return self._maps[row]

    def settled(self) -> CrossFitted:
        """The same with all its maps solved, so that the moments, in float64, are let go of."""
        for row in (None, *range(len(self._moments))):
            self.without(row)
        self._moments = ()
        return self


# What takes a sublayer's place while a plan is searched.
Learned = Replacement | CrossFitted


def settled(plan: Mapping[Sublayer, Learned]) -> dict[Sublayer, Learned]:
    """What has become part of a plan, without what only a candidate needs."""
    return {s: r.settled() if isinstance(r, CrossFitted) else r for s, r in plan.items()}


def for_row(plan: Mapping[Sublayer, Learned], row: int) -> dict[Sublayer, Replacement]:
    """What a row is judged by."""
    return {s: r.without(row) if isinstance(r, CrossFitted) else r for s, r in plan.items()}


def for_all(plan: Mapping[Sublayer, Learned]) -> dict[Sublayer, Replacement]:
    """What goes into a plan."""
    return {s: r.whole if isinstance(r, CrossFitted) else r for s, r in plan.items()}
