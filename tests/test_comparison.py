"""The numbers in a sweep's tables, worked by hand, and how tables are set."""

from __future__ import annotations

import pytest

from adaskip.plan import Phase
from adaskip.reports.comparison import Line, Table, ideal_speedup
from adaskip.runs.rows import GeneratedRow
from adaskip.runs.scoring import score_rows
from adaskip.tables import markdown_table, number, perplexity


def line_of(policy: str, seconds: list[float], skipped: int) -> Line:
    counts = {"forwards": 1, "attn": skipped, "ffn": skipped, "sublayers": []}
    rows = [
        GeneratedRow.from_dict(
            {
                "id": str(number),
                "prediction": "dog",
                "references": ["dog"],
                "classes": None,
                "length": 1,
                "tokens_after": 1,
                "truncated": False,
                "generated_tokens": 1,
                "skipped": {"prefill": counts, "decode": counts},
                "seconds": {"ttft": value, "per_token": None},
                "session": "s",
            }
        )
        for number, value in enumerate(seconds)
    ]
    score = score_rows("sample_qa", rows, n_layers=4, n_planned=3)
    return Line(policy, 1, "layers", {"sample_qa": score})


def test_speedups_are_medians_of_ratios_of_the_same_row() -> None:
    dense, other = line_of("dense", [2.0, 4.0, 9.0], 0), line_of("EE", [1.0, 4.0, 3.0], 1)
    table = Table("llama", "prefill", ("sample_qa",), (dense, other))
    assert table.dense is dense
    # Ratios 2, 1 and 3, although the ratio of the medians is 4 / 3.
    assert other.speedup(dense, "ttft") == 2.0
    assert other.speedup(dense, "per_token") is None
    assert dense.speedup(dense, "ttft") is None
    assert other.share(Phase.PREFILL) == 1 / 4
    assert ideal_speedup(1 / 4) == pytest.approx(4 / 3)
    assert table.delta(other, "sample_qa") == 0.0


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
