"""What patching, recording and learning cost, as ratios measured round by round."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaskip.learning import ImportanceRecorder, learn_importance
from adaskip.plan import EMPTY_PLAN, Phase
from adaskip.policies import FixedSkipping
from adaskip.profiling.calibration import random_prompt
from adaskip.profiling.interleaving import Ratio, by_turns
from adaskip.profiling.timing import Spread, dynamic_cache, growing_cache, synchronize, time_request
from adaskip.recorders import Recorder, TokenStatistics
from adaskip.session import skipping
from adaskip.speedtest.study import Content, Study
from adaskip.tables import MISSING, markdown_table, number

# The highest ratio that counts as free, printed beside what was measured.
GOALS = {
    "empty plan": (1.01, 1.01),
    "recording": (1.02, 1.03),
    "learn_importance": (1.03, None),
    "growing cache": (1.01, 1.0),
}
BASELINES = ("stock", "prefill only")
N_PROMPTS = 2
# Of prefill, and per decode step where there are any.
Seconds = tuple[float, ...]


def measure_overhead(
    model: PreTrainedModel, context: int, *, n_steps: int, rounds: int
) -> dict[str, Any]:
    """Stock against patched with an empty plan, recording, and a growing cache; learning likewise.

    Args:
        model: outside of `skipping(...)`.
        context: prompt tokens.
        n_steps: decode steps per request.
        rounds: requests of each kind that count.
    """
    ids = random_prompt(model, context)
    prompts = [random_prompt(model, context, seed=seed) for seed in range(N_PROMPTS)]
    kinds: dict[str, Callable[[], Seconds]] = {
        "stock": lambda: _stock(model, ids, n_steps),
        "empty plan": lambda: _patched(model, ids, n_steps, []),
        "recording": lambda: _patched(
            model, ids, n_steps, [ImportanceRecorder(), TokenStatistics("ffn", phase="decode")]
        ),
        "growing cache": lambda: _stock(model, ids, n_steps, growing=True),
        "prefill only": lambda: (_prefill(model, prompts),),
        "learn_importance": lambda: (_learn(model, prompts),),
    }
    for warm_up in kinds.values():
        warm_up()
    rounds_ = list(by_turns(kinds, rounds=rounds, baselines=BASELINES, title=f"{context} tokens"))
    return {"context": context, "rows": [_row(name, rounds_) for name in kinds]}


def _row(name: str, rounds: Sequence[Mapping[str, Sequence[Seconds]]]) -> dict[str, Any]:
    """Spreads of one kind, and its ratios to its baseline, round by round."""
    stock, prefill_only = BASELINES
    base = prefill_only if name in (prefill_only, "learn_importance") else stock
    row: dict[str, Any] = {"label": name}
    for index, phase in enumerate(Phase):
        own, reference = (_per_round(rounds, kind, index) for kind in (name, base))
        if own and reference:
            row[str(phase)] = asdict(Spread.of(own)) | {
                "ratio": asdict(Ratio.paired(own, reference)),
                "goal": GOALS.get(name, (None, None))[index],
            }
    return row


def _per_round(
    rounds: Sequence[Mapping[str, Sequence[Seconds]]], name: str, index: int
) -> list[float]:
    """One phase's seconds of a kind, the median of each round; empty if it has no such phase."""
    taken = [each[name] for each in rounds]
    return [median(s[index] for s in each) for each in taken if len(each[0]) > index]


def _stock(model: PreTrainedModel, ids: Tensor, n_steps: int, *, growing: bool = False) -> Seconds:
    make_cache = growing_cache if growing else dynamic_cache
    times = time_request(model, ids, n_steps, make_cache=make_cache)
    return times.ttft, times.per_token


def _patched(
    model: PreTrainedModel, ids: Tensor, n_steps: int, recorders: Sequence[Recorder]
) -> Seconds:
    with skipping(model, FixedSkipping(EMPTY_PLAN), recorders=recorders):
        return _stock(model, ids, n_steps)


@torch.inference_mode()
def _prefill(model: PreTrainedModel, prompts: Sequence[Tensor]) -> float:
    """Prefilling the prompts as `learn_importance` does: base model, no cache."""
    synchronize(model.device)
    start = time.perf_counter()
    decoder: Any = model.base_model
    for prompt in prompts:
        decoder(input_ids=prompt, use_cache=False)
    synchronize(model.device)
    return time.perf_counter() - start


def _learn(model: PreTrainedModel, prompts: Sequence[Tensor]) -> float:
    synchronize(model.device)
    start = time.perf_counter()
    learn_importance(model, prompts)
    synchronize(model.device)
    return time.perf_counter() - start


def _measure(model: PreTrainedModel, given: argparse.Namespace) -> Content:
    return {
        "points": [
            measure_overhead(model, context, n_steps=given.new_tokens, rounds=given.rounds)
            for context in given.contexts
        ]
    }


def _table(record: Mapping[str, Any]) -> str:
    """All context lengths."""
    rows = []
    for point in record["points"]:
        for row in point["rows"]:
            cells = [row["label"], str(point["context"])]
            for phase in Phase:
                own = row.get(str(phase))
                spread = own and [1000 * own[key] for key in ("median", "q1", "q3")]
                cells.append("{:.1f} [{:.1f}–{:.1f}]".format(*spread) if spread else MISSING)
                cells.append(Ratio(**own["ratio"]).text(3) if own else MISSING)
                cells.append(number(own and own["goal"]))
            rows.append(cells)
    header = ["case", "tokens", "prefill ms", "ratio", "goal", "ms/token", "ratio", "goal"]
    return markdown_table(header, rows)


OVERHEAD = Study(
    name="overhead",
    description="What patching, recording and learning cost",
    contexts=(512, 2048),
    new_tokens=20,
    rounds=9,
    measure=_measure,
    table=_table,
)
