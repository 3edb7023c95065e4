"""What patching, recording and learning cost, as ratios measured round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from adaskip.entering import skipping
from adaskip.learning import ImportanceRecorder, learn_importance
from adaskip.plan import EMPTY_PLAN, Phase
from adaskip.policies import FixedSkipping
from adaskip.profiling.calibration import random_prompt
from adaskip.profiling.interleaving import by_turns
from adaskip.profiling.timing import dynamic_cache, growing_cache, synchronize, time_request
from adaskip.recorders import Recorder, TokenStatistics
from adaskip.speedtest.measurement import Row, Seconds, Study, comparison, if_it_fits, option
from adaskip.speedtest.record import Key, Point

# The highest ratio that counts as free, printed beside what was measured.
GOALS = {
    "empty plan": (1.01, 1.01),
    "recording": (1.02, 1.03),
    "learn_importance": (1.03, None),
    "growing cache": (1.01, 1.0),
}
STOCK, PREFILLS = BASELINES = ("stock", "prefill only")
N_PROMPTS = 2


@dataclass(frozen=True, kw_only=True)
class Overhead(Study):
    """What it costs to have adaskip at work without skipping anything."""

    kind: ClassVar[str] = "overhead"
    title: ClassVar[str] = "What patching, recording and learning cost"

    contexts: tuple[int, ...] = option((512, 2048), "prompt lengths in tokens")
    new_tokens: int = option(20, "decode steps per request")

    @override
    def points(self, missing: Sequence[Key]) -> Iterator[Point]:
        model = self.open()
        counts = {"n_steps": self.new_tokens, "rounds": self.rounds}
        for key in missing:

            def measured(key: Key = key) -> Point:
                return {"rows": measure_overhead(model, key["context"], **counts)}

            yield if_it_fits(key, measured)


def measure_overhead(
    model: PreTrainedModel, context: int, *, n_steps: int, rounds: int
) -> list[Row]:
    """Stock against patched with an empty plan, recording, and a growing cache; learning likewise.

    Args:
        model: outside of `skipping(...)`.
        context: prompt tokens.
        n_steps: decode steps per request.
        rounds: requests of each kind that count.
    """
    device, ids = model.device, random_prompt(model, context)
    prompts = [random_prompt(model, context, seed=seed) for seed in range(N_PROMPTS)]
    kinds: dict[str, Callable[[], Seconds]] = {
        STOCK: lambda: _stock(model, ids, n_steps),
        "empty plan": lambda: _patched(model, ids, n_steps, []),
        "recording": lambda: _patched(
            model, ids, n_steps, [ImportanceRecorder(), TokenStatistics("ffn", phase="decode")]
        ),
        "growing cache": lambda: _stock(model, ids, n_steps, growing=True),
        PREFILLS: lambda: _clocked(device, lambda: _prefill(model, prompts)),
        "learn_importance": lambda: _clocked(device, lambda: learn_importance(model, prompts)),
    }
    for warm_up in kinds.values():
        warm_up()
    taken = list(by_turns(kinds, rounds=rounds, baselines=BASELINES, title=f"{context} tokens"))
    learning = (PREFILLS, "learn_importance")
    rows = [comparison(taken, k, PREFILLS if k in learning else STOCK) for k in kinds]
    for row in rows:
        for phase, goal in zip(Phase, GOALS.get(row["label"], (None, None)), strict=True):
            if phase in row:
                row[phase]["goal"] = goal
    return rows


def _stock(model: PreTrainedModel, ids: Tensor, n_steps: int, *, growing: bool = False) -> Seconds:
    make_cache = growing_cache if growing else dynamic_cache
    times = time_request(model, ids, n_steps, make_cache=make_cache)
    return times.ttft, times.per_token


def _patched(
    model: PreTrainedModel, ids: Tensor, n_steps: int, recorders: Sequence[Recorder]
) -> Seconds:
    with skipping(model, FixedSkipping(EMPTY_PLAN), recorders=recorders):
        return _stock(model, ids, n_steps)


def _clocked(device: torch.device, action: Callable[[], object]) -> Seconds:
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return (time.perf_counter() - start,)


@torch.inference_mode()
def _prefill(model: PreTrainedModel, prompts: Sequence[Tensor]) -> None:
    """Prefills the prompts as `learn_importance` does: base model, no cache."""
    decoder: Any = model.base_model
    for prompt in prompts:
        decoder(input_ids=prompt, use_cache=False)
