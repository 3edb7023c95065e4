"""Times of requests under plans, by turns: what replacements take, and what a plan reaches."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel

from adaskip.calls import check_window
from adaskip.configuration import cache_root
from adaskip.entering import skipping
from adaskip.errors import AdaskipError, unknown_name
from adaskip.plan import EMPTY_PLAN, Phase, SkipPlan, Sublayer
from adaskip.profiling.calibration import REPEATS, STEPS, identity, measured_times, random_prompt
from adaskip.profiling.interleaving import Ratio, by_turns, per_round
from adaskip.profiling.timing import MakeCache, RequestTimes, dynamic_cache, time_request
from adaskip.replacements import Linear, Replacement, Window
from adaskip.sublayer_times import PlanTimes, SublayerTimes, replacement_name, timed_as

logger = logging.getLogger(__name__)

VERSION = 2
_DENSE, _NOTHING = "dense", "nothing"
# How many requests of each kind tell what a plan reaches.
ROUNDS = 9


def measured_plan_times(
    model: PreTrainedModel,
    phase: Phase | str,
    context: int,
    replacements: Sequence[Replacement],
    *,
    batch: int = 1,
    make_cache: MakeCache = dynamic_cache,
    folder: Path | None = None,
    progress: bool = False,
) -> PlanTimes:
    """The times of sublayers and of replacements, kept on disk as `measured_times` are.

    Args:
        model: outside of `skipping(...)`.
        phase: "prefill" or "decode".
        context: prompt tokens.
        replacements: one of each sort whose time is wanted; see `linear_like` for linear maps.
        batch: sequences.
        make_cache: the cache the model will be used with.
        folder: where measured times are kept; by default in adaskip's cache folder.
        progress: whether to show a progress bar where something has to be measured.

    Raises:
        AdaskipError: unknown phase, or a number is not positive; or a replacement does not fit any
            layer of the model.
    """
    settings = {"batch": batch, "make_cache": make_cache, "folder": folder, "progress": progress}
    dense = measured_times(model, phase, context, **settings)  # type: ignore[arg-type]
    path = _path(model, folder or cache_root() / "times", dense, make_cache)
    known: dict[str, float] = {}
    with suppress(OSError, ValueError, TypeError, AttributeError):
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {str(name): float(share) for name, share in content.items()}
    missing = [r for r in replacements if timed_as(r) not in {"gain", *known}]
    if missing:
        shares = measure_replacements(model, [dense], missing, make_cache, progress=progress)
        known |= shares[dense.phase]
        with suppress(OSError):  # a cache that cannot be written is only slower
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(known), encoding="utf-8")
    names = {timed_as(r) for r in replacements} - {"gain"}
    return PlanTimes(dense, {name: known[name] * dense.total for name in sorted(names)})


def measure_replacements(
    model: PreTrainedModel,
    phases: Sequence[SublayerTimes],
    replacements: Sequence[Replacement],
    make_cache: MakeCache = dynamic_cache,
    *,
    repeats: int = REPEATS,
    progress: bool = False,
) -> dict[Phase, dict[str, float]]:
    """What replacements take, as shares of a dense forward, by phase and name; measured now.

    Each takes the place of every attention it may, and is compared within its round with nothing
    in those places: what is between the two is its cost, where it is used.

    Args:
        model: outside of `skipping(...)`.
        phases: of dense forwards, at one context length and batch size.
        replacements: one of each sort.
        make_cache: the cache the model will be used with.
        repeats: requests of each kind.
        progress: whether to show a progress bar.

    Raises:
        AdaskipError: a replacement does not fit any layer of the model.
    """
    context = phases[0].context
    ids = random_prompt(model, context, phases[0].batch)
    n_steps = STEPS if any(dense.phase is Phase.DECODE for dense in phases) else 1
    plans = {_DENSE: EMPTY_PLAN}
    for replacement in replacements:
        everywhere = _everywhere(model, replacement)
        plans[timed_as(replacement)] = everywhere
        plans[f"{_NOTHING} in {len(everywhere)}"] = SkipPlan(dict.fromkeys(everywhere))
    kinds = {
        name: partial(_request, model, plan, ids, n_steps, make_cache)
        for name, plan in plans.items()
    }
    logger.info("Timing %s at %d tokens", ", ".join(plans), context)
    for request in kinds.values():
        request()
    rounds = list(by_turns(kinds, rounds=repeats, title="timing replacements", progress=progress))

    def seconds(name: str, phase: Phase) -> list[float]:
        return per_round(rounds, name, lambda taken: taken.seconds(phase))

    shares: dict[Phase, dict[str, float]] = {}
    for phase in (dense.phase for dense in phases):
        base, of_phase = seconds(_DENSE, phase), shares.setdefault(phase, {})
        for name in map(timed_as, replacements):
            n = len(plans[name])
            own, nothing = seconds(name, phase), seconds(f"{_NOTHING} in {n}", phase)
            each = [(a - b) / n / total for a, b, total in zip(own, nothing, base, strict=True)]
            of_phase[name] = max(median(each), 0.0)
    return shares


def measured_acceleration(
    model: PreTrainedModel,
    plan: SkipPlan,
    phase: Phase | str,
    context: int,
    *,
    batch: int = 1,
    rounds: int = ROUNDS,
    make_cache: MakeCache = dynamic_cache,
    progress: bool = False,
) -> Ratio:
    """The ratio of dense time to that of a plan, of requests that take turns.

    Args:
        model: outside of `skipping(...)`.
        plan: what is skipped or replaced, in both phases.
        phase: "prefill" or "decode".
        context: prompt tokens, at random.
        batch: sequences.
        rounds: requests under the plan.
        make_cache: the cache of both.
        progress: whether to show a progress bar.

    Raises:
        AdaskipError: unknown phase, or a number is not positive.
    """
    if phase not in list(Phase):
        raise unknown_name("phase", str(phase), list(Phase))
    if min(context, batch, rounds) < 1:
        raise AdaskipError("Context, batch and rounds must be 1 or more each.")
    phase = Phase(phase)
    ids = random_prompt(model, context, batch)
    n_steps = 1 if phase is Phase.PREFILL else STEPS
    kinds: dict[str, Callable[[], RequestTimes]] = {
        _DENSE: partial(time_request, model, ids, n_steps, make_cache=make_cache),
        "plan": partial(_request, model, plan, ids, n_steps, make_cache),
    }
    for request in kinds.values():
        request()
    taken = list(
        by_turns(
            kinds, rounds=rounds, baselines=[_DENSE], title="measuring the plan", progress=progress
        )
    )
    own, base = (
        per_round(taken, kind, lambda times: times.seconds(phase)) for kind in ("plan", _DENSE)
    )
    return Ratio.paired(base, own)


def linear_like(model: PreTrainedModel, rank: int | None) -> Linear:
    """A linear map of a model's width that costs what a fitted one does."""
    hidden = model.config.get_text_config(decoder=True).hidden_size
    sizes = [(hidden, hidden)] if rank is None else [(hidden, rank), (rank, hidden)]
    return Linear.of([torch.full(size, 1e-3 / hidden) for size in sizes], torch.zeros(hidden))


def _everywhere(model: PreTrainedModel, replacement: Replacement) -> SkipPlan:
    """The plan that has a replacement in the place of every attention that it may take."""
    config = model.config.get_text_config(decoder=True)
    layers = range(config.num_hidden_layers)
    if isinstance(replacement, Window):
        layers = windowable(model, replacement)  # type: ignore[assignment]
    # Each a map of its own, whose weights have to be fetched like a sublayer's.
    places = {
        Sublayer(layer, "attn"): replacement
        if not isinstance(replacement, Linear)
        else Linear.of([f.clone() for f in replacement.factors], replacement.bias.clone())
        for layer in layers
    }
    if not places:
        raise AdaskipError(
            f"No layer of this model takes a {replacement_name(replacement)}; leave it out."
        )
    return SkipPlan(places)


def windowable(model: PreTrainedModel, window: Window) -> tuple[int, ...]:
    """The layers whose attention may have this window: those that see all tokens otherwise.

    Raises:
        AdaskipError: the window is larger than the model allows.
    """
    config = model.config.get_text_config(decoder=True)
    layers = []
    refused: AdaskipError | None = None
    for layer in range(config.num_hidden_layers):
        try:
            check_window(layer, window, config)
            layers.append(layer)
        except AdaskipError as error:
            refused = error
    if not layers and refused is not None:
        raise refused
    return tuple(layers)


def _request(
    model: PreTrainedModel,
    plan: SkipPlan,
    ids: torch.Tensor,
    n_steps: int,
    make_cache: MakeCache,
) -> RequestTimes:
    with skipping(model, plan):
        return time_request(model, ids, n_steps, make_cache=make_cache)


def _path(
    model: PreTrainedModel, folder: Path, dense: SublayerTimes, make_cache: MakeCache
) -> Path:
    facts = [*identity(model), dense.context, dense.batch, make_cache.__name__, VERSION]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    size = f"{dense.context}x{dense.batch}"
    return folder / f"{model.config.model_type}-replacements-{dense.phase}-{size}-{digest}.json"
