"""What the cells of a sweep will cost, from what is known before they run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adaskip.models.loading import model_spec
from adaskip.runs.ledger import answer_length, is_finished, rows_of
from adaskip.runs.plans import Cell, SweepPlan
from adaskip.runs.records import Record
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.runner import resolve
from adaskip.tasks.spec import task_spec

SAMPLE_ROWS = 20  # of a task of the offline sample without a limit
COLUMNS = ("cell", "state", "rows left", "prompt tokens", "forwards", "minutes", "known from")


@dataclass(frozen=True)
class Cost:
    """What is left to do in one cell.

    Attributes:
        rows: rows left; None if nobody knows.
        prompt_tokens: of all rows left.
        forwards: one prefill and the decode steps, of all rows left.
        seconds: None without rows of the same model to learn the pace from.
        basis: where rows and tokens are known from.
    """

    rows: int | None
    prompt_tokens: float
    forwards: float
    seconds: float | None
    basis: str


@dataclass
class Pace:
    """Seconds per prompt token and per decode step, from the rows of a model so far."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def add(self, rows: Sequence[Record]) -> None:
        """Takes in rows of one cell."""
        for row in rows:
            seconds = row["seconds"]
            self.prefill.append(seconds["ttft"] / max(row["tokens_after"], 1))
            if seconds["per_token"] is not None:
                self.decode.append(seconds["per_token"])

    def seconds(self, prompt_tokens: float, steps: float) -> float | None:
        """The time of so many tokens and decode steps, by the median pace."""
        if not self.prefill:
            return None
        step = statistics.median(self.decode) if self.decode else 0.0
        return prompt_tokens * statistics.median(self.prefill) + steps * step


def describe(plan: SweepPlan, cells: Sequence[Cell]) -> str:
    """The table `--dry_run` prints: every cell, how far it is and what is left to do.

    Raises:
        RunError: a file of an earlier call is damaged.
    """
    from adaskip.tables import markdown_table

    paces: dict[str, Pace] = {}
    made: dict[tuple[str, str], list[Record]] = {}
    for cell in plan.cells:
        rows = rows_of(cell.config, cell.task)
        if rows:
            paces.setdefault(cell.config.model_name, Pace()).add(rows)
            made.setdefault((cell.config.model_name, cell.task), rows)
    lines, costs = [], []
    for cell in cells:
        config = resolve(cell.config)
        finished = is_finished(config)
        key = (config.model_name, cell.task)
        pace = paces.get(config.model_name, Pace())
        cost = estimate(config, made.get(key, ()), pace, plan.estimate, finished=finished)
        costs.append(cost)
        done = len(rows_of(config, cell.task))
        state = "finished" if finished else f"{done} of {config.limit or 'all'} rows done"
        lines.append((cell.label, state, *_cells(cost)))
    total = Cost(
        sum(cost.rows or 0 for cost in costs),
        sum(cost.prompt_tokens for cost in costs),
        sum(cost.forwards for cost in costs),
        None
        if any(cost.seconds is None for cost in costs)
        else sum(cost.seconds or 0 for cost in costs),
        "",
    )
    lines.append((f"{len(cells)} cells", "", *_cells(total)))
    return "\n".join([markdown_table(COLUMNS, lines), "", _basis(plan)])


def estimate(
    config: RunConfig,
    made: Sequence[Record],
    pace: Pace,
    assumed: Mapping[str, Any],
    *,
    finished: bool,
) -> Cost:
    """What is left of one cell.

    Args:
        config: resolved, with its one task.
        made: rows of the same model and task under any policy; their prompts are the same.
        pace: of the model.
        assumed: the sweep's `estimate`.
        finished: whether nothing is left.
    """
    if finished:
        return Cost(0, 0, 0, 0.0, "")
    task = config.tasks[0]
    done = len(rows_of(config, task))
    rows = config.limit or assumed.get("rows", {}).get(task)
    if rows is None and task_spec(task).offline:
        rows = SAMPLE_ROWS
    if rows is None:
        return Cost(None, 0, 0, None, "number of rows unknown")
    left = max(rows - done, 0)
    if made:
        tokens = statistics.fmean(row["tokens_after"] for row in made)
        steps = statistics.fmean(row["generated_tokens"] for row in made) - 1
        basis = f"{len(made)} rows of this task"
    else:
        offline = task_spec(task).offline
        wanted = config.sample_tokens if offline else assumed.get("prompt_tokens", 10_000)
        tokens = min(wanted, config.max_length or model_spec(config.model_name).prompt_limit)
        steps = answer_length(config, task) - 1
        basis = "settings" if offline else "assumption"
    seconds = pace.seconds(left * tokens, left * steps)
    return Cost(left, left * tokens, left * (1 + steps), seconds, basis)


def _cells(cost: Cost) -> tuple[str, ...]:
    return (
        "?" if cost.rows is None else f"{cost.rows:,}",
        f"{cost.prompt_tokens:,.0f}",
        f"{cost.forwards:,.0f}",
        "?" if cost.seconds is None else f"{cost.seconds / 60:,.1f}",
        cost.basis,
    )


def _basis(plan: SweepPlan) -> str:
    return (
        "Forwards: one prefill and every decode step of each row, answers at full length until "
        "rows of the task exist. Minutes: at the median pace of the model's rows so far "
        f"(in {plan.folder}), whatever their policy; without loading, warming up and perplexity."
    )
