"""Fits linear maps to sublayers in closed form, in one pass over warm-up prompts.

Layer by layer, all prompts are taken through one sublayer before the next: what a sublayer is
fitted on is the residual stream that the plan itself produces up to there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from tqdm import tqdm
from transformers import PreTrainedModel

from adaskip import entering
from adaskip.blocks import execution_device
from adaskip.errors import AdaskipError, ProfileError
from adaskip.evaluating import evaluating
from adaskip.fingerprint import model_fingerprint
from adaskip.numbers import is_whole
from adaskip.patching import patch_forward
from adaskip.plan import EMPTY_PLAN, KINDS, SkipPlan, Sublayer
from adaskip.recorders import real_tokens
from adaskip.replacements import TINY, Linear, Replacement
from adaskip.sublayers import sublayer_function
from adaskip.warmup import checked_prompts

Prompts = Iterable[Tensor | Mapping[str, Tensor]]


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
        UnsupportedModelError: the architecture is not supported, or the model is patched.

    Source: NBL (arXiv 2505.21077), ReplaceMe; METHOD, "Replacements".
    """
    block = entering.check_model(model)
    decoder: Any = model.base_model
    entering.check_layers(decoder.layers, model.config.model_type, block)
    plan.check_model(model)
    hidden, wanted = _checked(model, sublayers, rank, plan)
    made: dict[Sublayer, Replacement] = dict(plan)
    # Not inference mode: what is fitted may be used where gradients are taken.
    with torch.no_grad(), evaluating(model):
        streams = _streams(model, prompts, sinks)
        for index, layer in enumerate(tqdm(decoder.layers, "fitting", disable=not progress)):
            for kind in KINDS:
                sublayer = Sublayer(index, kind)
                run = sublayer_function(layer, getattr(block, kind), block.multiplier)
                if sublayer in wanted:
                    made[sublayer] = _fitted(streams, index, kind, run, rank, ridge, hidden)
                for stream in streams:
                    stream.advance(index, kind, run, made, sublayer)
    about = {"linear maps": len(wanted), "rank": rank, "fitted on": source or "unnamed prompts"}
    return SkipPlan(made, fingerprint=model_fingerprint(model), about={**plan.about, **about})


def _checked(
    model: PreTrainedModel, sublayers: Iterable[Sublayer], rank: int | None, plan: SkipPlan
) -> tuple[int, frozenset[Sublayer]]:
    """The width of the residual stream, and the sublayers to fit."""
    config = model.config.get_text_config(decoder=True)
    wanted = SkipPlan(dict.fromkeys(sublayers))
    for each in (wanted, plan):
        each.check(config.num_hidden_layers, config.hidden_size)
    if rank is not None and not (is_whole(rank) and 1 <= rank <= config.hidden_size):
        raise AdaskipError(
            f"A linear map cannot have rank {rank!r}; in this model it takes a whole number from 1 "
            f"to {config.hidden_size}, or None for a full one."
        )
    return config.hidden_size, frozenset(wanted)


class _Stream:
    """The residual stream of one prompt on its way through the layers.

    Attributes:
        x: [batch, tokens, hidden].
        calls: what each layer is given besides.
        counted: which tokens are fitted on: bool [batch, tokens].
    """

    def __init__(self, x: Tensor, calls: list[dict[str, Any]], counted: Tensor) -> None:
        self.x = x
        self.calls = calls
        self.counted = counted

    def output(self, index: int, kind: str, run: Any) -> Tensor:
        """The stream after a sublayer that runs."""
        output: Tensor = run(self.x, self.calls[index] if kind == "attn" else None)
        return output

    def advance(
        self,
        index: int,
        kind: str,
        run: Any,
        made: Mapping[Sublayer, Replacement],
        sublayer: Sublayer,
    ) -> None:
        """Goes through one sublayer, or what takes its place."""
        if sublayer not in made:
            self.x = self.output(index, kind, run)
            return
        replacement = made[sublayer]
        if isinstance(replacement, Linear):
            self.x = replacement.to(self.x.device, self.x.dtype)(self.x)
        elif replacement is not None:
            self.x = self.x * replacement


def _streams(model: PreTrainedModel, prompts: Prompts, sinks: int) -> list[_Stream]:
    """Every prompt before the first layer; the layers themselves are not run."""
    decoder: Any = model.base_model
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    device = execution_device(model.get_input_embeddings())
    made = []
    for inputs in checked_prompts(prompts, vocab_size):
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        seen: list[tuple[Tensor, dict[str, Any]]] = []
        with ExitStack() as undo:
            for layer in decoder.layers:
                patch = patch_forward(layer, _noting(layer, seen))
                undo.callback(patch.take_back)
            decoder(**inputs, use_cache=False)
        x = seen[0][0]
        real = real_tokens(inputs.get("attention_mask"), 0, x.shape[1])
        real = torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real
        counted = (real & (real.cumsum(dim=1) > sinks)).to(x.device)
        made.append(_Stream(x, [call for _, call in seen], counted))
    if not made:
        raise ProfileError("No prompt was given; a fit needs at least one.")
    return made


def _noting(layer: nn.Module, seen: list[tuple[Tensor, dict[str, Any]]]) -> Any:
    """A forward that notes what the layer is given, and passes the stream on."""
    names = list(inspect.signature(type(layer).forward).parameters)[2:]

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((hidden_states, kwargs | dict(zip(names, args, strict=False))))
        return hidden_states

    return forward


def _fitted(
    streams: list[_Stream],
    index: int,
    kind: str,
    run: Any,
    rank: int | None,
    ridge: float,
    hidden: int,
) -> Linear:
    """The linear map of one sublayer."""
    moments = _Moments(hidden, streams[0].x.device)
    for stream in streams:
        delta = stream.output(index, kind, run) - stream.x
        moments.add(stream.x[stream.counted], delta[stream.counted])
    return moments.solve(rank, ridge)


class _Moments:
    """First and second moments of the normalized input and of what a sublayer adds to it."""

    def __init__(self, hidden: int, device: torch.device) -> None:
        kwargs: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self._count = 0
        self._n, self._delta = (torch.zeros(hidden, **kwargs) for _ in range(2))
        self._nn, self._n_delta = (torch.zeros(hidden, hidden, **kwargs) for _ in range(2))

    def add(self, x: Tensor, delta: Tensor) -> None:
        """Takes in tokens: [tokens, hidden] each."""
        # Products in float32, sums of prompts in float64: bfloat16 would lose the small directions.
        n = rms_norm(x.float(), (x.shape[-1],), eps=TINY)
        delta = delta.float()
        self._count += len(n)
        self._n += n.sum(dim=0)
        self._delta += delta.sum(dim=0)
        self._nn += n.T @ n
        self._n_delta += n.T @ delta

    def solve(self, rank: int | None, ridge: float) -> Linear:
        """The map, in float32 on the CPU.

        Raises:
            AdaskipError: there are not more tokens than directions.
        """
        hidden = len(self._n)
        if self._count <= hidden:
            raise AdaskipError(
                f"A linear map of a model {hidden} wide is fitted on at least {hidden + 1} tokens "
                f"besides the first ones of each prompt; {self._count} were given. Give more or "
                "longer prompts."
            )
        mean_n, mean_delta = self._n / self._count, self._delta / self._count
        cov = self._nn / self._count - mean_n.outer(mean_n)
        cross = self._n_delta / self._count - mean_n.outer(mean_delta)
        cov.diagonal().add_(ridge * cov.diagonal().mean())
        lower = torch.linalg.cholesky(cov)
        weight = torch.cholesky_solve(cross, lower)
        bias = mean_delta - mean_n @ weight
        if rank is None:
            return Linear(weight.float().cpu(), bias.float().cpu())
        _, _, directions = torch.linalg.svd(lower.T @ weight, full_matrices=False)
        right = directions[:rank]
        left = weight @ right.T
        bias = mean_delta - mean_n @ left @ right
        return Linear((left.float().cpu(), right.float().cpu()), bias.float().cpu())
