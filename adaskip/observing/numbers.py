"""The numbers by which the paper's observations are judged."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from adaskip.observing.similarities import Moments, Similarities
from adaskip.plan import KINDS, Phase, all_sublayers
from adaskip.recorders import Span
from adaskip.tables import markdown_table, number

# How many sublayers the agreement of two rankings looks at: the paper's smallest budget.
TOP = 8
SPREAD = ("mean", "std", "min", "min_layer", "max", "max_layer", "mean_std_over_tokens")
AGREEMENT = (
    *("pearson", "pearson_without_layer_0", "spearman", "mean_difference", "largest_difference"),
)
Numbers = dict[str, Any]


def means(moments: Sequence[Moments]) -> list[float]:
    """The mean of each layer."""
    return [m.mean for m in moments]


def columns(moments: Sequence[Moments]) -> Numbers:
    """Mean, standard deviation and count of each layer, for JSON."""
    return {
        "mean": [round(m.mean, 7) for m in moments],
        "std": [round(m.deviation, 7) for m in moments],
        "count": [m.count for m in moments],
    }


def spread(moments: Sequence[Moments]) -> Numbers:
    """A curve over depth in a few numbers; `std` is over layers."""
    values = means(moments)
    return {
        "mean": round(statistics.fmean(values), 4),
        "std": round(statistics.pstdev(values), 4),
        "min": round(min(values), 4),
        "min_layer": values.index(min(values)),
        "max": round(max(values), 4),
        "max_layer": values.index(max(values)),
        "mean_std_over_tokens": round(statistics.fmean(m.deviation for m in moments), 4),
    }


def agreement(one: Sequence[Sequence[Moments]], other: Sequence[Sequence[Moments]]) -> Numbers:
    """How far two sets of curves agree: correlations of values and ranks, and distances.

    Layer 0 stands apart so far that it alone can make a correlation: it is also left out.

    Args:
        one: curves over the layers, one or more.
        other: as many; differences are `other - one`.
    """
    a, b = ([m.mean for curve in curves for m in curve] for curves in (one, other))
    inner = ([m.mean for curve in curves for m in curve[1:]] for curves in (one, other))
    differences = [y - x for x, y in zip(a, b, strict=True)]
    return {
        "pearson": _correlation(a, b),
        "pearson_without_layer_0": _correlation(*inner),
        "spearman": _correlation(_ranks(a), _ranks(b)),
        "mean_difference": round(statistics.fmean(differences), 4),
        "largest_difference": round(max(map(abs, differences)), 4),
    }


def _correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's; None where a curve is flat or has one point."""
    try:
        return round(statistics.correlation(a, b), 4)
    except statistics.StatisticsError:
        return None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    for rank, index in enumerate(order):
        ranks[index] = rank
    return ranks


def _top(seen: Similarities, phase: Phase | None) -> list[int]:
    """Positions of the `TOP` sublayers of highest similarity; ties by depth."""
    pairs = zip(*(means(seen.layers(kind, phase)) for kind in KINDS), strict=True)
    pool = [mean for pair in pairs for mean in pair]
    return sorted(range(len(pool)), key=lambda i: -pool[i])[:TOP]


def layers_summary(seen: Similarities) -> Numbers:
    """Observation 1: how much the layers differ."""
    return {"layer": spread(seen.layers("layer"))}


def kinds_summary(seen: Similarities) -> Numbers:
    """Observation 2: how attention and FFN differ."""
    attn, ffn = (seen.layers(kind) for kind in KINDS)
    sublayers = all_sublayers(len(attn))
    top = [sublayers[position] for position in _top(seen, None)]
    return {
        "attn": spread(attn),
        "ffn": spread(ffn),
        "attn / ffn": agreement([attn], [ffn]),
        "layers where attention is higher": sum(
            a > f for a, f in zip(means(attn), means(ffn), strict=True)
        ),
        f"attention among the top {TOP}": sum(s.kind == "attn" for s in top),
    }


def phases_summary(seen: Similarities) -> Numbers:
    """Observation 3: how prefill and decode differ."""
    summary: Numbers = {}
    for kind in KINDS:
        curves = [seen.layers(kind, phase) for phase in Phase]
        for phase, moments in zip(Phase, curves, strict=True):
            summary[f"{kind} {phase}"] = spread(moments)
        summary[f"{kind} prefill / decode"] = agreement(curves[:1], curves[1:])
    both = ([seen.layers(kind, phase) for kind in KINDS] for phase in Phase)
    summary["all prefill / decode"] = agreement(*both)
    common = {*_top(seen, Phase.PREFILL)} & {*_top(seen, Phase.DECODE)}
    summary[f"common among the top {TOP}"] = len(common)
    return summary


def between_tasks(seen: Sequence[Similarities], spans: Sequence[Span]) -> Numbers:
    """How far the curves of two tasks agree, per pair of tasks."""
    return {
        f"{one.task} / {other.task}": agreement(
            [one.layers(span) for span in spans], [other.layers(span) for span in spans]
        )
        for one, other in combinations(seen, 2)
    }


def as_text(summaries: Mapping[str, Numbers], between: Numbers) -> str:
    """The numbers as two tables and a list.

    Args:
        summaries: per task, of one of the functions above.
        between: of `between_tasks`.
    """
    named = [
        (f"{task}, {name}", values)
        for task, summary in summaries.items()
        for name, values in summary.items()
    ] + [*between.items()]
    tables = []
    for first, header in (("IO similarity", SPREAD), ("agreement", AGREEMENT)):
        lines = [
            [name, *(_cell(values[key]) for key in header)]
            for name, values in named
            if isinstance(values, dict) and header[0] in values
        ]
        if lines:
            shown = [key.replace("_", " ") for key in header]
            tables.append(markdown_table([first, *shown], lines))
    counts = [f"- {name}: {value}" for name, value in named if not isinstance(value, dict)]
    return "\n\n".join([*tables, "\n".join(counts)]).rstrip()


def _cell(value: float | None) -> str:
    return str(value) if isinstance(value, int) else number(value, 4)
