"""Greedy answers to a batch of prompts: padding, stop rules, and the times of the two phases."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaskip.growing_cache import GrowingCache
from adaskip.profiling.timing import next_logits, run_phases

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
    request = _Request(model, prompts, stop, pad_id)
    times = run_phases(model.device, request.prefill, request.decode, request.go_on)
    answers = [_until_stop(column, stop.token_ids) for column in zip(*request.steps, strict=True)]
    n_decoded = len(request.steps) - 1
    return Generated(
        tokens=tuple(answer for answer, _ in answers),
        n_generated=tuple(count for _, count in answers),
        ttft=times.ttft,
        per_token=times.decode / n_decoded if n_decoded else None,
        total=times.total,
    )


class _Request:
    """A batch of prompts under way.

    Attributes:
        cache: its keys and values, with room for the whole answer: no decode step copies them.
        mask: ones for real tokens, `[batch, tokens so far]`; None for a single row.
        positions: of the tokens of the last forward, `[batch, tokens]`; None without a mask.
        steps: the token of every row, forward by forward.
        open_rows: per row whether its answer goes on.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Prompts, stop: StopRule, pad_id: int
    ) -> None:
        self._model, self._prompts, self._stop, self._pad_id = model, prompts, stop, pad_id
        self.cache = GrowingCache(model.config, room=stop.max_new_tokens)
        self.mask: Tensor | None = None
        self.positions: Tensor | None = None
        self.steps: list[list[int]] = []
        self.open_rows = [True] * len(prompts)

    def prefill(self) -> Tensor:
        """The first token of every row, `[batch]`."""
        device = self._model.device
        longest = max(map(len, self._prompts))
        missing = [longest - len(prompt) for prompt in self._prompts]
        pairs = list(zip(missing, self._prompts, strict=True))
        padded = [[self._pad_id] * n + list(prompt) for n, prompt in pairs]
        ids = torch.tensor(padded, device=device)
        # A mask of ones alone would cost kernels that need none their fast path; a batch has one
        # even without padding, because its finished rows become padding.
        if len(self._prompts) > 1:
            real = [[0] * n + [1] * len(prompt) for n, prompt in pairs]
            self.mask = torch.tensor(real, device=device)
            self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        return self._choose(ids)

    def decode(self, chosen: Tensor) -> Tensor:
        """The next token of every row, `[batch]`; a finished row's is masked out as padding."""
        if self.mask is not None and self.positions is not None:
            added = torch.tensor(self.open_rows, device=chosen.device, dtype=self.mask.dtype)
            self.mask = torch.cat([self.mask, added[:, None]], dim=1)
            self.positions = self.positions[:, -1:] + 1
        return self._choose(chosen[:, None])

    def go_on(self, chosen: Tensor) -> bool:
        """Notes the tokens of a forward; returns whether any row's answer goes on."""
        self.steps.append(chosen.tolist())
        self.open_rows = [
            is_open and token not in self._stop.token_ids
            for is_open, token in zip(self.open_rows, self.steps[-1], strict=True)
        ]
        return any(self.open_rows) and len(self.steps) < self._stop.max_new_tokens

    def _choose(self, ids: Tensor) -> Tensor:
        """The most likely token per row, `[batch]`."""
        logits = next_logits(self._model, ids, self.cache, self.mask, self.positions)
        if len(self.steps) < self._stop.min_new_tokens and self._stop.token_ids:
            logits = logits.clone()
            logits[:, sorted(self._stop.token_ids)] = float("-inf")
        return logits.argmax(-1)


def _until_stop(column: Sequence[int], stop_ids: Collection[int]) -> tuple[tuple[int, ...], int]:
    """One row's tokens before its stop token, and how many were generated with it."""
    for index, token in enumerate(column):
        if token in stop_ids:
            return tuple(column[:index]), index + 1
    return tuple(column), len(column)
