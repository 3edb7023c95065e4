"""The command line of `eval/perplexity.py`: several policies and budgets on one loaded model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaskip.cli.observe import DATA_OPTIONS, FACTS, add_options, configured
from adaskip.cli.run import Parser, guarded, say
from adaskip.configuration import read_config
from adaskip.errors import AdaskipError
from adaskip.models.processes import team
from adaskip.observing.recording import begun
from adaskip.plan import SCOPES
from adaskip.policies import POLICIES
from adaskip.policies.factory import LEARNED, takes
from adaskip.runs.bench import Bench
from adaskip.runs.parts import locked
from adaskip.runs.perplexity import Perplexity, shared_perplexity
from adaskip.runs.records import environment, write_json
from adaskip.runs.runconfig import (
    DENSE,
    POLICY_OPTIONS,
    WARMING_UP,
    RunConfig,
    budget_flag,
    refuse_unused,
)
from adaskip.runs.scoring import phase_shares
from adaskip.tables import markdown_table, number, percent

ROWS = 10


def perplexity_main(argv: Sequence[str] | None = None) -> int:
    """What `eval/perplexity.py` calls.

    Args:
        argv: the options, by default those of the command line.

    Returns:
        The exit code.
    """

    def action() -> int:
        given = vars(_parser().parse_args(argv))
        model, scope = given.pop("model"), given.pop("scope")
        max_tokens = given.pop("reference_tokens")
        policies = given.pop("policy")
        refuse_unused(given, policies or [DENSE])
        budgets = {flag: given.pop(flag) or [] for flag in _BUDGETS}
        given["limit"] = given["limit"] or ROWS
        base = dataclasses.replace(configured("perplexity", model, given), experiment=scope)
        cells = cells_of(base, policies, budgets)
        path, record = measure(cells, max_tokens)
        say(f"{table(record, cells)}\n\nWritten: {path}.")
        return 0

    return guarded(action)


_BUDGETS = ("skip_full_layer_num", "skip_sub_layer_num")


def _parser() -> Parser:
    parser = Parser(
        description="Perplexity of reference answers under policies and budgets, beside dense.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="as in configs/models.yaml")
    parser.add_argument(
        "--policy",
        nargs="*",
        default=[],
        metavar="NAME",
        help=f"besides dense: {', '.join(POLICIES)}",
    )
    for flag in _BUDGETS:
        users = ", ".join(name for name in POLICIES if budget_flag(name) == flag)
        text = f"budgets in {POLICIES[users.split(', ')[0]].budget}, of {users}"
        parser.add_argument(f"--{flag}", nargs="+", type=int, metavar="N", help=text)
    parser.add_argument(
        "--scope", default="e2e", choices=SCOPES, help="where plans apply (default: e2e)"
    )
    tokens = int(read_config(FACTS)["reference_tokens"])
    parser.add_argument(
        "--reference_tokens",
        type=int,
        default=tokens,
        metavar="N",
        help=f"tokens of each reference that count (default: {tokens})",
    )
    add_options(parser, (*DATA_OPTIONS, *POLICY_OPTIONS, *WARMING_UP))
    return parser


def cells_of(
    base: RunConfig, policies: Sequence[str], budgets: Mapping[str, Sequence[int]]
) -> list[RunConfig]:
    """Dense, then every policy with each of its budgets.

    Raises:
        AdaskipError: a policy is unknown or has no budget, or a budget has no policy.
    """
    cells = [base]
    flags = {policy: budget_flag(policy) for policy in policies if policy != DENSE}
    for given, values in budgets.items():
        if values and given not in flags.values():
            raise AdaskipError(f"--{given} is given, but no --policy that counts so.")
    for policy, flag in flags.items():
        values = budgets[flag] if flag else []
        if not values:
            raise AdaskipError(f"Policy {policy} needs its budget: --{flag} N.")
        for value in dict.fromkeys(values):
            cell = RunConfig.from_dict(base.as_dict() | {"policy": policy, str(flag): value})
            cell.check()
            cells.append(cell)
    return cells


def measure(cells: Sequence[RunConfig], max_tokens: int) -> tuple[Path, dict[str, Any]]:
    """Measures the cells that the result file lacks, the model being loaded at most once.

    Raises:
        AdaskipError: the model, the data, a budget or the existing file does not fit.
    """
    base = cells[0]
    path = Path(base.results_dir) / "perplexity" / f"{base.name}-{base.experiment}.json"
    settings = base.settings() | {
        "experiment": base.experiment,
        "tasks": list(base.tasks),
        "limit": base.limit,
        "reference_tokens": max_tokens,
    }
    group = team()
    with locked(path.parent):
        record = group.on_first(lambda: begun(path, base, " ".join(base.tasks), settings))
        missing = [cell for cell in cells if not _is_measured(cell, record)]
        if not missing:
            return path, record
        with group.together(), group.first_ahead():
            # The first process learns importance and fills caches; the others find them.
            bench = Bench.open(base)
            for cell in missing:
                bench.check_budget(cell)
                for task in cell.tasks:
                    bench.policy(cell, task)
        for cell in missing:
            record["sums"][key_of(cell)] = _measured(cell, bench, max_tokens)
            record["environment"] = environment(str(base.device))
            group.on_first(lambda: write_json(path, record))
    return path, record


def key_of(cell: RunConfig) -> str:
    """What the result file calls a cell: its policy, and what the command line can set of it."""
    if cell.policy == DENSE:
        return DENSE
    made = cell.policy_settings()
    parts = [_setting(key, made[key]) for key in POLICY_OPTIONS if key in made]
    if takes(cell.policy, LEARNED):
        parts.append(cell.importance or f"{cell.warmup} rows of {cell.warmup_task}")
    name = f"{cell.policy} {cell.budget}"
    return f"{name} ({', '.join(parts)})" if parts else name


def _setting(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return key if value else f"not {key}"
    return f"{key} {'none' if value is None else value}"


def _is_measured(cell: RunConfig, record: Mapping[str, Any]) -> bool:
    """Whether the result file has a cell, made with the same policy."""
    found = record["sums"].get(key_of(cell))
    made = cell.policy_settings()
    return found is not None and found.get("policy", made) == made


def _measured(cell: RunConfig, bench: Bench, max_tokens: int) -> dict[str, Any]:
    """Perplexity per task and over all tokens, with the share of sublayers left out."""
    whole = Perplexity(())
    tasks = {}
    for task in cell.tasks:
        rows = bench.rows(cell, task)
        found = shared_perplexity(
            bench.model,
            bench.tokenizer,
            bench.policy(cell, task),
            [(bench.prompt(cell, row), row.answers[0]) for row in rows],
            scope=cell.experiment,
            max_tokens=max_tokens,
            progress=team().is_first,
        )
        whole += found
        pairs = zip(rows, found.rows, strict=True)
        tasks[task] = _numbers(found) | {"rows": {r.id: [f.nll, f.tokens] for r, f in pairs}}
    skipped = [{"skipped": row.skipped} for row in whole.rows]
    return _numbers(whole) | {
        "policy": cell.policy_settings(),
        "skipped_share": phase_shares(skipped, bench.n_layers),
        "tasks": tasks,
    }


def _numbers(found: Perplexity) -> dict[str, Any]:
    return {"nll": found.nll, "tokens": found.tokens, "perplexity": found.perplexity}


def table(record: Mapping[str, Any], cells: Sequence[RunConfig]) -> str:
    """The cells asked for, dense first."""
    tasks = cells[0].tasks
    header = ["policy", *tasks, "all", "x dense", "skipped % prefill", "skipped % decode"]
    dense = record["sums"][DENSE]["perplexity"]
    lines = []
    for cell in cells:
        found = record["sums"][key_of(cell)]
        values = [found["tasks"][task]["perplexity"] for task in tasks]
        shares = [percent(found["skipped_share"][phase]) for phase in ("prefill", "decode")]
        ratio = found["perplexity"] / dense
        lines.append(
            [key_of(cell), *(number(v) for v in (*values, found["perplexity"], ratio)), *shares]
        )
    return markdown_table(header, lines)
