"""Several policies and budgets on one command line, dense among them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from adaskip.errors import AdaskipError
from adaskip.plan import SCOPES
from adaskip.policies import POLICIES
from adaskip.policies.factory import BUDGETS, takes
from adaskip.runs.runconfig import DENSE, PLAN_FILE, RunConfig, budget_flag


def add_policies(parser: argparse.ArgumentParser) -> None:
    """Adds `--policy`, an option per unit of budgets, and `--scope`."""
    parser.add_argument(
        "--policy",
        nargs="*",
        default=[],
        metavar="NAME",
        help=f"besides dense: {', '.join(POLICIES)}",
    )
    for unit, flag in BUDGETS.items():
        users = [name for name, policy in POLICIES.items() if policy.budget == unit]
        text = f"budgets in {unit}, of {', '.join(users)}"
        parser.add_argument(f"--{flag}", nargs="+", type=int, metavar="N", help=text)
    parser.add_argument(
        "--scope", default="e2e", choices=SCOPES, help="where plans apply (default: e2e)"
    )


def cells_of(
    base: RunConfig,
    policies: Sequence[str],
    budgets: Mapping[str, Sequence[int]],
    plan: str | None = None,
) -> list[RunConfig]:
    """Dense, then every policy with each of its budgets, or with the plan's file it takes.

    Raises:
        AdaskipError: a policy is unknown or has no budget, or a budget has no policy.
    """
    cells = [base]
    takers = [policy for policy in policies if takes(policy, PLAN_FILE)]
    flags = {p: budget_flag(p) for p in policies if p != DENSE and p not in takers}
    for given, values in budgets.items():
        if values and given not in flags.values():
            raise AdaskipError(f"--{given} is given, but no --policy that counts so.")
    for policy, flag in flags.items():
        values = budgets[flag] if flag else []
        if not values:
            raise AdaskipError(f"Policy {policy} needs its budget: --{flag} N.")
        for value in dict.fromkeys(values):
            cells.append(RunConfig.from_dict(base.as_dict() | {"policy": policy, str(flag): value}))
    cells += [RunConfig.from_dict(base.as_dict() | {"policy": p, "plan": plan}) for p in takers]
    for cell in cells:
        cell.check()
    return cells
