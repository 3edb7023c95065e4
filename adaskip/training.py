"""Trains the gains and maps of a plan, step by step, and keeps where that stands."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam
from tqdm import tqdm

from adaskip.divergence import Course, Prompt
from adaskip.errors import no_numbers
from adaskip.plan import Sublayer
from adaskip.replacements import Replacement
from adaskip.training_record import TrainingRecord

# Gains are near 1 and few, entries of maps far below and many.
_GAIN_RATE = 10.0
# The share of the steps in which the rate rises.
_RISE = 0.1
# Seconds of training that an interruption may cost.
_KEPT_EVERY = 60.0


class Training:
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
    """

    def __init__(
        self,
        course: Course,
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
        """What the plan replaces, with the numbers that had the least; None for its own."""
        return None if self._best is None else self._trained.with_numbers(self._best)

    def begin(self) -> None:
        """Looks at the plan as it is.

        Raises:
            AdaskipError: its predictions are no numbers.
        """
        self.before = self.least = self._course.divergence()
        if not math.isfinite(self.before):
            raise no_numbers(self._trained.sublayers_of.model.dtype)
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

    def _step(self, prompt: Prompt) -> None:
        """Learns from a prompt, at some of its positions."""
        for group, highest in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = highest * _share_of_rate(self._n_steps, self._done)
        self._optimizer.zero_grad()
        with torch.enable_grad():
            lost = self._course.by_token(prompt, prompt.drawn(self._generator))
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
