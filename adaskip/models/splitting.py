"""How `from_pretrained` is asked to split a model over devices or processes."""

from __future__ import annotations

import inspect
from typing import Any


def split_options(device_map: str | None, tp_plan: str | None) -> dict[str, Any]:
    """The arguments of `from_pretrained` that split a model; empty for a whole one.

    Args:
        device_map: "auto" puts layers on all devices of the process.
        tp_plan: "auto" splits every layer over the processes of the command.
    """
    options: dict[str, Any] = {}
    if device_map is not None:
        options["device_map"] = device_map
    if tp_plan is not None:
        options.update(_tensor_parallel(tp_plan))
    return options


def _tensor_parallel(tp_plan: str) -> dict[str, Any]:
    """By signature: transformers moved the plan into a configuration of its own."""
    from transformers.distributed.configuration_utils import DistributedConfig

    from adaskip.models.processes import team

    team()  # connects the processes, before transformers would do so for itself
    kind: Any = DistributedConfig
    if "tp_plan" in inspect.signature(kind).parameters:
        return {"distributed_config": kind(tp_plan=tp_plan)}
    return {"tp_plan": tp_plan}
