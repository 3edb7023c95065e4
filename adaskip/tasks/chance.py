"""Whether scores tell more than guessing: the one rule of tables, notes and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from adaskip.tasks.spec import task_spec

# Guessing reaches a score in more than this share of all draws: the score tells nothing.
DOUBT = 0.05


def at_chance(task: str, scores: Sequence[float]) -> bool:
    """Whether guessing would be as good in more than 5 % of draws: such rows compare nothing.

    A draw takes each row right with the task's chance (`TaskSpec.chance`), and is as good if at
    least as many rows are right as the scores sum up to, rounded up.

    Args:
        task: a name of `adaskip.tasks.spec.task_names()`.
        scores: of the rows of the dense model, 0..1.

    Returns:
        False where the task's chance is not known, and without a row.
    """
    chance, n = task_spec(task).chance, len(scores)
    if chance is None or not scores:
        return False
    reached = math.ceil(math.fsum(scores) - 1e-9)
    draws = (
        math.comb(n, right) * chance**right * (1 - chance) ** (n - right)
        for right in range(reached, n + 1)
    )
    return math.fsum(draws) > DOUBT
