"""Which tokens of a forward are padding, and which count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from adaskip.cache_name import CACHE
from adaskip.calls import inputs_of
from adaskip.errors import UnsupportedCallError
from adaskip.generating import Turn
from adaskip.plan import Phase, Step


def real_tokens(
    attention_mask: object, past: int, tokens: int, batch: int | None = None
) -> Tensor | None:
    """Which of a forward's tokens are not padding: bool [batch, tokens], or None if all are.

    Args:
        attention_mask: as a model takes it: None, [batch, past + tokens] or more columns, of tokens
            still to come, a 4-D mask [batch, 1, tokens, keys] (bool or additive), or a dictionary
            of those by layer type.
        past: tokens in the cache.
        tokens: new tokens per sequence.
        batch: sequences, where one row of a mask may stand for all of them.

    Raises:
        UnsupportedCallError: the mask is of another kind, as flex attention's own.
    """
    if isinstance(attention_mask, dict):
        # By name: the order of such a dictionary is not to be relied on.
        masks = [attention_mask[name] for name in sorted(attention_mask)]
        attention_mask = next((mask for mask in masks if mask is not None), None)
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise UnsupportedCallError(
            f"An attention_mask of type {type(attention_mask).__name__} does not tell which tokens "
            "are padding; pass one [batch, tokens], or none."
        )
    # Keys are those of the whole past, or, in the mask of a sliding window that is full, the last
    # ones only.
    width = attention_mask.shape[-1]
    own = past if past + tokens <= width else width - tokens
    if attention_mask.ndim == 2:
        found = attention_mask[:, own : own + tokens].bool()
    else:
        # A token that may not attend to itself is padding.
        by_query = attention_mask[:, 0].expand(-1, tokens, -1)
        allowed = torch.diagonal(by_query, offset=own, dim1=-2, dim2=-1)
        found = allowed if allowed.dtype == torch.bool else allowed >= 0
    return found if batch is None else found.expand(batch, -1)


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
    if turn is not None and told and call.get(CACHE) is not None:
        return turn.real_tokens(step.phase, past, step.tokens)
    batch = inputs_of(call).shape[0]
    return real_tokens(call.get("attention_mask"), past, step.tokens, batch)


def seen_in_call(call: dict[str, Any], turn: Turn | None, step: Step, past: int) -> Tensor | None:
    """Which of a forward's tokens later ones see: bool [batch, tokens]; None if all are seen.

    Those of decode steps of `generate()` are, as in its own mask, also in rows that have ended: a
    later turn says what of them was padding.

    Args:
        call: the forward's arguments by name.
        turn: the call of `generate()` it is of; None if there is none.
        step: the forward.
        past: tokens in the cache.
    """
    if turn is not None and turn.tells_padding and turn.phase is step.phase is Phase.DECODE:
        return None
    return real_in_call(call, turn, step, past)


def tells_before(call: dict[str, Any], past: int) -> bool:
    """Whether a forward's own mask says which of the tokens before it are padding.

    Args:
        call: the forward's arguments by name.
        past: tokens in the cache.
    """
    mask = call.get("attention_mask")
    return isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > past


def real_before(call: dict[str, Any], turn: Turn | None, past: int) -> Tensor | None:
    """Which of the tokens before a forward are not padding: bool [batch, past]; None if all are.

    Of an answer that `generate()` is making all are, as in `seen_in_call`.

    Args:
        call: the forward's arguments by name.
        turn: the call of `generate()` it is of; None if there is none.
        past: tokens in the cache.
    """
    if tells_before(call, past):
        earlier: Tensor = call["attention_mask"][:, :past]
        return earlier.bool()
    if turn is None or not turn.tells_padding or turn.mask is None:
        return None
    told = turn.mask[:, :past].bool()
    return pad(told, (0, past - told.shape[1]), value=True)
