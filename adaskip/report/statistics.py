"""How sure a difference of mean scores is: paired bootstrap intervals, seeded."""

from __future__ import annotations

from collections.abc import Mapping

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 2025


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
    import numpy as np

    common = [row for row in own if row in base]
    if len(common) < 2:
        return None
    differences = np.array([own[row] - base[row] for row in common])
    draws = np.random.default_rng(seed).integers(len(common), size=(resamples, len(common)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(differences[draws].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)
