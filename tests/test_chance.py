"""Chance: one rule says which dense scores tell nothing, and every table says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_fixtures import score, table
from test_scoring import made_row, save_run

from adaskip.reports.comparison import Line
from adaskip.reports.sweep_tables import quality
from adaskip.runs.evaluation import evaluate
from adaskip.tasks.chance import at_chance


@pytest.mark.parametrize(
    ("task", "scores", "expected"),
    [
        # Nobody guesses a number of seven digits: one hit is enough.
        ("needle_single", [0.0, 0.0, 0.0], True),
        ("needle_single", [0.0, 1.0, 0.0], False),
        ("needle_values", [0.0, 0.25], False),
        # 2 of 2 of four: 1 in 16. 3 of 3: 1 in 64.
        ("needle_keys", [1.0, 1.0], True),
        ("needle_keys", [1.0, 1.0, 1.0], False),
        # Half of four answers, drawn of eight: 53 of 70 draws; three of four 17.
        ("variable_tracking", [0.5], True),
        ("variable_tracking", [0.75], True),
        ("variable_tracking", [1.0], False),
        # In 20 rows 0.6 is far above what drawing gives, though no binomial of rows would say so.
        ("variable_tracking", [0.5, 0.75] * 10, False),
        ("variable_tracking", [0.5] * 20, True),
        ("common_words", [0.2] * 20, True),
        ("common_words", [0.3, 0.4] * 10, False),
        # 8 of 10 coins fall right in 56 of 1,024 draws, 9 in 11.
        ("sample_classification", [1.0] * 8 + [0.0] * 2, True),
        ("sample_classification", [1.0] * 9 + [0.0], False),
        # Nobody knows what guessing earns there.
        ("sample_qa", [0.0, 0.0], False),
        ("gov_report", [0.0, 0.0], False),
        ("needle_single", [], False),
    ],
)
def test_scores_that_guessing_reaches(task: str, scores: list[float], expected: bool) -> None:
    assert at_chance(task, scores) == expected


def test_a_sweeps_table_says_it_of_dense_alone() -> None:
    shares = {"prefill": 0.0, "decode": 0.0}
    for task, marked in (("sample_classification", True), ("sample_qa", False)):
        made = score(50.0, task=task)
        lines = [
            Line(p, n, "layers", shares, 1.0, 0.5, {task: made})
            for p, n in (("dense", 0), ("EE", 1))
        ]
        shown = quality(table(*lines, tasks=(task,)))[task, "score"].tolist()
        assert shown == ["50.00 (chance)" if marked else "50.00", "50.00"]


def test_the_table_of_a_run_says_it(tmp_path: Path) -> None:
    rows = [
        made_row(n, answer, task="sample_classification", references=["Yes"], classes=["Yes", "No"])
        for n, answer in enumerate(("Yes", "No"))
    ]
    save_run(tmp_path, rows, policy="dense")
    save_run(tmp_path, rows, policy="EE", skip_full_layer_num=1)
    text = evaluate(tmp_path, "llama-EE-PREFILL")
    assert "50.00 (chance)" in text
    assert text.count("(chance)") == 1
    assert "sample_classification, dense: no better than guessing, so this task tells" in text
