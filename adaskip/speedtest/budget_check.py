"""Whether `AdaSkip(acceleration=...)` is as fast as it says: predicted against measured ratio."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from adaskip.budget import SELECTS, Select
from adaskip.importance import Importance
from adaskip.learning import learn_importance
from adaskip.plan import Phase
from adaskip.policies import AdaSkip
from adaskip.profiling.calibration import measure_sublayers, random_prompt
from adaskip.profiling.interleaving import Ratio, by_turns
from adaskip.profiling.timing import RequestTimes, growing_cache, time_request
from adaskip.session import skipping
from adaskip.speedtest.study import Content, Study
from adaskip.sublayer_times import SublayerTimes
from adaskip.tables import markdown_table, number

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
    policies = [
        (phase, _policy(importance, times[phase], ratio, select))
        for phase in Phase
        for ratio in ratios
        for select in SELECTS
    ]
    ids = random_prompt(model, context)
    names = ["dense", *(f"{phase} {p.acceleration} {p.select}" for phase, p in policies)]
    kinds = {
        name: partial(_request, model, ids, n_steps, kind)
        for name, kind in zip(names, [None, *policies], strict=True)
    }
    for warm_up in kinds.values():
        warm_up()
    taken = list(by_turns(kinds, rounds=rounds, baselines=["dense"], title=f"{context} tokens"))
    return [
        _row(phase, policy, [[r[label] for r in taken] for label in ("dense", name)])
        for name, (phase, policy) in zip(names[1:], policies, strict=True)
    ]


def _policy(importance: Importance, times: SublayerTimes, ratio: float, select: Select) -> AdaSkip:
    return AdaSkip(importance, acceleration=ratio, times=times, select=select, online=False)


def _request(
    model: PreTrainedModel, ids: Tensor, n_steps: int, kind: tuple[Phase, AdaSkip] | None
) -> RequestTimes:
    context = nullcontext() if kind is None else skipping(model, kind[1], scope=kind[0].value)
    # A prefill is measured without the decode steps that would follow.
    steps = 1 if kind is not None and kind[0] is Phase.PREFILL else n_steps
    with context:
        return time_request(model, ids, steps, make_cache=growing_cache)


def _row(
    phase: Phase, policy: AdaSkip, rounds: Sequence[Sequence[Sequence[RequestTimes]]]
) -> dict[str, Any]:
    """Predicted and measured ratio; `rounds`: requests of each round, dense and with the policy."""
    chosen, times = policy.chosen(), policy.times
    assert times is not None  # noqa: S101 - given above
    predicted = times.speedup(chosen)
    dense, own = ([median(t.seconds(phase) for t in each) for each in kind] for kind in rounds)
    measured = Ratio.paired(dense, own)
    return {
        "phase": str(phase),
        "context": times.context,
        "select": policy.select,
        "asked": policy.acceleration,
        "attn": sum(s.kind == "attn" for s in chosen),
        "ffn": sum(s.kind == "ffn" for s in chosen),
        "predicted": predicted,
        "measured": asdict(measured),
        "off_points": 100 * (measured.median - predicted),
    }


def _measure(model: PreTrainedModel, given: argparse.Namespace) -> Content:
    counts = {"n_steps": given.new_tokens, "rounds": given.rounds}
    found = (check_budgets(model, context, given.ratios, **counts) for context in given.contexts)
    return {"rows": [row for rows in found for row in rows]}


def _table(record: Mapping[str, Any]) -> str:
    """The last column is in percentage points."""
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
                Ratio(**row["measured"]).text(3),
                number(row["off_points"], 1, signed=True),
            ]
            for row in record["rows"]
        ],
    )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[1.15, 1.3], help="accelerations to ask for"
    )


BUDGET = Study(
    name="budget",
    description="Predicted and measured ratio of AdaSkip(acceleration=...)",
    contexts=(1024, 4096),
    new_tokens=16,
    rounds=5,
    measure=_measure,
    table=_table,
    options=_options,
)
