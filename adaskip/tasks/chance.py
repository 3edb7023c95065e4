"""Whether scores tell more than guessing: the one rule of tables, notes and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from adaskip.tasks.spec import task_spec

# Guessing reaches a score in more than this share of all draws: the score tells nothing.
DOUBT = 0.05


def at_chance(task: str, scores: Sequence[float]) -> bool:
    """Whether guessing would be as good in more than 5 % of draws: such rows compare nothing.

    A draw takes each row right with the task's chance (`TaskSpec.chance`), or, where a row asks for
    several answers, as many at random of what its context offers; it is as good if at least as much
    is right as the scores sum up to, rounded up.

    Args:
        task: a name of `adaskip.tasks.spec.task_names()`.
        scores: of the rows of the dense model, 0..1.

    Returns:
        False where the task's chance is not known, and without a row.
    """
    spec = task_spec(task)
    if spec.chance is None or not scores:
        return False
    import numpy as np

    row, total = np.array(_by_hits(spec.chance, spec.n_answers)), np.ones(1)
    for _ in scores:
        total = np.convolve(total, row)
    reached = math.ceil(spec.n_answers * math.fsum(scores) - 1e-9)
    return math.fsum(total[reached:]) > DOUBT


def _by_hits(chance: float, n_answers: int) -> list[float]:
    """The probability that guessing finds 0, 1, 2, ... of a row's answers."""
    if n_answers == 1:
        return [1 - chance, chance]
    offered = round(n_answers / chance)
    return [
        math.comb(n_answers, hits)
        * math.comb(offered - n_answers, n_answers - hits)
        / math.comb(offered, n_answers)
        for hits in range(n_answers + 1)
    ]
