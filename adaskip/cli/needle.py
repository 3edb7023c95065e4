"""The command line of `eval/needle_heatmap.py`: makes the runs that are missing, draws all."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from adaskip.cli.policies import add_policies, cells_of
from adaskip.cli.run import add_run_options, as_words
from adaskip.command import FAILED, Command, say
from adaskip.models.processes import team
from adaskip.models.spec import model_spec
from adaskip.policies.factory import BUDGETS
from adaskip.reports.needle import write_report
from adaskip.runs.needle_grid import NeedleGrid
from adaskip.runs.runconfig import DENSE, POLICY_OPTIONS, WARMING_UP, RunConfig, refuse_unused
from adaskip.sweep import run_cells
from adaskip.tasks.spec import task_names, task_spec

CONTEXTS, DEPTHS = (1000, 2000, 4000), (0, 25, 50, 75, 100)
ROWS = 5
# Importance is learned once, at one length, for all of the map.
_DEFAULTS = {"warmup_tokens": 1000, "results_dir": "results/needle"}
_RUN_OPTIONS = (
    *("limit", "model_path", "max_length", "max_new_tokens", "batch_size", "dtype", "device"),
    *("allow_pickle", "seed", "results_dir"),
)


def needle_main(argv: Sequence[str] | None = None) -> int:
    """What `eval/needle_heatmap.py` calls: the exit code of its options."""
    return NEEDLE.main(argv)


def _act(options: argparse.Namespace) -> int:
    given = vars(options)
    command = _command(given)
    task, model = given.pop("task"), given.pop("model")
    contexts, depths = given.pop("contexts"), given.pop("depths")
    policies, scope = given.pop("policy"), given.pop("scope")
    refuse_unused(given, policies or [DENSE])
    plan = given.pop("plan", None)
    budgets = {flag: given.pop(flag) or [] for flag in BUDGETS.values()}
    base = RunConfig.from_dict(given | {"experiment": scope, "model_name": model, "policy": DENSE})
    limit = base.max_length or model_spec(model).prompt_limit
    grid = NeedleGrid.of(task, contexts, depths, cells_of(base, policies, budgets, plan), limit)
    failures = run_cells(grid.cells(), None)
    say(team().on_main(lambda: write_report(grid, command, failures)))
    return FAILED if failures else 0


def _command(given: Mapping[str, Any]) -> str:
    """What makes the map again, to be pasted into a shell."""
    words = ["python", "eval/needle_heatmap.py"]
    first = ("model", "task", "contexts", "depths", "scope", "limit")
    named = (*first, "policy", *BUDGETS.values(), "plan")
    for key in named:
        value = given.get(key)
        if value not in (None, []):
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    rest = {key: value for key, value in given.items() if key not in named}
    return shlex.join([*words, *as_words(rest, **_DEFAULTS)])


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    takers = [name for name in task_names() if task_spec(name).takes_depth]
    add("--model", required=True, metavar="NAME", help="as in configs/models.yaml")
    add("--task", default=takers[0], choices=takers, help=f"(default: {takers[0]})")
    for name, default, unit in (("contexts", CONTEXTS, "tokens"), ("depths", DEPTHS, "percent")):
        text = f"{name}, in {unit} (default: {' '.join(map(str, default))})"
        add(f"--{name}", nargs="+", type=int, default=[*default], metavar="N", help=text)
    add_policies(parser)
    add_run_options(
        parser,
        (*_RUN_OPTIONS, *POLICY_OPTIONS, *WARMING_UP),
        limit=ROWS,
        **_DEFAULTS,
    )


NEEDLE = Command(
    "How deep in how long a context a needle is found: dense and policies side by side.",
    _options,
    _act,
    "--model smollm2 --policy ADA --skip_sub_layer_num 8 --contexts 500 1000 --limit 2",
)
