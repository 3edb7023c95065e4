"""Measuring by turns: every kind in every round, compared within its round."""

from __future__ import annotations

from collections import Counter

import pytest

from adaskip.profiling.interleaving import BASELINE_REPEATS, MIN_ROUNDS, Ratio, by_turns


def test_every_kind_runs_in_every_round_in_another_order() -> None:
    calls: list[str] = []
    kinds = {name: lambda name=name: calls.append(name) or len(calls) for name in "abcdef"}
    rounds = list(by_turns(kinds, rounds=4, baselines=["a"], progress=False))
    assert len(rounds) == 4
    per_round = len(kinds) - 1 + BASELINE_REPEATS
    orders = [calls[i : i + per_round] for i in range(0, len(calls), per_round)]
    for taken, order in zip(rounds, orders, strict=True):
        assert Counter(order) == Counter("aaabcdef")
        assert {name: len(values) for name, values in taken.items()} == Counter(order)
    assert len({tuple(order) for order in orders}) == 4
    # What a call returned stands under its own name, in its own round.
    assert calls[rounds[2]["d"][0] - 1] == "d"
    assert 2 * per_round < rounds[2]["d"][0] <= 3 * per_round


def test_a_time_limit_leaves_the_fewest_rounds() -> None:
    rounds = list(by_turns({"a": lambda: 1}, rounds=50, seconds=0, progress=False))
    assert len(rounds) == MIN_ROUNDS
    assert len(list(by_turns({"a": lambda: 1}, rounds=2, seconds=0, progress=False))) == 2


def test_ratio_is_of_rounds_not_of_medians() -> None:
    # The machine is twice as slow in the second round and thrice in the third.
    own, base = [8.0, 16.0, 27.0], [10.0, 20.0, 30.0]
    ratio = Ratio.paired(own, base)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((0.8, 0.8, 0.9))
    assert ratio.text(2) == "0.80 [0.80–0.90]"
