"""Trains the gains and linear maps of a plan by gradient, towards the dense model's predictions.

A fit in closed form brings each sublayer's map near to what that sublayer adds. What counts is what
the model says at last: here all of them are trained together on it, and make up for each other and
for the windows and skips between them.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from tqdm import tqdm
from transformers import PreTrainedModel

from adaskip.blocks import execution_device
from adaskip.calls import check_fits
from adaskip.errors import AdaskipError
from adaskip.evaluating import evaluating
from adaskip.fingerprint import fingerprint_name, model_fingerprint
from adaskip.fitting import (
    DISTILLED_ON,
    DIVERGED,
    DIVERGES,
    EPOCHS,
    UNNAMED,
    Prompts,
    about_other_maps,
)
from adaskip.numbers import is_finite, is_whole
from adaskip.padding import real_tokens
from adaskip.plan import SkipPlan, Sublayer, all_sublayers
from adaskip.replacements import Linear, Replacement
from adaskip.streams import Sublayers
from adaskip.training_record import TrainingRecord
from adaskip.warmup import checked_prompts

# By default every prompt is seen so often, at this highest rate.
TWICE, RATE = 2, 3e-4
# One to learn from, one to judge by.
LEAST_PROMPTS = 2
# Of so many prompts one is held out, to tell by whether training helped; of fewer, one.
_HELD_OUT = 8
# Positions of a prompt that are looked at in a step: logits of a whole one take more than layers.
_POSITIONS = 256
# Gains are near 1 and few, entries of maps far below and many.
_GAIN_RATE = 10.0
# The share of the steps in which the rate rises.
_RISE = 0.1
# Seconds of training that an interruption may cost.
_KEPT_EVERY = 60.0


def distill_plan(
    model: PreTrainedModel,
    plan: SkipPlan,
    prompts: Prompts,
    *,
    epochs: int = TWICE,
    learning_rate: float = RATE,
    seed: int = 0,
    source: str = "",
    record: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> SkipPlan:
    """A plan whose gains and linear maps are trained towards the dense model's predictions.

    Minimizes KL(dense || plan) of the next token over the prompts' tokens, one prompt a step, by
    Adam with a rate that rises over a tenth of the steps and falls to nothing. Windows, skips and
    the model's weights stay as they are, and so does the plan's time. An eighth of the prompts, the
    last ones, is held out: what is returned is what diverged least on them after an epoch, or the
    plan's own numbers where training did not help.

    Args:
        model: a causal language model of a supported family, outside of `skipping()`.
        plan: with gains or linear maps; fitted on the same prompts is a good start.
        prompts: input ids [batch, tokens], or mappings with `input_ids` and `attention_mask`.
        epochs: passes over the prompts.
        learning_rate: the highest, of linear maps; gains learn ten times as fast.
        seed: of the order of prompts and the choice of their positions.
        source: what the prompts are, kept in the plan.
        record: a file that keeps where the training stands, every minute and at the end: after an
            interruption the same call goes on from there. Remove it once the plan is saved.
        progress: whether to show a progress bar.

    Returns:
        The plan; maps that were trained are in float32 on the CPU. `about` has the divergence on
        the prompts held out, in nats per token, before and after: what maps were fitted on tells
        too well of before.

    Raises:
        AdaskipError: the plan has nothing to train or does not fit the model, there are fewer than
            two prompts, a number is none, the model's weights are quantized or of inference mode,
            or its predictions are no numbers.
        PlanError: it was made for another model.
        ProfileError: a prompt is none.
        RunError: the record is of another training, damaged, or cannot be read or written.
        UnsupportedModelError: the architecture is not supported, or the model is patched.

    Source: knowledge distillation (arXiv 1503.02531); METHOD, "Replacements".
    """
    sublayers_of = Sublayers(model)
    _check_numbers(epochs, learning_rate, seed)
    check_distills(model)
    _check_plan(plan, model)
    given = checked_prompts(prompts, model.config.get_text_config(decoder=True).vocab_size)
    if len(given) < LEAST_PROMPTS:
        raise AdaskipError(
            f"Distilling takes at least {LEAST_PROMPTS} prompts, as one is held out to judge by; "
            f"{len(given)} given."
        )
    fingerprint = model_fingerprint(model)
    kept = TrainingRecord(
        record,
        {
            "model": fingerprint_name(fingerprint),
            "dtype": str(model.dtype),
            "device": model.device.type,
            "plan": plan.digest,
            "prompts": _digest(given),
            "epochs": int(epochs),
            "learning rate": float(learning_rate),
            "seed": int(seed),
        },
    )
    # A record of something else is refused before the model runs.
    before = kept.read()
    with torch.inference_mode(False), evaluating(model), _frozen(model):
        course = _Course(_Trained(sublayers_of, plan), given, progress=progress)
        training = _Training(course, int(epochs), learning_rate, int(seed), kept)
        if before is None:
            training.begin()
        else:
            training.go_on(*before)
        training.run(progress=progress)
    about = about_other_maps(plan) | {DISTILLED_ON: source or UNNAMED, EPOCHS: int(epochs)}
    about |= {DIVERGED: training.before, DIVERGES: training.least}
    return SkipPlan(training.best or plan, fingerprint=fingerprint, about=about)


def check_distills(model: PreTrainedModel) -> None:
    """Raises an `AdaskipError` unless gradients can be taken through a model."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise AdaskipError(
            "The model's weights are quantized, through which plans are not distilled; distil on "
            "the model as it was before: the plan fits both."
        )
    if any(weight.is_inference() for weight in model.parameters()):
        raise AdaskipError(
            "The model's weights were made in inference mode, so there are no gradients; load it "
            "outside of torch.inference_mode()."
        )


def _check_numbers(epochs: object, learning_rate: object, seed: object) -> None:
    if not (is_whole(epochs) and epochs >= 1):
        raise AdaskipError(f"epochs is {epochs!r}; give a whole number of passes, 1 or more.")
    if not (is_finite(learning_rate) and learning_rate > 0):
        raise AdaskipError(f"A learning rate of {learning_rate!r} is none; give one above 0.")
    if not (is_whole(seed) and 0 <= seed < 2**63):
        raise AdaskipError(f"A seed of {seed!r} is none; give a whole number, 0 or more.")


def _check_plan(plan: SkipPlan, model: PreTrainedModel) -> None:
    """Refuses a plan that does not fit the model, or has nothing to train."""
    plan.check_model(model)
    config = model.config.get_text_config(decoder=True)
    check_fits(plan, config.num_hidden_layers, config)
    if not can_learn(plan):
        raise AdaskipError(
            "The plan has no gain and no linear map, so nothing of it can be trained; give one "
            "that has some."
        )


def _digest(prompts: Iterable[Mapping[str, Tensor]]) -> str:
    """Tells prompts apart: a hash of their ids and masks."""
    digest = hashlib.sha256()
    for prompt in prompts:
        for name, tensor in sorted(prompt.items()):
            digest.update(f"{name} {tensor.tolist()}".encode())
    return digest.hexdigest()[:16]


def can_learn(plan: SkipPlan) -> bool:
    """Whether a plan has a gain or a linear map."""
    return any(isinstance(each, float | Linear) for each in plan.values())


class _Trained:
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
class _Prompt:
    """A prompt, and the dense model's residual stream behind the last layer, on the CPU."""

    inputs: Mapping[str, Tensor]
    dense: Tensor


class _Course:
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
        self, trained: _Trained, given: Sequence[Mapping[str, Tensor]], *, progress: bool
    ) -> None:
        self.trained, self._own = trained, trained.sublayers_of
        self._order = all_sublayers(len(self._own.decoder.layers))
        with torch.no_grad():
            told = tqdm(given, "the dense model", disable=not progress)
            prompts = [_Prompt(inputs, self._behind(inputs, {}).cpu()) for inputs in told]
        n_held = max(1, len(prompts) // _HELD_OUT)
        self.learned, self._held = prompts[:-n_held], prompts[-n_held:]

    def divergence(self) -> float:
        """Nats per token on the prompts held out, at positions that are always the same."""
        with torch.no_grad():
            found = [self.by_token(prompt, self._spread(prompt)) for prompt in self._held]
        return float(sum(each.sum() for each in found)) / sum(map(len, found))

    @staticmethod
    def _spread(prompt: _Prompt) -> Tensor:
        """As many positions, evenly over the prompt."""
        tokens = prompt.dense.shape[1]
        return torch.linspace(0, tokens - 1, min(tokens, _POSITIONS)).long()

    def by_token(self, prompt: _Prompt, positions: Tensor) -> Tensor:
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


class _Training:
    """Trains on the prompts of a course, epoch by epoch.

    Args:
        course: takes the prompts through what learns.
        epochs: passes over the prompts.
        learning_rate: the highest, of linear maps.
        seed: of the prompts' order and positions.
        record: keeps where it stands.

    Attributes:
        before: the divergence on the prompts held out, in nats per token, before it began.
        least: the least after an epoch, or that.
        best: what the plan replaces, with the numbers that had it; None for the plan's own.
    """

    def __init__(
        self,
        course: _Course,
        epochs: int,
        learning_rate: float,
        seed: int,
        record: TrainingRecord,
    ) -> None:
        self._course, self._trained, self._record = course, course.trained, record
        self._generator = torch.Generator().manual_seed(seed)
        learns = [
            (self._trained.maps, learning_rate),
            (self._trained.gains, learning_rate * _GAIN_RATE),
        ]
        groups = [{"params": tensors, "lr": rate} for tensors, rate in learns if tensors]
        self._rates = [float(rate) for tensors, rate in learns if tensors]
        self._optimizer = Adam(groups)
        self._n_steps, self._done = epochs * len(course.learned), 0
        # The prompts of this epoch that are still to come, by their numbers.
        self._to_come: list[int] = []
        self._best: list[Tensor] | None = None
        self.before = self.least = math.nan

    @property
    def best(self) -> dict[Sublayer, Replacement] | None:
        return None if self._best is None else self._trained.with_numbers(self._best)

    def begin(self) -> None:
        """Looks at the plan as it is.

        Raises:
            AdaskipError: its predictions are no numbers.
        """
        self.before = self.least = self._course.divergence()
        if not math.isfinite(self.before):
            model = self._trained.sublayers_of.model
            raise AdaskipError(
                f"The predictions of the model or the plan are no numbers in {model.dtype}; load "
                "the model in bfloat16 or float32, and see whether the plan's gains are right."
            )
        # Whether it can be kept is told before hours of it.
        self._keep()

    def run(self, *, progress: bool) -> None:
        """Trains to the end."""
        kept = time.monotonic()
        with tqdm(
            total=self._n_steps, initial=self._done, desc="distilling", disable=not progress
        ) as bar:
            while self._done < self._n_steps:
                if not self._to_come:
                    order = torch.randperm(len(self._course.learned), generator=self._generator)
                    self._to_come = order.tolist()
                self._step(self._course.learned[self._to_come.pop(0)])
                bar.update()
                if not self._to_come:
                    self._judge()
                ends = self._done == self._n_steps
                if ends or time.monotonic() - kept >= _KEPT_EVERY:
                    self._keep()
                    kept = time.monotonic()

    def _step(self, prompt: _Prompt) -> None:
        """Learns from a prompt, at some of its positions."""
        for group, highest in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = highest * _share_of_rate(self._n_steps, self._done)
        tokens = prompt.dense.shape[1]
        drawn = torch.randperm(tokens, generator=self._generator)[:_POSITIONS].sort().values
        self._optimizer.zero_grad()
        with torch.enable_grad():
            lost = self._course.by_token(prompt, drawn)
            # Of a batch, no row may have a token at these positions.
            torch.autograd.backward(lost.sum() / max(1, len(lost)))
        # One that overflows would make all of them no numbers.
        if clip_grad_norm_(self._trained.tensors, 1.0).isfinite():
            self._optimizer.step()
        self._done += 1

    def _judge(self) -> None:
        """Keeps the numbers of now if no others diverged less on the prompts held out."""
        found = self._course.divergence()
        if found < self.least:
            self.least = found
            self._best = [
                tensor.detach().to("cpu", torch.float32, copy=True)
                for tensor in self._trained.tensors
            ]

    def _keep(self) -> None:
        """Writes down where the training stands."""
        tensors = {"generator": self._generator.get_state()}
        for number, tensor in enumerate(self._trained.tensors):
            tensors[f"now.{number}"] = tensor
            for name, value in self._optimizer.state[tensor].items():
                tensors[f"{name}.{number}"] = value
        tensors |= {f"best.{number}": tensor for number, tensor in enumerate(self._best or ())}
        numbers = {"done": self._done, "to come": self._to_come}
        self._record.write(tensors, numbers | {"before": self.before, "least": self.least})

    def go_on(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Goes on from what a record keeps."""
        self._generator.set_state(tensors["generator"])
        for number, tensor in enumerate(self._trained.tensors):
            with torch.no_grad():
                tensor.copy_(tensors[f"now.{number}"])
            state = {
                name: tensors[f"{name}.{number}"]
                for name in ("step", "exp_avg", "exp_avg_sq")
                if f"{name}.{number}" in tensors
            }
            # How many steps there were stays on the CPU.
            own = {k: v if k == "step" else v.to(tensor.device) for k, v in state.items()}
            if own:
                self._optimizer.state[tensor] = own
        if "best.0" in tensors:
            n_tensors = len(self._trained.tensors)
            self._best = [tensors[f"best.{number}"] for number in range(n_tensors)]
        self._done, self._to_come = numbers["done"], [*numbers["to come"]]
        self.before, self.least = numbers["before"], numbers["least"]


def _share_of_rate(n_steps: int, done: int) -> float:
    """Of the highest learning rate, after so many of all steps: up evenly, down as a cosine."""
    rise, step = math.ceil(n_steps * _RISE), done + 1
    fallen = max(0, step - rise) / (n_steps + 1 - rise)
    return min(step / rise, 0.5 + 0.5 * math.cos(math.pi * fallen))


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Lets no weight of a model learn for a while."""
    # By name: where accelerate keeps weights elsewhere, a forward puts others in their places. And
    # what is computed again runs to its end, where these are taken out.
    learning = [name for name, weight in model.named_parameters() if weight.requires_grad]
    for name in learning:
        model.get_parameter(name).requires_grad_(False)
    try:
        with set_checkpoint_early_stop(False):
            yield
    finally:
        for name in learning:
            model.get_parameter(name).requires_grad_(True)
