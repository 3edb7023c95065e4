"""How many warm-up prompts the chosen sublayers need, and how far they depend on their task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from adaskip.configuration import read_config
from adaskip.errors import AdaskipError
from adaskip.observing.recording import OpenModel, observe_requests
from adaskip.plan import all_sublayers
from adaskip.runs.runconfig import RunConfig

RESAMPLES = 2000
Floats = npt.NDArray[np.float64]


def measured_stability(config: RunConfig, open_model: OpenModel) -> dict[str, Any]:
    """What `stability` returns, for one model and the tasks of a configuration.

    Raises:
        AdaskipError: the data, the model or an earlier record does not fit.
    """
    facts = read_config("observations.yaml")
    asked = facts["warmup_prompts"]
    prompts = [n for n in asked if config.limit is None or n <= config.limit]
    if not prompts:
        raise AdaskipError(
            f"--limit is {config.limit}; how stable a choice is takes {min(asked)} rows or more of "
            f"each task ({max(asked)} without a limit)."
        )
    most = max(prompts)
    config = dataclasses.replace(config, limit=most)
    requests = {t: observe_requests(config, t, open_model, most) for t in config.tasks}
    return stability(requests, prompts, facts["chosen_sublayers"], config.seed)


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
    values = {"mean": common.mean(), "low": low, "high": high}
    return {name: round(float(value), 4) for name, value in values.items()}


def stability(
    requests: Mapping[str, Sequence[Sequence[float]]],
    prompts: Sequence[int],
    budgets: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """How stable the chosen sublayers of one model are.

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
