"""The oracle of skipping with gain None: the same projections zeroed in an unpatched copy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from adaskip import Sublayer


def zeroed(model: PreTrainedModel, sublayers: Iterable[Sublayer]) -> PreTrainedModel:
    """A copy whose given sublayers add nothing."""
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for sublayer in sublayers:
            layer = copy.model.layers[sublayer.layer]
            if sublayer.kind == "attn":
                layer.self_attn.o_proj.weight.zero_()
            else:
                # The experts of a layer share one tensor.
                down: Any = getattr(layer.mlp, "experts", layer.mlp).down_proj
                (down if isinstance(down, Tensor) else down.weight).zero_()
    return copy


@torch.no_grad()
def greedy(
    prefill: PreTrainedModel, decode: PreTrainedModel, ids: Tensor, cache: Cache, steps: int
) -> tuple[Tensor, Tensor]:
    """Tokens [batch, steps] and logits [batch, steps, vocabulary] of two models, one per phase.

    Args:
        prefill: computes the prompt `ids` on top of what `cache` holds.
        decode: takes every step after it.
        ids: [batch, tokens].
        cache: filled on return.
        steps: tokens to generate.
    """
    logits = [prefill(ids, past_key_values=cache).logits[:, -1]]
    while len(logits) < steps:
        token = logits[-1].argmax(-1, keepdim=True)
        logits.append(decode(token, past_key_values=cache).logits[:, -1])
    whole = torch.stack(logits, dim=1)
    return whole.argmax(-1), whole
