"""A greedy request in its two phases, and their times: the one loop that decodes.

The device is synchronized around whole phases, never within.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from adaskip.cache_name import CACHE
from adaskip.growing_cache import GrowingCache, kv_tensors
from adaskip.plan import Phase

MakeCache = Callable[[PreTrainedModel], Cache]


def growing_cache(model: PreTrainedModel) -> Cache:
    """The cache that does not copy itself at every step."""
    return GrowingCache(model.config)


def dynamic_cache(model: PreTrainedModel) -> Cache:
    """What `generate()` makes by default."""
    return DynamicCache(config=model.config)


def synchronize(device: torch.device) -> None:
    """Waits for the device; only around whole phases, never within."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def next_logits(
    call: Callable[..., Any],
    ids: Tensor,
    cache: Cache,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """One forward of a request: logits of its last position, `[batch, vocabulary]`.

    Args:
        call: the model, or what stands for it, e.g. a compiled one.
        ids: the prompts, or the tokens chosen last: `[batch, tokens]`.
        cache: the request's keys and values so far.
        mask: ones for real tokens, `[batch, tokens so far]`; None without padding.
        positions: of `ids`, `[batch, tokens]`; None without padding.
    """
    output = call(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **{CACHE: cache},
    )
    logits: Tensor = output.logits[:, -1]
    return logits


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds of a request.

    Attributes:
        ttft: from the start of prefill to the first token.
        decode: of all decode steps together.
        total: from the start of prefill to the last token.
    """

    ttft: float
    decode: float
    total: float


def run_phases(
    device: torch.device,
    prefill: Callable[[], Tensor],
    decode: Callable[[Tensor], Tensor],
    go_on: Callable[[Tensor], bool],
) -> PhaseTimes:
    """Runs a request: one prefill, then decode steps for as long as its tokens ask for more.

    Args:
        device: what computes.
        prefill: returns the first tokens.
        decode: returns the next tokens, given the last ones.
        go_on: sees the tokens of every forward; returns whether a decode step follows.
    """
    synchronize(device)
    start = time.perf_counter()
    chosen = prefill()
    synchronize(device)
    first = time.perf_counter()
    more = go_on(chosen)
    begin = time.perf_counter()
    while more:
        chosen = decode(chosen)
        more = go_on(chosen)
    synchronize(device)
    end = time.perf_counter()
    return PhaseTimes(first - start, end - begin, end - start)


@dataclass(frozen=True)
class RequestTimes:
    """A request that was timed.

    Attributes:
        ttft: seconds of the prefill forward, the choice of the first token included.
        per_token: seconds per decode step: all steps together by their number.
        kv_bytes: keys and values held at the end.
        tokens: the tokens chosen, [batch, 1 + steps], on the device.
    """

    ttft: float
    per_token: float
    kv_bytes: int
    tokens: Tensor = field(repr=False, compare=False)

    def seconds(self, phase: Phase) -> float:
        """Of a forward of this phase."""
        return self.ttft if phase is Phase.PREFILL else self.per_token


@torch.no_grad()
def time_request(
    model: PreTrainedModel,
    input_ids: Tensor,
    n_steps: int,
    *,
    make_cache: MakeCache = growing_cache,
    decode: Callable[..., Any] | None = None,
    after_forward: Callable[[], None] | None = None,
) -> RequestTimes:
    """Prefills once and decodes greedily, whatever the tokens are.

    Args:
        model: may be within `skipping(...)`.
        input_ids: the prompts, unpadded: [batch, tokens], on the model's device.
        n_steps: decode steps, 1 or more.
        make_cache: makes the request's empty cache.
        decode: called for decode steps in place of the model, e.g. a compiled one.
        after_forward: called after each forward; it must not touch the device.
    """
    cache = make_cache(model)
    taken: list[Tensor] = []

    def choose(call: Callable[..., Any], ids: Tensor) -> Tensor:
        return next_logits(call, ids, cache).argmax(-1, keepdim=True)

    def go_on(chosen: Tensor) -> bool:
        taken.append(chosen)
        if after_forward is not None:
            after_forward()
        return len(taken) <= n_steps

    step = partial(choose, decode or model)
    times = run_phases(input_ids.device, lambda: choose(model, input_ids), step, go_on)
    held = sum(tensor.nbytes for tensor in kv_tensors(cache))
    return RequestTimes(times.ttft, times.decode / n_steps, held, torch.cat(taken, dim=1))
