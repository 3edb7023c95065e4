"""Warm-up prompts, looked at before the model runs on the first of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaskip.errors import ProfileError
from adaskip.positions import positions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_WANTED = (
    "give a list of input ids [batch, tokens], e.g. [tokenizer(text, return_tensors='pt')"
    ".input_ids], of mappings with input_ids and attention_mask, or of texts with tokenizer="
)


def tokenized(
    prompts: object, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> list[object]:
    """The prompts with the ids of each text in its place; others stay as they are.

    Args:
        prompts: an iterable of texts, and of what `checked_prompts` takes.
        tokenizer: the model's own.
        config: the model's; a text beyond its positions is cut there.

    Raises:
        ProfileError: a text has no token, or the prompts are one text.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise ProfileError(f"The prompts are one {type(prompts).__name__}; {_WANTED}.")
    limit = positions(config)
    found: list[object] = []
    for number, prompt in enumerate(prompts, start=1):
        if isinstance(prompt, str):
            ids: Any = tokenizer(prompt, return_tensors="pt").input_ids
            if not ids.numel():
                raise ProfileError(f"Text {number} has no token; leave it out.")
            if limit is not None and ids.shape[1] > limit:
                logger.warning(
                    "Text %d has %d tokens; the first %d, which the model has positions for, are "
                    "used.",
                    *(number, ids.shape[1], limit),
                )
            found.append(ids[:, :limit])
        else:
            found.append(prompt)
    return found


def checked_prompts(prompts: object, vocab_size: int) -> list[dict[str, Tensor]]:
    """The prompts as inputs of a model, in a list.

    Args:
        prompts: an iterable of input ids [batch, tokens], or of mappings with `input_ids` and
            perhaps `attention_mask` [batch, tokens] and more tensors.
        vocab_size: ids the model knows.

    Raises:
        ProfileError: one is of another kind or shape, is empty or all padding, or has an id the
            model does not know.
    """
    alone = isinstance(prompts, str | bytes | Tensor | Mapping)
    if alone or not isinstance(prompts, Iterable):
        raise ProfileError(f"The prompts are one {type(prompts).__name__}; {_WANTED}.")
    return [_checked(prompt, number, vocab_size) for number, prompt in enumerate(prompts, start=1)]


def _checked(prompt: object, number: int, vocab_size: int) -> dict[str, Tensor]:
    """One prompt. What it holds is read on the CPU, where it mostly lies."""
    inputs: dict[str, Any] = dict(prompt) if isinstance(prompt, Mapping) else {"input_ids": prompt}
    ids: Any = inputs.get("input_ids")
    mask = inputs.get("attention_mask")
    for name, tensor in {"input_ids": ids, **inputs}.items():
        if not isinstance(tensor, Tensor):
            raise ProfileError(
                f"{name} of prompt {number} is a {type(tensor).__name__}; {_WANTED}."
            )
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.numel():
        raise ProfileError(
            f"Prompt {number} is {ids.dtype} of shape {list(ids.shape)}; it must be int64 ids "
            "[batch, tokens] with one token or more (ids[None] adds a batch dimension)."
        )
    # Through numpy: on the CPU, and no read of the model's device.
    values = ids.cpu().numpy()
    if values.min() < 0 or values.max() >= vocab_size:
        raise ProfileError(
            f"Prompt {number} has ids from {values.min()} to {values.max()}, but the model knows 0 "
            f"to {vocab_size - 1}; use its own tokenizer."
        )
    if isinstance(mask, Tensor) and mask.ndim == 2:
        _check_mask(mask, ids, number)
    return inputs


def _check_mask(mask: Tensor, ids: Tensor, number: int) -> None:
    if mask.shape != ids.shape:
        raise ProfileError(
            f"attention_mask of prompt {number} is of shape {list(mask.shape)}, its input_ids of "
            f"{list(ids.shape)}; they must be the same."
        )
    if not (mask.cpu().numpy() != 0).any(axis=1).all():
        raise ProfileError(
            f"A sequence of prompt {number} is padding only, by its attention_mask; leave it out."
        )
