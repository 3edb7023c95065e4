"""Greedy generation with the times of its two phases: one function each for prefill and decode."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaskip.growing_cache import GrowingCache
from adaskip.profiling.timing import synchronize

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Generated:
    """Answers to a batch of prompts.

    Attributes:
        tokens: per prompt the new token ids, without the one that ended the answer.
        n_generated: per prompt the tokens generated, the one that ended the answer included.
        ttft: seconds from the start of prefill to the first token.
        per_token: seconds per decode step, for the whole batch; None without a decode step.
        total: seconds from the start of prefill to the last token.
    """

    tokens: tuple[tuple[int, ...], ...]
    n_generated: tuple[int, ...]
    ttft: float
    per_token: float | None
    total: float


@dataclass
class _State:
    """A batch under way: cache, mask (None for a single row), position of each row's last token."""

    cache: GrowingCache
    mask: Tensor | None
    positions: Tensor | None


@dataclass(frozen=True)
class StopRule:
    """When an answer ends.

    Attributes:
        token_ids: tokens that end it.
        max_new_tokens: and its longest length.
        min_new_tokens: tokens before which none of `token_ids` may be chosen.
    """

    token_ids: frozenset[int]
    max_new_tokens: int
    min_new_tokens: int = 0


@torch.no_grad()
def generate_greedy(
    model: PreTrainedModel, prompts: Prompts, stop: StopRule, *, pad_id: int = 0
) -> Generated:
    """Continues each prompt by its most likely tokens.

    The same tokens as `model.generate(do_sample=False)` without logits processors; several prompts
    are padded on the left.

    Args:
        model: in eval mode; may be within `skipping(...)`.
        prompts: token ids, one sequence per row.
        stop: when an answer ends.
        pad_id: token that fills shorter prompts, masked out.
    """
    synchronize(model.device)
    start = time.perf_counter()
    chosen, state = _prefill(model, prompts, stop, pad_id)
    steps = [chosen.tolist()]
    first = time.perf_counter()
    open_rows = [token not in stop.token_ids for token in steps[0]]
    while any(open_rows) and len(steps) < stop.max_new_tokens:
        chosen = _decode(model, chosen, open_rows, state, stop, len(steps))
        steps.append(chosen.tolist())
        open_rows = [
            is_open and token not in stop.token_ids
            for is_open, token in zip(open_rows, steps[-1], strict=True)
        ]
    synchronize(model.device)
    end = time.perf_counter()
    answers = [_until_stop(column, stop.token_ids) for column in zip(*steps, strict=True)]
    return Generated(
        tokens=tuple(answer for answer, _ in answers),
        n_generated=tuple(count for _, count in answers),
        ttft=first - start,
        per_token=(end - first) / (len(steps) - 1) if len(steps) > 1 else None,
        total=end - start,
    )


def _prefill(
    model: PreTrainedModel, prompts: Prompts, stop: StopRule, pad_id: int
) -> tuple[Tensor, _State]:
    """The first token of every row, `[batch]`, and the state to go on from."""
    longest = max(len(prompt) for prompt in prompts)
    padded = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    ids = torch.tensor(padded, device=model.device)
    # With room for the whole answer, no decode step copies the context.
    state = _State(GrowingCache(model.config, room=stop.max_new_tokens), None, None)
    # A mask of ones alone would cost kernels that need none their fast path; a batch has one even
    # without padding, because its finished rows become padding.
    if len(prompts) > 1:
        real = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        state.mask = torch.tensor(real, device=model.device)
        state.positions = (state.mask.cumsum(-1) - 1).clamp(min=0)
    logits = _forward(model, ids, state)
    return _choose(logits, stop, n_before=0), state


def _decode(
    model: PreTrainedModel,
    chosen: Tensor,
    open_rows: Sequence[bool],
    state: _State,
    stop: StopRule,
    n_before: int,
) -> Tensor:
    """The next token of every row, `[batch]`; a finished row's is masked out as padding."""
    if state.mask is not None and state.positions is not None:
        added = torch.tensor(open_rows, device=chosen.device, dtype=state.mask.dtype)
        state.mask = torch.cat([state.mask, added[:, None]], dim=1)
        state.positions = state.positions[:, -1:] + 1
    return _choose(_forward(model, chosen[:, None], state), stop, n_before)


def _forward(model: PreTrainedModel, ids: Tensor, state: _State) -> Tensor:
    """Logits of the last position, `[batch, vocabulary]`."""
    output = model(
        input_ids=ids,
        attention_mask=state.mask,
        position_ids=state.positions,
        past_key_values=state.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def _choose(logits: Tensor, stop: StopRule, n_before: int) -> Tensor:
    """The most likely token per row, `[batch]`."""
    if n_before < stop.min_new_tokens and stop.token_ids:
        logits = logits.clone()
        logits[:, sorted(stop.token_ids)] = float("-inf")
    return logits.argmax(-1)


def _until_stop(column: Sequence[int], stop_ids: Collection[int]) -> tuple[tuple[int, ...], int]:
    """One row's tokens before its stop token, and how many were generated with it."""
    for index, token in enumerate(column):
        if token in stop_ids:
            return tuple(column[:index]), index + 1
    return tuple(column), len(column)
