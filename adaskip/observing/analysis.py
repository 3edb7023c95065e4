"""The numbers by which the paper's three observations are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import pandas as pd

from adaskip.configuration import read_config
from adaskip.models.spec import model_spec
from adaskip.observing.recording import OpenModel, observe_tasks
from adaskip.observing.similarities import layers, means
from adaskip.plan import KINDS, Phase
from adaskip.recorders import Span
from adaskip.runs.runconfig import RunConfig

# How many sublayers the agreement of two rankings looks at: the paper's smallest budget.
TOP = 8
Numbers = dict[str, Any]


def stand_in(observation: str, task: str) -> str | None:
    """The LongBench task an offline task stands in for in an observation; None for a real one."""
    facts = read_config("observations.yaml")[observation]
    return dict(zip(facts["sample_tasks"], facts["tasks"], strict=True)).get(task)


def spread(curve: pd.DataFrame) -> Numbers:
    """A curve over depth, of `layers`, in a few numbers; `std` is over layers."""
    mean = curve["mean"]
    return {
        "mean": _rounded(mean.mean()),
        "std": _rounded(mean.std(ddof=0)),
        "min": _rounded(mean.min()),
        "min_layer": int(mean.idxmin()),
        "max": _rounded(mean.max()),
        "max_layer": int(mean.idxmax()),
        "mean_std_over_tokens": _rounded(curve["std"].mean()),
    }


def agreement(one: pd.Series, other: pd.Series) -> Numbers:
    """How far two sets of curves agree: correlations of values and ranks, and distances.

    Layer 0 stands apart so far that it alone can make a correlation: it is also left out.

    Args:
        one: a similarity per `layer`, of one curve or more.
        other: likewise, with the same index; differences are `other - one`.
    """
    inner = one.index.get_level_values("layer") > 0
    ranks = (each.rank(method="first") for each in (one, other))
    difference = other - one
    return {
        "pearson": _correlation(one, other),
        "pearson_without_layer_0": _correlation(one[inner], other[inner]),
        "spearman": _correlation(*ranks),
        "mean_difference": _rounded(difference.mean()),
        "largest_difference": _rounded(difference.abs().max()),
    }


def _correlation(one: pd.Series, other: pd.Series) -> float | None:
    """Pearson's; None where a curve is flat or has one point."""
    found = one.corr(other, min_periods=2)
    return None if pd.isna(found) else _rounded(found)


def _rounded(value: float) -> float:
    return round(float(value), 4)


def _top(seen: pd.DataFrame, phase: Phase | None = None) -> list[tuple[int, str]]:
    """Layer and kind of the `TOP` sublayers of highest similarity; ties by depth."""
    by_depth = means(seen, KINDS, phase).swaplevel().sort_index()
    return [*by_depth.sort_values(ascending=False, kind="stable").index[:TOP]]


def _layers_summary(seen: pd.DataFrame) -> Numbers:
    """Observation 1: how much the layers differ."""
    return {"layer": spread(layers(seen, "layer"))}


def kinds_summary(seen: pd.DataFrame) -> Numbers:
    """Observation 2: how attention and FFN differ."""
    attn, ffn = (layers(seen, kind) for kind in KINDS)
    return {
        "attn": spread(attn),
        "ffn": spread(ffn),
        "attn / ffn": agreement(attn["mean"], ffn["mean"]),
        "layers where attention is higher": int((attn["mean"] > ffn["mean"]).sum()),
        f"attention among the top {TOP}": sum(kind == "attn" for _, kind in _top(seen)),
    }


def phases_summary(seen: pd.DataFrame) -> Numbers:
    """Observation 3: how prefill and decode differ."""
    summary: Numbers = {}
    for kind in KINDS:
        curves = [layers(seen, kind, phase) for phase in Phase]
        for phase, curve in zip(Phase, curves, strict=True):
            summary[f"{kind} {phase}"] = spread(curve)
        summary[f"{kind} prefill / decode"] = agreement(*(curve["mean"] for curve in curves))
    summary["all prefill / decode"] = agreement(*(means(seen, KINDS, phase) for phase in Phase))
    common = set.intersection(*({*_top(seen, phase)} for phase in Phase))
    summary[f"common among the top {TOP}"] = len(common)
    return summary


class View(NamedTuple):
    """What an observation looks at: parts of a layer, phases (None: all tokens), and a summary."""

    spans: tuple[Span, ...]
    phases: tuple[Phase | None, ...]
    summary: Callable[[pd.DataFrame], Numbers]


VIEWS: Mapping[str, View] = {
    "ob1": View(("layer",), (None,), _layers_summary),
    "ob2": View(KINDS, (None,), kinds_summary),
    "ob3": View(KINDS, tuple(Phase), phases_summary),
}


def full_attention(config: RunConfig) -> list[int]:
    """The layers that see the whole context, of a model of which others slide; empty for others."""
    kinds = () if config.model_path else model_spec(config.model_name).shape.get("layer_types", ())
    return [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]


def hybrid_summary(
    seen: pd.DataFrame, spans: Sequence[Span], full: Sequence[int]
) -> dict[str, Numbers]:
    """How layers with full and with sliding attention differ, per part of a layer."""
    summary = {}
    for span in spans:
        curve = layers(seen, span)
        is_full = curve.index.isin(full)
        summary[f"{span}, full attention"] = spread(curve[is_full])
        summary[f"{span}, sliding attention"] = spread(curve[~is_full])
    return summary


def observed(observation: str, config: RunConfig, open_model: OpenModel) -> Numbers:
    """What an observation says of one model, as its JSON has it.

    Args:
        observation: a key of `VIEWS`.
        config: resolved.
        open_model: loads the model; not called if everything is recorded.

    Returns:
        `tasks`: per task the mean, standard deviation and count per layer, and their summary.
        `between_tasks`: how far the curves of two tasks agree. `full_attention`: the layers whose
        attention does not slide, only of models that have both kinds.

    Raises:
        AdaskipError: the data, the model or an earlier record does not fit.
    """
    view, seen = VIEWS[observation], observe_tasks(config, open_model)
    full = full_attention(config)
    pooled = view.spans if full and None in view.phases else ()
    found: Numbers = {
        "tasks": {
            task: {
                "stands_in_for": stand_in(observation, task),
                "prompts": frame["id"].nunique(),
                "summary": view.summary(frame) | hybrid_summary(frame, pooled, full),
                "similarity": {
                    phase or "all": {
                        span: _columns(layers(frame, span, phase)) for span in view.spans
                    }
                    for phase in view.phases
                },
            }
            for task, frame in seen.items()
        },
        "between_tasks": between_tasks(seen, view.spans),
    }
    return found | ({"full_attention": full} if full else {})


def between_tasks(seen: Mapping[str, pd.DataFrame], spans: Sequence[Span]) -> Numbers:
    """How far the curves of two tasks agree, per pair of tasks."""
    curves = {task: means(frame, spans) for task, frame in seen.items()}
    return {f"{a} / {b}": agreement(curves[a], curves[b]) for a, b in combinations(curves, 2)}


def _columns(curve: pd.DataFrame) -> Numbers:
    columns: Numbers = curve[["mean", "std", "count"]].round(7).to_dict("list")
    return columns
