"""Keeps the perplexity of reference answers beside a run's predictions, for the sweep's tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adaskip.errors import RunError
from adaskip.models.processes import team
from adaskip.runs.bench import Bench
from adaskip.runs.ledger import run_folder
from adaskip.runs.perplexity import shared_perplexity
from adaskip.runs.records import SCHEMA, Record, read_json, write_json
from adaskip.runs.runconfig import RunConfig


@dataclass(frozen=True)
class PerplexityPlan:
    """How much a sweep measures: a task's first rows, a reference's first tokens."""

    rows: int = 5
    max_tokens: int = 64


def perplexity_path(config: RunConfig, task: str) -> Path:
    """Where it is kept."""
    return run_folder(config) / f"{task}.perplexity.json"


def read_perplexity(config: RunConfig, task: str) -> Record | None:
    """What was measured, None if nothing was.

    Raises:
        RunError: the file is damaged.
    """
    path = perplexity_path(config, task)
    if not path.exists():
        return None
    record = read_json(path)
    if not isinstance(record.get("perplexity"), float) or "plan" not in record:
        raise RunError(f"{path} is damaged; delete it and run again.")
    return record


def is_measured(config: RunConfig, task: str, plan: PerplexityPlan) -> bool:
    """Whether it was measured as the plan asks."""
    record = read_perplexity(config, task)
    return record is not None and record["plan"] == vars(plan)


def measure_perplexity(config: RunConfig, task: str, bench: Bench, plan: PerplexityPlan) -> None:
    """Measures and writes it for one task of a resolved configuration; all processes together.

    Raises:
        AdaskipError: as the run itself; or a reference is empty.
    """
    rows = bench.rows(config, task)[: plan.rows]
    group = team()
    measured = shared_perplexity(
        bench.model,
        bench.tokenizer,
        bench.policy(config, task),
        [(bench.prompt(config, row), row.answers[0]) for row in rows],
        scope=config.experiment,
        max_tokens=plan.max_tokens,
        progress=group.is_first,
        same=bool(config.tp_plan),
    )
    content = {
        "schema": SCHEMA,
        "plan": vars(plan),
        "perplexity": measured.perplexity,
        "nll": measured.nll,
        "tokens": measured.tokens,
        "rows": [
            {"id": row.id, "nll": loss.nll, "tokens": loss.tokens}
            for row, loss in zip(rows, measured.rows, strict=True)
        ],
    }
    group.on_first(lambda: write_json(perplexity_path(config, task), content))
