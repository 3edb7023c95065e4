"""Reads a sweep's YAML file into the cells it asks for. Nothing here runs anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from adaskip.errors import AdaskipError, unknown_name
from adaskip.models.loading import model_names
from adaskip.plan import SCOPES, Scope
from adaskip.runs.loaded import warmup_task
from adaskip.runs.reference_quality import PerplexitySettings
from adaskip.runs.runconfig import (
    DENSE,
    RunConfig,
    budget_flag,
    check_file_name,
    refuse_unused,
)
from adaskip.runs.sweepfile import KEYS, check_shape, is_list
from adaskip.tasks.spec import task_spec

# What the sweep decides itself.
_RESERVED = frozenset(
    {"experiment", "model_name", "policy", "skip_full_layer_num", "skip_sub_layer_num", "name"}
    | {"tasks", "results_dir", "resume"}
)
SELECTORS = ("model", "experiment", "policy", "budget", "task")


@dataclass(frozen=True)
class Cell:
    """One model, policy, budget and task: one JSONL file.

    Attributes:
        experiments: the tables it belongs to; a dense row belongs to several and is made once.
        config: the run it is a part of, with this task alone.
    """

    experiments: tuple[Scope, ...]
    config: RunConfig

    @property
    def task(self) -> str:
        """Its one task."""
        return self.config.tasks[0]

    @property
    def label(self) -> str:
        """How messages call it."""
        config = self.config
        budget = "" if config.policy == DENSE else f" {config.budget}"
        experiments = "+".join(self.experiments)
        return f"{config.model_name} {experiments} {config.policy}{budget} {self.task}"

    def matches(self, only: Mapping[str, str]) -> bool:
        """Whether every selector fits."""
        own: dict[str, Iterable[str]] = {
            "model": [self.config.model_name],
            "experiment": self.experiments,
            "policy": [self.config.policy],
            "budget": [str(self.config.budget)],
            "task": [self.task],
        }
        return all(value in own[key] for key, value in only.items())


@dataclass(frozen=True)
class SweepPlan:
    """A sweep: its cells in the order they run, and what its tables look like.

    Attributes:
        experiments: the tasks of each experiment, in table order.
        folder: where tables and figure go; the runs lie in `runs/` below it.
        perplexity: how perplexity is measured, None if it is not.
        estimate: what `--dry_run` reckons with until there are rows.
    """

    name: str
    folder: Path
    models: tuple[str, ...]
    experiments: dict[Scope, tuple[str, ...]]
    cells: tuple[Cell, ...]
    perplexity: PerplexitySettings | None = None
    estimate: Mapping[str, Any] = field(default_factory=dict)


def read_plan(path: Path) -> SweepPlan:
    """Reads and checks a sweep's file.

    Raises:
        AdaskipError: it is missing, no YAML, or asks for something unknown.
    """
    content = _read(path)
    check_shape(path, content)
    name = check_file_name("sweep name", str(content["name"]))
    folder = Path(content.get("results_dir") or f"results/{name}")
    experiments: dict[Scope, tuple[str, ...]] = {}
    for experiment, tasks in content["experiments"].items():
        if experiment not in SCOPES:
            raise AdaskipError(f"{path}: {unknown_name('experiment', str(experiment), SCOPES)}")
        experiments[cast(Scope, experiment)] = tuple(task_spec(task).name for task in tasks)
    models = tuple(content["models"])
    for model in models:
        if model not in model_names():
            raise AdaskipError(f"{path}: {unknown_name('model', model, model_names())}")
    given = [content.get("settings") or {}, *(content.get("tasks") or {}).values()]
    refuse_unused((key for settings in given for key in settings), [*content["policies"]])
    cells = [
        cell
        for model in models
        for cell in _cells(model, folder, experiments, _policies(content["policies"]), content)
    ]
    for cell in cells:
        cell.config.check()
    return SweepPlan(
        name,
        folder,
        models,
        experiments,
        tuple(cells),
        _perplexity(path, content),
        _estimate(path, content),
    )


def select(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that `--only key=value ...` leaves; repeated keys are alternatives of none.

    Raises:
        AdaskipError: a selector is malformed, unknown, or no cell is left.
    """
    chosen: dict[str, str] = {}
    for item in only:
        key, separator, value = item.partition("=")
        if not separator or not value:
            raise AdaskipError(f"--only {item!r} must be key=value, e.g. policy=EE.")
        if key not in SELECTORS:
            raise unknown_name("--only key", key, SELECTORS)
        chosen[key] = value
    left = [cell for cell in cells if cell.matches(chosen)]
    if not left:
        raise AdaskipError(f"No cell matches --only {' '.join(only)}; --dry_run lists all of them.")
    return left


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise AdaskipError(f"The sweep file {path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise AdaskipError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise AdaskipError(f"{path} must be a mapping with the keys {', '.join(KEYS)}.")
    return content


def _perplexity(path: Path, content: Mapping[str, Any]) -> PerplexitySettings | None:
    facts = content.get("perplexity")
    if not facts:
        return None
    for key, value in facts.items():
        if key not in ("rows", "max_tokens") or type(value) is not int or value < 1:
            raise AdaskipError(f"{path}: perplexity takes rows and max_tokens, each 1 or more.")
    return PerplexitySettings(**facts)


def _estimate(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    facts = content.get("estimate") or {}
    rows = facts.get("rows", {}) if isinstance(facts, dict) else None
    numbers = [*rows.values(), facts.get("prompt_tokens", 1)] if isinstance(rows, dict) else []
    if not numbers or set(facts) - {"rows", "prompt_tokens"} or not is_list(numbers, int):
        raise AdaskipError(f"{path}: estimate takes rows (by task) and prompt_tokens, as numbers.")
    return dict(facts)


def _policies(budgets: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
    return [(policy, budget) for policy, values in budgets.items() for budget in values]


def _cells(
    model: str,
    folder: Path,
    experiments: Mapping[Scope, Sequence[str]],
    policies: Sequence[tuple[str, int]],
    content: Mapping[str, Any],
) -> list[Cell]:
    """The cells of one model, dense ones first: the others' times are compared with them."""
    cells = []
    every_task = dict.fromkeys(task for tasks in experiments.values() for task in tasks)
    for task in every_task:
        users = tuple(name for name, tasks in experiments.items() if task in tasks)
        config = _config(model, users[0], DENSE, None, task, content, folder)
        cells.append(Cell(users, dataclasses.replace(config, name=f"{model}-{DENSE}")))
    for experiment, tasks in experiments.items():
        for task in tasks:
            for policy, budget in policies:
                config = _config(model, experiment, policy, budget, task, content, folder)
                cells.append(Cell((experiment,), config))
    return cells


def _config(
    model: str,
    experiment: Scope,
    policy: str,
    budget: int | None,
    task: str,
    content: Mapping[str, Any],
    folder: Path,
) -> RunConfig:
    settings = {**(content.get("settings") or {}), **(content.get("tasks") or {}).get(task, {})}
    for key in settings:
        if key in _RESERVED:
            raise AdaskipError(f"The sweep sets {key!r} itself; remove it from its settings.")
    flag = budget_flag(policy)
    return RunConfig.from_dict(
        {
            # One source for the whole sweep, so that importance is learned once.
            "warmup_task": warmup_task(
                t for tasks in content["experiments"].values() for t in tasks
            ),
            **settings,
            "experiment": experiment,
            "model_name": model,
            "policy": policy,
            "tasks": [task],
            "results_dir": str(folder / "runs"),
            **({flag: budget} if flag else {}),
        }
    )
