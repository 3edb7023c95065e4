"""How many warm-up prompts the chosen sublayers need, and how far they depend on their task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from adaskip.plan import all_sublayers
from adaskip.reports.observation_figures import Curve, Panel

RESAMPLES = 2000
Floats = npt.NDArray[np.float64]


def chosen(similarity: Floats, n_skip: int) -> npt.NDArray[np.bool_]:
    """Which sublayers ADA skips: the `n_skip` of highest similarity, ties by depth.

    Args:
        similarity: [..., 2L].
        n_skip: how many.

    Returns:
        True at the chosen: [..., 2L].
    """
    order = np.argsort(-similarity, axis=-1, kind="stable")[..., :n_skip]
    mask = np.zeros(similarity.shape, dtype=np.bool_)
    np.put_along_axis(mask, order, values=True, axis=-1)
    return mask


def resampled(requests: Floats, n_prompts: int, seed: int, n_resamples: int = RESAMPLES) -> Floats:
    """Profiles from `n_prompts` prompts drawn with replacement: [resamples, 2L].

    Args:
        requests: similarity per warm-up prompt, [prompts, 2L].
        n_prompts: how many are drawn for one profile.
        seed: of the draws.
        n_resamples: how many profiles.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(requests), (n_resamples, n_prompts))
    profiles: Floats = requests[drawn].mean(axis=1)
    return profiles


def overlap(one: Floats, other: Floats, n_skip: int) -> dict[str, float]:
    """Share of common sublayers among the chosen: mean and 95 % interval over resamples.

    Args:
        one: profiles, [resamples, 2L].
        other: likewise, or one profile, [2L].
        n_skip: sublayers chosen.
    """
    common = (chosen(one, n_skip) & chosen(other, n_skip)).sum(axis=-1) / n_skip
    low, high = np.quantile(common, [0.025, 0.975])
    return {
        "mean": round(float(common.mean()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }


def stability(
    requests: Mapping[str, Sequence[Sequence[float]]],
    prompts: Sequence[int],
    budgets: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """The report on one model.

    Args:
        requests: per warm-up task, the similarity of every sublayer in every prompt.
        prompts: numbers of warm-up prompts to compare with all of them.
        budgets: numbers of sublayers to choose.
        seed: of the bootstrap.

    Returns:
        `chosen`: the set from all prompts, per task and budget. `by_prompts`: overlap of a
        resampled profile's set with it, per task, budget and number of prompts. `between_tasks`:
        overlap of two tasks' sets, per budget and pair.
    """
    arrays = {task: np.asarray(rows, dtype=np.float64) for task, rows in requests.items()}
    return {
        "prompts": {task: len(array) for task, array in arrays.items()},
        "resamples": RESAMPLES,
        "chosen": {
            task: {str(budget): _names(array.mean(axis=0), budget) for budget in budgets}
            for task, array in arrays.items()
        },
        "by_prompts": {
            task: {
                str(budget): {
                    str(n): overlap(resampled(array, n, seed + n), array.mean(axis=0), budget)
                    for n in prompts
                }
                for budget in budgets
            }
            for task, array in arrays.items()
        },
        "between_tasks": {
            str(budget): _between(arrays, budget, max(prompts), seed) for budget in budgets
        },
    }


def _names(profile: Floats, n_skip: int) -> list[str]:
    mask = chosen(profile, n_skip)
    return [str(s) for s, is_in in zip(all_sublayers(len(mask) // 2), mask, strict=True) if is_in]


def _between(arrays: Mapping[str, Floats], n_skip: int, n: int, seed: int) -> dict[str, Any]:
    """Overlap of two tasks' sets; of a task's with its own tells what resampling alone leaves."""
    draws = {
        task: [resampled(array, n, seed + 1000 * (1 + index) + half) for half in (0, 1)]
        for index, (task, array) in enumerate(arrays.items())
    }
    found = {f"{a} / {a}": overlap(draws[a][0], draws[a][1], n_skip) for a in arrays}
    for a, b in combinations(arrays, 2):
        whole = overlap(arrays[a].mean(axis=0)[None], arrays[b].mean(axis=0), n_skip)
        pair = overlap(draws[a][0], draws[b][1], n_skip)
        found[f"{a} / {b}"] = pair | {"all_prompts": whole["mean"]}
    return found


def panels(model: str, report: Mapping[str, Any]) -> list[Panel]:
    """One panel per warm-up task, and one of the overlap between tasks."""
    drawn = []
    for task, budgets in report["by_prompts"].items():
        curves = []
        for style, (budget, by_prompts) in enumerate(budgets.items()):
            curves.append(
                _curve(f"{budget} sublayers chosen", [*by_prompts.values()], style, joined=True)
            )
        ticks = {float(i): n for i, n in enumerate(next(iter(budgets.values())))}
        title = f"{model}: against all {report['prompts'][task]} prompts, {task}"
        drawn.append(_panel(title, "warm-up prompts", curves, ticks))
    pairs = [*next(iter(report["between_tasks"].values()))]
    curves = [
        _curve(f"{budget} sublayers chosen", [*found.values()], style, joined=False)
        for style, (budget, found) in enumerate(report["between_tasks"].items())
    ]
    short = {float(i): " / ".join(map(_short, pair.split(" / "))) for i, pair in enumerate(pairs)}
    title = f"{model}: between warm-up tasks, {max(report['prompts'].values())} prompts each"
    drawn.append(_panel(title, "pair of tasks", curves, short))
    return drawn


def _short(task: str) -> str:
    """The beginning of a task's name, for a tick."""
    name = task.removeprefix("sample_")
    return name if len(name) <= 5 else f"{name[:5]}."


def _panel(title: str, x_label: str, curves: Sequence[Curve], ticks: Mapping[float, str]) -> Panel:
    """A panel of shares, all on one scale."""
    return Panel(
        title, x_label, "share of the same sublayers", tuple(curves), ticks, bounds=(0.48, 1.02)
    )


def _curve(label: str, found: Sequence[Mapping[str, float]], style: int, *, joined: bool) -> Curve:
    # Side by side, so that whiskers do not hide one another.
    x = [index + 0.12 * (style - 1) for index in range(len(found))]
    mean, low, high = ([each[key] for each in found] for key in ("mean", "low", "high"))
    # The mean of shares near 1 can lie below its own lower quantile: whiskers cannot be negative.
    low = [min(a, b) for a, b in zip(low, mean, strict=True)]
    high = [max(a, b) for a, b in zip(high, mean, strict=True)]
    return Curve(label, x, mean, style, low=low, high=high, joined=joined)
