"""Compiled decoding under plans beside the dense model, at any batch size: one graph per plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from adaskip.entering import skipping
from adaskip.errors import refuse_below_one
from adaskip.grouped_attention import grouped_decoding
from adaskip.plan import EMPTY_PLAN, KINDS, Phase, SkipPlan, all_sublayers
from adaskip.policies.made_plan import read_plans
from adaskip.profiling import memory
from adaskip.profiling.calibration import random_prompt
from adaskip.profiling.interleaving import Ratio, Spread, by_turns, per_round
from adaskip.profiling.timing import MakeCache, RequestTimes, time_request
from adaskip.speedtest.cases import (
    DENSE,
    compiled_call,
    forget_compiled,
    static_cache,
    without_kind,
)
from adaskip.speedtest.measurement import Row, Study, if_it_fits, option
from adaskip.speedtest.record import Key, Point
from adaskip.speedtest.roofline import Rates, forward_bytes, measured_rates

# The requests of each kind in one round.
Round = Mapping[str, Sequence[RequestTimes]]


@dataclass(frozen=True, kw_only=True)
class CompiledDecoding(Study):
    """Times compiled decoding under plans that were made.

    On CUDA, decode steps are CUDA graphs, and grouped queries read each key once.
    """

    kind: ClassVar[str] = "compiled"
    title: ClassVar[str] = "Compiled decoding, dense and under plans"
    free = Study.free | {"batches"}

    contexts: tuple[int, ...] = option((1024,), "prompt lengths in tokens")
    batches: tuple[int, ...] = option((1,), "batch sizes")
    new_tokens: int = option(64, "decode steps per request")
    plans: tuple[str, ...] = option((), "files of plans to measure")
    ideal: bool = option(
        True, "also what is ideal: by steps without any attention, and without any FFN"
    )

    @override
    def keys(self) -> list[Key]:
        return [{"batch": b, "context": c} for b in self.batches for c in self.contexts]

    @override
    def check(self) -> None:
        super().check()
        refuse_below_one({"batches": min(self.batches)})
        read_plans(self.plans, [DENSE, *(f"no {kind}" for kind in KINDS)])

    @override
    def points(self, missing: Sequence[Key]) -> Iterator[Point]:
        model = self.open()
        plans = {label: file.plan for label, file in read_plans(self.plans).items()}
        rates = measured_rates(model.device)
        for key in missing:

            def measured(key: Key = key) -> Point:
                rows = compare_compiled(
                    model,
                    plans,
                    random_prompt(model, key["context"], key["batch"]),
                    n_steps=self.new_tokens,
                    rounds=self.rounds,
                    ideal=self.ideal,
                    rates=rates,
                )
                return {"rates": rates and asdict(rates), "rows": rows}

            yield if_it_fits(key, measured)


def compare_compiled(
    model: PreTrainedModel,
    plans: dict[str, SkipPlan],
    ids: Tensor,
    *,
    n_steps: int,
    rounds: int,
    ideal: bool,
    rates: Rates | None,
) -> list[Row]:
    """Requests under all plans, and dense ones, by turns, their decode steps compiled.

    Args:
        model: outside of `skipping(...)`.
        plans: by the name of their row.
        ids: the prompts: [batch, tokens].
        n_steps: decode steps per request.
        rounds: requests of each kind that count.
        ideal: whether to measure what the sublayers take.
        rates: of the device, for the roofline; None for none.
    """
    forget_compiled()
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    bare = {f"no {kind}": without_kind(kind, n_layers) for kind in KINDS} if ideal else {}

    def request(plan: SkipPlan | None) -> Callable[[], RequestTimes]:
        make_cache = static_cache(ids.shape[1] + n_steps)
        return lambda: _request(model, plan, ids, n_steps, make_cache)

    cases: dict[str, SkipPlan | None] = {DENSE: None, **plans, **bare}
    kinds = {name: request(plan) for name, plan in cases.items()}
    # The first call that is compiled is compiled twice: a cheap one.
    request(SkipPlan(dict.fromkeys(all_sublayers(n_layers))))()
    meter = memory.Peaks(model.device)
    peaks: dict[str, int | None] = {}
    for name, run in kinds.items():
        meter.begin()
        run()  # its first step compiles, its second records the graph
        peaks[name] = meter.end()
    title = f"{ids.shape[1]} tokens x {ids.shape[0]}"
    taken = list(by_turns(kinds, rounds=rounds, baselines=[DENSE], title=title))
    each = _each(taken, n_layers) if ideal else {}
    rows = []
    for name in [DENSE, *plans]:
        plan = cases[name] or EMPTY_PLAN
        row = _row(name, taken)
        row |= {"kv_bytes": taken[0][name][0].kv_bytes, "peak_bytes": peaks[name]}
        row |= {"skipped_attn": len(plan.layers("attn")), "skipped_ffn": len(plan.layers("ffn"))}
        row |= {"windows": len(plan.windows), "ideal_speedup": None, "roofline_ratio": None}
        own = row[str(Phase.DECODE)]["median"]
        # What takes the place of a sublayer is not timed here.
        if ideal and len(plan.gains) == len(plan):
            dense = median(_seconds(taken, DENSE, Phase.DECODE))
            saved = sum(each[sublayer.kind] for sublayer in plan)
            row["ideal_speedup"] = dense / (dense - saved)
        if rates is not None:
            held = range(ids.shape[1] + 1, ids.shape[1] + n_steps + 1)
            needed = mean(forward_bytes(model, plan, n, ids.shape[0]) for n in held)
            row["roofline_ratio"] = own / rates.seconds(0, needed)
        rows.append(row)
    return rows


def _request(
    model: PreTrainedModel, plan: SkipPlan | None, ids: Tensor, n_steps: int, make_cache: MakeCache
) -> RequestTimes:
    cache = make_cache(model)
    with ExitStack() as patched:
        if model.device.type == "cuda":
            patched.enter_context(grouped_decoding(model))
        if plan is not None:
            patched.enter_context(skipping(model, plan))
        return time_request(
            model, ids, n_steps, make_cache=lambda _: cache, decode=compiled_call(model)
        )


def _seconds(taken: Sequence[Round], name: str, phase: Phase) -> list[float]:
    """Of a forward of this phase, in each round."""
    return per_round(taken, name, lambda request: request.seconds(phase))


def _each(taken: Sequence[Round], n_layers: int) -> dict[str, float]:
    """Seconds of an attention and of an FFN in a dense step, by difference."""
    seconds = {name: median(_seconds(taken, name, Phase.DECODE)) for name in taken[0]}
    return {kind: max(seconds[DENSE] - seconds[f"no {kind}"], 0.0) / n_layers for kind in KINDS}


def _row(name: str, taken: Sequence[Round]) -> Row:
    row: Row = {"label": name}
    for phase in Phase:
        times, dense = (_seconds(taken, kind, phase) for kind in (name, DENSE))
        speedup = asdict(Ratio.paired(dense, times))
        row[str(phase)] = asdict(Spread.of(times)) | {"speedup": speedup}
    own, base = (taken[0][kind][0].tokens for kind in (name, DENSE))
    same = bool(torch.equal(own, base))
    return row | {"same_tokens_as_dense": same}
