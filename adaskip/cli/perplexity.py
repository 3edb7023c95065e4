"""The command line of `eval/perplexity.py`: several policies and budgets on one loaded model."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from adaskip.cli.observe import DATA_OPTIONS, FACTS, configured
from adaskip.cli.policies import add_policies, cells_of
from adaskip.cli.run import add_run_options
from adaskip.command import Command, say
from adaskip.configuration import read_config
from adaskip.errors import refuse_below_one
from adaskip.importance import Importance
from adaskip.models.processes import team
from adaskip.policies.factory import BUDGETS, LEARNED, takes
from adaskip.runs.environment import environment
from adaskip.runs.loaded import LoadedModel, hold, unchanged
from adaskip.runs.perplexity import Loss, Perplexity, RowLoss
from adaskip.runs.reference_quality import losses
from adaskip.runs.rows import Stored
from adaskip.runs.runconfig import (
    DATA_DIR,
    DENSE,
    PLAN_FILE,
    POLICY_OPTIONS,
    WARMING_UP,
    RunConfig,
    refuse_unused,
)
from adaskip.runs.scoring import phase_shares
from adaskip.runs.store import Store, locked
from adaskip.tables import markdown_table, number, percent

ROWS = 10


def perplexity_main(argv: Sequence[str] | None = None) -> int:
    """What `eval/perplexity.py` calls: the exit code of its options."""
    return PERPLEXITY.main(argv)


def _act(options: argparse.Namespace) -> int:
    given = vars(options)
    model, scope = given.pop("model"), given.pop("scope")
    max_tokens = given.pop("reference_tokens")
    refuse_below_one({"reference_tokens": max_tokens})
    policies = given.pop("policy")
    refuse_unused(given, policies or [DENSE])
    budgets = {flag: given.pop(flag) or [] for flag in BUDGETS.values()}
    # Of one policy alone; what is configured here is dense.
    plan = given.pop("plan", None)
    base = dataclasses.replace(configured("perplexity", model, given), experiment=scope)
    cells = cells_of(base, policies, budgets, plan)
    path, found = measure(cells, max_tokens)
    say(f"{table(found, cells)}\n\nWritten: {path}.")
    return 0


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME", help="as in configs/models.yaml")
    add_policies(parser)
    tokens = int(read_config(FACTS)["reference_tokens"])
    parser.add_argument(
        "--reference_tokens",
        type=int,
        default=tokens,
        metavar="N",
        help=f"tokens of each reference that count (default: {tokens})",
    )
    add_run_options(parser, (*DATA_OPTIONS, *POLICY_OPTIONS, *WARMING_UP), limit=ROWS)


PERPLEXITY = Command(
    "Perplexity of reference answers under policies and budgets, beside dense.",
    _options,
    _act,
    "--model smollm2 --policy ADA --skip_sub_layer_num 8 --limit 2",
)


class TaskLoss(Stored):
    """One task under one policy; `rows` has `[nll, tokens]` by row."""

    nll: float
    tokens: int
    perplexity: float
    rows: dict[str, list[float | int]]


class PolicyLoss(Loss):
    """All tasks under one policy.

    Attributes:
        perplexity: over the tokens of all tasks.
        policy: what the policy was made with; None where a file does not tell.
        warmup_data_dir: where the files of its warm-up rows were; None without any, and in files
            that do not tell.
        skipped_share: of the sublayers, by phase.
    """

    perplexity: float
    policy: dict[str, Any] | None = None
    warmup_data_dir: str | None = None
    skipped_share: dict[str, float | None]
    tasks: dict[str, TaskLoss]


def measure(cells: Sequence[RunConfig], max_tokens: int) -> tuple[Path, dict[str, PolicyLoss]]:
    """Measures the cells that the result file lacks, the model being loaded at most once.

    Returns:
        The file, and what it holds by `key_of` a cell.

    Raises:
        AdaskipError: the model, the data, a budget or the existing file does not fit.
    """
    base = cells[0]
    settings = base.settings() | {
        "experiment": base.experiment,
        "tasks": base.tasks,
        "limit": base.limit,
        "reference_tokens": max_tokens,
        **base.data_settings(base.tasks),
    }
    store = Store(
        Path(base.results_dir) / "perplexity" / f"{base.name}-{base.experiment}.json",
        PolicyLoss,
        settings,
        {"model": base.name, "task": " ".join(base.tasks)},
        key="sums",
        lately=[DATA_DIR],
    )
    group, under_way = team(), store.path.with_suffix("")
    with locked(store.path.parent):
        found = {row.id: row for row in group.on_main(store.rows)}
        missing = [cell for cell in cells if not _is_measured(cell, found)]
        if not missing and group.on_main(lambda: unchanged(store, base)):
            return store.path, found
        with group.together(), group.main_ahead():
            # The main process learns importance and fills caches; the others find them.
            loaded = LoadedModel.open(base)
            for cell in missing:
                for task in cell.tasks:
                    loaded.policy(cell, task)
        rows = [row for task in base.tasks for row in loaded.rows(base, task)]
        hold(store, base, loaded, rows)
        for cell in missing:
            scored = {
                task: losses(cell, task, loaded, max_tokens, under_way=under_way)
                for task in cell.tasks
            }
            row = _measured(cell, loaded, {task: each.rows for task, each in scored.items()})
            found[row.id] = row
            group.on_main(partial(store.append, [row]))
            for each in scored.values():
                group.on_main(each.forget)
        group.on_main(lambda: store.note(environment=environment(str(base.device))))
    return store.path, found


def key_of(cell: RunConfig) -> str:
    """What the result file calls a cell: its policy, and what the command line can set of it."""
    if cell.policy == DENSE:
        return DENSE
    made = cell.policy_settings()
    if PLAN_FILE in made:
        return f"{cell.policy} {made[PLAN_FILE]}"
    parts = [_setting(key, made[key]) for key in POLICY_OPTIONS if key in made]
    if takes(cell.policy, LEARNED):
        parts.append(_learned_from(cell))
    name = f"{cell.policy} {cell.budget}"
    return f"{name} ({', '.join(parts)})" if parts else name


def _learned_from(cell: RunConfig) -> str:
    """The name of a given profile, which tells what is in it, or where one is learned."""
    if cell.importance:
        return Importance.load(cell.importance).name
    tokens = f" of {cell.warmup_tokens} tokens" if cell.warmup_tokens else ""
    return f"{cell.warmup} rows of {cell.warmup_task}{tokens}"


def _setting(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return key if value else f"not {key}"
    return f"{key} {'none' if value is None else value}"


def _is_measured(cell: RunConfig, found: Mapping[str, PolicyLoss]) -> bool:
    """Whether a cell was measured with the same policy."""
    row = found.get(key_of(cell))
    if row is None or row.policy not in (None, cell.policy_settings()):
        return False
    return row.warmup_data_dir in (None, _warmup_data_dir(cell))


def _warmup_data_dir(cell: RunConfig) -> str | None:
    """Where the files are of the rows that a cell's importance is learned from, if it has any."""
    learns = takes(cell.policy, LEARNED) and not cell.importance
    return cell.data_settings(filter(None, [cell.warmup_task])).get(DATA_DIR) if learns else None


def _measured(
    cell: RunConfig, loaded: LoadedModel, scored: Mapping[str, Mapping[str, RowLoss]]
) -> PolicyLoss:
    """Perplexity per task and over all tokens, with the share of sublayers left out."""
    whole = Perplexity(())
    tasks = {}
    for task, by_row in scored.items():
        found = Perplexity(tuple(by_row.values()))
        whole += found
        tasks[task] = TaskLoss(
            nll=found.nll,
            tokens=found.tokens,
            perplexity=found.perplexity,
            rows={name: [loss.nll, loss.tokens] for name, loss in by_row.items()},
        )
    return PolicyLoss(
        id=key_of(cell),
        nll=whole.nll,
        tokens=whole.tokens,
        perplexity=whole.perplexity,
        policy=cell.policy_settings(),
        warmup_data_dir=_warmup_data_dir(cell),
        skipped_share=phase_shares((row.skipped for row in whole.rows), loaded.n_layers),
        tasks=tasks,
    )


def table(found: Mapping[str, PolicyLoss], cells: Sequence[RunConfig]) -> str:
    """The cells asked for, dense first."""
    tasks = cells[0].tasks
    header = ["policy", *tasks, "all", "x dense", "skipped % prefill", "skipped % decode"]
    dense = found[DENSE].perplexity
    lines = []
    for cell in cells:
        row = found[key_of(cell)]
        values = [row.tasks[task].perplexity for task in tasks]
        values += [row.perplexity, row.perplexity / dense]
        shares = [percent(row.skipped_share[phase]) for phase in ("prefill", "decode")]
        lines.append([row.id, *map(number, values), *shares])
    return markdown_table(header, lines)
