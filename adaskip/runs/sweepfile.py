"""Reads a sweep's YAML file into the cells it asks for. Nothing here runs anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from adaskip.errors import AdaskipError, did_you_mean, unknown_name
from adaskip.models.spec import model_names
from adaskip.plan import SCOPES, Scope
from adaskip.policies.factory import takes
from adaskip.runs.data import warmup_task
from adaskip.runs.files import check_file_name, differences
from adaskip.runs.ledger import run_folder
from adaskip.runs.reference_quality import PerplexitySettings
from adaskip.runs.runconfig import DENSE, RunConfig, budget_flag, refuse_unused
from adaskip.runs.yamlfile import read_yaml, shipped_or_given
from adaskip.shipped import plan_label
from adaskip.tasks.spec import task_spec

T = TypeVar("T")
# What the sweep decides itself.
_RESERVED = frozenset(
    {"experiment", "model_name", "policy", "skip_full_layer_num", "skip_sub_layer_num", "name"}
    | {"tasks", "results_dir", "resume"}
)
SELECTORS = ("model", "experiment", "policy", "budget", "task")
Some = Annotated[list[T], Field(min_length=1)]


class SweepFile(BaseModel):
    """What a sweep's file may say.

    Attributes:
        name: of the sweep.
        results_dir: the sweep's folder; None is `results/<name>`.
        models: as in `configs/models.yaml`.
        policies: budgets by policy, in its own unit; of PLAN, the plans' files.
        experiments: tasks by experiment, in table order.
        settings: options of every run.
        tasks: options of single tasks' runs.
        perplexity: how perplexity is measured; None if it is not.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    name: str
    results_dir: str | None = None
    models: Some[str]
    policies: Annotated[dict[str, Some[int | str]], Field(min_length=1)]
    experiments: Annotated[dict[str, Some[str]], Field(min_length=1)]
    settings: dict[str, Any] | None = None
    tasks: dict[str, dict[str, Any]] | None = None
    perplexity: PerplexitySettings | None = None


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
        """The task whose rows it holds."""
        return self.config.tasks[0]

    @property
    def label(self) -> str:
        """The name of the cell in messages."""
        config = self.config
        budget = "" if config.policy == DENSE else f" {config.budget}"
        experiments = "+".join(self.experiments)
        return f"{config.model_name} {experiments} {config.label}{budget} {self.task}"

    def matches(self, only: Mapping[str, str]) -> bool:
        """Whether every selector fits."""
        return all(value in self.selected_by()[key] for key, value in only.items())

    def selected_by(self) -> dict[str, Iterable[str]]:
        """The values of each selector that fit."""
        return {
            "model": [self.config.model_name],
            "experiment": self.experiments,
            "policy": [self.config.policy, self.config.label],
            "budget": [str(self.config.budget)],
            "task": [self.task],
        }


@dataclass(frozen=True)
class Sweep:
    """Many runs: the cells in the order they run, and what the tables look like.

    Attributes:
        experiments: the tasks of each experiment, in table order.
        folder: where tables and figure go; the runs lie in `runs/` below it.
        perplexity: how perplexity is measured, None if it is not.
    """

    name: str
    folder: Path
    models: tuple[str, ...]
    experiments: dict[Scope, tuple[str, ...]]
    cells: tuple[Cell, ...]
    perplexity: PerplexitySettings | None = None


def sweep_path(given: str) -> Path:
    """The file of a sweep: a path, or the name of one that is shipped.

    Raises:
        AdaskipError: it is a name, and of none.
    """
    return shipped_or_given(given, "sweep", "policies")


def read_sweep(path: Path, folder: Path | None = None, **settings: Any) -> Sweep:
    """Reads and checks a sweep's file.

    Args:
        path: the YAML file.
        folder: in place of the file's `results_dir`.
        settings: of every run, over the file's.

    Raises:
        AdaskipError: it is missing, no YAML, or asks for something unknown.
    """
    content = read_yaml(path, SweepFile)
    name = check_file_name("sweep name", content.name)
    experiments: dict[Scope, tuple[str, ...]] = {}
    for experiment, tasks in content.experiments.items():
        if experiment not in SCOPES:
            raise AdaskipError(f"{path}: {unknown_name('experiment', experiment, SCOPES)}")
        experiments[experiment] = tuple(task_spec(task).name for task in tasks)
    for model in content.models:
        if model not in model_names():
            raise AdaskipError(f"{path}: {unknown_name('model', model, model_names())}")
    by_task = content.tasks or {}
    for what, named in (("model", content.models), *(("task", t) for t in experiments.values())):
        _refuse_twice(path, what, named)
    for policy, budgets in content.policies.items():
        _check_budgets(path, policy, budgets)
    common = {**(content.settings or {}), **settings}
    given = [key for own in (common, *by_task.values()) for key in own]
    for key in given:
        if key in _RESERVED:
            raise AdaskipError(f"The sweep sets {key!r} itself; remove it from its settings.")
    refuse_unused(given, [*content.policies])
    folder = folder or Path(content.results_dir or f"results/{name}")
    common["results_dir"] = str(folder / "runs")
    # One source for the whole sweep, so that importance is learned once.
    every_task = list(dict.fromkeys(task for tasks in experiments.values() for task in tasks))
    common.setdefault("warmup_task", warmup_task(every_task))
    for task in by_task:
        if task not in every_task:
            raise AdaskipError(f"{path}: {unknown_name('task of the sweep', task, every_task)}")
    own = {task: {**common, **by_task.get(task, {}), "tasks": [task]} for task in every_task}
    cells = [c for m in content.models for c in _cells(m, experiments, content.policies, own)]
    for cell in cells:
        cell.config.check()
    _refuse_two_settings(path, cells)
    models = tuple(content.models)
    return Sweep(name, folder, models, experiments, tuple(cells), content.perplexity)


def select(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that `--only key=value ...` leaves: those that fit all of them.

    Raises:
        AdaskipError: a selector is malformed, unknown or there twice, or no cell is left.
    """
    chosen: dict[str, str] = {}
    for item in only:
        key, separator, value = item.partition("=")
        if not separator or not value:
            raise AdaskipError(f"--only {item!r} must be key=value, e.g. policy=EE.")
        if key not in SELECTORS:
            raise unknown_name("--only key", key, SELECTORS)
        if key in chosen:
            raise AdaskipError(
                f"--only has {key} twice, and a cell must fit all of them; call once for each."
            )
        chosen[key] = value
    left = [cell for cell in cells if cell.matches(chosen)]
    if not left:
        own = [cell.selected_by() for cell in cells]
        hints = (did_you_mean(v, {n for o in own for n in o[k]} - {v}) for k, v in chosen.items())
        raise AdaskipError(
            f"No cell matches --only {' '.join(only)}; --dry_run lists all of them."
            f"{next(filter(None, hints), '')}"
        )
    return left


def _check_budgets(path: Path, policy: str, budgets: Sequence[int | str]) -> None:
    """Refuses files as budgets of a policy that takes numbers, and the other way round."""
    if policy == DENSE:
        raise AdaskipError(f"{path}: every sweep has {DENSE} rows; leave it out of 'policies'.")
    _refuse_twice(path, f"budget of {policy}", budgets)
    of_files = takes(policy, "plan_file")
    kind, wanted = (str, "the file of a plan") if of_files else (int, "a valid integer")
    for number, budget in enumerate(budgets):
        if not isinstance(budget, kind):
            raise AdaskipError(
                f"{path}: 'policies.{policy}.{number}' is {budget!r}: it must be {wanted}."
            )
        if isinstance(budget, str) and plan_label(budget) == DENSE:
            raise AdaskipError(
                f"{path}: the plan {budget} would be called {DENSE!r} in the tables; rename it."
            )


def _refuse_twice(path: Path, what: str, named: Sequence[object]) -> None:
    for one in named:
        if named.count(one) > 1:
            raise AdaskipError(f"{path} names the {what} {one!r} twice; leave one out.")


def _refuse_two_settings(path: Path, cells: Sequence[Cell]) -> None:
    """Refuses cells that would be of one run but ask for different settings."""
    first: dict[Path, Cell] = {}
    for cell in cells:
        other = first.setdefault(run_folder(cell.config), cell)
        if what := differences(_of_one_run(other.config), _of_one_run(cell.config)):
            raise AdaskipError(
                f"{path}: {other.label} and {cell.label} would be one run, but their settings "
                f"differ ({what}); set that for the whole sweep, rename a plan's file, or make two "
                "sweeps."
            )


def _of_one_run(config: RunConfig) -> dict[str, Any]:
    """What the tasks of one run must have in common."""
    return config.settings() | config.policy_settings() | {"importance": config.importance}


def _cells(
    model: str,
    experiments: Mapping[Scope, Sequence[str]],
    policies: Mapping[str, Sequence[int | str]],
    settings: Mapping[str, dict[str, Any]],
) -> list[Cell]:
    """The cells of one model, dense ones first: the others' times are compared with them.

    Args:
        model: its name.
        experiments: tasks by experiment.
        policies: budgets by policy, or plans' files.
        settings: of the run, by task.
    """

    def config(experiment: Scope, task: str, **own: Any) -> RunConfig:
        named = {"experiment": experiment, "model_name": model}
        return RunConfig.from_dict(settings[task] | named | own)

    cells = []
    for task in settings:
        users = tuple(name for name, tasks in experiments.items() if task in tasks)
        dense = config(users[0], task, policy=DENSE)
        cells.append(Cell(users, dataclasses.replace(dense, name=f"{model}-{DENSE}")))
    for experiment, tasks in experiments.items():
        for task in tasks:
            for policy, budgets in policies.items():
                for budget in budgets:
                    flag = "plan" if isinstance(budget, str) else budget_flag(policy)
                    own = {} if flag is None else {flag: budget}
                    cells.append(
                        Cell((experiment,), config(experiment, task, policy=policy, **own))
                    )
    return cells
