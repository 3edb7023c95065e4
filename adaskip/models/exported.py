"""Folders that `export_checkpoint` wrote: loaded by our own classes, none of their code is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from adaskip.blocks import EXPORTED
from adaskip.errors import UnsupportedModelError


def is_exported(raw: Mapping[str, Any]) -> bool:
    """Whether the content of a `config.json` is that of a checkpoint some of whose parts are gone.

    Raises:
        UnsupportedModelError: it has such a model type, but was written by something else.
    """
    if raw["model_type"] not in EXPORTED:
        return False
    if not isinstance(raw.get("adaskip"), Mapping) or "block_configs" not in raw:
        raise UnsupportedModelError(
            f"Architecture {raw['model_type']!r} is supported as adaskip exports it, and this "
            "checkpoint was written by something else: its config.json has no entry 'adaskip'."
        )
    return True


def exported_class(model_type: str) -> Any:
    """Our causal language model for a model type of `EXPORTED`, with its `config_class`."""
    from adaskip.models import modeling_adaskip

    found = (getattr(modeling_adaskip, name) for name in dir(modeling_adaskip))
    return next(
        model
        for model in found
        if isinstance(model, type)
        and issubclass(model, modeling_adaskip.PartialModel)
        and getattr(getattr(model, "config_class", None), "model_type", None) == model_type
    )


def exported_config(raw: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration in the content of an exported `config.json`."""
    config: PretrainedConfig = exported_class(raw["model_type"]).config_class.from_dict(dict(raw))
    return config
