"""A policy has the same colour in every figure, and a damaged figure is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_fixtures import line, table

from adaskip.errors import RunError
from adaskip.policies import POLICIES
from adaskip.reports.figures import as_data_uri, policy_colour, policy_marker
from adaskip.reports.sweep_figures import bar_styles, draw_quality, draw_scores


def test_policies_differ() -> None:
    assert len({policy_colour(policy) for policy in POLICIES}) == len(POLICIES)
    assert len({policy_marker(policy) for policy in POLICIES}) == len(POLICIES)


@pytest.mark.parametrize("others", [(), (("EE", 4), ("SD", 4)), (("US", 1), ("US", 2))])
def test_a_policy_keeps_its_colour(others: tuple[tuple[str, int], ...]) -> None:
    lines = (("dense", 0), *others, ("ADA", 8), ("ADA", 16))
    styles = bar_styles([table(*(line(policy, n) for policy, n in lines))])
    colours, hatches = zip(styles["ADA 8"], styles["ADA 16"], strict=True)
    assert set(colours) == {policy_colour("ADA")}
    assert len(set(hatches)) == 2
    assert "dense" not in styles


def test_there_is_no_figure_without_anything_to_show() -> None:
    assert draw_scores([table()]) is None
    assert draw_quality([table(line("dense", 0))]) is None
    assert draw_quality([table(line("EE", 1), line("EE", 2))]) is None


def test_a_damaged_figure_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"no picture")
    with pytest.raises(RunError, match=r"x\.png cannot be read"):
        as_data_uri(path)
