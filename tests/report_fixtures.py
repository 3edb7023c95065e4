"""Lines and tables of a sweep's report, made by hand."""

from __future__ import annotations

from typing import Any

from adaskip.reports.comparison import ComparedScore, Line, Table

TASK = "sample_qa"


def score(value: float, **changes: Any) -> ComparedScore:
    """Ten points more or less than 50 on two rows."""
    given: dict[str, Any] = {
        "task": TASK,
        "n_rows": 2,
        "n_short": 0,
        "n_planned": 2,
        "score": value,
        "rouge_l": None,
        "unscored": None,
        "truncated": 0.5,
        "ttft": 1.0,
        "per_token": 0.5,
        "skipped_share": {"prefill": 0.25, "decode": 0.0},
        "backend": None,
        "row_scores": {"a": (value - 10) / 100, "b": (value + 10) / 100},
        "row_seconds": {"a": (1.0, None), "b": (2.0, 0.5)},
        "sessions": ("s",),
        "delta": None,
        "delta_interval": None,
        "perplexity": None,
        **changes,
    }
    return ComparedScore(**given)


def line(policy: str, budget: int, value: float = 50.0, **changes: Any) -> Line:
    """A line of one task."""
    unit = "sublayers" if policy == "ADA" else "layers"
    shares = {"prefill": 0.25, "decode": 0.0}
    return Line(policy, budget, unit, shares, 1.5, 0.5, {TASK: score(value, **changes)})


def table(*lines: Line, tasks: tuple[str, ...] = (TASK,)) -> Table:
    return Table("llama", "prefill", tasks, lines)
