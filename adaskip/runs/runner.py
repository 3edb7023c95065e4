"""Runs one configuration: every row generated, audited, timed and kept at once."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path

import torch

from adaskip.configuration import read_config
from adaskip.errors import RunError
from adaskip.models.devices import resolve_device, resolve_dtype
from adaskip.models.processes import team
from adaskip.policies import SkipPolicy
from adaskip.policies.factory import LEARNED, takes
from adaskip.runs.batches import plan_batches, run_batches, share_out
from adaskip.runs.bench import Bench, warmup_task
from adaskip.runs.ledger import begin, is_finished, rows_path, run_folder, session_id, update
from adaskip.runs.parts import Share, locked, make_rows
from adaskip.runs.records import Record, lock
from adaskip.runs.rows import check_row
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.scoring import phase_shares
from adaskip.tasks.spec import Row, task_spec

__all__ = ["RunConfig", "is_finished", "plan_batches", "resolve", "run", "run_folder"]

logger = logging.getLogger(__name__)


def resolve(config: RunConfig) -> RunConfig:
    """Fills in the defaults that depend on the machine and on `configs/`.

    Raises:
        AdaskipError: the configuration is wrong in itself.
    """
    config.check()
    device = resolve_device(config.device)
    facts = read_config("budgets.yaml")
    kind = "sample_tasks" if config.model_name in facts["offline_models"] else "tasks"
    tasks = config.tasks or tuple(facts["experiments"][config.experiment][kind])
    for task in (*tasks, *filter(None, [config.warmup_task])):
        task_spec(task)
    return dataclasses.replace(
        config,
        device=str(device),
        dtype=str(resolve_dtype(config.dtype, device)).removeprefix("torch."),
        tasks=tuple(dict.fromkeys(tasks)),
        name=config.run_name,
        warmup_task=config.warmup_task or warmup_task(tasks),
    )


def run(config: RunConfig, bench: Bench | None = None) -> Path:
    """Generates what is missing of a run.

    Nothing of the run is written before everything that can be wrong has been checked.

    Args:
        config: what to run.
        bench: the loaded model to use; loaded here if None.

    Returns:
        The run's folder, with `<task>.jsonl` and `run.json`.

    Raises:
        AdaskipError: the configuration, the model, the data or an existing run does not fit; or
            what ran was not the plan.
    """
    config, group = resolve(config), team()
    session_id()  # agreed on by all processes before the first of them needs it alone
    folder = run_folder(config)
    if group.on_first(lambda: is_finished(config)):
        logger.info("%s is finished; nothing to do", folder)
        return folder
    group.on_first(lambda: refuse_busy(folder))
    with group.together(), group.first_ahead(not config.tp_plan):
        # The first process learns importance and fills caches; the others find them. Parts of one
        # model can't go ahead of each other.
        bench = _fitting(config, bench)
        rows = {task: bench.rows(config, task) for task in config.tasks}
        policies = {task: bench.policy(config, task) for task in config.tasks}
    profile = bench.importance(config).name if takes(config.policy, LEARNED) else None
    n_layers, n_rows = bench.n_layers, {task: len(rows[task]) for task in config.tasks}
    with locked(folder):
        record = group.on_first(
            lambda: begin(config, n_layers=n_layers, profile=profile, n_rows=n_rows)
        )
        torch.manual_seed(config.seed)
        for task in config.tasks:
            made = _run_task(config, task, bench, policies[task], rows[task])
            facts = {"skipped_share": phase_shares(made, n_layers)}
            group.on_first(partial(update, config, record, task, facts))
    return folder


def refuse_busy(folder: Path) -> None:
    """Refuses a run another process works on, before a model is loaded for it.

    Raises:
        RunError: it is busy.
    """
    if folder.exists():
        with lock(folder):
            pass


def _fitting(config: RunConfig, bench: Bench | None) -> Bench:
    """The loaded model, checked against the configuration."""
    if bench is None:
        bench = Bench.open(config)
    elif not bench.fits(config):
        raise RunError(f"The loaded model {bench.source} is not the one of {config.run_name}.")
    bench.check_budget(config)
    return bench


def _run_task(
    config: RunConfig, task: str, bench: Bench, policy: SkipPolicy | None, rows: list[Row]
) -> list[Record]:
    """Generates the missing rows of one task, each process its part, and returns all rows."""
    batches = plan_batches(rows, config.batch_size)

    def generate(share: Share) -> None:
        own = share_out(batches, share.done, rank=share.rank, world=share.world)
        run_batches(config, task, bench, policy, own, share.done, share.target)

    order = [row.id for batch in batches for row in batch]
    # Processes that hold parts of one model go through all rows together.
    same = bool(config.tp_plan)
    return make_rows(rows_path(config, task), order, generate, same=same, check=check_row)
