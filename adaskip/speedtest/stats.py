"""What the measured requests of a speed test say: speedups, their ideals, memory, rooflines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, median
from typing import Any

from transformers import PreTrainedModel

from adaskip.errors import RunError
from adaskip.plan import EMPTY_PLAN, Phase, SkipPlan
from adaskip.profiling.calibration import REPEATS
from adaskip.profiling.interleaving import Ratio, Spread
from adaskip.profiling.plan_times import measure_replacements
from adaskip.profiling.timing import RequestTimes, growing_cache
from adaskip.replacements import Window
from adaskip.speedtest.cases import DENSE_COMPILED, Case, CaseRun
from adaskip.speedtest.roofline import Rates, forward_bytes, kv_bytes
from adaskip.sublayer_times import GAIN, PlanTimes, SublayerTimes, timed_as
from adaskip.summary import kept_tokens
from adaskip.window_track import ROOM

Line = dict[str, Any]


@dataclass
class Measured:
    """The requests of one case at one context length and batch size.

    Attributes:
        first: the request that warmed up, with what it skipped and held.
        peak_bytes: its peak memory, None if unknown.
        ttft, per_token: seconds, one value per round.
    """

    first: CaseRun
    peak_bytes: int | None
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
        plans = self.first.plans
        return plans[:1] if phase is Phase.PREFILL else plans[1:]


def checked_kv(model: PreTrainedModel, case: Case, run: CaseRun, context: int, batch: int) -> int:
    """The bytes of keys and values by formula.

    Raises:
        RunError: the cache holds something else.
    """
    held = context + len(run.plans) - 1
    config = model.config.get_text_config(decoder=True)
    tokens_of = dict.fromkeys(range(config.num_hidden_layers), held)
    windowed: dict[int, float] = {}
    # Attention that SkipDecode leaves out later has kept what it had when it last ran; a static
    # cache has room for all tokens from the first one that is kept.
    plans = run.plans[:1] if case.cache == "static" else run.plans
    for number, plan in reversed(list(enumerate(plans))):
        for layer in plan.layers("attn"):
            tokens_of[layer] = context + number - 1 if number else 0
        for layer, window in plan.windows.items():
            room = _window_room(window, held, static=case.cache == "static")
            windowed[layer] = held - window.share * (held - room)
    static = case.cache == "static"
    for layer, tokens in tokens_of.items():
        tokens_of[layer] = kept_tokens(config, layer, tokens, static=static)
    one = kv_bytes(model.config, EMPTY_PLAN, 1, batch, model.dtype.itemsize) // len(tokens_of)
    formula = round(one * sum((tokens_of | windowed).values()))
    if formula != run.times.kv_bytes:
        raise RunError(
            f"{case.label}: the cache holds {run.times.kv_bytes} bytes of keys and values, by "
            f"formula {formula}; this is a defect, please report it."
        )
    return formula


def _window_room(window: Window, held: int, *, static: bool) -> int:
    """Tokens a window has room for: no more than the cache, in steps of `ROOM` where that grows."""
    return window.sinks + min(window.size, held if static else -(-held // ROOM) * ROOM)


def with_replacements(
    model: PreTrainedModel,
    dense: Mapping[Phase, SublayerTimes],
    measured: Mapping[str, Measured],
    *,
    repeats: int,
) -> dict[Phase, PlanTimes]:
    """The sublayers' times, with those of what takes places in the cases, measured now."""
    plans = [plan for own in measured.values() for plan in own.first.plans]
    sorts = {timed_as(r): r for plan in plans for r in plan.values()}
    sorts.pop(GAIN, None)
    if not sorts:
        return {phase: PlanTimes(times) for phase, times in dense.items()}
    named = [*sorts.values()]
    shares = measure_replacements(
        model, [*dense.values()], named, growing_cache, repeats=min(repeats, REPEATS)
    )
    return {
        phase: PlanTimes(
            times, {name: share * times.total for name, share in shares[phase].items()}
        )
        for phase, times in dense.items()
    }


def compiled_times(measured: Mapping[str, Measured], times: PlanTimes) -> PlanTimes:
    """Sublayer times of a compiled decode step, whose inside cannot be seen: by difference.

    The dense step minus the one without any attention (or FFN), by the number of layers. What takes
    their place is taken to be the same share of a step.
    """
    eager = times.dense
    total = median(measured[DENSE_COMPILED].per_token)
    each = {
        kind: max(total - median(measured[f"no {kind} compiled"].per_token), 0.0) / eager.n_layers
        for kind in ("attn", "ffn")
    }
    seconds = {sublayer: each[sublayer.kind] for sublayer in eager.seconds}
    replaced = {name: t * total / eager.total for name, t in times.replaced.items()}
    dense = SublayerTimes(total, seconds, Phase.DECODE, eager.context, eager.batch)
    return PlanTimes(dense, replaced)


def case_records(
    cases: Sequence[Case], measured: Mapping[str, Measured], times: Mapping[Phase, PlanTimes]
) -> list[Line]:
    """Every measured case, ready for JSON; times in seconds.

    Args:
        cases: all that took turns.
        measured: their requests, by label.
        times: what the sublayers, and what takes their place, take in eager forwards.
    """
    compiled = dict(times)
    if DENSE_COMPILED in measured:
        compiled[Phase.DECODE] = compiled_times(measured, times[Phase.DECODE])
    shown = [case for case in cases if case.measured]
    return [_line(case, measured, compiled if case.compiled else times) for case in shown]


def _line(case: Case, measured: Mapping[str, Measured], times: Mapping[Phase, PlanTimes]) -> Line:
    own, baseline = measured[case.label], measured[case.baseline]
    last = own.first.plans[-1]
    return {
        "label": case.label,
        "policy": None if case.policy is None else repr(case.policy),
        "cache": case.cache,
        "compiled": case.compiled,
        "skipped_attn": len(last.layers("attn")),
        "skipped_ffn": len(last.layers("ffn")),
        "windows": len(last.windows),
        "peak_bytes": own.peak_bytes,
        "kv_bytes": own.first.times.kv_bytes,
        "same_tokens_as_eager": _same_tokens(case, measured),
        **{str(phase): phase_record(own, baseline, times[phase], phase) for phase in Phase},
    }


def add_rooflines(
    lines: Sequence[Line], model: PreTrainedModel, measured: Mapping[str, Measured], rates: Rates
) -> None:
    """Adds to each phase the seconds it takes at least, and the ratio of the measured time to them.

    Operations are counted in eager forwards; a compiled case has those of its eager one.
    """
    for line in lines:
        own = measured[line["label"]]
        batch, n_tokens = own.first.times.tokens.shape
        context = own.first.context
        held = [0, *range(context + 1, context + n_tokens)]
        counts = measured[eager_label(line["label"])].first.operations
        least = [
            rates.seconds(operations, forward_bytes(model, plan, tokens, batch))
            for operations, plan, tokens in zip(counts, own.first.plans, held, strict=True)
        ]
        for phase, roofline in zip(Phase, (least[0], mean(least[1:])), strict=True):
            ratio = median(own.seconds(phase)) / roofline
            line[str(phase)] |= {"roofline": roofline, "roofline_ratio": ratio}


def phase_record(
    own: Measured, baseline: Measured, times: PlanTimes, phase: Phase
) -> dict[str, Any]:
    """Times of a phase, its speedup, the ideal one, and the fraction of the ideal saving.

    Compared with the baseline of the same round, round by round. Ideal: by what the skipped
    sublayers, and what takes their place, were measured to take. The fraction is under
    `saving_ratio`.
    """
    # SkipDecode skips more from step to step.
    share = mean(1 - 1 / times.speedup(plan) for plan in own.plans_of(phase))
    pairs = list(zip(own.seconds(phase), baseline.seconds(phase), strict=True))
    fractions = [(1 - a / b) / share for a, b in pairs] if share else []
    return asdict(Spread.of(own.seconds(phase))) | {
        "rounds": [round(seconds, 7) for seconds in own.seconds(phase)],
        "speedup": asdict(Ratio.of([b / a for a, b in pairs])),
        "ideal_speedup": 1 / (1 - share),
        "saving_ratio": asdict(Ratio.of(fractions)) if fractions else None,
    }


def eager_label(label: str) -> str:
    """The label of the eager case that a compiled one belongs to; an eager one's own."""
    return label.removesuffix(" compiled")


def _same_tokens(case: Case, measured: Mapping[str, Measured]) -> bool | None:
    """Whether a compiled case chose the tokens of its eager one; None where that is no question."""
    eager = eager_label(case.label)
    if not case.compiled or eager not in measured:
        return None
    tokens, expected = (measured[label].first.times.tokens for label in (case.label, eager))
    return bool((tokens == expected).all())
