"""The cases a speed test compares: what is skipped, on which cache, eager or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CompileConfig, PreTrainedModel, StaticCache

from adaskip.entering import skipping
from adaskip.errors import AdaskipError
from adaskip.importance import Importance
from adaskip.plan import EMPTY_PLAN, KINDS, Kind, SkipPlan, Sublayer
from adaskip.policies import FixedSkipping, SkipPolicy, policy_class
from adaskip.policies.factory import build_policy
from adaskip.policies.made_plan import MadePlan, PlanFile
from adaskip.profiling.timing import (
    MakeCache,
    RequestTimes,
    dynamic_cache,
    growing_cache,
    time_request,
)
from adaskip.shipped import plan_label

CacheName = Literal["dynamic", "growing", "static"]
STOCK, EMPTY = "stock", "empty plan"
DENSE, DENSE_COMPILED = BASELINES = ("dense", "dense compiled")
# Sets of skipped sublayers that one process may compile; torch's own limit is 8.
_MAX_GRAPHS = 128


@dataclass(frozen=True)
class Case:
    """One line of the table, per context and batch.

    Attributes:
        label: its name there.
        policy: what is skipped; None leaves the model unpatched.
        cache: which KV cache.
        compiled: whether decode steps are compiled (needs the static cache).
        measured: False for a case that only tells what sublayers take.
    """

    label: str
    policy: SkipPolicy | None = field(repr=False)
    cache: CacheName = "growing"
    compiled: bool = False
    measured: bool = True

    @property
    def baseline(self) -> str:
        """The label of the case that skips nothing and is otherwise the same."""
        return DENSE_COMPILED if self.compiled else DENSE


def make_cases(
    importance: Importance,
    policies: Sequence[str],
    budgets: Sequence[int],
    *,
    n_steps: int,
    compiled: bool = False,
    plans: Sequence[PlanFile] = (),
) -> list[Case]:
    """Stock, dense, empty plan, every policy at every budget, and plans that were made.

    Args:
        importance: of the model, for policies that learn.
        policies: registered names.
        budgets: in sublayers; policies that count layers skip half as many.
        n_steps: decode steps, the horizon of a policy that has one.
        compiled: whether to add the compiled ones.
        plans: files of plans, whose budget is what they replace.

    Raises:
        AdaskipError: as `check_cases`.
    """
    check_cases(policies, budgets, [plan_label(file.path) for file in plans], compiled=compiled)
    named = [_named(p, n, importance, n_steps) for p in policies for n in budgets]
    named += [(plan_label(file.path), MadePlan(file, len(file.plan))) for file in plans]
    cases = [
        Case(STOCK, None, "dynamic"),
        Case(DENSE, None),
        Case(EMPTY, FixedSkipping(EMPTY_PLAN)),
        *(Case(label, policy) for label, policy in named),
    ]
    return cases + (_compiled(named, importance.n_layers) if compiled else [])


def check_cases(
    policies: Sequence[str], budgets: Sequence[int], plans: Iterable[str], *, compiled: bool = False
) -> None:
    """Refuses cases that cannot be, or that one table could not tell apart.

    Args:
        policies: registered names.
        budgets: in sublayers.
        plans: what tables call the plans that were made.
        compiled: whether there are compiled ones.

    Raises:
        AdaskipError: a policy is unknown, a budget is not even, or two cases have one name.
    """
    odd = [n for n in budgets if n < 2 or n % 2]
    if odd:
        raise AdaskipError(f"A budget of {odd[0]} sublayers is not whole layers; give even ones.")
    named = [EMPTY, *(_label(p, n) for p in policies for n in budgets), *plans]
    labels = [STOCK, *BASELINES, *named]
    if compiled:
        labels += [f"{label} compiled" for label in (*named, *(f"no {kind}" for kind in KINDS))]
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise AdaskipError(
            f"Two cases would be called {twice[0]!r}, and a table could not tell them apart; name "
            "policies and budgets once, and rename a plan's file of that name."
        )


def _compiled(named: Sequence[tuple[str, SkipPolicy]], n_layers: int) -> list[Case]:
    """The compiled cases, without changing plans: each would compile a graph of its own."""
    fixed = [(label, policy) for label, policy in named if not policy.stepwise]
    return [
        Case(DENSE_COMPILED, None, "static", True),
        Case("empty plan compiled", FixedSkipping(EMPTY_PLAN), "static", True),
        Case(
            "no attn compiled",
            FixedSkipping(without_kind("attn", n_layers)),
            "static",
            True,
            measured=False,
        ),
        Case(
            "no ffn compiled",
            FixedSkipping(without_kind("ffn", n_layers)),
            "static",
            True,
            measured=False,
        ),
        *(Case(f"{label} compiled", policy, "static", True) for label, policy in fixed),
    ]


def _named(
    name: str, n_sublayers: int, importance: Importance, n_steps: int
) -> tuple[str, SkipPolicy]:
    """A policy at a budget, and how the table calls it."""
    n_skip = _n_skip(name, n_sublayers)
    # Without an extension, whose set would differ from request to request.
    offered = {"online": False, "horizon": n_steps}
    made = build_policy(name, n_skip, offered, lambda: importance)
    # It fits the model, or is refused before anything is measured.
    made.bind(importance.n_layers)
    return _label(name, n_sublayers), made


def _label(name: str, n_sublayers: int) -> str:
    return f"{name} {_n_skip(name, n_sublayers)}"


def _n_skip(name: str, n_sublayers: int) -> int:
    """A budget in the unit of a policy."""
    return n_sublayers // 2 if policy_class(name).budget == "layers" else n_sublayers


def without_kind(kind: Kind, n_layers: int) -> SkipPlan:
    """The plan that leaves out every sublayer of a kind."""
    return SkipPlan({Sublayer(layer, kind): None for layer in range(n_layers)})


@dataclass
class CaseRun:
    """One request of a case.

    Attributes:
        times: how long it took, and its tokens.
        context: prompt tokens.
        plans: what each of its forwards skipped, the prefill first, if that was asked for.
        operations: of each of its forwards, if they were counted.
    """

    times: RequestTimes
    context: int
    plans: list[SkipPlan]
    operations: list[int] = field(default_factory=list)


def run_case(
    model: PreTrainedModel,
    case: Case,
    ids: Tensor,
    n_steps: int,
    *,
    look: bool = False,
    counter: FlopCounterMode | None = None,
    make_cache: MakeCache | None = None,
) -> CaseRun:
    """Times one request.

    Args:
        model: outside of `skipping(...)`.
        case: what is measured.
        ids: the prompts: [batch, tokens].
        n_steps: decode steps.
        look: whether to note what is skipped; not while it counts.
        counter: with `look`, counts operations; it makes the request slower.
        make_cache: the case's `cache_maker`, shared by its requests; by default one of its own.
    """
    cache = (make_cache or cache_maker(case, ids.shape[1] + n_steps))(model)
    plans: list[SkipPlan] = []
    counts = [0]
    patched = nullcontext() if case.policy is None else skipping(model, case.policy)
    with patched as session, counter or nullcontext():

        def note() -> None:
            plans.append(EMPTY_PLAN if session is None else session.plan)
            if counter is not None:
                counts.append(counter.get_total_flops())

        times = time_request(
            model,
            ids,
            n_steps,
            make_cache=lambda _: cache,
            decode=compiled_call(model) if case.compiled else None,
            after_forward=note if look else None,
        )
    return CaseRun(
        times, ids.shape[1], plans, [after - before for before, after in pairwise(counts)]
    )


def cache_maker(case: Case, capacity: int) -> MakeCache:
    """Makes the empty caches of a case's requests, of so many tokens."""
    if case.cache == "static":
        return static_cache(capacity)
    return dynamic_cache if case.cache == "dynamic" else growing_cache


def static_cache(capacity: int) -> MakeCache:
    """One cache for all requests of a case, as `generate()` keeps it, emptied for each.

    A CUDA graph reads and writes where the cache lies: with another one, it is recorded anew.
    """
    kept: list[StaticCache] = []

    def make(model: PreTrainedModel) -> StaticCache:
        if not kept:
            kept.append(StaticCache(config=model.config, max_cache_len=capacity))
        kept[0].reset()  # type: ignore[no-untyped-call]
        return kept[0]

    return make


def compile_config(device: torch.device | str) -> CompileConfig:
    """What `generate(cache_implementation="static", compile_config=...)` takes on a device.

    CUDA graphs on a GPU; on a CPU, where `generate()` compiles only when told to, inductor.
    """
    mode: Any = "reduce-overhead" if torch.device(device).type == "cuda" else None
    config = CompileConfig(fullgraph=False, mode=mode)
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


def forget_compiled() -> None:
    """Drops what was compiled for another prompt length or batch.

    Otherwise torch takes sizes that have changed for ones that go on changing, and what it compiles
    of the second point of a measurement differs from the first's.
    """
    torch.compiler.reset()


def compiled_call(model: PreTrainedModel) -> Callable[..., Any]:
    """The model compiled for decode steps, with room for a graph per set of skipped sublayers."""
    import torch._dynamo.config as settings

    settings.recompile_limit = max(settings.recompile_limit, _MAX_GRAPHS)
    call: Callable[..., Any] = model.get_compiled_call(compile_config(model.device))
    return call
