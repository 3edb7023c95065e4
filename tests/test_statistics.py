"""Intervals of means and medians: worked cases, and that they cover what they should."""

from __future__ import annotations

import math
import random

import pytest

from adaskip.leaderboard.comparing import ratio_interval
from adaskip.profiling.intervals import median_interval, paired_interval


def test_equal_differences_leave_no_doubt() -> None:
    own, base = {"a": 0.5, "b": 1.0, "c": 0.25}, {"c": 0.5, "b": 1.25, "a": 0.75}
    assert paired_interval(own, base) == (-0.25, -0.25)


def test_two_rows_by_hand() -> None:
    # Means of two draws from {0, 1}: 0, 1/2, 1 with chances 1/4, 1/2, 1/4.
    assert paired_interval({"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 0.0}) == (0.0, 1.0)


def test_only_common_rows_count_and_one_is_not_enough() -> None:
    assert paired_interval({"a": 1.0, "b": 1.0}, {"a": 0.0, "x": 0.0}) is None
    assert paired_interval({"a": 1.0, "b": 1.0, "z": 9.0}, {"a": 0.0, "b": 0.0}) == (1.0, 1.0)


def test_a_row_weighs_by_what_it_is_divided_by() -> None:
    # The long row is in 64 % of the draws and then outweighs the 19 others.
    found = ratio_interval([(5e5, 1e6), *[(0.0, 1.0)] * 19])
    assert found is not None
    assert (found[0], round(found[1], 3)) == (0.0, 0.5)
    assert ratio_interval([(1.0, 2.0)]) is None
    assert ratio_interval([(1.0, 0.0), (1.0, 2.0)]) is None


def test_it_is_seeded() -> None:
    generator = random.Random(1)
    own = {str(n): generator.random() for n in range(20)}
    base = {str(n): generator.random() for n in range(20)}
    assert paired_interval(own, base) == paired_interval(own, base)
    assert paired_interval(own, base, seed=1) != paired_interval(own, base, seed=2)


def test_it_covers_the_true_difference_about_as_often_as_it_says() -> None:
    generator = random.Random(3)
    covered = 0
    for _ in range(400):
        own = {str(n): generator.gauss(0.1, 1.0) for n in range(40)}
        found = paired_interval(own, dict.fromkeys(own, 0.0), resamples=1000)
        assert found is not None
        covered += found[0] <= 0.1 <= found[1]
    assert covered / 400 == pytest.approx(0.94, abs=0.03)


def test_interval_of_a_median_by_hand() -> None:
    # 2 / 2**5 = 6 % and 2 / 2**6 = 3 %: six values are the fewest whose ends say 95 %.
    assert median_interval([3, 1, 2]) == (1, 3)
    assert median_interval([7]) == (7, 7)
    assert median_interval([6, 5, 4, 3, 2, 1]) == (1, 6)
    # 2 * (1 + 8) / 2**8 = 7 %, 2 * (1 + 9) / 2**9 = 4 %.
    assert median_interval(range(1, 9)) == (1, 8)
    assert median_interval(range(1, 10)) == (2, 8)


def test_interval_of_a_median_covers_it() -> None:
    generator = random.Random(5)
    covered = 0
    for _ in range(1000):
        low, high = median_interval([generator.expovariate(1.0) for _ in range(15)])
        covered += low <= math.log(2) <= high
    assert covered / 1000 == pytest.approx(0.965, abs=0.02)  # 15 values: 1 - 2 * 576 / 2**15
