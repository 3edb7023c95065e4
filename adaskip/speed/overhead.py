"""What patching, recording and learning cost: ratios of medians, measured by turns."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from adaskip.experiments.cli import Parser, guarded, say
from adaskip.experiments.generation import synchronize
from adaskip.experiments.records import SCHEMA, environment, write_json
from adaskip.learning import ImportanceRecorder, learn_importance
from adaskip.models.loading import model_names
from adaskip.plan import EMPTY_PLAN, Phase
from adaskip.policies import FixedSkipping
from adaskip.recorders import Recorder, TokenStatistics
from adaskip.report.tables import markdown_table, number
from adaskip.session import skipping
from adaskip.speed.calibration import hardware, random_prompt
from adaskip.speed.timing import Spread, dynamic_cache, growing_cache, open_model, time_request

# The highest ratio that counts as free, printed beside what was measured.
GOALS = {
    "empty plan": (1.01, 1.01),
    "recording": (1.02, 1.03),
    "learn_importance": (1.03, None),
    "growing cache": (1.01, 1.0),
}
N_PROMPTS = 2


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
    kinds: dict[str, Callable[[], tuple[float, float | None]]] = {
        "stock": lambda: _stock(model, ids, n_steps),
        "empty plan": lambda: _patched(model, ids, n_steps, []),
        "recording": lambda: _patched(
            model, ids, n_steps, [ImportanceRecorder(), TokenStatistics("ffn", phase="decode")]
        ),
        "growing cache": lambda: _stock(model, ids, n_steps, growing=True),
        "prefill only": lambda: (_prefill(model, prompts), None),
        "learn_importance": lambda: (_learn(model, prompts), None),
    }
    seconds: dict[str, list[tuple[float, float | None]]] = {name: [] for name in kinds}
    for number_ in tqdm(range(rounds + 1), desc=f"{context} tokens", unit="round"):
        for name, action in kinds.items():
            taken = action()
            if number_:
                seconds[name].append(taken)
    return {"context": context, "rows": [_row(name, seconds) for name in kinds]}


def _row(name: str, seconds: dict[str, list[tuple[float, float | None]]]) -> dict[str, Any]:
    """Spreads of one kind, and its ratios to its baseline."""
    base = "prefill only" if name in ("prefill only", "learn_importance") else "stock"
    row: dict[str, Any] = {"label": name}
    for index, phase in enumerate(Phase):
        own = [taken[index] for taken in seconds[name]]
        values = [value for value in own if value is not None]
        if not values:
            continue
        reference = median(taken[index] or 0.0 for taken in seconds[base])
        goal = GOALS.get(name, (None, None))[index]
        row[str(phase)] = asdict(Spread.of(values)) | {
            "ratio": median(values) / reference,
            "goal": goal,
        }
    return row


def _stock(
    model: PreTrainedModel, ids: Tensor, n_steps: int, *, growing: bool = False
) -> tuple[float, float]:
    make_cache = growing_cache if growing else dynamic_cache
    times = time_request(model, ids, n_steps, make_cache=make_cache)
    return times.ttft, times.per_token


def _patched(
    model: PreTrainedModel, ids: Tensor, n_steps: int, recorders: Sequence[Recorder]
) -> tuple[float, float]:
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


def as_markdown(points: Sequence[dict[str, Any]]) -> str:
    """The table of all context lengths."""
    rows = []
    for point in points:
        for row in point["rows"]:
            cells = [row["label"], str(point["context"])]
            for phase in Phase:
                own = row.get(str(phase))
                spread = own and [1000 * own[key] for key in ("median", "q1", "q3")]
                cells.append("{:.1f} [{:.1f}–{:.1f}]".format(*spread) if spread else number(None))
                cells.append(number(own and own["ratio"], 3))
                cells.append(number(own and own["goal"]))
            rows.append(cells)
    header = ["case", "tokens", "prefill ms", "ratio", "goal", "ms/token", "ratio", "goal"]
    return markdown_table(header, rows)


def overhead_main(argv: Sequence[str] | None = None) -> int:
    """What `speed/overhead.py` calls; returns the exit code."""

    def action() -> int:
        given = _parser().parse_args(argv)
        model = open_model(given.model, given.device, real=given.real, n_layers=given.layers)
        points = [
            measure_overhead(model, context, n_steps=given.new_tokens, rounds=given.rounds)
            for context in given.contexts
        ]
        record = {
            "schema": SCHEMA,
            "settings": vars(given) | {"hardware": hardware(model.device)},
            "environment": environment(model.device.type),
            "points": points,
        }
        path = Path(given.results_dir) / f"overhead-{given.model}-{model.device.type}.json"
        write_json(path, record)
        say(as_markdown(points))
        return 0

    return guarded(action)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="What patching, recording and learning cost.", allow_abbrev=False)
    parser.add_argument("--model", default="smollm2", choices=model_names(), help="the shape")
    parser.add_argument("--real", action="store_true", help="real weights in place of random ones")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--new_tokens", type=int, default=20, help="decode steps per request")
    parser.add_argument("--rounds", type=int, default=9, help="requests of each kind")
    parser.add_argument("--layers", type=int, help="decoder layers (random weights)")
    parser.add_argument("--device", help="torch device")
    parser.add_argument("--results_dir", default="results/speed")
    return parser
