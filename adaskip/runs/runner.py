"""Runs one configuration: every row generated, audited, timed and kept at once.

`accelerated` finds the number of sublayers for `--acceleration 1.15`.
"""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path

import torch

from adaskip.budget import check_acceleration, sublayers_for
from adaskip.configuration import read_config
from adaskip.errors import AdaskipError, RunError, unknown_name
from adaskip.fingerprint import model_fingerprint
from adaskip.metrics import METRICS
from adaskip.models.devices import resolve_device, resolve_dtype
from adaskip.models.processes import refuse_several, team
from adaskip.plan import Phase
from adaskip.policies import SkipPolicy
from adaskip.policies.factory import LEARNED, takers, takes
from adaskip.profiling.calibration import measured_times
from adaskip.profiling.timing import growing_cache
from adaskip.runs.batches import make_batches, run_batches
from adaskip.runs.data import check_data, warmup_task
from adaskip.runs.files import lock
from adaskip.runs.ledger import (
    begin,
    command_id,
    is_finished,
    refuse_other_rows,
    run_folder,
    task_rows,
    update,
)
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.rows import GeneratedRow
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.scoring import phase_shares
from adaskip.runs.store import Share, locked
from adaskip.tasks.prompts import check_prompt
from adaskip.tasks.spec import Row, task_spec

__all__ = ["RunConfig", "is_finished", "make_batches", "resolve", "run", "run_folder"]

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
        _check_task(task)
    return dataclasses.replace(
        config,
        device=str(device),
        dtype=str(resolve_dtype(config.dtype, device)).removeprefix("torch."),
        tasks=tuple(dict.fromkeys(tasks)),
        name=config.run_name,
        warmup_task=config.warmup_task or warmup_task(tasks),
    )


def _check_task(task: str) -> None:
    """Refuses what else would end a run after its model was loaded, or its answers were made."""
    metric = task_spec(task).metric
    if metric not in METRICS:
        what = f"metric of the task {task!r} in configs/tasks.yaml:"
        raise unknown_name(what, metric, METRICS)
    check_prompt(task)


def run(config: RunConfig, loaded: LoadedModel | None = None) -> Path:
    """Generates what is missing of a run.

    Nothing of the run is written before everything that can be wrong has been checked.

    Args:
        config: what to run.
        loaded: the loaded model to use; loaded here if None.

    Returns:
        The run's folder, with `<task>.jsonl` and `run.json`.

    Raises:
        AdaskipError: the configuration, the model, the data or an existing run does not fit; or
            what ran was not the plan.
    """
    config, group = resolve(config), team()
    command_id()  # agreed on by all processes before the main one needs it alone
    folder = run_folder(config)
    if group.on_main(lambda: is_finished(config)):
        logger.info("%s is finished; nothing to do", folder)
        return folder
    group.on_main(lambda: refuse_busy(folder))
    with group.together(), group.main_ahead(not config.tp_plan):
        # The main process learns importance and fills caches; the others find them. Parts of one
        # model can't go ahead of each other.
        if loaded is None:
            check_data(config)
            loaded = LoadedModel.open(config)
        if not loaded.fits(config):
            raise RunError(f"The loaded model {loaded.source} is not the one of {config.run_name}.")
        rows = {task: loaded.rows(config, task) for task in config.tasks}
        for task in config.tasks:
            loaded.check_lengths(config, task, rows[task])
        policies = {task: loaded.policy(config, task) for task in config.tasks}
    profile = loaded.importance(config).name if takes(config.policy, LEARNED) else None
    facts = {
        "n_layers": loaded.n_layers,
        "model": model_fingerprint(loaded.model),
        "n_rows": {task: len(rows[task]) for task in config.tasks},
        "attention": loaded.model.config._attn_implementation,
    }
    with locked(folder):
        for task in config.tasks:
            group.on_main(partial(refuse_other_rows, config, task, rows[task]))
        group.on_main(lambda: begin(config, profile=profile, **facts))
        torch.manual_seed(config.seed)
        for task in config.tasks:
            made = _run_task(config, task, loaded, policies[task], rows[task])
            shares = phase_shares((row.skipped for row in made), loaded.n_layers)
            in_order = [row.id for row in made] == [row.id for row in rows[task]]
            known = {"skipped_share": shares, "in_order": in_order}
            group.on_main(partial(update, folder, task, known))
    return folder


def refuse_busy(folder: Path) -> None:
    """Refuses a run another process works on, before a model is loaded for it.

    Raises:
        RunError: it is busy.
    """
    if folder.exists():
        with lock(folder):
            pass


def _run_task(
    config: RunConfig, task: str, loaded: LoadedModel, policy: SkipPolicy | None, rows: list[Row]
) -> list[GeneratedRow]:
    """Generates the missing rows of one task, each process its share, and returns all rows."""
    batches = make_batches(rows, config.batch_size)

    def generate(share: Share[GeneratedRow]) -> None:
        run_batches(config, loaded, policy, batches, share)

    # Processes that hold parts of one model go through all rows together. Batches are made by
    # length, but rows are kept in the data's order, so that the first ones are those of any run.
    return task_rows(run_folder(config), task).make(
        [row.id for row in rows], generate, same=bool(config.tp_plan)
    )


def accelerated(config: RunConfig, acceleration: float) -> tuple[RunConfig, LoadedModel]:
    """The configuration whose number of sublayers reaches an acceleration, and its loaded model.

    Sublayers are taken by similarity until the predicted ratio of dense to skipped time reaches
    `acceleration`, so the run is the one with that number of sublayers, and is kept as such. Times
    are those of prefill in the prefill experiment, else of a decode step, at the longest context
    the run may have.

    Raises:
        AdaskipError: another policy or budget was asked for, or the ratio cannot be reached.

    Source: METHOD, "Budget by acceleration ratio".
    """
    check_acceleration(acceleration)
    if not takes(config.policy, "acceleration") or config.skip_sub_layer_num is not None:
        raise AdaskipError(
            f"--acceleration {acceleration} is a budget of {', '.join(takers('acceleration'))}, in "
            "place of --skip_sub_layer_num; give one of them."
        )
    refuse_several(
        "--acceleration measures times, which differ between processes",
        "run it once in one process, and give the others the number of sublayers it found",
    )
    config = dataclasses.replace(config, skip_sub_layer_num=0)
    resolved = resolve(config)
    check_data(resolved)
    loaded = LoadedModel.open(resolved)
    offline = all(task_spec(task).offline for task in resolved.tasks)
    limit = config.max_length or loaded.spec.prompt_limit
    context = min(limit, config.sample_tokens) if offline else limit
    phase = Phase.PREFILL if config.experiment == "prefill" else Phase.DECODE
    times = measured_times(
        loaded.model, phase, context, batch=config.batch_size, make_cache=growing_cache
    )
    chosen = sublayers_for(loaded.importance(resolved), times, acceleration, "rank")
    logger.warning(
        "An acceleration of %s in %s at %d tokens takes %d sublayers: %.3f predicted",
        *(acceleration, phase, context, len(chosen), times.speedup(chosen)),
    )
    return dataclasses.replace(config, skip_sub_layer_num=len(chosen)), loaded
