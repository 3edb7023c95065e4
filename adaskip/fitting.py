"""Fits linear maps to sublayers in closed form, in one pass over warm-up prompts.

Layer by layer, all prompts are taken through one sublayer before the next: what a sublayer is
fitted on is the residual stream that the plan itself produces up to there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm
from tqdm import tqdm
from transformers import PreTrainedModel

from adaskip.calls import check_fits
from adaskip.errors import AdaskipError, ProfileError
from adaskip.fingerprint import model_fingerprint
from adaskip.numbers import is_finite, is_whole
from adaskip.plan import EMPTY_PLAN, SkipPlan, Sublayer, all_sublayers
from adaskip.replacements import TINY, Linear, Replacement
from adaskip.streams import Calls, Sublayers, measuring
from adaskip.warmup import checked_prompts

Prompts = Iterable[Tensor | Mapping[str, Tensor]]

# What a plan's `about` calls the prompts of its linear maps.
FITTED_ON = "fitted on"
# And the loss that it had with the maps that it was chosen by.
LOSS_BEFORE = "loss before fit"
# Likewise the prompts that it was distilled on, how often it saw each, and the divergence of those
# held out, before and after.
DISTILLED_ON, EPOCHS = "distilled on", "distilled epochs"
DIVERGED, DIVERGES = "divergence before distilling", "divergence"
_OF_OTHER_MAPS = (DISTILLED_ON, EPOCHS, DIVERGED, DIVERGES)
# What it says of prompts that nothing is said of.
UNNAMED = "unnamed prompts"


def fit_linears(
    model: PreTrainedModel,
    prompts: Prompts,
    sublayers: Iterable[Sublayer],
    *,
    rank: int | None = None,
    plan: SkipPlan = EMPTY_PLAN,
    ridge: float = 1e-3,
    sinks: int = 4,
    source: str = "",
    progress: bool = False,
) -> SkipPlan:
    """A plan that replaces sublayers by the linear maps that come nearest to them.

    For each sublayer, with `n = x / rms(x)` of its input and what it adds, `delta`: `C = cov(n) +
    ridge * mean(diag) * I`, `W = C^-1 cov(n, delta)`, `b = mean(delta) - mean(n) W`. Rank r keeps
    the r leading output directions of `L^T W`, `L` the Cholesky factor of `C` (reduced-rank
    regression).

    Args:
        model: a causal language model of a supported family, outside of `skipping()`.
        prompts: input ids [batch, tokens], or mappings with `input_ids` and `attention_mask`.
        sublayers: those to fit.
        rank: of the maps; None for full ones.
        plan: what is skipped or replaced besides; a sublayer of it that is fitted is fitted anew.
        ridge: share of the mean variance that is added to every direction's.
        sinks: first tokens of each sequence that are left out, attention sinks.
        source: what the prompts are, kept in the plan.
        progress: whether to show a progress bar.

    Returns:
        `plan` with the fitted maps, in float32 on the CPU, and the model's fingerprint.

    Raises:
        AdaskipError: a sublayer or a rank does not fit the model, or there are too few tokens.
        ProfileError: a prompt is none.
        UnsupportedModelError: the architecture is not supported, or the model is patched or on
            several devices.

    Source: NBL (arXiv 2505.21077), ReplaceMe; METHOD, "Replacements".
    """
    sublayers_of = Sublayers(model)
    plan.check_model(model)
    ranks = dict.fromkeys(_checked(model, sublayers, rank, plan), rank)
    made = _fitted(sublayers_of, prompts, ranks, plan, ridge, sinks, progress=progress)
    # What `plan` tells of itself, a loss or a time, is not true of this one.
    about = {"linear maps": len(ranks), "rank": rank, FITTED_ON: source or UNNAMED}
    about |= {"besides": plan.digest} if plan else {}
    return SkipPlan(made, fingerprint=model_fingerprint(model), about=about)


def refit_linears(
    model: PreTrainedModel,
    plan: SkipPlan,
    prompts: Prompts,
    *,
    ridge: float = 1e-3,
    sinks: int = 4,
    source: str = "",
    progress: bool = False,
) -> SkipPlan:
    """A plan with its linear maps fitted anew, on more prompts than it was chosen by.

    A search looks at every row for every candidate, so it is given few; a full map has as many
    numbers as some thousand tokens can tell. This takes one forward of each prompt: `fit_linears`
    with each map's own rank.

    Args:
        model: a causal language model of a supported family, outside of `skipping()`.
        plan: whose linear maps are fitted; what else it does stays.
        prompts: input ids [batch, tokens], or mappings with `input_ids` and `attention_mask`; those
            that the plan was made from among them.
        ridge: as `fit_linears` takes it.
        sinks: likewise.
        source: what the prompts are, kept in the plan.
        progress: whether to show a progress bar.

    Returns:
        The plan; what it told of as its loss, that of other maps, is now its "loss before fit", and
        what was told of distilling is gone.

    Raises:
        AdaskipError: the plan has no linear map, or there are too few tokens.
        PlanError: it was made for another model.
        ProfileError: a prompt is none.
        UnsupportedModelError: the architecture is not supported, or the model is patched or on
            several devices.
    """
    ranks = {s: r.rank for s, r in plan.items() if isinstance(r, Linear)}
    if not ranks:
        raise AdaskipError("The plan has no linear map to fit anew; give one that has some.")
    sublayers_of = Sublayers(model)
    plan.check_model(model)
    _checked(model, ranks, None, plan)
    made = _fitted(sublayers_of, prompts, ranks, plan, ridge, sinks, progress=progress)
    about = about_other_maps(plan)
    about[FITTED_ON] = source or UNNAMED
    return SkipPlan(made, fingerprint=model_fingerprint(model), about=about)


def about_other_maps(plan: SkipPlan) -> dict[str, str | float | None]:
    """What a plan is about that stays true when its linear maps and gains become others."""
    told = {LOSS_BEFORE if key == "loss" else key: value for key, value in plan.about.items()}
    return {key: value for key, value in told.items() if key not in _OF_OTHER_MAPS}


def _fitted(
    sublayers_of: Sublayers,
    prompts: Prompts,
    ranks: Mapping[Sublayer, int | None],
    plan: SkipPlan,
    ridge: float,
    sinks: int,
    *,
    progress: bool,
) -> dict[Sublayer, Replacement]:
    """What a plan replaces, with maps of these ranks fitted, in depth order."""
    if not (is_finite(ridge) and ridge >= 0):
        raise AdaskipError(f"A ridge of {ridge!r} is none; give a number, 0 or more.")
    if not (is_whole(sinks) and sinks >= 0):
        raise AdaskipError(f"sinks is {sinks!r}; give a whole number of tokens, 0 or more.")
    made: dict[Sublayer, Replacement] = dict(plan)
    with measuring(sublayers_of.model):
        streams = _streams(sublayers_of, prompts, sinks)
        order = all_sublayers(len(sublayers_of.decoder.layers))
        for sublayer in tqdm(order, "fitting", disable=not progress):
            if sublayer in ranks:
                moments = Moments(streams[0].x)
                for stream in streams:
                    delta = sublayers_of.run(sublayer, stream.x, stream.calls) - stream.x
                    moments.add(stream.x[stream.counted], delta[stream.counted])
                made[sublayer] = moments.solve(ranks[sublayer], ridge)
            for stream in streams:
                stream.x = sublayers_of.through(sublayer, stream.x, stream.calls, made)
    return made


def _checked(
    model: PreTrainedModel, sublayers: Iterable[Sublayer], rank: int | None, plan: SkipPlan
) -> frozenset[Sublayer]:
    """The sublayers to fit, which the model has."""
    config = model.config.get_text_config(decoder=True)
    if isinstance(sublayers, Sublayer):
        raise AdaskipError(f"sublayers is {sublayers}; give a list of them: [{sublayers!r}].")
    wanted = SkipPlan(dict.fromkeys(sublayers))
    for each in (wanted, plan):
        check_fits(each, config.num_hidden_layers, config)
    check_rank(rank, config.hidden_size)
    return frozenset(wanted)


def check_rank(rank: int | None, hidden: int) -> None:
    """Raises an `AdaskipError` unless a linear map of a model `hidden` wide can have this rank."""
    if rank is not None and not (is_whole(rank) and 1 <= rank <= hidden):
        raise AdaskipError(
            f"A linear map cannot have rank {rank!r}; in this model it takes a whole number from 1 "
            f"to {hidden}, or None for a full one."
        )


@dataclass
class _Stream:
    """The residual stream of one prompt on its way through the layers.

    Attributes:
        x: [batch, tokens, hidden].
        calls: what each layer is given besides.
        counted: which tokens are fitted on: bool [batch, tokens].
    """

    x: Tensor
    calls: Calls
    counted: Tensor


def _streams(sublayers: Sublayers, prompts: Prompts, sinks: int) -> list[_Stream]:
    """Every prompt before the first layer."""
    config = sublayers.model.config.get_text_config(decoder=True)
    made = []
    for inputs in checked_prompts(prompts, config.vocab_size):
        x, calls = sublayers.begin(inputs)
        real = torch.ones(x.shape[:2], dtype=torch.bool) if calls.real is None else calls.real
        made.append(_Stream(x, calls, (real & (real.cumsum(dim=1) > sinks)).to(x.device)))
    if not made:
        raise ProfileError("No prompt was given; a fit needs at least one.")
    return made


class Moments:
    """First and second moments of the normalized input and of what a sublayer adds to it.

    Args:
        like: a residual stream [..., hidden], for its width and device.
    """

    def __init__(self, like: Tensor) -> None:
        hidden = like.shape[-1]
        kwargs: dict[str, Any] = {"dtype": torch.float64, "device": like.device}
        self._count = 0
        self._n, self._delta = (torch.zeros(hidden, **kwargs) for _ in range(2))
        self._nn, self._n_delta = (torch.zeros(hidden, hidden, **kwargs) for _ in range(2))

    def add(self, x: Tensor, delta: Tensor) -> None:
        """Takes in tokens: [tokens, hidden] each."""
        # Products in float32, sums of prompts in float64: bfloat16 would lose the small directions,
        # also where autocast is on around the model.
        with torch.autocast(x.device.type, enabled=False):
            n = rms_norm(x.float(), (x.shape[-1],), eps=TINY)
            delta = delta.float()
            self._count += len(n)
            self._n += n.sum(dim=0)
            self._delta += delta.sum(dim=0)
            self._nn += n.T @ n
            self._n_delta += n.T @ delta

    @classmethod
    def joined(cls, parts: Sequence[Moments]) -> Moments:
        """Those of all tokens of one or more together."""
        made = cls(parts[0]._n)
        for part in parts:
            made._count += part._count
            for name in ("_n", "_delta", "_nn", "_n_delta"):
                getattr(made, name).add_(getattr(part, name))
        return made

    @property
    def are_enough(self) -> bool:
        """Whether there are more tokens than directions."""
        return self._count > len(self._n)

    def check(self) -> None:
        """Raises an `AdaskipError` if a map cannot be fitted on so few tokens."""
        hidden = len(self._n)
        if not self.are_enough:
            raise AdaskipError(
                f"A linear map of a model {hidden} wide is fitted on at least {hidden + 1} tokens "
                f"besides the first ones of each prompt; {self._count} were given. Give more or "
                "longer prompts."
            )

    def solve(self, rank: int | None, ridge: float) -> Linear:
        """The map, in float32 on the CPU.

        Raises:
            AdaskipError: there are not more tokens than directions, or they are too alike.
        """
        self.check()
        mean_n, mean_delta = self._n / self._count, self._delta / self._count
        cov = self._nn / self._count - mean_n.outer(mean_n)
        cross = self._n_delta / self._count - mean_n.outer(mean_delta)
        cov.diagonal().add_(ridge * cov.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(cov)
        if failed:
            raise AdaskipError(
                f"The {self._count} tokens are too alike to fit a linear map on; give longer or "
                "other prompts, or a larger ridge."
            )
        weight = torch.cholesky_solve(cross, lower)
        bias = mean_delta - mean_n @ weight
        if rank is None:
            return Linear(weight.float().cpu(), bias.float().cpu())
        _, _, directions = torch.linalg.svd(lower.T @ weight, full_matrices=False)
        right = directions[:rank]
        left = weight @ right.T
        bias = mean_delta - mean_n @ left @ right
        return Linear((left.float().cpu(), right.float().cpu()), bias.float().cpu())
