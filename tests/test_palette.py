"""A policy has the same colour in every figure, whatever else is drawn there."""

from __future__ import annotations

import pytest

from adaskip.policies import POLICIES
from adaskip.reports.comparison import Line, Table
from adaskip.reports.figure import _styles
from adaskip.reports.palette import COLOURS, ON_DARK, ON_LIGHT, policy_colour, policy_number
from adaskip.reports.tradeoff import _legend


def table(*lines: tuple[str, int]) -> Table:
    return Table("m", "e2e", (), tuple(Line(policy, n, "layers", {}) for policy, n in lines))


def test_policies_differ_and_the_palettes_go_together() -> None:
    assert len({policy_colour(policy) for policy in POLICIES}) == len(POLICIES)
    assert len(COLOURS) == len(ON_LIGHT) == len(ON_DARK)


@pytest.mark.parametrize("others", [(), (("EE", 4), ("SD", 4)), (("US", 1), ("US", 2))])
def test_a_policy_keeps_its_colour(others: tuple[tuple[str, int], ...]) -> None:
    styles = _styles([table(("dense", 0), *others, ("ADA", 8), ("ADA", 16))])
    colours, hatches = zip(styles["ADA 8"], styles["ADA 16"], strict=True)
    assert set(colours) == {policy_colour("ADA")}
    assert len(set(hatches)) == 2
    assert "dense" not in styles
    legend = _legend([policy for policy, _ in others] + ["ADA"])
    assert legend.split('class="p')[-1].startswith(str(policy_number("ADA")))
