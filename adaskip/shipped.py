"""Plans that come with the package, by name: `SkipPlan.load("smollm2/1.2@1000")`."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

from adaskip.errors import PlanError, did_you_mean

# <model>/<acceleration>@<context>.safetensors, the acceleration perhaps with "-kv25" behind it.
_SHIPPED = Path(__file__).parent / "plans"
SUFFIX = ".safetensors"
# Bytes of all of them together.
LIMIT = 4_000_000


def shipped_plans() -> tuple[str, ...]:
    """The names that `SkipPlan.load` knows without a file, as `model/acceleration@context`."""
    paths = (path.relative_to(_SHIPPED) for path in _SHIPPED.glob(f"*/*{SUFFIX}"))
    return tuple(sorted(path.as_posix().removesuffix(SUFFIX) for path in paths))


def find_plan(path: str | os.PathLike[str]) -> Path:
    """The file of a plan: the one at a path, else the shipped one of that name.

    Raises:
        PlanError: there is neither; the message lists what is shipped.
    """
    file = Path(path)
    if file.exists():
        return file
    names, name = shipped_plans(), file.as_posix()
    if name in names:
        return _SHIPPED / f"{name}{SUFFIX}"
    shipped = f" Shipped are: {', '.join(names)}." if names else " None is shipped."
    beside = (other.name for other in file.parent.glob(f"*{SUFFIX}"))
    hint = did_you_mean(file.name, beside) or did_you_mean(name, names)
    raise PlanError(f"There is no plan at {path}.{hint}{shipped}")


def plan_label(path: str | os.PathLike[str]) -> str:
    """What runs and tables call a plan: its file's name, as a name of a run may be."""
    return PurePath(path).name.removesuffix(SUFFIX).replace("@", "-at-")
