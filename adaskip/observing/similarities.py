"""IO similarities averaged over tokens, by model, task, phase and part of a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

from adaskip.plan import Phase
from adaskip.recorders import Span

SPANS: tuple[Span, ...] = ("attn", "ffn", "layer")


@dataclass(frozen=True)
class Moments:
    """Mean and spread of a similarity over tokens, kept as sums so that they can be added.

    Attributes:
        count: tokens.
        total: sum of their similarities; `squares`: of the squares.
    """

    count: int
    total: float
    squares: float

    @property
    def mean(self) -> float:
        """Every token weighs the same."""
        return self.total / self.count

    @property
    def deviation(self) -> float:
        """Standard deviation over tokens."""
        return math.sqrt(max(self.squares / self.count - self.mean**2, 0.0))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.total + other.total, self.squares + other.squares
        )


@dataclass(frozen=True)
class Similarities:
    """What the prompts of one task told about one model.

    Attributes:
        ids: the rows seen.
        phases: per phase and part of a layer, one entry per layer.
    """

    model: str
    task: str
    ids: tuple[str, ...]
    phases: dict[Phase, dict[Span, list[Moments]]]

    def layers(self, span: Span, phase: Phase | None = None) -> list[Moments]:
        """By depth, in one phase or over all tokens."""
        if phase is not None:
            return self.phases[phase][span]
        both = (self.phases[each][span] for each in Phase)
        return [prefill + decode for prefill, decode in zip(*both, strict=True)]

    @staticmethod
    def from_rows(model: str, task: str, rows: Sequence[Mapping[str, Any]]) -> Similarities:
        """From the rows `recording` keeps: per phase a count, and `[total, squares]`s by layer."""
        phases: dict[Phase, dict[Span, list[Moments]]] = {phase: {} for phase in Phase}
        for phase, spans in phases.items():
            sums = [row["sums"][phase] for row in rows]
            for span in SPANS:
                columns = zip(*(_moments(each, span) for each in sums if span in each), strict=True)
                spans[span] = [reduce(add, column) for column in columns]
        return Similarities(model, task, tuple(str(row["id"]) for row in rows), phases)


def _moments(sums: Mapping[str, Any], span: Span) -> list[Moments]:
    return [Moments(sums["count"], *pair) for pair in sums[span]]
