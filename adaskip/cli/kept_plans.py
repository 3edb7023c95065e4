"""The files of `adaskip plan`: what each is called, and whether one there is the plan asked for."""

from __future__ import annotations

import argparse
from pathlib import Path, PurePath
from typing import Any

from adaskip.distilling import can_learn
from adaskip.errors import AdaskipError
from adaskip.fitting import EPOCHS
from adaskip.methods import METHODS
from adaskip.models.devices import resolve_device, resolve_dtype
from adaskip.plan import SkipPlan
from adaskip.policies.factory import takes
from adaskip.search import MENU, SEARCH
from adaskip.search.menu import Dishes
from adaskip.tasks.spec import task_spec

# What a plan's `about` calls --fit_rows.
FIT_ROWS = "fit rows"
# What plans of earlier versions do not tell; there it is not compared.
_LATELY = ("dtype", "device", "min length", "data dir")


def plan_path(folder: Path, given: argparse.Namespace, method: str, ratio: float) -> Path:
    """A plan's file: its method, what the search may use where that is less than all, its ratio."""
    parts = [method]
    if method == SEARCH and given.replacements != [*MENU]:
        parts.append("+".join(given.replacements))
    if method == SEARCH and given.rank is not None:
        parts.append(f"rank{given.rank}")
    if method == SEARCH and given.kv_share is not None:
        parts.append(f"kv{given.kv_share:g}")
    # All digits: each ratio has a file of its own.
    return folder / f"{'-'.join(parts)}-{str(ratio).removesuffix('.0')}.safetensors"


def training_of(path: Path) -> Path:
    """Where the training of a plan stands until its file is there."""
    return path.with_suffix(".distilling")


def may_hold(given: argparse.Namespace, method: str) -> dict[str, bool]:
    """Whether a method's plans may hold gains, and linear maps: what can be fitted or trained."""
    if method == SEARCH:
        return {name: name in given.replacements for name in ("gain", "linear")}
    if method in METHODS:
        return {"gain": METHODS[method].gain, "linear": METHODS[method].linear}
    return {"gain": takes(method, "gain"), "linear": False}


def made_of(given: argparse.Namespace, method: str) -> dict[str, Any]:
    """What else tells a plan's file from another one of its name.

    Raises:
        AdaskipError: there is no such device or dtype.
    """
    device = resolve_device(given.device)
    made = {"model": given.model_path or given.model, "exact": given.exact, "device": device.type}
    made["dtype"] = str(resolve_dtype(given.dtype, device)).removeprefix("torch.")
    if not all(task_spec(task).offline for task in given.tasks):
        made |= {"min length": given.min_length, "data dir": str(PurePath(given.data_dir))}
    return made | ({FIT_ROWS: given.fit_rows} if may_hold(given, method)["linear"] else {})


def is_ready(plan: SkipPlan | None, given: argparse.Namespace) -> bool:
    """Whether a plan that may have been made before has all that is asked for."""
    return plan is not None and (not given.measure or "measured acceleration" in plan.about)


def kept_plan(
    folder: Path, given: argparse.Namespace, method: str, ratio: float
) -> SkipPlan | None:
    """The plan that was made before; None if there is none.

    Raises:
        AdaskipError: the file is another plan's.
    """
    path = plan_path(folder, given, method, ratio)
    if not path.exists():
        return None
    plan = SkipPlan.load(path)
    wanted = {"method": method, "acceleration": ratio, "calibration": given.source}
    wanted |= made_of(given, method)
    wanted |= {key: getattr(given, key) for key in ("phase", "context", "batch")}
    if can_learn(plan):
        wanted[EPOCHS] = given.distill or None
        wanted |= {FIT_ROWS: given.fit_rows} if given.distill else {}
    if method == SEARCH:
        wanted["replacements"] = str(Dishes(given.replacements, given.windows, given.rank))
        wanted["kv share"] = given.kv_share
    for key, value in wanted.items():
        if key in _LATELY and key not in plan.about:
            continue
        if plan.about.get(key) != value:
            raise AdaskipError(
                f"{path} was made with another {key} ({plan.about.get(key)}, asked for: {value}); "
                "give another --out, or remove it."
            )
    return plan
