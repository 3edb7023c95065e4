"""A policy has the same colour in every figure, and a damaged figure is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_fixtures import TASK, line, score, table

from adaskip.errors import RunError
from adaskip.plan import Phase
from adaskip.policies import POLICIES
from adaskip.reports import speed, sweep_figures
from adaskip.reports.figures import as_data_uri, canvas, policy_colour, policy_marker
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


def test_bars_of_policies_are_told_apart_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(sweep_figures, "as_png", lambda figure: drawn.append(figure) or b"")
    lines = [line(policy, n) for policy, n in (("dense", 0), ("ADA", 8), ("ADA", 16), ("EE", 4))]
    draw_scores([table(*lines)])
    panel = drawn[0].axes[0]
    bars = {c.get_label(): c for c in panel.containers if hasattr(c, "patches")}
    points = {c.get_label(): c for c in panel.containers if c not in bars.values()}
    looks = {
        label: (points[label].lines[0].get_marker(), bar.patches[0].get_hatch())
        for label, bar in bars.items()
    }
    assert {*looks} == {"ADA 8", "ADA 16", "EE 4"}
    assert len({*looks.values()}) == 3
    assert looks["ADA 8"][0] == looks["ADA 16"][0] == policy_marker("ADA")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()].count("ADA 8") == 1


def test_speedups_of_policies_are_told_apart_without_colours() -> None:
    speedup = {"median": 1.1, "low": 1.0, "high": 1.2}
    case = {"prefill": {"speedup": speedup, "ideal_speedup": 1.2}}
    labels = ["ADA 8", "ADA 16", "EE 4"]
    point = {"context": 8, "cases": [case | {"label": label} for label in labels]}
    panel = canvas(1, 1, width=4, height=4)[1][0][0]
    speed._panel(panel, [point], labels, Phase.PREFILL)
    looks = [
        (line.get_marker(), line.get_fillstyle())
        for line in (container.lines[0] for container in panel.containers)
    ]
    assert looks == [
        *((policy_marker("ADA"), "full"), (policy_marker("ADA"), "none")),
        (policy_marker("EE"), "full"),
    ]


def test_tasks_at_chance_are_left_out_of_the_mean_score(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(sweep_figures, "as_png", lambda figure: drawn.append(figure) or b"")
    chance = "sample_classification"
    lines = [line(policy, n, value) for policy, n, value in (("dense", 0, 50), ("EE", 4, 20))]
    for each, value in zip(lines, (0, 90), strict=True):
        rows = {"row_scores": {"a": value / 100, "b": value / 100}}
        each.tasks[chance] = score(value, task=chance, **rows)
    given = table(*lines, tasks=(TASK, chance))
    draw_quality([given])
    curves = {curve.get_label(): curve for curve in drawn[0].axes[0].get_lines()}
    assert [*curves["EE"].get_ydata()] == [20]
    draw_scores([given])
    labels = [tick.get_text() for tick in drawn[1].axes[0].get_xticklabels()]
    assert ["(chance)" in label for label in labels] == [False, True]


def test_speed_figures_show_plans_that_were_given() -> None:
    labels = ["stock", "dense", "empty plan", "ADA 8", "SEARCH-1.2", "no attn compiled"]
    cases = [{"label": name, "compiled": name.endswith("compiled")} for name in labels]
    assert speed._labels([{"cases": cases}], compiled=False) == ["ADA 8", "SEARCH-1.2"]
    assert speed._labels([{"cases": cases}], compiled=True) == []
    times = {"prefill": {"speedup": {"median": 1.1, "low": 1, "high": 2}, "ideal_speedup": None}}
    panel = canvas(1, 1, width=4, height=4)[1][0][0]
    point = {"context": 8, "cases": [times | case for case in cases]}
    speed._panel(panel, [point], ["SEARCH-1.2"], Phase.PREFILL)
    (container,) = panel.containers
    assert container.lines[0].get_color() == policy_colour("SEARCH-1.2")


def test_there_is_no_figure_without_anything_to_show() -> None:
    assert draw_scores([table()]) is None
    assert draw_quality([table(line("dense", 0))]) is None
    assert draw_quality([table(line("EE", 1), line("EE", 2))]) is None


def test_a_damaged_figure_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"no picture")
    with pytest.raises(RunError, match=r"x\.png cannot be read"):
        as_data_uri(path)
