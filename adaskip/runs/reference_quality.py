"""Keeps the perplexity of reference answers beside a run's predictions, for the sweep's tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from pydantic import BaseModel, ConfigDict, PositiveInt

from adaskip.models.processes import team
from adaskip.runs.files import read_json
from adaskip.runs.ledger import read_record, run_folder
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.perplexity import Loss, RowLoss, perplexity_of, shared_perplexity
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.store import Store


class PerplexitySettings(BaseModel):
    """How much a sweep measures.

    Attributes:
        rows: of a task, from the first.
        max_tokens: of a reference, from the first.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    rows: PositiveInt = 5
    max_tokens: PositiveInt = 64


@dataclass(frozen=True)
class ReferenceQuality:
    """A perplexity of reference answers, and what it rests on: rows, and tokens of all of them."""

    perplexity: float
    rows: int
    tokens: int


def read_perplexity(
    config: RunConfig, task: str, settings: PerplexitySettings
) -> ReferenceQuality | None:
    """The perplexity that was measured with these settings, None if none was.

    Raises:
        RunError: the file is damaged.
    """
    store = _store(config, task)
    rows = store.rows()
    if not rows or not _as_asked(store, settings):
        return None
    tokens = sum(row.tokens for row in rows)
    return ReferenceQuality(
        perplexity_of(math.fsum(r.nll for r in rows), tokens), len(rows), tokens
    )


def is_measured(config: RunConfig, task: str, settings: PerplexitySettings) -> bool:
    """Whether it was measured as the settings ask.

    Raises:
        RunError: the file is damaged.
    """
    store = _store(config, task)
    rows = store.rows()
    # A run of fewer rows than are asked for may have been given more since.
    there = read_record(run_folder(config)).tasks[task].rows if rows else 0
    if not rows or len(rows) < min(settings.rows, there):
        return False
    return _as_asked(store, settings)


def _as_asked(store: Store[Loss], settings: PerplexitySettings) -> bool:
    """Whether rows that are there were measured with these settings."""
    record = read_json(store.path)
    made = record.get("settings") or record.get("plan")  # what earlier versions called them
    return bool(made == settings.model_dump())


def losses(
    config: RunConfig, task: str, loaded: LoadedModel, max_tokens: int, n_rows: int | None = None
) -> dict[str, RowLoss]:
    """The loss of each row's reference under a configuration; all processes together.

    Args:
        config: what is skipped where.
        task: whose rows.
        loaded: the model.
        max_tokens: of a reference, from the first.
        n_rows: of the task, from the first; None is all.

    Raises:
        AdaskipError: as the run itself; or a reference is empty.
    """
    rows = loaded.rows(config, task)[:n_rows]
    measured = shared_perplexity(
        loaded.model,
        loaded.tokenizer,
        loaded.policy(config, task),
        [(loaded.prompt(config, row), row.reference) for row in rows],
        scope=config.experiment,
        max_tokens=max_tokens,
        progress=team().is_main,
        same=bool(config.tp_plan),
    )
    return {row.id: loss for row, loss in zip(rows, measured.rows, strict=True)}


def measure_perplexity(
    config: RunConfig, task: str, loaded: LoadedModel, settings: PerplexitySettings
) -> None:
    """Measures and writes it for one task; all processes together.

    Raises:
        AdaskipError: as `losses`.
    """
    found = losses(config, task, loaded, settings.max_tokens, settings.rows)
    rows = [Loss(id=name, nll=loss.nll, tokens=loss.tokens) for name, loss in found.items()]
    store = _store(config, task, settings)
    # What was measured otherwise makes room.
    team().on_main(partial(store.path.unlink, missing_ok=True))
    team().on_main(lambda: store.append(rows))


def _store(config: RunConfig, task: str, settings: PerplexitySettings | None = None) -> Store[Loss]:
    path = run_folder(config) / f"{task}.perplexity.json"
    return Store(path, Loss, None if settings is None else settings.model_dump())
