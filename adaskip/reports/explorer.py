"""The plan explorer: what plans replace, and what smaller budgets would have, as one page.

The page holds its data as JSON and fetches nothing; what it shows follows from its slider.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaskip.fingerprint import fingerprint_name
from adaskip.fitting import LOSS_BEFORE
from adaskip.plan import KINDS, SkipPlan, Sublayer
from adaskip.replacements import Linear, Window
from adaskip.runs.files import write_text
from adaskip.search.course import Course, named
from adaskip.search.menu import NOTHING
from adaskip.sublayer_times import replacement_name

_HERE = Path(__file__).parent
# What the page's three files become one by.
_PARTS = {"/*STYLE*/": "explorer.css", "/*SCRIPT*/": "explorer.js"}
_DATA = "/*DATA*/"


def write_explorer(path: Path, plans: Mapping[str, SkipPlan]) -> None:
    """Writes the page.

    Args:
        path: of the page.
        plans: by what they are called.

    Raises:
        PlanError: what a plan tells of its course is damaged.
        RunError: the page cannot be written.
    """
    write_text(path, page(plans))


def page(plans: Mapping[str, SkipPlan]) -> str:
    """The page of plans, by what they are called.

    Raises:
        PlanError: what a plan tells of its course is damaged.
    """
    text = (_HERE / "explorer.html").read_text(encoding="utf-8")
    for mark, name in _PARTS.items():
        text = text.replace(mark, (_HERE / name).read_text(encoding="utf-8"))
    data = json.dumps([_told(name, plan) for name, plan in plans.items()], allow_nan=False)
    # Whatever a plan says of itself stays a text within the page.
    return text.replace(_DATA, data.replace("<", "\\u003c"))


def _told(name: str, plan: SkipPlan) -> dict[str, Any]:
    """One plan, ready for JSON: lists by kind and layer, None where nothing is known."""
    course = Course.of(plan)
    sublayers = [*plan] if course is None else [*course.seconds]
    n_layers = max((s.layer for s in sublayers), default=-1) + 1
    facts: dict[str, Any] = dict(plan.facts)
    measured = [facts.get(f"measured {key}") for key in ("acceleration", "from", "to")]
    stops = [_stop(*stop) for stop in course.stops] if course else _only(plan, facts)
    if stops and LOSS_BEFORE in facts:
        # Its maps became others after anybody looked at its loss.
        stops[-1]["fitted"] = True

    def lists(values: Mapping[Sublayer, Any]) -> dict[str, list[Any]]:
        return {k: [values.get(Sublayer(i, k)) for i in range(n_layers)] for k in KINDS}

    return {
        "name": name,
        "model": fingerprint_name(plan.fingerprint) if plan.fingerprint else None,
        "facts": {key: value for key, value in facts.items() if _is_shown(key, value)},
        "layers": n_layers,
        "total": course and course.total,
        "similarity": lists(course.similarity if course else {}),
        "time": lists(course.seconds if course else {}),
        "sensitivity": lists({s: [*told] for s, told in course.alone.items()} if course else {}),
        "stops": stops,
        "whole": course is not None,
        "last": lists({sublayer: _detail(r) for sublayer, r in plan.items()}),
        "measured": None if measured[0] is None else measured,
    }


def _stop(
    changes: Mapping[Sublayer, str],
    speedup: float | None,
    kv_share: float | None,
    loss: float | None,
) -> dict[str, Any]:
    told = {str(sublayer): name for sublayer, name in changes.items()}
    return {"changes": told, "speedup": speedup, "kv": kv_share, "loss": loss}


def _only(plan: SkipPlan, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The one stop of a plan that tells nothing of its course."""
    speedup, kv_share = facts.get("predicted acceleration"), facts.get("predicted kv share")
    loss = facts.get("loss", facts.get(LOSS_BEFORE))
    return [_stop(named(plan), speedup, kv_share, loss)] if plan else []


def _is_shown(key: str, value: Any) -> bool:
    """Whether the page lists a fact: what it shows with the slider, it does not say twice."""
    by_slider = key.startswith(("predicted", "measured")) or key in ("loss", LOSS_BEFORE)
    return value is not None and not by_slider


def _detail(replacement: float | Linear | Window | None) -> str:
    """What takes a sublayer's place in the plan itself, with its numbers."""
    if replacement is None:
        return NOTHING
    if isinstance(replacement, Window):
        return f"{replacement_name(replacement)}, {replacement.sinks} sinks"
    if isinstance(replacement, Linear):
        return f"linear map, rank {min(replacement.factors[0].shape)}"
    return f"gain {replacement:.4g}"
