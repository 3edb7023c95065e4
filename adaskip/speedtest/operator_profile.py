"""Where the time of a prefill goes, operator by operator, dense and with attention skipped."""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from adaskip.cli.command import Parser, guarded, say
from adaskip.errors import refuse_below_one
from adaskip.models.loading import model_names, random_model
from adaskip.plan import KINDS, SkipPlan, Sublayer
from adaskip.policies import FixedSkipping
from adaskip.profiling import memory
from adaskip.profiling.calibration import random_prompt
from adaskip.profiling.timing import growing_cache
from adaskip.session import skipping
from adaskip.tables import markdown_table, number


@dataclass(frozen=True)
class Profiled:
    """One prefill.

    Attributes:
        seconds: by the clock, without the profiler.
        system: of them in the kernel (all threads).
        page_faults: pages mapped in.
        operators: milliseconds within each operator itself, under the profiler.
    """

    seconds: float
    system: float
    page_faults: int
    operators: Mapping[str, float]


def profile_prefill(model: PreTrainedModel, ids: Tensor, plan: SkipPlan, rounds: int) -> Profiled:
    """The median round of a prefill under a plan, and its operators' times."""
    with torch.no_grad(), skipping(model, FixedSkipping(plan)):
        _prefill(model, ids)
        taken = []
        for _ in range(rounds):
            before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            _prefill(model, ids)
            seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
            taken.append(
                (seconds, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt)
            )
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            _prefill(model, ids)
    operators = {e.key: e.self_cpu_time_total / 1000 for e in profiler.key_averages()}
    return Profiled(*sorted(taken)[len(taken) // 2], operators)


def _prefill(model: PreTrainedModel, ids: Tensor) -> None:
    model(ids, past_key_values=growing_cache(model), use_cache=True, logits_to_keep=1)


def spread_plan(n_layers: int, kind: str, n_skip: int) -> SkipPlan:
    """`n_skip` sublayers of a kind at regular distances."""
    layers = [k * n_layers // n_skip for k in range(n_skip)]
    return SkipPlan({Sublayer(n, k): None for n in layers for k in KINDS if k == kind})


def compare(model: PreTrainedModel, context: int, kind: str, n_skip: int, rounds: int) -> str:
    """A table of dense and skipped prefill at one context length."""
    ids = random_prompt(model, context)
    n_layers = int(model.config.num_hidden_layers)
    plans = (SkipPlan(), spread_plan(n_layers, kind, n_skip), spread_plan(n_layers, kind, n_layers))
    dense, skipped, none = (profile_prefill(model, ids, plan, rounds) for plan in plans)
    names = sorted(dense.operators, key=lambda name: -dense.operators[name])[:12]
    three = (dense, skipped, none)
    lines = [(name, [p.operators.get(name, 0.0) for p in three]) for name in names]
    lines += [
        ("sum", [sum(p.operators.values()) for p in three]),
        ("clock", [1000 * p.seconds for p in three]),
        ("in the kernel", [1000 * p.system for p in three]),
        ("page faults", [float(p.page_faults) for p in three]),
    ]
    rows = [_row(name, values, n_skip / n_layers) for name, values in lines]
    header = ["ms", "dense", f"{n_skip} {kind} skipped", f"no {kind}", "saved", "its share"]
    return f"## {context} tokens\n\n{markdown_table(header, rows)}"


def _row(name: str, values: Sequence[float], share: float) -> list[str]:
    """Saved: by the skipped ones. Its share: what their number says, of what all of them take."""
    dense, skipped, none = values
    cells = (dense, skipped, none, dense - skipped, share * (dense - none))
    return [name, *(number(value, 1) for value in cells)]


def profile_main(argv: Sequence[str] | None = None) -> int:
    """What `speed/profile_prefill.py` calls; returns the exit code."""

    def action() -> int:
        parser = Parser(description="Times a prefill by operator.", allow_abbrev=False)
        parser.add_argument("--model", default="smollm2", choices=model_names(), help="the shape")
        parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
        parser.add_argument("--kind", default="attn", choices=KINDS, help="what is skipped")
        parser.add_argument("--n_skip", type=int, default=8, help="how many of them")
        parser.add_argument("--rounds", type=int, default=3, help="prefills without the profiler")
        parser.add_argument("--layers", type=int, help="decoder layers")
        parser.add_argument(
            "--keep_memory",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="keep freed memory in the process; without, as stock transformers runs",
        )
        given = parser.parse_args(argv)
        numbers = {"contexts": min(given.contexts), "n_skip": given.n_skip}
        refuse_below_one(numbers | {"rounds": given.rounds})
        if given.keep_memory:
            memory.keep_freed_memory()
        model = random_model(given.model, device="cpu", n_layers=given.layers)
        for context in given.contexts:
            say(compare(model, context, given.kind, given.n_skip, given.rounds))
        return 0

    return guarded(action)
