"""Runs one configuration: every row generated, audited, timed and kept at once."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from adaskip.audit import Audit
from adaskip.bench import Bench, warmup_task
from adaskip.configuration import read_config
from adaskip.errors import RunError
from adaskip.generation import Generated, generate_greedy
from adaskip.internlm import check_prompt_length
from adaskip.ledger import (
    SESSION,
    begin,
    is_finished,
    rows_path,
    run_folder,
    update,
)
from adaskip.models import resolve_device, resolve_dtype
from adaskip.plan import Phase
from adaskip.policies import SkipPolicy
from adaskip.prompts import Prompt, postprocess
from adaskip.records import Record, append_rows, lock, repair_rows
from adaskip.runconfig import RunConfig
from adaskip.scoring import phase_shares
from adaskip.session import skipping
from adaskip.tasks import Row, task_spec

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
    config = resolve(config)
    if is_finished(config):
        logger.info("%s is finished; nothing to do", run_folder(config))
        return run_folder(config)
    if run_folder(config).exists():
        with lock(run_folder(config)):
            pass  # a run that is busy is refused before a model is loaded for it
    if bench is None:
        bench = Bench.open(config)
    elif not bench.fits(config):
        raise RunError(f"The loaded model {bench.source} is not the one of {config.run_name}.")
    bench.check_budget(config)
    rows = {task: bench.rows(config, task) for task in config.tasks}
    policies = {task: bench.policy(config, task) for task in config.tasks}
    with lock(run_folder(config)):
        record = begin(
            config,
            n_layers=bench.n_layers,
            profile=bench.importance(config).fingerprint if config.policy == "ADA" else None,
            n_rows={task: len(rows[task]) for task in config.tasks},
        )
        torch.manual_seed(config.seed)
        for task in config.tasks:
            _run_task(config, task, bench, policies[task], rows[task])
            made = repair_rows(rows_path(config, task))
            update(config, record, task, {"skipped_share": phase_shares(made, bench.n_layers)})
    return run_folder(config)


def plan_batches(
    rows: Sequence[Row], size: int, *, rank: int = 0, world: int = 1
) -> list[list[Row]]:
    """One process's rows in the order they are generated and written, batch by batch."""
    own = list(rows[rank::world])
    if size > 1:
        # Neighbours in length need little padding; the id makes the order the same every time.
        own.sort(key=lambda row: (len(row.context) + len(row.input), row.id))
    return [own[start : start + size] for start in range(0, len(own), size)]


def _run_task(
    config: RunConfig, task: str, bench: Bench, policy: SkipPolicy | None, rows: list[Row]
) -> None:
    """Generates the missing rows of one task and appends each batch as it is done."""
    path = rows_path(config, task)
    done = {str(row["id"]) for row in repair_rows(path)}
    pending = [row for row in rows if row.id not in done]
    if pending and done - {row.id for row in rows}:
        raise RunError(
            f"{path} holds rows that are not among those asked for now: give the --limit and the "
            "data it was made with, or another run name (--model)."
        )
    with contextlib.ExitStack() as stack:
        bench.warm_up()
        title = f"{config.folder_name} {task}"
        bar = stack.enter_context(tqdm(total=len(rows), desc=title, unit="row"))
        bar.update(len(rows) - len(pending))
        session = None
        if policy is not None:
            session = stack.enter_context(skipping(bench.model, policy, scope=config.experiment))
        audit = stack.enter_context(Audit(bench.model, session))
        for batch in plan_batches(rows, config.batch_size):
            new = [row for row in batch if row.id not in done]
            if new:
                # A batch begun before it was killed is made again as it was, for the same numbers.
                made = _run_batch(config, bench, policy, audit, batch)
                append_rows(path, [item for item in made if item["id"] not in done])
                bar.update(len(new))


def _run_batch(
    config: RunConfig, bench: Bench, policy: SkipPolicy | None, audit: Audit, batch: list[Row]
) -> list[Record]:
    """Generates one batch, checks what ran, and returns its records."""
    prompts = [bench.prompt(config, row) for row in batch]
    stop = bench.stop_rule(config, batch[0].task)
    for prompt in prompts:
        check_prompt_length(bench.model, prompt.tokens_after, stop.max_new_tokens)
    audit.start_request()
    made = generate_greedy(
        bench.model, [prompt.input_ids for prompt in prompts], stop, pad_id=bench.pad_id
    )
    extension = getattr(policy, "extension", None) if config.experiment != "prefill" else None
    skipped = {
        **audit.counts(),
        "online_extension": [str(sublayer) for sublayer in extension.gains] if extension else [],
    }
    _check_scope(config, skipped)
    return [
        _row_record(bench, row, prompt, made, index, skipped)
        for index, (row, prompt) in enumerate(zip(batch, prompts, strict=True))
    ]


def _row_record(
    bench: Bench, row: Row, prompt: Prompt, made: Generated, index: int, skipped: dict[str, Any]
) -> Record:
    spec = task_spec(row.task)
    text = str(bench.tokenizer.decode(list(made.tokens[index]), skip_special_tokens=True))
    return {
        "id": row.id,
        "task": row.task,
        "prediction": postprocess(text, spec, bench.spec.answer_end),
        "references": list(row.answers),
        "classes": list(row.all_classes) if row.all_classes else None,
        "length": row.length,
        "tokens_before": prompt.tokens_before,
        "tokens_after": prompt.tokens_after,
        "truncated": prompt.truncated,
        "generated_tokens": made.n_generated[index],
        "skipped": skipped,
        "seconds": {"ttft": made.ttft, "per_token": made.per_token, "total": made.total},
        "batch": len(made.tokens),
        "session": SESSION,
    }


def _check_scope(config: RunConfig, skipped: dict[str, Any]) -> None:
    """Refuses a row in which a phase of the experiment skipped nothing, or another one something.

    The audit shows that the plan was carried out; this, that there was one.
    """
    for phase in Phase:
        count = skipped[phase]
        if not count["forwards"]:
            continue
        wanted = config.budget > 0 and not (
            config.experiment == "decode" and phase is Phase.PREFILL
        )
        if bool(count["attn"] + count["ffn"]) != wanted:
            state = "nothing was" if wanted else "something was"
            raise RunError(
                f"{config.folder_name}: {state} skipped in {phase} in the {config.experiment} "
                "experiment. The row is not kept; this is a bug, please report it."
            )
