"""What is said of a leaderboard: gaps at equal time, verdicts, tables, the page in a browser."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from chromium import Window, browser, opened
from leaderboard_fixtures import filled, whole
from matplotlib.figure import Figure

from adaskip.chance import SEED
from adaskip.leaderboard.axes import Axis, same_axes
from adaskip.leaderboard.collecting import collect, table_of
from adaskip.leaderboard.comparing import at_speed, unbeaten
from adaskip.leaderboard.draws import Draws
from adaskip.leaderboard.values import REPORT_FILE, Beside, read_report, verdict
from adaskip.profiling.interleaving import Ratio
from adaskip.profiling.intervals import draws
from adaskip.reports import leaderboard_figures
from adaskip.reports.leaderboard_report import PAGE, render, write_report
from adaskip.reports.leaderboard_tables import as_text, compared


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole report."""
    folder = tmp_path_factory.mktemp("board")
    boards = whole(folder)
    write_report(boards[0].file, boards, folder, config="mine.yaml")
    return folder


def test_gaps_at_equal_time_lie_between_plans(tmp_path: Path) -> None:
    table = table_of(filled(tmp_path))
    assert table is not None
    assert table.perplexity == pytest.approx(math.exp(2))
    first = table.entries[0]
    assert first.ttft is not None
    assert (first.ttft.median, first.kv_share) == (1.0625, 0.94)
    # Rows lose 0.2 and 0.4 nats per token.
    assert first.gap == pytest.approx(0.3)
    assert first.interval == pytest.approx((0.2, 0.4))
    # Half way between the plans at 1.0625 and 1.125; below the first, between dense and it.
    halfway = at_speed(table.entries, "ADA", 1.09375)
    assert halfway == pytest.approx({"a": 0.4, "b": 0.8})
    assert at_speed(table.entries, "ADA", 1.03125) == pytest.approx({"a": 0.1, "b": 0.2})
    assert at_speed(table.entries, "ADA", 0.9) == {"a": 0.0, "b": 0.0}
    assert at_speed(table.entries, "ADA", 1.2) is None
    assert at_speed(table.entries, "SEARCH gain", 1.125) == pytest.approx({"a": 0.05, "b": 0.1})


@dataclass(frozen=True)
class Plan:
    """A plan of a few rows."""

    method: str
    speed: float
    gap: float
    by_round: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    rows: tuple[float, ...] = ()

    @property
    def by_row(self) -> dict[str, float]:
        return dict(zip("abcdefgh", self.rows or (self.gap, self.gap), strict=False))


def test_a_plan_that_the_methods_own_beats_is_on_no_line() -> None:
    slow, best, fast = Plan("M", 1.125, 2.0), Plan("M", 1.25, 0.5), Plan("M", 1.5, 1.0)
    plans = [fast, slow, best, Plan("other", 1.125, 0.0)]
    assert unbeaten([fast, slow, best]) == [best, fast]
    assert at_speed(plans, "M", 1.125) == {"a": 0.25, "b": 0.25}
    assert at_speed(plans, "M", 1.375) == {"a": 0.75, "b": 0.75}


# Rounds whose median, drawn anew, is anything from the one to the other.
UNSTEADY = (1.125, 1.375) * 5
STEADY = (1.25,) * 10


def verdicts(base: Plan, plan: Plan, speed: float = 1.125) -> tuple[str, str]:
    """What is said of a plan at an acceleration, and at its own."""
    drawn = Draws([base, plan])
    found = drawn.at_equal_speed(plan.method, "ADA", speed), drawn.over_plan(plan, "ADA")
    assert None not in found
    first, second = (each.verdict if each else "" for each in found)
    return first, second


def test_better_is_said_where_it_is_so_whatever_rounds_are_drawn() -> None:
    base = Plan("ADA", 1.25, 1.0, {1: STEADY})

    def told(gap: float, rounds: tuple[float, ...], speed: float = 1.125) -> str:
        return verdicts(base, Plan("M", 1.25, gap, {2: rounds}), speed)[0]

    # Base loses 0.5 there; 0.8 of a plan at 1.125 to 1.375 are 0.8 to 0.27.
    assert (told(0.8, STEADY), told(0.8, UNSTEADY)) == ("better", "")
    assert (told(1.2, STEADY), told(1.2, UNSTEADY)) == ("worse", "")
    assert (told(0.2, UNSTEADY), told(9.0, UNSTEADY)) == ("better", "worse")
    # It may not be as fast at all.
    assert (told(0.2, UNSTEADY, 1.1875), told(9.0, UNSTEADY, 1.1875)) == ("", "worse")
    assert Draws([base]).at_equal_speed("M", "ADA", 1.125) is None


def test_rounds_that_two_plans_took_turns_in_are_drawn_together() -> None:
    base = Plan("ADA", 1.25, 1.0, {1: UNSTEADY})
    assert verdicts(base, Plan("M", 1.25, 0.9, {1: UNSTEADY})) == ("better", "better")
    assert verdicts(base, Plan("M", 1.25, 0.9, {2: UNSTEADY})) == ("", "")
    assert verdicts(base, Plan("M", 1.25, 1.1, {1: UNSTEADY})) == ("worse", "worse")
    assert verdicts(base, Plan("M", 1.25, 1.1, {2: UNSTEADY})) == ("", "")


def test_few_rounds_say_nothing() -> None:
    few, enough = {1: STEADY[:4]}, {1: STEADY[:2], 2: STEADY[:3]}
    base, plan = Plan("ADA", 1.25, 1.0), Plan("M", 1.25, 0.1)
    for theirs, own, said in (
        (few, enough, "too few rounds of times"),
        (enough, few, "too few rounds of times"),
        (enough, enough, "better"),
        # Predicted ones are as sure as they are told.
        ({}, {}, "better"),
    ):
        plans = [replace(base, by_round=theirs), replace(plan, by_round=own)]
        found = Draws(plans).over_plan(plans[1], "ADA")
        assert found is not None
        assert compared(found) == said
        assert bool(found.verdict) == (said == "better")


def test_every_draw_is_what_plans_of_these_rows_and_rounds_would_be() -> None:
    shuffled = np.random.default_rng(3)

    def plan(method: str, *sittings: int) -> Plan:
        rounds = {
            sitting: tuple(float(x) for x in 1.2 + 0.2 * shuffled.standard_normal(7))
            for sitting in sittings
        }
        rows = tuple(float(x) for x in shuffled.random(5))
        speed = float(np.median([*rounds.values()]))
        return Plan(method, speed, fmean(rows), rounds, rows)

    plans = [plan("A", 1), plan("A", 2), plan("A", 1, 2), plan("A", 2), plan("B", 2)]
    speed = plans[-1].speed
    line = Draws(plans)._line("A", np.array([speed]))
    rows = draws(5)
    rounds = {sitting: draws(7, seed=(SEED, sitting, 7)) for sitting in (1, 2)}
    assert {*line.reached} == {True, False}
    for number in range(300):
        again = [
            replace(
                each,
                speed=float(
                    np.median([np.take(r, rounds[s][number]) for s, r in each.by_round.items()])
                ),
                gap=float(np.take(each.rows, rows[number]).mean()),
                rows=tuple(np.take(each.rows, rows[number])),
            )
            for each in plans[:4]
        ]
        there = at_speed(again, "A", speed)
        assert line.reached[number] == (there is not None)
        if there is None:
            there = max(again, key=lambda each: (each.speed, -each.gap)).by_row
        assert line.gaps[number] == pytest.approx(fmean(there.values()))


def test_a_plan_stands_beside_the_others_at_its_measured_time(tmp_path: Path) -> None:
    table = table_of(filled(tmp_path))
    assert table is not None
    slow, fast, searched = table.entries
    # The searched plan is faster than any of AdaSkip's, which it is not compared with there.
    assert searched.beside == {}
    assert (slow.front, fast.front, searched.front) == (False, False, True)
    found = fast.beside["SEARCH gain"]
    assert found.gap == pytest.approx(0.075)
    assert found.difference == pytest.approx(0.9 - 0.075)
    assert found.share == pytest.approx(12)
    assert found.verdict == "worse"
    # Rows that lose 0.6 and 1.2.
    assert (slow.collapsed, fast.collapsed) == (0, 1)


def test_rounds_of_all_sittings_of_a_plan_count(tmp_path: Path) -> None:
    board = filled(tmp_path)
    dense, own = (row for row in board.sitting(1).rows() if row.id in ("dense", "ADA 1.05"))
    slow = {"ttft": [2 * seconds for seconds in dense.ttft]}
    board.sitting(2).append([dense.model_copy(update=slow), own])
    table = table_of(board)
    assert table is not None
    entry, n = table.entries[0], len(own.ttft)
    assert entry.by_round == {1: (1.0625,) * n, 2: (2.125,) * n}
    # Half of the rounds each: between the two.
    assert entry.ttft == Ratio(1.59375, 1.0625, 2.125)
    assert (board.to_time, table.rounds) == ([], (n, n))


def test_better_is_said_only_beyond_the_interval() -> None:
    def beside(own: tuple[float, ...], other: tuple[float, ...]) -> Beside:
        plans = [Plan(m, 1.25, fmean(r), rows=r) for m, r in (("M", own), ("ADA", other))]
        found = Draws(plans).over_plan(plans[0], "ADA")
        assert found is not None
        return found

    dense, base = (0.0,) * 4, (0.3,) * 4
    less, mixed = (0.1, 0.2, 0.1, 0.2), (0.1, 0.2, 0.1, 0.7)
    assert (beside(less, base).verdict, compared(beside(less, base))) == ("better", "better")
    assert beside(less, base).share == pytest.approx(0.5)
    assert beside(less, base).share_interval == pytest.approx((1 / 3, 2 / 3))
    assert (beside(mixed, base).verdict, compared(beside(mixed, base))) == (
        "",
        "no difference shown",
    )
    assert beside(mixed, base).difference < 0
    assert beside(base, less).verdict == "worse"
    assert (beside(less, dense).share, beside(less, dense).verdict) == (None, "worse")
    one = beside((0.1,), (0.3,))
    assert (one.interval, one.share_interval, one.verdict) == (None, None, "")
    for unknown in ((math.nan, math.nan), (math.nan, -0.1), (0.1, math.nan), None):
        assert verdict(unknown, higher_is_better=False) == ""


def test_tasks_at_chance_speak_for_nothing(results: Path) -> None:
    table = read_report(results / REPORT_FILE).tables[0]
    assert table.tasks["needle_single"].at_chance
    facts = table.tasks["sample_summarization"]
    assert (facts.at_chance, facts.dense.score) == (False, pytest.approx(48.3, abs=0.1))
    worst = table.entries[1].scores["sample_summarization"]
    assert worst.delta == pytest.approx(-0.9 * facts.dense.score)
    assert worst.verdict == "worse"
    text = (results / "report.md").read_text(encoding="utf-8")
    assert "(0.0, +0.0 [0.0, 0.0])" in text
    assert "needle_single: dense 0.0 [0.0, 0.0] over 6 rows, chance 0 (at chance" in text


def test_models_share_axes_where_they_share_rows(results: Path) -> None:
    report = read_report(results / REPORT_FILE)
    axes = same_axes(report)
    # llama alone is at 2,000 tokens.
    assert [*axes] == [1000]
    assert [a.model for a in axes[1000] if a.plan == "dense"] == ["smollm2", "llama"]
    dense = axes[1000][0]
    # 2 x 1 and 2 x 3 nats over 8 and 12 characters.
    assert (dense.seconds, dense.nats, dense.prompt) == (2.0, pytest.approx(8 / 20), 150)
    # The rows lose 0.9 and 1.8 nats per token more, of two tokens each.
    (plan,) = (a for a in axes[1000] if (a.model, a.plan) == ("smollm2", "ADA 1.2"))
    assert plan.nats == pytest.approx((8 + 1.8 + 3.6) / 20)


def test_plans_of_models_on_the_same_axes_are_joined_by_their_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = []
    monkeypatch.setattr(leaderboard_figures, "as_png", lambda figure: drawn.append(figure) or b"")
    # The plan that was asked for more is the slower one.
    places = [("dense", 2.0), ("ADA", 1.0), ("ADA", 1.5)]
    axes = [Axis("smollm2", name, name, seconds, 3 - seconds, None) for name, seconds in places]
    leaderboard_figures.draw_axes(axes, ["ADA"])
    (line,) = drawn[0].axes[0].get_lines()
    assert [*line.get_xdata()] == [1.0, 1.5, 2.0]
    assert [*line.get_ydata()] == [2.0, 1.5, 1.0]


def test_the_report_is_made_of_its_json_alone(results: Path) -> None:
    before = {path: path.read_bytes() for path in results.iterdir() if path.is_file()}
    render(results)
    assert {path: path.read_bytes() for path in results.iterdir() if path.is_file()} == before
    boards = whole(results.parent / "again")
    found = replace(collect(boards[0].file, boards), config="mine.yaml")
    assert found == read_report(results / REPORT_FILE)
    pictures = sorted(path.name for path in results.glob("*.png"))
    assert pictures == [
        *("pareto-llama-1000.png", "pareto-llama-2000.png"),
        *("pareto-models-1000.png", "pareto-smollm2-1000.png"),
    ]


def test_the_text_says_what_exists(tmp_path: Path) -> None:
    board = filled(tmp_path)
    text = as_text(collect(board.file, [board]))
    assert "| ADA         |  1.05 |     1.100 | 1.062 [1.062–1.062]" in text
    # At 1.1 AdaSkip loses 0.66 nats over both rows, the search 0.06.
    assert "0.060, 9% [9%–9%], better" in text
    assert "Of 2 plans of other methods 2 are no faster than the fastest of SEARCH gain." in text
    assert "it loses less than 2 of these, beyond the interval of rows and rounds" in text
    assert "Tasks:" not in text


def test_predicted_speeds_are_called_so(tmp_path: Path) -> None:
    boards = whole(tmp_path)
    said = write_report(boards[0].file, boards, tmp_path, config="mine.yaml")
    assert "time measured; hollow" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "predicted x TTFT" not in said
    for board in boards:
        board.sitting(1).path.unlink()
    write_report(boards[0].file, boards, tmp_path, config="mine.yaml")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    headers = [line for line in text.splitlines() if line.startswith(("| method", "| calibration"))]
    # Of plans, at equal time, of scores, of calibrations; one of the three has no calibrations.
    n_predicted = sum("| predicted x TTFT |" in line for line in headers)
    assert n_predicted == 3 + 1
    assert "time predicted; hollow" in text
    assert "time measured" not in text


# Sorted by gap, falling; then the rows of one method in front only.
USED = """(() => {
  const column = document.querySelectorAll('#quality thead button')[6];
  column.click(); column.click();
  const rows = [...document.querySelectorAll('#quality tbody tr')];
  const gaps = rows.map(row => Number(row.cells[6].dataset.value));
  const sorted = gaps.every((gap, i) => !i || gap <= gaps[i - 1]);
  const form = document.querySelector('form');
  form.elements.method.value = 'SLEB'; form.elements.context.value = '1000';
  form.dispatchEvent(new Event('change'));
  const seen = () => rows.filter(row => row.offsetParent !== null).map(row => row.dataset.method);
  const filtered = seen();
  const said = [...document.querySelectorAll('[role=status]')].map(e => e.textContent);
  form.elements.front.click();
  const front = seen().length;
  return {sorted, filtered, said, front, first: rows[0].dataset.method,
    order: column.closest('th').getAttribute('aria-sort'),
    named: [...document.querySelectorAll('select, input')].every(e => e.labels.length === 1)};
})()"""
# Whether anything is cut off at the right: a cell beyond its table's frame, a text beyond its cell.
CUT = """(() => [...document.querySelectorAll('.board th, .board td, .board small')]
  .filter(e => e.offsetParent !== null && (e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0
    || e.getBoundingClientRect().right > e.closest('figure').getBoundingClientRect().right + 1))
  .map(e => e.textContent).slice(0, 3))()"""


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    with opened(tmp_path_factory.mktemp("browser")) as found:
        yield found


@browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1300, 420])
def test_the_page_shows_all_of_the_table_on_any_screen(
    results: Path, window: Window, width: int, dark: bool
) -> None:
    window.open(results / PAGE, width=width, dark=dark)
    assert window.value("performance.getEntriesByType('resource').map(e => e.name).filter("
                        "name => !name.startsWith('data:'))") == []  # fmt: skip
    assert window.value(CUT) == []
    assert window.value("document.documentElement.scrollWidth") <= width
    pictures = window.value("[...document.images].map(image => image.naturalWidth)")
    assert len(pictures) == 4
    assert min(pictures) > 500
    # Per model and context length dense and its plans, below a header.
    rows = "[...document.querySelectorAll('table.board')].map(table => table.rows.length)"
    assert window.value(rows) == [1 + 3 * 13, 1 + 3 * 13]
    light = window.value("getComputedStyle(document.body).backgroundColor") == "rgb(251, 251, 249)"
    assert light is not dark


@browser
def test_the_page_sorts_and_filters(results: Path, window: Window) -> None:
    window.open(results / PAGE, width=1300)
    told = window.value(USED)
    assert (told["sorted"], told["order"], told["first"]) == (True, "descending", "SEARCH window")
    assert sorted(told["filtered"]) == ["SLEB"] * 4 + ["dense"] * 2
    # Both tables are filtered, and each says so.
    assert told["said"] == ["6 of 39 rows"] * 2
    assert told["front"] <= 6
    assert told["named"]


# Of each row: its method, whether it is coloured, and what its first and last cells say.
WORDS = """[...document.querySelectorAll('.board tbody tr')].map(row => ({front: row.className,
  first: row.cells[0].textContent, last: row.cells[row.cells.length - 1].textContent,
  colour: row.cells[row.cells.length - 1].className, table: row.closest('table').id}))"""


@browser
def test_nothing_is_said_by_colour_alone(results: Path, window: Window) -> None:
    window.open(results / PAGE, width=1300)
    told = window.value(WORDS)
    assert {row["front"] for row in told} == {"dense", "front", ""}
    for row in told:
        assert row["first"].endswith("in front") == (row["front"] == "front")
        if row["table"] == "scores" and row["colour"]:
            assert row["last"].endswith(row["colour"])
    # On paper, too, which shows what rows a form has left.
    window.ask("Emulation.setEmulatedMedia", media="print")
    shown = "[...document.querySelectorAll('[role=status], form')].map(e => !!e.offsetParent)"
    assert window.value(shown) == [False, True, True]


@browser
def test_collapses_are_sorted_by_their_share(results: Path, window: Window) -> None:
    window.open(results / PAGE)
    cells = "[...document.querySelectorAll('#quality td[data-label=collapsed]')]"
    told = window.value(cells + ".map(c => [c.firstChild.textContent, c.dataset.value])")
    # Of two rows each.
    assert {(shown, float(value)) for shown, value in told} == {("0", 0), ("1", 0.5)}


@browser
def test_the_keyboard_sorts(results: Path, window: Window) -> None:
    window.open(results / PAGE, width=1300)
    window.value("document.querySelector('#quality thead button').focus()")
    for _ in range(4):
        window.press("Tab")
    window.press(" ")
    sorted_by = "document.querySelector('[aria-sort]').textContent"
    assert window.value(sorted_by) == "× per token"


def test_the_page_refers_to_nothing_outside_itself(results: Path) -> None:
    text = (results / PAGE).read_text(encoding="utf-8")
    addresses = re.findall(r"""(?:src|href|url|action)\s*[=(]\s*["']?([^"'\s>)]*)""", text)
    assert {address.split(":")[0].split("#")[0] for address in addresses} <= {"", "data"}
    assert "default-src 'none'" in text
    assert len(text) < 2_000_000


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, in their order."""
    figures: list[Figure] = []
    monkeypatch.setattr(leaderboard_figures, "as_png", lambda each: figures.append(each) or b"")
    return figures


def test_lines_of_a_figure_are_what_the_table_says_between_plans(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    table = table_of(filled(tmp_path))
    assert table is not None
    leaderboard_figures.draw_front(table, table.methods)
    lines = {line.get_label(): line for line in drawn[0].axes[0].get_lines()}
    for method in table.methods:
        own = sorted((e.speed, e.gap) for e in table.entries if e.method == method)
        speeds, gaps = np.array([(1.0, 0.0), *own]).T
        # Straight in nats, on an axis that is not: at many speeds, not at the plans' alone.
        told = lines[method].get_xdata()
        assert len(told) > 10 * len(own)
        assert lines[method].get_ydata() == pytest.approx(np.interp(told, speeds, gaps))
        assert told[:: lines[method].get_markevery()] == pytest.approx(speeds)


def test_a_plan_that_is_no_faster_than_dense_is_on_no_line(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    table = table_of(filled(tmp_path))
    assert table is not None
    slow = replace(next(e for e in table.entries if e.method == "ADA"), ttft=None, predicted=0.97)
    leaderboard_figures.draw_front(replace(table, entries=(*table.entries, slow)), table.methods)
    lines = [line for line in drawn[0].axes[0].get_lines() if line.get_label() == "ADA"]
    assert [min(line.get_xdata()) for line in lines] == [1.0]
    hollow = [line for line in drawn[0].axes[0].get_lines() if line.get_fillstyle() == "none"]
    assert 0.97 in [line.get_xdata()[0] for line in hollow]


def test_a_method_looks_the_same_in_every_figure(tmp_path: Path, drawn: list[Figure]) -> None:
    (table,) = filter(None, [table_of(filled(tmp_path))])
    leaderboard_figures.draw_front(table, table.methods)
    alone = replace(table, entries=tuple(e for e in table.entries if e.method != "ADA"))
    leaderboard_figures.draw_front(alone, table.methods)
    looks = [
        {
            line.get_label(): (line.get_color(), line.get_marker())
            for line in figure.axes[0].get_lines()
            if line.get_label() in table.methods
        }
        for figure in drawn
    ]
    assert {*looks[0]} == {"ADA", "SEARCH gain"}
    assert len({*looks[0].values()}) == 2
    assert looks[1] == {"SEARCH gain": looks[0]["SEARCH gain"]}
