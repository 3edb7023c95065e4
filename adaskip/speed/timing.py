"""Times of the two phases of a request, and of every sublayer within them.

Devices are synchronized only around whole phases. Sublayers are told apart by timestamps within a
dense forward, which add up to it by construction; timing them one by one would not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from adaskip.blocks import block_spec, bound_parts
from adaskip.experiments.generation import synchronize
from adaskip.growing_cache import GrowingCache, kv_tensors
from adaskip.memory import keep_freed_memory
from adaskip.models.loading import load_model, random_model
from adaskip.plan import Phase, SkipPlan, Sublayer, all_sublayers

MakeCache = Callable[[PreTrainedModel], Cache]


def growing_cache(model: PreTrainedModel) -> Cache:
    """The cache that does not copy itself at every step."""
    return GrowingCache(model.config)


def dynamic_cache(model: PreTrainedModel) -> Cache:
    """What `generate()` makes by default."""
    return DynamicCache(config=model.config)


@dataclass(frozen=True)
class RequestTimes:
    """One request.

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
    device = input_ids.device
    seen = after_forward or _nothing
    synchronize(device)
    start = time.perf_counter()
    chosen = _next(model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1))
    synchronize(device)
    first = time.perf_counter()
    seen()
    tokens = [chosen]
    step = decode or model
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(n_steps):
        chosen = _next(step(chosen, past_key_values=cache, use_cache=True, logits_to_keep=1))
        tokens.append(chosen)
        seen()
    synchronize(device)
    end = time.perf_counter()
    held = sum(tensor.nbytes for tensor in kv_tensors(cache))
    return RequestTimes(first - start, (end - begin) / n_steps, held, torch.cat(tokens, dim=1))


def _next(output: Any) -> Tensor:
    chosen: Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
    return chosen


def _nothing() -> None:
    """Nobody wants to look."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements, in the unit of the values."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), q1, q3, len(values))


def kv_bytes(config: Any, plan: SkipPlan, tokens: int, batch: int, itemsize: int) -> int:
    """Bytes of keys and values after `tokens` tokens under a plan that is in force throughout.

    `2 * batch * KV heads * head_dim * tokens * itemsize` per attention that is not skipped. For
    models without sliding windows.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    n_running = text.num_hidden_layers - len(plan.layers("attn"))
    return int(2 * batch * heads * width * tokens * itemsize * n_running)


class SublayerClock:
    """Timestamps at the borders of all sublayers, forward after forward.

    On CUDA the timestamps are events in the stream, read when the measurement is over.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._decoder: Any = model.base_model
        self._block = block_spec(model.config.model_type)
        self._device = model.device
        self._marks: list[Any] = []

    @contextmanager
    def running(self) -> Iterator[SublayerClock]:
        """Installs the timestamps, outside of `skipping(...)`, and takes them away."""
        with ExitStack() as undo:
            for layer in self._decoder.layers:
                body, pre, _ = bound_parts(layer, self._block.ffn)
                for module in (layer, body if pre is None else pre):
                    undo.callback(module.register_forward_pre_hook(self._mark).remove)
            undo.callback(self._decoder.norm.register_forward_pre_hook(self._mark).remove)
            yield self

    def _mark(self, *hook_arguments: object) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def read(self) -> list[dict[Sublayer, float]]:
        """Seconds of every sublayer in each forward since the last `read`."""
        synchronize(self._device)
        marks, self._marks = self._marks, []
        sublayers = all_sublayers(len(self._decoder.layers))
        forwards = []
        for start in range(0, len(marks), len(sublayers) + 1):
            borders = marks[start : start + len(sublayers) + 1]
            spans = [_seconds(a, b) for a, b in pairwise(borders)]
            forwards.append(dict(zip(sublayers, spans, strict=True)))
        return forwards


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    return float(start.elapsed_time(end)) / 1000


class ClockedRequests:
    """Dense requests with timestamps, one at a time, and what they told of the sublayers.

    Attributes:
        requests: the requests so far.
        forwards: seconds of every sublayer, in each forward of a phase.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        n_steps: int,
        make_cache: MakeCache = growing_cache,
    ) -> None:
        self.requests: list[RequestTimes] = []
        self.forwards: dict[Phase, list[dict[Sublayer, float]]] = {phase: [] for phase in Phase}
        self._clock = SublayerClock(model)
        self._time = partial(time_request, model, input_ids, n_steps, make_cache=make_cache)

    def warm_up(self) -> None:
        """A request that does not count."""
        with self._clock.running():
            self._time()
        self._clock.read()

    def request(self) -> RequestTimes:
        """A request that counts."""
        with self._clock.running():
            times = self._time()
        prefill, *steps = self._clock.read()
        self.requests.append(times)
        self.forwards[Phase.PREFILL].append(prefill)
        self.forwards[Phase.DECODE] += steps
        return times


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
