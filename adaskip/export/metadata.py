"""Where a checkpoint comes from, kept in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from adaskip.plan import SkipPlan
from adaskip.replacements import Linear
from adaskip.version import __version__


def about(model: PreTrainedModel, plan: SkipPlan) -> dict[str, Any]:
    """Version, source, plan and the fingerprint it was made with, ready for JSON.

    Of linear maps the shapes are told; their numbers are weights of the checkpoint.
    """
    rows = []
    for sublayer, replacement in plan.items():
        row: dict[str, Any] = {"layer": sublayer.layer, "kind": sublayer.kind}
        if isinstance(replacement, Linear):
            row["linear"] = [list(factor.shape) for factor in replacement.factors]
        else:
            row["gain"] = replacement
        rows.append(row)
    return {
        "version": __version__,
        "source": source_name(model),
        "fingerprint": plan.fingerprint,
        "about": plan.facts,
        "plan": rows,
    }


def source_name(model: PreTrainedModel) -> str:
    """What the model was loaded from: a hub id, or the last part of a path."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return Path(name).name if Path(name).is_absolute() else name
