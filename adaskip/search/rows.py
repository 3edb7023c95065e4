"""Calibration rows: what a plan is made from, the ids of prompts with those of their answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from adaskip.errors import AdaskipError
from adaskip.warmup import checked_prompts

Ids = Tensor | Sequence[int]
Row = tuple[Ids, Ids]
# Of ids.
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def row_ids(row: Row) -> tuple[Tensor, Tensor]:
    """Ids of a calibration row: prompt and answer together, [1, tokens], and the answer's, [n].

    The last of them is only predicted: what the model reads ends before it.

    Raises:
        AdaskipError: it is no pair, not of ids of one prompt and its answer, or has no prompt or no
            answer tokens.
    """
    parts: list[Tensor] = []
    if isinstance(row, tuple | list) and len(row) == 2:
        with suppress(TypeError, ValueError, RuntimeError):
            parts = [torch.as_tensor(part) for part in row]
    if not parts:
        parted = row if isinstance(row, tuple | list) else [row]
        texts = any(isinstance(part, str) for part in parted)
        what = "of texts" if texts else f"a {type(row).__name__} that is no pair of ids"
        raise AdaskipError(
            f"A calibration row is {what}; give the ids of prompt and answer, e.g. "
            "(tokenizer(prompt).input_ids, tokenizer(answer).input_ids)."
        )
    if not all(part.numel() for part in parts):
        raise AdaskipError(
            "A calibration row has no prompt or no answer tokens; the loss is taken over the "
            "answer's. Give (prompt ids, answer ids) with one token or more each."
        )
    for ids in parts:
        if ids.dtype not in _WHOLE or ids.ndim not in (1, 2) or ids.numel() != ids.shape[-1]:
            raise AdaskipError(
                f"A calibration row has {ids.dtype} of shape {list(ids.shape)}; give whole ids "
                "[tokens] or [1, tokens] of a prompt, and of its answer, each prompt a row of its "
                "own."
            )
    prompt, answer = (ids.flatten().long() for ids in parts)
    return torch.cat([prompt, answer])[None], answer


def checked_rows(rows: Iterable[Row], vocab_size: int) -> list[Row]:
    """Calibration rows, all of them looked at before the model runs on the first.

    Args:
        rows: `(prompt ids, answer ids)` each.
        vocab_size: ids the model knows.

    Raises:
        AdaskipError: there is none, or one that `row_ids` refuses or has other ids.
    """
    found = list(rows)
    if not found:
        raise AdaskipError("No calibration row was given; a search needs at least one.")
    checked_prompts([row_ids(row)[0] for row in found], vocab_size)
    return found


def reads(rows: Iterable[Row]) -> list[Tensor]:
    """What the model reads of calibration rows: [1, tokens] each."""
    return [row_ids(each)[0][:, :-1] for each in rows]
