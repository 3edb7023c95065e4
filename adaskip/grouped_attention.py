"""Decoding with grouped queries that reads each key once, where attention has a mask.

A static cache, which compiled decoding needs, is longer than its tokens and so has a mask; there
transformers repeats keys and values for every query head of their group before the product (four
times the bytes, for Llama 3). Here the query heads of a group are rows of one product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "adaskip_grouped"


@contextmanager
def grouped_decoding(model: PreTrainedModel) -> Iterator[None]:
    """Within it, a model whose attention is "sdpa" decodes so; another model is left as it is.

    Args:
        model: outside of `skipping(...)`; prompts are computed as before.
    """
    config: Any = model.config.get_text_config(decoder=True)
    stock = config._attn_implementation
    if stock != "sdpa":
        yield
        return
    AttentionInterface.register(NAME, grouped_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = stock


def grouped_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one token per sequence; of several, and without a mask, as transformers does.

    Args:
        module: the attention module.
        query: [batch, heads, tokens, head_dim].
        key: [batch, key-value heads, places, head_dim].
        value: likewise.
        attention_mask: which places are seen, bool, or what is added to the scores:
            [batch, 1, tokens, places].
        dropout: probability; only without does this function compute itself.
        scaling: of the inner products.
        **kwargs: what other attention functions take.

    Returns:
        [batch, tokens, heads, head_dim], and no weights.
    """
    batch, heads, tokens, width = query.shape
    if tokens > 1 or attention_mask is None or dropout:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    together = query.reshape(batch, key.shape[1], -1, width)
    scores = (together @ key.transpose(-1, -2)).float()
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if attention_mask.is_floating_point():
        scores = scores + attention_mask
    else:
        scores = scores.masked_fill(~attention_mask, -math.inf)
    weights = scores.softmax(dim=-1).to(query.dtype)
    return (weights @ value).reshape(batch, 1, heads, -1), None
