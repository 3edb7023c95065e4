"""Compiled requests under plans beside the dense model's, at any batch size: one graph per plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import mean, median
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from typing_extensions import override

from adaskip.entering import skipping
from adaskip.errors import refuse_below_one
from adaskip.grouped_attention import grouped_decoding
from adaskip.plan import EMPTY_PLAN, KINDS, Phase, SkipPlan, all_sublayers
from adaskip.policies.made_plan import read_plans
from adaskip.profiling import memory
from adaskip.profiling.calibration import random_prompt
from adaskip.profiling.interleaving import Ratio, Spread, by_turns
from adaskip.profiling.timing import RequestTimes, growing_cache, next_logits, time_request
from adaskip.speedtest.cases import DENSE, compiled_call, compiled_prefill, without_kind
from adaskip.speedtest.measurement import Row, Study, option
from adaskip.speedtest.record import Key, Point
from adaskip.speedtest.roofline import Rates, forward_bytes, measured_rates, operation_counter

# A dense request whose prompts are not compiled, where those of the others are.
EAGER_PREFILL = "dense, eager prefill"


@dataclass(frozen=True, kw_only=True)
class CompiledRequests(Study):
    """Times compiled decoding, and compiled prefill if asked for, under plans that were made.

    On CUDA, decode steps are CUDA graphs, and grouped queries read each key once.
    """

    kind: ClassVar[str] = "compiled"
    title: ClassVar[str] = "Compiled requests, dense and under plans"
    free = Study.free | {"batches"}

    contexts: tuple[int, ...] = option((1024,), "prompt lengths in tokens")
    batches: tuple[int, ...] = option((1,), "batch sizes")
    new_tokens: int = option(64, "decode steps per request")
    plans: tuple[str, ...] = option((), "files of plans to measure")
    prefill: bool = option(False, "also compile the prefill, each context a graph of its own")
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
        read_plans(self.plans)

    @override
    def points(self, missing: Sequence[Key]) -> Iterator[Point]:
        model = self.open()
        plans = {label: file.plan for label, file in read_plans(self.plans).items()}
        rates = measured_rates(model.device)
        for key in missing:
            ids = random_prompt(model, key["context"], key["batch"])
            rows = compare_compiled(
                model,
                plans,
                ids,
                n_steps=self.new_tokens,
                rounds=self.rounds,
                prefill=self.prefill,
                ideal=self.ideal,
                rates=rates,
            )
            yield {"rates": rates and asdict(rates), "rows": rows}


@dataclass(frozen=True)
class _Case:
    """What one row measures: a plan, None for the unpatched model, and how its prompts run."""

    plan: SkipPlan | None
    compiled_prefill: bool


def compare_compiled(
    model: PreTrainedModel,
    plans: dict[str, SkipPlan],
    ids: Tensor,
    *,
    n_steps: int,
    rounds: int,
    prefill: bool,
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
        prefill: whether the prefill is compiled, too; then a dense one is timed that is not.
        ideal: whether to measure what the sublayers take.
        rates: of the device, for the roofline; None for none.
    """
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    named: dict[str, SkipPlan | None] = {DENSE: None, **plans}
    shown = {name: _Case(plan, prefill) for name, plan in named.items()}
    if prefill:
        shown[EAGER_PREFILL] = _Case(None, compiled_prefill=False)
    bare = {f"no {kind}": _Case(without_kind(kind, n_layers), prefill) for kind in KINDS}
    cases = shown | (bare if ideal else {})

    def request(case: _Case, *, cache: StaticCache) -> RequestTimes:
        return _request(model, case, ids, n_steps, cache)

    def cache() -> StaticCache:
        return StaticCache(config=model.config, max_cache_len=ids.shape[1] + n_steps)

    kinds = {name: partial(request, case, cache=cache()) for name, case in cases.items()}
    # The first call that is compiled is compiled twice: a cheap one.
    nothing = SkipPlan(dict.fromkeys(all_sublayers(n_layers)))
    request(_Case(nothing, compiled_prefill=False), cache=cache())
    peaks: dict[str, int | None] = {}
    for name, run in kinds.items():
        memory.reset_peak(model.device)
        if prefill:
            # A graph that allocates the cache leaves it where later graphs must not find it.
            _request(
                model, replace(cases[name], compiled_prefill=False), ids, 1, run.keywords["cache"]
            )
        run()  # its first step compiles, its second records the graph
        peaks[name] = memory.peak_bytes(model.device)
        if prefill:
            run()  # what a window held is used again from here on, by a graph of its own
    title = f"{ids.shape[1]} tokens x {ids.shape[0]}"
    taken: dict[str, list[RequestTimes]] = {name: [] for name in kinds}
    for one in by_turns(kinds, rounds=rounds, title=title):
        for name, requests in one.items():
            taken[name] += requests
    phases = tuple(Phase) if prefill else (Phase.DECODE,)
    each = {phase: _each(taken, n_layers, phase) for phase in phases} if ideal else {}
    rows = []
    for name, case in shown.items():
        plan = case.plan or EMPTY_PLAN
        row = _row(name, taken[name], taken[DENSE])
        row |= {"kv_bytes": taken[name][0].kv_bytes, "peak_bytes": peaks[name]}
        row |= {"skipped_attn": len(plan.layers("attn")), "skipped_ffn": len(plan.layers("ffn"))}
        row |= {"windows": len(plan.windows), "phases": [str(phase) for phase in phases]}
        for phase in phases:
            own = row[str(phase)]
            own |= {"ideal_speedup": None, "roofline_ratio": None}
            # What takes the place of a sublayer is not timed here, nor the eager sublayers.
            if ideal and len(plan.gains) == len(plan) and case.compiled_prefill == prefill:
                dense = median(request.seconds(phase) for request in taken[DENSE])
                saved = sum(each[phase][sublayer.kind] for sublayer in plan)
                own["ideal_speedup"] = dense / (dense - saved)
            if rates is not None:
                least = _roofline(model, plan, ids, n_steps, rates, phase)
                own["roofline_ratio"] = own["median"] / least
        rows.append(row)
    return rows


def _request(
    model: PreTrainedModel, case: _Case, ids: Tensor, n_steps: int, cache: StaticCache
) -> RequestTimes:
    # One cache per case, as `generate()` keeps it: where a graph reads and writes stays as it is.
    cache.reset()  # type: ignore[no-untyped-call]
    with ExitStack() as patched:
        if model.device.type == "cuda":
            patched.enter_context(grouped_decoding(model))
        if case.plan is not None:
            patched.enter_context(skipping(model, case.plan))
        return time_request(
            model,
            ids,
            n_steps,
            make_cache=lambda _: cache,
            prefill=compiled_prefill(model) if case.compiled_prefill else None,
            decode=compiled_call(model),
        )


def _each(taken: dict[str, list[RequestTimes]], n_layers: int, phase: Phase) -> dict[str, float]:
    """Seconds of an attention and of an FFN in a dense forward, by difference."""
    seconds = {name: median(r.seconds(phase) for r in requests) for name, requests in taken.items()}
    return {kind: max(seconds[DENSE] - seconds[f"no {kind}"], 0.0) / n_layers for kind in KINDS}


def _roofline(
    model: PreTrainedModel, plan: SkipPlan, ids: Tensor, n_steps: int, rates: Rates, phase: Phase
) -> float:
    """Seconds that a forward takes at least; of decode steps by their bytes alone."""
    batch, context = ids.shape
    if phase is Phase.DECODE:
        held = range(context + 1, context + n_steps + 1)
        return rates.seconds(0, mean(forward_bytes(model, plan, n, batch) for n in held))
    with torch.no_grad(), skipping(model, plan), operation_counter() as counter:
        next_logits(model, ids, growing_cache(model))
    return rates.seconds(counter.get_total_flops(), forward_bytes(model, plan, 0, batch))


def _row(name: str, own: Sequence[RequestTimes], base: Sequence[RequestTimes]) -> Row:
    row: Row = {"label": name}
    for phase in Phase:
        times, dense = ([request.seconds(phase) for request in r] for r in (own, base))
        speedup = asdict(Ratio.paired(dense, times))
        row[str(phase)] = asdict(Spread.of(times)) | {"speedup": speedup}
    same = bool(torch.equal(own[0].tokens, base[0].tokens))
    return row | {"same_tokens_as_dense": same}
