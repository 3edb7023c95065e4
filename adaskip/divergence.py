"""How far a plan is from the dense model, as a function of its gains and maps that can learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from adaskip.blocks import execution_device
from adaskip.padding import real_tokens
from adaskip.plan import SkipPlan, Sublayer, all_sublayers
from adaskip.replacements import Linear, Replacement
from adaskip.streams import Sublayers

# Of so many prompts one is held out, to tell by whether training helped; of fewer, one.
_HELD_OUT = 8
# Positions of a prompt that are looked at at once: logits of a whole one take more than layers.
_POSITIONS = 256


class Trained:
    """The gains and maps of a plan as tensors that learn.

    Args:
        sublayers_of: of the model.
        plan: it stays as it is.

    Attributes:
        replacements: all that the plan replaces, with the tensors in their places.
        maps: the tensors of linear maps.
        gains: numbers, [] each.
    """

    def __init__(self, sublayers_of: Sublayers, plan: SkipPlan) -> None:
        self.sublayers_of = sublayers_of
        self.replacements: dict[Sublayer, Any] = dict(plan)
        self.maps: list[Tensor] = []
        self.gains: list[Tensor] = []
        for sublayer, replacement in plan.items():
            device = execution_device(sublayers_of.decoder.layers[sublayer.layer])
            if isinstance(replacement, Linear):
                *factors, bias = (
                    tensor.detach().to(device, torch.float32, copy=True).requires_grad_()
                    for tensor in replacement.tensors
                )
                self.replacements[sublayer] = Linear.of(factors, bias)
                self.maps += [*factors, bias]
            elif isinstance(replacement, float):
                gain = torch.tensor(replacement, device=device, requires_grad=True)
                self.replacements[sublayer] = gain
                self.gains.append(gain)

    @property
    def tensors(self) -> list[Tensor]:
        """All that learns."""
        return [*self.maps, *self.gains]

    def with_numbers(self, numbers: Sequence[Tensor]) -> dict[Sublayer, Replacement]:
        """What the plan replaces, with these in the places of `tensors`."""
        number_of = dict(zip(map(id, self.tensors), numbers, strict=True))
        made: dict[Sublayer, Replacement] = {}
        for sublayer, replacement in self.replacements.items():
            if isinstance(replacement, Linear):
                *factors, bias = (number_of[id(tensor)] for tensor in replacement.tensors)
                made[sublayer] = Linear.of(factors, bias)
            else:
                is_gain = isinstance(replacement, Tensor)
                made[sublayer] = float(number_of[id(replacement)]) if is_gain else replacement
        return made


@dataclass
class Prompt:
    """A prompt, and the dense model's residual stream behind the last layer, on the CPU."""

    inputs: Mapping[str, Tensor]
    dense: Tensor

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Some positions, for a step to look at."""
        tokens = self.dense.shape[1]
        return torch.randperm(tokens, generator=generator)[:_POSITIONS].sort().values

    def spread(self) -> Tensor:
        """As many positions, always the same, evenly over the prompt."""
        tokens = self.dense.shape[1]
        return torch.linspace(0, tokens - 1, min(tokens, _POSITIONS)).long()


class Course:
    """Takes prompts through a plan that learns.

    Args:
        trained: what learns.
        given: the prompts, looked at already.
        progress: whether to show a progress bar.

    Attributes:
        trained: likewise.
        learned: the prompts to learn from.
    """

    def __init__(
        self, trained: Trained, given: Sequence[Mapping[str, Tensor]], *, progress: bool
    ) -> None:
        self.trained, self._own = trained, trained.sublayers_of
        self._order = all_sublayers(len(self._own.decoder.layers))
        with torch.no_grad():
            told = tqdm(given, "the dense model", disable=not progress)
            prompts = [Prompt(inputs, self._behind(inputs, {}).cpu()) for inputs in told]
        n_held = max(1, len(prompts) // _HELD_OUT)
        self.learned, self._held = prompts[:-n_held], prompts[-n_held:]

    def divergence(self) -> float:
        """Nats per token on the prompts held out, at positions that are always the same."""
        with torch.no_grad():
            found = [self.by_token(prompt, prompt.spread()) for prompt in self._held]
        return float(sum(each.sum() for each in found)) / sum(map(len, found))

    def by_token(self, prompt: Prompt, positions: Tensor) -> Tensor:
        """KL(dense || plan) of what follows some positions, padding left out, in nats: [tokens]."""
        ids = prompt.inputs["input_ids"]
        with torch.no_grad():
            dense = self._told(ids, prompt.dense, positions)
        found = self._told(ids, self._behind(prompt.inputs, self.trained.replacements), positions)
        by_token = kl_div(found, dense, reduction="none", log_target=True).sum(dim=-1)
        real = real_tokens(prompt.inputs.get("attention_mask"), 0, ids.shape[1], len(ids))
        if real is None:
            return by_token.flatten()
        return by_token[real[:, positions].to(by_token.device)]

    def _told(self, ids: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        """Log-probabilities that a stream behind the last layer gives: [batch, n, vocabulary]."""
        at = execution_device(self._own.model.get_input_embeddings())
        some = ids[:, positions].to(at), x[:, positions.to(x.device)].to(at)
        # The last 0 are all of them.
        return log_softmax(self._own.logits(*some, n_last=0).float(), dim=-1)

    def _behind(
        self, inputs: Mapping[str, Tensor], replacements: Mapping[Sublayer, Replacement]
    ) -> Tensor:
        """The stream behind the last layer: [batch, tokens, hidden]."""
        x, calls = self._own.begin(inputs)
        for sublayer in self._order:
            # What a sublayer holds within is computed again, so that long prompts fit.
            x = checkpoint(
                self._own.through,
                sublayer,
                x,
                calls,
                replacements,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return x
