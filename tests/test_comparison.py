"""The cells of a sweep's tables, worked by hand; how tables are set; the report and its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from report_fixtures import TASK, line, table

from adaskip.errors import RunError
from adaskip.reports.comparison import Report, read_report
from adaskip.reports.sweep_report import page_of, render, tables_text
from adaskip.reports.sweep_tables import as_markdown, quality, work
from adaskip.tables import markdown_table, number, perplexity

DEMO = ROOT / "results" / "demo"
OF = {"perplexity_rows": 4, "perplexity_tokens": 14}
LINES = (
    line("dense", 0, 50),
    line("EE", 4, 30, delta=-20.0, delta_interval=(-31.25, 0.0), perplexity=1234.5),
    line("ADA", 8, 40, delta=-10.0, rouge_l=12.5, perplexity=9.5, **OF),
)
REPORT = Report("<i>", 4, ("<u>",), {"<b>": "<s>"}, {}, (table(*LINES),))


def test_quality_by_hand() -> None:
    frame = quality(table(*LINES))
    columns = [("", "policy"), ("", "skips")]
    columns += [(TASK, what) for what in ("score", "Δ [95 %]", "rougeL", "perplexity")]
    assert frame.columns.tolist() == columns
    assert frame.values.tolist() == [
        ["dense", "nothing", "50.00", "–", "–", "–"],
        ["EE", "4 layers", "30.00", "-20.00 [-31.2, +0.0]", "–", "1,234"],
        ["ADA", "8 sublayers", "40.00", "-10.00", "12.50", "9.50 (4 rows, 14 tokens)"],
    ]
    # The best of those that skip as much: 4 layers are 8 sublayers.
    assert table(*LINES).best(TASK) == {"ADA 8"}
    assert table(*LINES, line("EE", 8, 60)).best(TASK) == {"ADA 8"}
    # A tie of all has no best, nor has a task at which dense is at chance.
    assert table(LINES[0], line("EE", 4, 40), line("ADA", 8, 40)).best(TASK) == set()
    guessing = line("dense", 0, 0, task="sample_classification", row_scores={"a": 0.0, "b": 0.0})
    assert table(guessing, *LINES[1:]).best(TASK) == set()
    assert as_markdown(quality(table())) == "No results yet."


def test_a_sweep_claims_no_speedup() -> None:
    """Its rows are made minutes apart; the speed report times policies within a round."""
    frame = work(table(*LINES))
    assert frame.values.tolist()[1] == [
        "EE",
        "4 layers",
        "2",
        "50.0",
        "25.0",
        "0.0",
        "1.50",
        "500.0",
    ]
    text = tables_text(REPORT) + (DEMO / "report.md").read_text(encoding="utf-8")
    assert "speedup" not in text
    assert "bound" not in text
    assert text.count("docs/SPEED.md") == 2
    assert "speedup" not in (DEMO / "report.json").read_text(encoding="utf-8")


def test_what_a_report_holds_is_text_not_markup() -> None:
    made = page_of(REPORT, [])
    for name in ("i", "u", "s"):
        assert f"<{name}>" not in made
        assert f"&lt;{name}&gt;" in made
    assert "<b>40.00</b>" in made
    assert made.count("<b>") == 1
    # Between policies there is a rule, in each of the two tables.
    assert made.count('class="first"') == 2 * 2


def test_a_report_is_read_back(tmp_path: Path) -> None:
    REPORT.save(tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == REPORT


@pytest.mark.parametrize("content", [{}, {"name": "x", "tables": [{"model": "llama"}]}])
def test_what_is_no_report_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"schema": 1, **content}))
    with pytest.raises(RunError, match=r"is no report of a sweep.*; run the sweep again"):
        render(tmp_path)
    assert [*tmp_path.iterdir()] == [path]


def test_the_demos_text_is_made_from_its_json(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "report.json").write_bytes((DEMO / "report.json").read_bytes())
    render(tmp_path / "demo")
    made, kept = (
        [
            text
            for text in (folder / "report.md").read_text(encoding="utf-8").splitlines()
            if "](../" not in text  # figures of other commands
        ]
        for folder in (tmp_path / "demo", DEMO)
    )
    assert [text for text in made if text] == [text for text in kept if text]


def test_tables_line_up_also_with_wide_letters() -> None:
    text = markdown_table(["a", "b"], [["数数", "1"], ["x", number(-0.5, signed=True)]])
    assert text.splitlines() == [
        "| a    |     b |",
        "| ---- | ----: |",
        "| 数数 |     1 |",
        "| x    | -0.50 |",
    ]
    assert (number(None), number(float("nan"))) == ("–", "–")
    assert (perplexity(12.345), perplexity(74157.84), perplexity(None)) == ("12.35", "74,158", "–")
