"""Opens the model that a speed script times."""

from __future__ import annotations

from transformers import PreTrainedModel

from adaskip.models.loading import load_model, random_model
from adaskip.profiling.memory import keep_freed_memory


def open_model(
    name: str, device: str | None, *, real: bool, n_layers: int | None
) -> PreTrainedModel:
    """The model a script times, with freed memory kept on a CPU.

    Args:
        name: as in configs/models.yaml.
        device: where; None for the default.
        real: its own weights, else random ones of its shape.
        n_layers: decoder layers of a random one, None for all.
    """
    if real:
        model = load_model(name, device=device)
    else:
        model = random_model(name, device=device, n_layers=n_layers)
    if model.device.type == "cpu":
        keep_freed_memory()
    return model
