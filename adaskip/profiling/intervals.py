"""How sure a mean or a median is: intervals of 95 %."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adaskip.chance import SEED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 10_000


def paired_interval(
    own: Mapping[str, float],
    base: Mapping[str, float],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval of the mean difference over rows both runs have.

    Rows are drawn with replacement as pairs, so that what makes a row hard for both runs cancels.

    Args:
        own: score by row id.
        base: score by row id of the run compared with.
        resamples: bootstrap samples.
        seed: of the draws; the same rows give the same interval.

    Returns:
        Lower and upper end, in the unit of the scores; None with fewer than two common rows.
    """
    differences = [own[row] - base[row] for row in own if row in base]
    if len(differences) < 2:
        return None
    return bootstrap(differences, lambda drawn: drawn.mean(axis=1), resamples=resamples, seed=seed)


def bootstrap(
    rows: Sequence[Any],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a statistic of rows, drawn with replacement.

    Args:
        rows: a number each, or several.
        statistic: from draws [resamples, rows, ...] to one number of each.
        resamples: bootstrap samples.
        seed: of the draws; the same rows give the same interval.
    """
    import numpy as np

    values = np.array(rows)
    return central(statistic(values[draws(len(values), resamples=resamples, seed=seed)]))


def draws(
    n: int, *, resamples: int = RESAMPLES, seed: int | Sequence[int] = SEED
) -> NDArray[np.int64]:
    """Which of `n` rows each bootstrap sample has, drawn with replacement: [resamples, n]."""
    import numpy as np

    return np.random.default_rng(seed).integers(n, size=(resamples, n))


def central(drawn: NDArray[np.float64]) -> tuple[float, float]:
    """Between which values 95 % of a statistic of all bootstrap samples lie: `drawn` is flat."""
    import numpy as np

    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a median, whatever the distribution: two of the ordered values.

    The k-th lowest and the k-th highest value enclose the median unless fewer than k values fall on
    one side of it, so k is the largest number for which that has a probability of at most 5 %.
    Fewer than 6 values cannot say that much: theirs is the lowest and the highest.
    """
    ordered = sorted(values)
    n, k, outside = len(ordered), 0, 0.0
    while k < n // 2:
        outside += 2 * math.comb(n, k) / 2**n
        if outside > 1 - CONFIDENCE:
            break
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]
