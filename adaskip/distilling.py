"""Trains the gains and linear maps of a plan by gradient, towards the dense model's predictions.

A fit in closed form brings each sublayer's map near to what that sublayer adds. What counts is what
the model says at last: here all of them are trained together on it, and make up for each other and
for the windows and skips between them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import PreTrainedModel

from adaskip.calls import check_fits
from adaskip.divergence import Course, Trained
from adaskip.errors import AdaskipError
from adaskip.evaluating import evaluating
from adaskip.fingerprint import model_fingerprint, model_identity
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
from adaskip.plan import SkipPlan
from adaskip.replacements import Linear
from adaskip.streams import Sublayers
from adaskip.training import Training
from adaskip.training_record import TrainingRecord
from adaskip.warmup import checked_prompts

# By default every prompt is seen so often, at this highest rate.
TWICE, RATE = 2, 3e-4
# One to learn from, one to judge by.
LEAST_PROMPTS = 2


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
        UnsupportedModelError: the architecture is not supported, or the model is patched or on
            several devices.

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
    kept = TrainingRecord(
        record,
        {
            **model_identity(model),
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
        course = Course(Trained(sublayers_of, plan), given, progress=progress)
        training = Training(course, int(epochs), learning_rate, int(seed), kept)
        if before is None:
            training.begin()
        else:
            training.go_on(*before)
        training.run(progress=progress)
    about = about_other_maps(plan) | {DISTILLED_ON: source or UNNAMED, EPOCHS: int(epochs)}
    about |= {DIVERGED: training.before, DIVERGES: training.least}
    return SkipPlan(training.best or plan, fingerprint=model_fingerprint(model), about=about)


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
