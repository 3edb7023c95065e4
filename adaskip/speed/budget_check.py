"""Whether `AdaSkip(acceleration=...)` is as fast as it says: predicted against measured ratio."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from adaskip.budget import SELECTS
from adaskip.experiments.cli import Parser, guarded, say
from adaskip.experiments.records import SCHEMA, environment, write_json
from adaskip.learning import learn_importance
from adaskip.models.loading import model_names
from adaskip.plan import Phase
from adaskip.policies import AdaSkip
from adaskip.report.tables import markdown_table, number
from adaskip.session import skipping
from adaskip.speed.calibration import hardware, measure_sublayers, random_prompt
from adaskip.speed.timing import growing_cache, open_model, time_request

_WARMUP_TOKENS = 256


def check_budgets(
    model: PreTrainedModel, context: int, ratios: Sequence[float], *, n_steps: int, rounds: int
) -> list[dict[str, Any]]:
    """Predicts from sublayer times measured first, then measures dense and skipped by turns.

    Args:
        model: outside of `skipping(...)`.
        context: prompt tokens.
        ratios: acceleration ratios to try, each in both phases and with both selections.
        n_steps: decode steps per request.
        rounds: requests of each kind that count.
    """
    importance = learn_importance(model, [random_prompt(model, _WARMUP_TOKENS)])
    times = measure_sublayers(
        model, context, n_steps=n_steps, make_cache=growing_cache, progress=True
    )
    kinds: list[tuple[Phase, AdaSkip] | None] = [None]
    for phase in Phase:
        for ratio in ratios:
            for select in SELECTS:
                policy = AdaSkip(
                    importance,
                    acceleration=ratio,
                    times=times[phase],
                    select=select,
                    online=False,
                )
                kinds.append((phase, policy))
    ids = random_prompt(model, context)
    taken: list[list[dict[Phase, float]]] = [[] for _ in kinds]
    for number_ in tqdm(range(rounds + 1), desc=f"{context} tokens", unit="round"):
        for place, kind in enumerate(kinds):
            seconds = _request(model, ids, n_steps, kind)
            if number_:
                taken[place].append(seconds)
    return [
        _row(*kind, taken[0], taken[place]) for place, kind in enumerate(kinds) if kind is not None
    ]


def _request(
    model: PreTrainedModel, ids: Tensor, n_steps: int, kind: tuple[Phase, AdaSkip] | None
) -> dict[Phase, float]:
    context = nullcontext() if kind is None else skipping(model, kind[1], scope=kind[0].value)
    # A prefill is measured without the decode steps that would follow.
    steps = 1 if kind is not None and kind[0] is Phase.PREFILL else n_steps
    with context:
        request = time_request(model, ids, steps, make_cache=growing_cache)
    return {Phase.PREFILL: request.ttft, Phase.DECODE: request.per_token}


def _row(
    phase: Phase,
    policy: AdaSkip,
    dense: Sequence[dict[Phase, float]],
    own: Sequence[dict[Phase, float]],
) -> dict[str, Any]:
    assert policy.times is not None  # noqa: S101 - given above
    chosen = policy.chosen()
    predicted = policy.times.speedup(chosen)
    measured = median(t[phase] for t in dense) / median(t[phase] for t in own)
    return {
        "phase": str(phase),
        "context": policy.times.context,
        "select": policy.select,
        "asked": policy.acceleration,
        "attn": sum(s.kind == "attn" for s in chosen),
        "ffn": sum(s.kind == "ffn" for s in chosen),
        "predicted": predicted,
        "measured": measured,
        "off_points": 100 * (measured - predicted),
    }


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table; the last column in percentage points."""
    header = ["phase", "tokens", "select", "asked", "attn+ffn", "predicted", "measured", "off"]
    return markdown_table(
        header,
        [
            [
                row["phase"],
                str(row["context"]),
                row["select"],
                number(row["asked"]),
                f"{row['attn']}+{row['ffn']}",
                number(row["predicted"], 3),
                number(row["measured"], 3),
                number(row["off_points"], 1, signed=True),
            ]
            for row in rows
        ],
    )


def budget_main(argv: Sequence[str] | None = None) -> int:
    """What `speed/budget.py` calls; returns the exit code."""

    def action() -> int:
        given = _parser().parse_args(argv)
        model = open_model(given.model, given.device, real=given.real, n_layers=given.layers)
        rows = []
        for context in given.contexts:
            rows += check_budgets(
                model, context, given.ratios, n_steps=given.new_tokens, rounds=given.rounds
            )
        record = {
            "schema": SCHEMA,
            "settings": vars(given) | {"hardware": hardware(model.device)},
            "environment": environment(model.device.type),
            "rows": rows,
        }
        folder = Path(given.results_dir)
        write_json(folder / f"budget-{given.model}-{model.device.type}.json", record)
        say(as_markdown(rows))
        return 0

    return guarded(action)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Predicted and measured ratio of AdaSkip(acceleration=...).",
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="smollm2", choices=model_names(), help="the shape")
    parser.add_argument("--real", action="store_true", help="real weights in place of random ones")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.15, 1.3])
    parser.add_argument("--new_tokens", type=int, default=16, help="decode steps per request")
    parser.add_argument("--rounds", type=int, default=5, help="requests of each kind")
    parser.add_argument("--layers", type=int, help="decoder layers (random weights)")
    parser.add_argument("--device", help="torch device")
    parser.add_argument("--results_dir", default="results/speed")
    return parser
