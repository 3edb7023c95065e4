"""A speed test: every case at every context length and batch size, by turns in one process."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from adaskip.errors import AdaskipError, refuse_below_one
from adaskip.learning import learn_importance
from adaskip.models.devices import resolve_dtype
from adaskip.plan import Phase
from adaskip.policies import POLICIES, policy_class
from adaskip.policies.factory import takes
from adaskip.policies.made_plan import read_plans
from adaskip.profiling import memory
from adaskip.profiling.calibration import random_prompt
from adaskip.profiling.clock import ClockedRequests
from adaskip.profiling.interleaving import MIN_ROUNDS, by_turns
from adaskip.profiling.timing import RequestTimes
from adaskip.speedtest.cases import (
    BASELINES,
    DENSE,
    Case,
    CaseRun,
    cache_maker,
    check_cases,
    forget_compiled,
    make_cases,
    run_case,
)
from adaskip.speedtest.measurement import Measurement, if_it_fits, option
from adaskip.speedtest.record import Key, Point
from adaskip.speedtest.roofline import Rates, measured_rates, operation_counter
from adaskip.speedtest.stats import (
    Measured,
    add_rooflines,
    case_records,
    checked_kv,
    with_replacements,
)

WARMUP_TOKENS = 256


def _all_policies() -> tuple[str, ...]:
    """Those that skip whole layers first; a plan's file is named by itself."""
    names = [name for name in POLICIES if not takes(name, "plan_file")]
    return tuple(sorted(names, key=lambda name: POLICIES[name].budget))


@dataclass(frozen=True, kw_only=True)
class SpeedTest(Measurement):
    """Times prefill and decode, dense and with sublayers skipped.

    Attributes:
        minutes: about how long it may take in all, the same for every point. A point takes at
            least `MIN_ROUNDS` rounds, and one to warm up.
    """

    kind: ClassVar[str] = "speed"
    title: ClassVar[str] = "Prefill and decode, dense and with sublayers skipped"
    free = Measurement.free | {"batches", "rounds", "minutes", "allow_pickle"}

    model_name: str
    weights: str | None = option(
        None,
        "real weights: 'default' for the model's own, or a folder or hub id (default: random ones "
        "of its shape, nothing is downloaded)",
    )
    contexts: tuple[int, ...] = option((512, 1024, 2048, 4096), "prompt lengths in tokens")
    batches: tuple[int, ...] = option((1,), "batch sizes")
    policies: tuple[str, ...] = field(
        default_factory=_all_policies, metadata={"help": "policies to measure"}
    )
    budgets: tuple[int, ...] = option(
        (4, 8, 16), "sublayers to skip; policies that count whole layers skip half as many"
    )
    plans: tuple[str, ...] = option((), "plans' files, or shipped names, to measure besides")
    rounds: int = option(15, "requests per case at most")
    minutes: float = option(
        10.0, f"about how long to measure; a point takes {MIN_ROUNDS} rounds at least"
    )
    compiled: bool = option(False, "also measure compiled decoding on a static cache")
    keep_memory: bool = option(
        True, "keep freed memory in the process (CPU): no page faults within the times"
    )
    dtype: str | None = option(
        None, "float32, bfloat16 or float16 (default: bfloat16 on CUDA, else float32)"
    )
    allow_pickle: bool = option(
        False, "also read weights from .bin files: pickles, of which torch reads tensors only"
    )

    @property
    @override
    def source(self) -> tuple[str, str | None]:
        return self.model_name, self.weights

    @override
    def keys(self) -> list[Key]:
        return [{"batch": b, "context": c} for b in self.batches for c in self.contexts]

    @override
    def check(self) -> None:
        super().check()
        refuse_below_one({"batches": min(self.batches)})
        for name in self.policies:
            policy_class(name)
            if takes(name, "plan_file"):
                raise AdaskipError(f"Policy {name} is measured by its plan: --plans FILE ...")
        check_cases(self.policies, self.budgets, read_plans(self.plans), compiled=self.compiled)
        if not 0 <= self.minutes < math.inf:
            raise AdaskipError(f"--minutes is {self.minutes}; it must be a number, 0 or more.")

    @override
    def settings(self, device: torch.device) -> dict[str, Any]:
        dtype = str(resolve_dtype(self.dtype, device)).removeprefix("torch.")
        return super().settings(device) | {"dtype": dtype}

    @override
    def points(self, missing: Sequence[Key]) -> Iterator[Point]:
        model = self.open(
            dtype=self.dtype, allow_pickle=self.allow_pickle, keep_memory=self.keep_memory
        )
        prompts = [random_prompt(model, WARMUP_TOKENS)]
        importance = learn_importance(model, prompts, source="random ids")
        cases = make_cases(
            importance,
            self.policies,
            self.budgets,
            n_steps=self.new_tokens,
            compiled=self.compiled,
            plans=[*read_plans(self.plans).values()],
        )
        rates = measured_rates(model.device)
        seconds = 60 * self.minutes / len(missing)
        for key in missing:

            def measured(key: Key = key) -> Point:
                ids = random_prompt(model, key["context"], key["batch"])
                return self.measure_point(model, cases, ids, seconds, rates)

            yield if_it_fits(key, measured, lines="cases")

    def measure_point(
        self,
        model: PreTrainedModel,
        cases: Sequence[Case],
        ids: Tensor,
        seconds: float,
        rates: Rates | None,
    ) -> Point:
        """All cases on the same prompts: a round to warm up, then rounds that count.

        Args:
            model: outside of `skipping(...)`.
            cases: what is compared.
            ids: the prompts: [batch, tokens].
            seconds: about how long it may take.
            rates: of a CUDA device, for the roofline; None for others.

        Raises:
            RunError: a case holds other keys and values than it must.
        """
        start, n_steps = time.perf_counter(), self.new_tokens
        if any(case.compiled for case in cases):
            forget_compiled()
        clock = ClockedRequests(model, ids, n_steps)
        room = ids.shape[1] + n_steps
        requests = {
            c.label: partial(run_case, model, c, ids, n_steps, make_cache=cache_maker(c, room))
            for c in cases
        }
        meter, count = memory.Peaks(model.device), rates is not None
        measured = {
            case.label: _first(requests[case.label], model, case, ids, meter, count=count)
            for case in cases
        }
        clock.warm_up()
        kinds = {label: partial(_times, request) for label, request in requests.items()}
        turns = by_turns(
            kinds | {"clocked": clock.request},
            rounds=self.rounds,
            baselines=[label for label in BASELINES if label in kinds],
            seconds=seconds - (time.perf_counter() - start),
            title=f"{ids.shape[1]} tokens x {ids.shape[0]}",
        )
        for taken in turns:
            for label, own in measured.items():
                own.add(taken[label])
        dense = {phase: clock.times(phase, measured[DENSE].seconds(phase)) for phase in Phase}
        times = with_replacements(model, dense, measured, repeats=self.rounds)
        lines = case_records(cases, measured, times)
        if rates is not None:
            add_rooflines(lines, model, measured, rates)
        sublayers = {str(phase): value.as_dict() for phase, value in dense.items()}
        return {"rates": rates and asdict(rates), "sublayers": sublayers, "cases": lines}


def _times(request: partial[CaseRun]) -> RequestTimes:
    return request().times


def _first(
    request: partial[CaseRun],
    model: PreTrainedModel,
    case: Case,
    ids: Tensor,
    meter: memory.Peaks,
    *,
    count: bool,
) -> Measured:
    """The request that warms up: memory, keys and values, what is skipped, operations."""
    # A compiled step would not be compiled while its operations are counted.
    counter = operation_counter() if count and not case.compiled else None
    meter.begin()
    run = request(look=True, counter=counter)
    peak = meter.end()
    checked_kv(model, case, run, ids.shape[1], ids.shape[0])
    return Measured(run, peak)
