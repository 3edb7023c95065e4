"""What the measured requests of a speed test say: speedups, their ideals, memory, floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, median
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from adaskip.errors import RunError
from adaskip.plan import EMPTY_PLAN, Phase, SkipPlan, Sublayer
from adaskip.profiling.interleaving import Ratio
from adaskip.profiling.timing import RequestTimes, Spread, kv_bytes
from adaskip.speedtest.cases import DENSE_COMPILED, Case, CaseRun
from adaskip.speedtest.roofline import Rates, decode_work, prefill_work
from adaskip.sublayer_times import SublayerTimes


@dataclass(frozen=True)
class Point:
    """Where a table's lines were measured.

    Attributes:
        context: prompt tokens.
        batch: sequences.
        n_steps: decode steps.
        rates: of a CUDA device, None for others.
    """

    context: int
    batch: int
    n_steps: int
    rates: Rates | None


@dataclass
class Measured:
    """The requests of one case at one context length and batch size.

    Attributes:
        plans: what each forward skipped, the prefill first.
        peak_bytes: peak memory, None if unknown.
        kv_bytes: keys and values held at the end.
        kv_formula: what they must be.
        tokens: the tokens chosen: [batch, 1 + steps].
        ttft, per_token: seconds, one value per round.
    """

    plans: list[SkipPlan]
    peak_bytes: int | None
    kv_bytes: int
    kv_formula: int
    tokens: Tensor
    ttft: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)

    def add(self, requests: Sequence[RequestTimes]) -> None:
        """Takes one more round: its median, if it has more than one request."""
        self.ttft.append(median(request.ttft for request in requests))
        self.per_token.append(median(request.per_token for request in requests))

    def seconds(self, phase: Phase) -> list[float]:
        """Of each round: time to the first token, or time per output token."""
        return self.ttft if phase is Phase.PREFILL else self.per_token

    def plans_of(self, phase: Phase) -> list[SkipPlan]:
        """What the forwards of a phase skipped."""
        return self.plans[:1] if phase is Phase.PREFILL else self.plans[1:]


def checked_kv(
    model: PreTrainedModel, case: Case, run: CaseRun, context: int, batch: int, n_steps: int
) -> int:
    """The bytes of keys and values by formula.

    Raises:
        RunError: the cache holds something else.
    """
    held = context + n_steps
    # Attention that SkipDecode leaves out later has kept what it had when it last ran.
    tokens_of = dict.fromkeys(range(model.config.num_hidden_layers), held)
    if case.cache != "static":
        for number, plan in reversed(list(enumerate(run.plans))):
            for layer in plan.layers("attn"):
                tokens_of[layer] = context + number - 1 if number else 0
    else:
        for layer in run.plans[0].layers("attn"):
            tokens_of[layer] = 0
    one = kv_bytes(model.config, EMPTY_PLAN, 1, batch, model.dtype.itemsize) // len(tokens_of)
    formula = one * sum(tokens_of.values())
    if formula != run.times.kv_bytes:
        raise RunError(
            f"{case.label}: the cache holds {run.times.kv_bytes} bytes of keys and values, by "
            f"formula {formula}; this is a defect, please report it."
        )
    return formula


def compiled_times(measured: Mapping[str, Measured], eager: SublayerTimes) -> SublayerTimes:
    """Sublayer times of a compiled decode step, whose inside cannot be seen: by difference.

    The dense step minus the one without any attention (or FFN), by the number of layers.
    """
    total = median(measured[DENSE_COMPILED].per_token)
    each = {
        kind: max(total - median(measured[f"no {kind} compiled"].per_token), 0.0) / eager.n_layers
        for kind in ("attn", "ffn")
    }
    seconds = {sublayer: each[sublayer.kind] for sublayer in eager.seconds}
    return SublayerTimes(total, seconds, Phase.DECODE, eager.context, eager.batch)


def case_record(
    model: PreTrainedModel,
    case: Case,
    measured: Mapping[str, Measured],
    times: Mapping[Phase, SublayerTimes],
    compiled: SublayerTimes | None,
    point: Point,
) -> dict[str, Any]:
    """One case, ready for JSON; times in seconds."""
    own, baseline = measured[case.label], measured[case.baseline]
    record: dict[str, Any] = {
        "label": case.label,
        "policy": None if case.policy is None else repr(case.policy),
        "cache": case.cache,
        "compiled": case.compiled,
        "skipped_attn": len(own.plans[-1].layers("attn")),
        "skipped_ffn": len(own.plans[-1].layers("ffn")),
        "peak_bytes": own.peak_bytes,
        "kv_bytes": own.kv_bytes,
        "kv_formula_bytes": own.kv_formula,
        "same_tokens_as_eager": _same_tokens(case, measured),
    }
    for phase in Phase:
        of_phase = (
            compiled if compiled and case.compiled and phase is Phase.DECODE else times[phase]
        )
        record[str(phase)] = _phase_record(own, baseline, of_phase, phase)
        if point.rates is not None:
            plan = own.plans_of(phase)[-1]
            past = point.context + point.n_steps // 2
            work = (
                prefill_work(model, plan, point.context, point.batch)
                if phase is Phase.PREFILL
                else decode_work(model, plan, past, point.batch)
            )
            floor = work.floor(point.rates)
            record[str(phase)] |= {"floor": floor, "floor_ratio": _median(own, phase) / floor}
    return record


def _phase_record(
    own: Measured, baseline: Measured, times: SublayerTimes, phase: Phase
) -> dict[str, Any]:
    """Times of a phase, its speedup over the baseline, the ideal one, and how near they are.

    Compared with the baseline of the same round, round by round.
    """
    # SkipDecode skips more from step to step.
    saved = mean(times.saved(_sublayers(plan)) for plan in own.plans_of(phase))
    share = saved / times.total
    pairs = list(zip(own.seconds(phase), baseline.seconds(phase), strict=True))
    kept = [(1 - a / b) / share for a, b in pairs] if share else []
    return asdict(Spread.of(own.seconds(phase))) | {
        "rounds": [round(seconds, 7) for seconds in own.seconds(phase)],
        "speedup": asdict(Ratio.of([b / a for a, b in pairs])),
        "ideal_speedup": 1 / (1 - share),
        "saving_ratio": asdict(Ratio.of(kept)) if kept else None,
    }


def _same_tokens(case: Case, measured: Mapping[str, Measured]) -> bool | None:
    """Whether a compiled case chose the tokens of its eager one; None where that is no question."""
    eager = case.label.removesuffix(" compiled")
    if not case.compiled or eager not in measured:
        return None
    return bool((measured[case.label].tokens == measured[eager].tokens).all())


def _median(measured: Measured, phase: Phase) -> float:
    return median(measured.seconds(phase))


def _sublayers(plan: SkipPlan) -> list[Sublayer]:
    return list(plan)
