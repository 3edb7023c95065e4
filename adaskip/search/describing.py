"""What a plan that was made for a budget tells about itself, and what its record depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from adaskip.budget import kv_share
from adaskip.fingerprint import CONFIGURATION, model_identity
from adaskip.plan import SkipPlan, Sublayer
from adaskip.profiling.plan_times import measured_acceleration
from adaskip.replacements import Replacement
from adaskip.search.journal import digest_of, short_hash
from adaskip.search.rows import Row
from adaskip.sublayer_times import PlanTimes


def described(
    model: PreTrainedModel,
    plan: Mapping[Sublayer, Replacement],
    times: PlanTimes,
    acceleration: float,
) -> dict[str, str | float | None]:
    """The budget of a plan, and what is predicted of it.

    Args:
        model: whose plan it is.
        plan: what is replaced.
        times: of sublayers and replacements, where the plan is to be used.
        acceleration: that was asked for.
    """
    dense = times.dense
    return {
        "acceleration": float(acceleration),
        "phase": str(dense.phase),
        "context": dense.context,
        "batch": dense.batch,
        "predicted acceleration": times.speedup(plan),
        "predicted kv share": kv_share(SkipPlan(plan), model.config, dense.context),
    }


def reached(facts: Mapping[str, Any]) -> tuple[float, float]:
    """What `described` predicts: the acceleration, and the share of keys and values."""
    return facts["predicted acceleration"], facts["predicted kv share"]


def with_measured(model: PreTrainedModel, plan: SkipPlan, *, progress: bool = False) -> SkipPlan:
    """A plan that also tells what it reaches now, beside what was predicted.

    Args:
        model: outside of `skipping(...)`.
        plan: made for a phase, a context length and a batch, which its `about` has.
        progress: whether to show a progress bar.
    """
    about: Mapping[str, Any] = plan.about
    found = measured_acceleration(
        model,
        plan,
        about["phase"],
        int(about["context"]),
        batch=int(about["batch"]),
        progress=progress,
    )
    measured = {
        "measured acceleration": found.median,
        "measured from": found.low,
        "measured to": found.high,
    }
    return SkipPlan(plan, fingerprint=plan.fingerprint, about={**about, **measured})


def record_name(model: PreTrainedModel, rows: Sequence[Row]) -> str:
    """A name for the record in a folder that may hold those of other models and rows, too."""
    # Records of earlier versions, which do not tell the configuration, are found by it, too.
    told = {k: v for k, v in identity(model, rows).items() if k != CONFIGURATION}
    return f"record-{short_hash(told)}.jsonl"


def identity(model: PreTrainedModel, rows: Sequence[Row]) -> dict[str, Any]:
    """What all that is measured of calibration rows depends on."""
    return {**model_identity(model), "calibration": digest_of(rows)}
