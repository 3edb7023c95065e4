"""What a leaderboard keeps of each plan, and what tells one plan from another."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import Field

from adaskip.plan import EMPTY_PLAN
from adaskip.runs.rows import Stored

DENSE_DIGEST = EMPTY_PLAN.digest


class PlanRow(Stored):
    """A plan that was made, or why there is none; `id` is its point's.

    Attributes:
        recipe: what it was made from and for.
        plan_digest: of the plan; empty if there is none, or it was made before digests were kept.
        about: what the plan tells of itself; empty if there is none.
        model: the name of the model's fingerprint; empty if there is no plan, and in earlier files.
        replaced: by what each sublayer is replaced, as `restoring.told` has it.
        error: why the method reaches no such acceleration.
    """

    id: str
    recipe: dict[str, Any] = Field(default_factory=dict)
    plan_digest: str = ""
    about: dict[str, Any] = Field(default_factory=dict)
    model: str = ""
    replaced: dict[str, str] = Field(default_factory=dict)
    error: str | None = None


class PlanValues(Stored):
    """What was measured under a plan; it says nothing of a plan that was made anew since.

    Attributes:
        id: of its point.
        plan_digest: of the plan.
    """

    id: str
    plan_digest: str = ""


class LossRow(PlanValues):
    """`[nll, tokens]` of each test row's reference under a plan."""

    rows: dict[str, list[float | int]]


class ScoreRow(PlanValues):
    """The score, 0 to 1, of each test row's answer under a plan."""

    rows: dict[str, float]


class TimesRow(PlanValues):
    """Times of a plan: one value per round, in seconds.

    Attributes:
        ttft: of prefill.
        per_token: of a decode step.
        kv_bytes: held at the end of a request.
    """

    ttft: list[float]
    per_token: list[float]
    kv_bytes: int


class Timed(NamedTuple):
    """Times of a plan and of the dense model, taken in the same rounds of a sitting."""

    sitting: int
    own: TimesRow
    dense: TimesRow
