"""What a leaderboard compares: its YAML file. Nothing here runs anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from adaskip.plan import Phase

Acceleration = Annotated[float, Field(gt=1)]


@dataclass(frozen=True)
class Point:
    """A method asked for an acceleration.

    Attributes:
        method: as in the file; with a menu, "SEARCH gain window".
        acceleration: that it is asked for, by predicted time.
    """

    method: str
    acceleration: float

    @property
    def name(self) -> str:
        """What rows of the stores are called."""
        return f"{self.method} {self.acceleration:g}"


class ContextSettings(BaseModel):
    """What is compared at one context length.

    Attributes:
        accelerations: of the phase, each method is asked for, by predicted time.
        methods: to compare; None are the file's.
        planned_at: prompt tokens at which predicted times count; None are the context's own.
        rows: of the test split; None are the file's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    accelerations: Annotated[list[Acceleration], Field(min_length=1)]
    methods: Annotated[list[str], Field(min_length=1)] | None = None
    planned_at: PositiveInt | None = None
    rows: PositiveInt | None = None


class LeaderboardFile(BaseModel):
    """What a leaderboard's file says.

    Attributes:
        model: as in `configs/models.yaml`.
        task: whose references are scored; its rows are made offline.
        rows: of the test split.
        reference_tokens: of each reference, from the first.
        calibration_rows: of the warm-up split.
        calibration_tokens: of each of their contexts.
        phase: whose time counts.
        rounds: in which times are taken, every plan and the dense model in each.
        contexts: by prompt tokens.
        methods: names of `adaskip.methods`; SEARCH may be followed by its menu.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    task: str
    rows: PositiveInt
    reference_tokens: PositiveInt
    calibration_rows: PositiveInt
    calibration_tokens: PositiveInt
    phase: Phase
    rounds: PositiveInt
    contexts: Annotated[dict[PositiveInt, ContextSettings], Field(min_length=1)]
    methods: Annotated[list[str], Field(min_length=1)]

    def points(self, context: int) -> Iterator[Point]:
        """What is compared at a context length, in the file's order."""
        own = self.contexts[context]
        for method in own.methods or self.methods:
            for acceleration in own.accelerations:
                yield Point(method, acceleration)
