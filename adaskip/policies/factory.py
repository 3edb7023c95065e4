"""Makes a policy from settings, for runs, sweeps and speed tests; tells what it is made with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from adaskip.errors import AdaskipError
from adaskip.importance import Importance
from adaskip.policy import POLICIES, SkipPolicy, policy_class

LEARNED = "importance"
# The option that carries a budget, by what it counts.
BUDGETS = {"layers": "skip_full_layer_num", "sublayers": "skip_sub_layer_num"}


def takes(name: str, option: str) -> bool:
    """Whether the policy of this name has a field `option`; one that cannot be made has none."""
    try:
        return option in policy_class(name).hyperparameters()
    except AdaskipError:
        return False


def takers(option: str) -> tuple[str, ...]:
    """The names of the policies that have a field `option`."""
    return tuple(name for name in POLICIES if takes(name, option))


def arguments(name: str, n_skip: int, offered: Mapping[str, Any]) -> dict[str, Any]:
    """What a policy is made with, apart from what it learns.

    Args:
        name: as it is registered.
        n_skip: its budget, in its own unit.
        offered: settings by field name; those it has no field for are not used, and a field that
            is not offered keeps its default.

    Raises:
        AdaskipError: there is no such policy, or a field without a default is not offered.
    """
    fields = policy_class(name).hyperparameters()
    made = {key: offered.get(key, default) for key, default in fields.items() if key != LEARNED}
    made["n_skip"] = n_skip
    missing = [key for key, value in made.items() if value is dataclasses.MISSING]
    if missing:
        raise AdaskipError(
            f"Policy {name} cannot be made from settings: nothing sets its field {missing[0]}; "
            "give it a default."
        )
    return made


def build_policy(
    name: str, n_skip: int, offered: Mapping[str, Any], importance: Callable[[], Importance]
) -> SkipPolicy:
    """The policy of this name, with the arguments that `arguments` tells.

    Args:
        name: as it is registered.
        n_skip: its budget, in its own unit.
        offered: settings by field name.
        importance: gives what was learned about the model; called if the policy has a field for it.

    Raises:
        AdaskipError: there is no such policy, or its settings do not fit.
    """
    made = arguments(name, n_skip, offered)
    if takes(name, LEARNED):
        made[LEARNED] = importance()
    return policy_class(name)(**made)


def describe(made: Mapping[str, Any]) -> dict[str, Any]:
    """A policy's arguments, ready for JSON.

    Raises:
        AdaskipError: a value has no faithful form there.
    """
    return {key: _described(key, value) for key, value in made.items()}


def _described(key: str, value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(getattr(value, "name", None), str):
        return value.name
    if isinstance(value, list | tuple):
        return [_described(key, item) for item in value]
    if isinstance(value, dict):
        return {str(name): _described(key, item) for name, item in value.items()}
    raise AdaskipError(
        f"The policy's field {key} is a {type(value).__name__}, which a record cannot tell from "
        "another one: use numbers and texts, or give it a name."
    )
