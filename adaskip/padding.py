"""Which tokens of a forward are padding, and which count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaskip.generating import Turn
from adaskip.plan import Phase, Step


def real_tokens(attention_mask: object, past: int, tokens: int) -> Tensor | None:
    """Which of a forward's tokens are not padding: bool [batch, tokens], or None if all are.

    Args:
        attention_mask: as a model takes it: None, [batch, past + tokens], a 4-D mask
            [batch, 1, tokens, keys] (bool or additive), or a dictionary of those by layer type.
        past: tokens in the cache.
        tokens: new tokens per sequence.
    """
    if isinstance(attention_mask, dict):
        # By name: the order of such a dictionary is not to be relied on.
        masks = [attention_mask[name] for name in sorted(attention_mask)]
        attention_mask = next((mask for mask in masks if mask is not None), None)
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.ndim == 2:
        return attention_mask[:, -tokens:].bool()
    # A token that may not attend to itself is padding. Keys are those of the whole past, or, in the
    # mask of a sliding window that is full, the last ones only.
    width = attention_mask.shape[-1]
    own = past if past + tokens <= width else width - tokens
    allowed = torch.diagonal(attention_mask[:, 0], offset=own, dim1=-2, dim2=-1)
    return allowed if allowed.dtype == torch.bool else allowed >= 0


def real_in_call(call: dict[str, Any], turn: Turn | None, step: Step, past: int) -> Tensor | None:
    """Which of a forward's tokens are not padding: bool [batch, tokens]; None if all are.

    Args:
        call: the forward's arguments by name.
        turn: the call of `generate()` it is of; None if there is none.
        step: the forward.
        past: tokens in the cache.
    """
    # A prompt that generate() computes besides its own (guidance) comes with its own mask.
    told = turn is not None and turn.tells_padding and turn.phase is step.phase
    if turn is not None and told and call.get("past_key_values") is not None:
        return turn.real_tokens(step.phase, past, step.tokens)
    return real_tokens(call.get("attention_mask"), past, step.tokens)


def real_before(call: dict[str, Any], turn: Turn | None, past: int) -> Tensor | None:
    """Which of the tokens before a forward are not padding: bool [batch, past]; None if all are.

    Args:
        call: the forward's arguments by name.
        turn: the call of `generate()` it is of; None if there is none.
        past: tokens in the cache.
    """
    if turn is not None and turn.tells_padding:
        return turn.real_tokens(Phase.PREFILL, 0, past)
    mask = call.get("attention_mask")
    return mask[:, :past].bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
