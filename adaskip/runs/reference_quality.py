"""Keeps the perplexity of reference answers beside a run's predictions, for the sweep's tables."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt

from adaskip.fingerprint import model_identity
from adaskip.models.processes import team
from adaskip.policies.factory import LEARNED, takes
from adaskip.runs.files import read_json
from adaskip.runs.ledger import answer_length, read_record, run_folder
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.perplexity import Loss, RowLoss, perplexity_of, reference_perplexity
from adaskip.runs.rows import Skips
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.store import Share, Store, locked
from adaskip.search.journal import short_hash
from adaskip.tasks.spec import task_spec


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
    asked = task_spec(task).wanted(config.limit) or there
    if not rows or len(rows) < min(settings.rows, asked, there):
        return False
    return _as_asked(store, settings)


def _as_asked(store: Store[Loss], settings: PerplexitySettings) -> bool:
    """Whether rows that are there were measured with these settings."""
    record = read_json(store.path)
    made = record.get("settings") or record.get("plan")  # what earlier versions called them
    return bool(made == settings.model_dump())


class ScoredRow(Loss):
    """A row of what is under way.

    Attributes:
        skipped: what was left out, by phase.
    """

    skipped: Skips


@dataclass(frozen=True)
class Scored:
    """The losses of a task's references, by row, and the file that keeps them for a while."""

    rows: dict[str, RowLoss]
    file: Path

    def forget(self) -> None:
        """Removes the file, once the losses are kept elsewhere; for the main process."""
        self.file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.file.parent.rmdir()  # others may be under way in it


def losses(
    config: RunConfig,
    task: str,
    loaded: LoadedModel,
    max_tokens: int,
    n_rows: int | None = None,
    *,
    under_way: Path,
) -> Scored:
    """The loss of each row's reference under a configuration; all processes together.

    Args:
        config: what is skipped where.
        task: whose rows.
        loaded: the model.
        max_tokens: of a reference, from the first.
        n_rows: of the task, from the first; None is all.
        under_way: a folder that keeps each row once it is scored: after an interruption the same
            call goes on from there. Hold it.

    Raises:
        AdaskipError: as the run itself; or a reference is empty.
    """
    rows, policy = loaded.rows(config, task)[:n_rows], loaded.policy(config, task)
    items = {row.id: (loaded.prompt(config, row), row.reference) for row in rows}
    learns = takes(config.policy, LEARNED)
    # All that a row's loss depends on: what differs in any of it has another file.
    made_from = [
        config.settings() | {"scope": config.experiment},
        config.policy_settings(),
        loaded.importance(config).name if learns else None,
        model_identity(loaded.model),
        [task, max_tokens, answer_length(config, task)],
        [[name, prompt.input_ids, reference] for name, (prompt, reference) in items.items()],
    ]
    # One file for all processes, of which each may hold a part of the model.
    name = team().on_main(lambda: short_hash(made_from))
    store = Store(under_way / f"{name}.jsonl", ScoredRow)

    def score(share: Share[ScoredRow]) -> None:
        own = share.of([name for name in items if name not in share.done])
        scored = iter(own)

        def keep(loss: RowLoss) -> None:
            share.append([ScoredRow(id=next(scored), **vars(loss))])

        if own:
            reference_perplexity(
                loaded.model,
                loaded.tokenizer,
                policy,
                [items[name] for name in own],
                scope=config.experiment,
                max_tokens=max_tokens,
                progress=team().is_main,
                on_row=keep,
            )

    # Processes that hold parts of one model go through all rows together.
    made = store.make([*items], score, same=bool(config.tp_plan))
    return Scored({row.id: RowLoss(row.nll, row.tokens, row.skipped) for row in made}, store.path)


def measure_perplexity(
    config: RunConfig, task: str, loaded: LoadedModel, settings: PerplexitySettings
) -> None:
    """Measures and writes it for one task, if nobody has; all processes together.

    Raises:
        AdaskipError: as `losses`.
        RunError: another command works on the run.
    """
    store, group = _store(config, task, settings), team()
    with locked(run_folder(config)):
        if group.on_main(lambda: is_measured(config, task, settings)):
            return
        under_way = store.path.with_suffix("")
        scored = losses(
            config, task, loaded, settings.max_tokens, settings.rows, under_way=under_way
        )
        rows = [Loss(id=n, nll=loss.nll, tokens=loss.tokens) for n, loss in scored.rows.items()]
        # What was measured otherwise makes room.
        group.on_main(partial(store.path.unlink, missing_ok=True))
        group.on_main(lambda: store.append(rows))
        group.on_main(scored.forget)


def _store(config: RunConfig, task: str, settings: PerplexitySettings | None = None) -> Store[Loss]:
    path = run_folder(config) / f"{task}.perplexity.json"
    return Store(path, Loss, None if settings is None else settings.model_dump())
