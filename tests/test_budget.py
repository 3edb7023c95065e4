"""Sublayers for an acceleration ratio: worked numbers, the exact knapsack, AdaSkip's option."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import N_LAYERS, prompt, tiny_model

from adaskip import AdaSkip, AdaskipError, Importance, Sublayer, learn_importance, skipping
from adaskip.budget import sublayers_for
from adaskip.plan import Phase, all_sublayers
from adaskip.profiling.calibration import identity, measured_times
from adaskip.profiling.clock import ClockedRequests, SublayerClock, sublayer_types
from adaskip.speedtest.budget_check import check_budgets
from adaskip.sublayer_times import SublayerTimes, combined


def importance(similarities: Sequence[float]) -> Importance:
    """In depth order: attn0, ffn0, attn1, ..."""
    sublayers = all_sublayers(len(similarities) // 2)
    values = dict(zip(sublayers, similarities, strict=True))
    ones = dict.fromkeys(sublayers, 1.0)
    return Importance(values, ones, ones, fingerprint="x", n_requests=1, n_tokens=1)


def times(seconds: Sequence[float], rest: float = 0.0) -> SublayerTimes:
    values = dict(zip(all_sublayers(len(seconds) // 2), seconds, strict=True))
    return SublayerTimes(sum(seconds) + rest, values, Phase.PREFILL, context=1024)


# attn 3 s each, ffn 1 s each, 4 s of the rest: T = 12.
SIMILARITY = importance([0.80, 0.99, 0.90, 0.95])
TIMES = times([3, 1, 3, 1], rest=4)


@pytest.mark.parametrize(
    ("acceleration", "expected"),
    [
        (1.0, []),
        (12 / 11, ["ffn0"]),  # saves exactly 1 of 12
        (1.10, ["ffn0", "ffn1"]),
        (12 / 10, ["ffn0", "ffn1"]),
        (1.21, ["ffn0", "ffn1", "attn1"]),
        (12 / 4, ["ffn0", "ffn1", "attn1", "attn0"]),
    ],
)
def test_takes_by_rank_until_reached(acceleration: float, expected: list[str]) -> None:
    chosen = sublayers_for(SIMILARITY, TIMES, acceleration)
    assert [str(s) for s in chosen] == expected
    assert TIMES.speedup(chosen) >= acceleration - 1e-9


def test_knapsack_takes_one_large_for_many_small() -> None:
    # 3 of 12 s to save: ffn0 + ffn1 + attn1 by rank; attn1 alone loses 0.10 instead of 0.16.
    by_rank = sublayers_for(SIMILARITY, TIMES, 12 / 9)
    best = sublayers_for(SIMILARITY, TIMES, 12 / 9, "knapsack")
    assert [str(s) for s in by_rank] == ["ffn0", "ffn1", "attn1"]
    assert [str(s) for s in best] == ["attn1"]


@pytest.mark.parametrize("seed", range(8))
def test_knapsack_is_exact(seed: int) -> None:
    rng = random.Random(seed)
    similarity = importance([rng.uniform(0.5, 1) for _ in range(10)])
    measured = times([rng.uniform(0.1, 2) for _ in range(10)], rest=1.0)
    acceleration = rng.uniform(1.05, 2.5)
    chosen = sublayers_for(similarity, measured, acceleration, "knapsack")

    def loss(sublayers: Sequence[Sublayer]) -> float:
        return sum(1 - similarity.similarity[s] for s in sublayers)

    every = itertools.chain.from_iterable(
        itertools.combinations(similarity.similarity, n) for n in range(11)
    )
    reached = [s for s in every if measured.speedup(s) >= acceleration]
    assert measured.speedup(chosen) >= acceleration
    assert loss(chosen) == pytest.approx(min(map(loss, reached)))


@pytest.mark.parametrize("select", ["rank", "knapsack"])
def test_a_ratio_that_is_reached_exactly_is_reached(select: str) -> None:
    chance = random.Random(5)
    learned = importance([0.9 - 0.1 * i for i in range(8)])
    for _ in range(200):
        given = times([chance.random() for _ in range(8)], rest=chance.random())
        for n in range(1, 9):
            leading = learned.ranking()[:n]
            found = sublayers_for(learned, given, given.speedup(leading), select)
            assert given.speedup(found) == pytest.approx(given.speedup(leading), rel=1e-9) or (
                select == "knapsack" and given.speedup(found) > given.speedup(leading)
            )
            if select == "rank":
                assert found == leading


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(AdaskipError, match=r"3\.1 cannot be reached .* gives 3\.00"):
        sublayers_for(SIMILARITY, TIMES, 3.1)
    for acceleration in (0.9, float("nan"), float("inf"), "1.2", True):
        with pytest.raises(AdaskipError, match="is none; give a ratio"):
            sublayers_for(SIMILARITY, TIMES, acceleration)
    with pytest.raises(AdaskipError, match="Did you mean 'knapsack'"):
        sublayers_for(SIMILARITY, TIMES, 1.1, "knapsac")  # type: ignore[arg-type]
    with pytest.raises(AdaskipError, match="model of 1 layers"):
        sublayers_for(SIMILARITY, times([1, 1]), 1.1)


def test_combined_scales_clocked_shares_to_plain_time() -> None:
    attn, ffn = Sublayer(0, "attn"), Sublayer(0, "ffn")
    forwards = [{attn: 6.0, ffn: 2.0}, {attn: 8.0, ffn: 2.0}, {attn: 7.0, ffn: 5.0}]
    result = combined([10, 9, 11], forwards, [20, 20, 20], phase=Phase.DECODE, context=7, batch=2)
    assert result.total == 10
    assert result.seconds == {attn: 3.5, ffn: 1.0}
    assert SublayerTimes.from_dict(result.as_dict()) == result
    with pytest.raises(AdaskipError, match="damaged"):
        SublayerTimes.from_dict({"version": 1})
    for changes in ({"phase": "x"}, {"total": "many"}, {"context": math.inf}):
        with pytest.raises(AdaskipError, match="damaged"):
            SublayerTimes.from_dict(result.as_dict() | changes)


def test_sublayers_of_one_kind_differ_by_what_they_see_and_compute() -> None:
    types = sublayer_types(tiny_model("gemma2", "eager"))
    assert [types[s] for s in types if s.kind == "attn"] == [
        f"Gemma2Attention {seen}" for seen in 2 * ["sliding_attention", "full_attention"]
    ]
    assert len({types[s] for s in types if s.kind == "ffn"}) == 1
    # The first layer's FFN has no experts.
    experts = sublayer_types(tiny_model("qwen3_moe", mlp_only_layers=[0]))
    ffns = [name.split()[0] for s, name in experts.items() if s.kind == "ffn"]
    assert ffns == ["Qwen3MoeMLP", *(N_LAYERS - 1) * ["Qwen3MoeSparseMoeBlock"]]
    # What a layer of an exported model lacks is of no type.
    model = tiny_model("llama")
    del model.model.layers[1].mlp
    assert sublayer_types(model)[Sublayer(1, "ffn")].split() == ["NoneType"]


@pytest.mark.parametrize(
    ("family", "one", "other"),
    [
        ("mistral", {"sliding_window": 8}, {"sliding_window": None}),
        ("qwen3_moe", {"num_experts_per_tok": 2}, {"num_experts_per_tok": 1}),
        (
            "llama",
            {"num_attention_heads": 4, "head_dim": 8},
            {"num_attention_heads": 8, "head_dim": 4},
        ),
    ],
)
def test_times_of_one_model_are_not_those_of_another_of_the_same_weights(
    family: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    attention = "eager" if family == "mistral" else "sdpa"
    told = [identity(tiny_model(family, attention, **changes)) for changes in (one, other, one)]
    assert told[0] == told[2] != told[1]


def test_times_go_by_where_weights_lie_and_in_which_form() -> None:
    plain = identity(tiny_model("llama"))
    # Times that are kept of a model on one device go by these.
    assert len(plain) == 7
    assert identity(dispatch_model(tiny_model("llama"), {"": "cpu"}, force_hooks=True)) == plain
    offloaded = cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))
    mixed, quantized, split = (tiny_model("llama") for _ in range(3))
    mixed.model.layers[1].mlp.up_proj.bfloat16()
    quantized.config.quantization_config = {"quant_method": "hqq", "nbits": 4}
    add_hook_to_module(split.model.layers[1], AlignDevicesHook("meta"))
    told = [identity(model) for model in (offloaded, mixed, quantized, split)]
    assert len({*map(tuple, [plain, *told])}) == 5


def test_layers_of_one_type_get_their_mean() -> None:
    layers = all_sublayers(3)
    forward = dict(zip(layers, [1.0, 5.0, 3.0, 7.0, 9.0, 9.0], strict=True))
    kinds = ["full", "mlp", "full", "mlp", "sliding", "experts"]
    arguments = {"phase": Phase.PREFILL, "context": 7, "batch": 1}
    result = combined(
        [40], [forward], [40], types=dict(zip(layers, kinds, strict=True)), **arguments
    )
    assert list(result.seconds.values()) == [2, 6, 2, 6, 9, 9]


@pytest.mark.parametrize("select", ["rank", "knapsack"])
def test_adaskip_takes_an_acceleration(select: str) -> None:
    model = tiny_model("llama")
    learned = learn_importance(model, [prompt(30)])
    measured = times([2, 1] * N_LAYERS)
    policy = AdaSkip(learned, acceleration=1.3, times=measured, select=select, online=False)
    expected = sublayers_for(learned, measured, 1.3, select)
    with skipping(model, policy) as session:
        model(prompt(5))
    assert set(session.plan.gains) == set(expected)
    assert policy.threshold == min(learned.similarity[s] for s in expected)


def test_an_acceleration_needs_times_and_nothing_is_measured_on_entering() -> None:
    model = tiny_model("llama")
    policy = AdaSkip(learn_importance(model, [prompt(30)]), acceleration=1.1)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(AdaskipError, match="give times=measured_times"), skipping(model, policy):
        pass
    measured = times([2, 1] * N_LAYERS)
    with skipping(model, AdaSkip(policy.importance, acceleration=1.1, times=measured)):
        pass


def test_adaskip_takes_one_budget() -> None:
    for arguments in ({}, {"n_skip": 4, "acceleration": 1.1}):
        with pytest.raises(AdaskipError, match="takes one budget"):
            AdaSkip(SIMILARITY, **arguments)
    with pytest.raises(AdaskipError, match="Unknown select 'best'"):
        AdaSkip(SIMILARITY, acceleration=1.1, select="best")  # type: ignore[arg-type]
    assert AdaSkip(SIMILARITY, 3).threshold == 0.90


def test_a_model_whose_weights_lie_elsewhere_is_timed_where_it_computes(tmp_path: Path) -> None:
    offloaded = cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))
    assert offloaded.device.type == "meta"
    assert SublayerClock(offloaded)._device.type == "cpu"
    assert identity(offloaded)[0] == identity(tiny_model("llama"))[0]
    assert measured_times(offloaded, "prefill", 24, folder=tmp_path).total > 0


def test_timestamps_go_into_the_stream_of_the_model_s_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Stands in for CUDA's: on the current device all of them would be those of an idle one.
    marks: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            marks.append(stream)

    model = tiny_model("llama")
    clock = SublayerClock(model)
    clock._device = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", str)
    with clock.running():
        model(prompt(4))
    assert marks == ["cuda:1"] * (2 * N_LAYERS + 1)


def test_a_step_s_sublayers_are_their_mean_over_the_request() -> None:
    requests = ClockedRequests(tiny_model("llama"), prompt(6), 3)
    steps = [dict.fromkeys(all_sublayers(N_LAYERS), seconds) for seconds in (9.0, 1.0, 1.0, 4.0)]
    requests._clock.read = lambda: steps  # type: ignore[method-assign]
    requests.request()
    assert {*requests.forwards[Phase.PREFILL][0].values()} == {9.0}
    assert [{*each.values()} for each in requests.forwards[Phase.DECODE]] == [{2.0}]


def test_times_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    first = measured_times(model, "prefill", 24, folder=tmp_path)
    assert sorted(p.name.split("-")[1] for p in tmp_path.iterdir()) == ["decode", "prefill"]
    assert first.saved(first.seconds) <= 1.05 * first.total
    assert set(first.seconds) == set(all_sublayers(N_LAYERS))
    with monkeypatch.context() as patch:
        patch.setattr(
            "adaskip.profiling.calibration.measure_sublayers", lambda *_, **__: pytest.fail("again")
        )
        assert measured_times(model, Phase.PREFILL, 24, folder=tmp_path) == first
        assert measured_times(model, "decode", 24, folder=tmp_path).phase is Phase.DECODE
    # Another context, another dtype: other times. A damaged file: measured anew.
    for path in tmp_path.iterdir():
        path.write_text("{")
    measured_times(model, "decode", 24, folder=tmp_path)
    measured_times(model, "decode", 25, folder=tmp_path)
    measured_times(model.to(torch.bfloat16), "decode", 24, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6
    with pytest.raises(AdaskipError, match="Unknown phase"):
        measured_times(model, "training", 24, folder=tmp_path)
    with pytest.raises(AdaskipError, match="1 or more"):
        measured_times(model, "decode", 0, folder=tmp_path)


def test_prediction_is_compared_with_measurement() -> None:
    rows = check_budgets(tiny_model("llama"), 16, [1.02], n_steps=2, rounds=1)
    assert [(row["phase"], row["select"]) for row in rows] == [
        ("prefill", "rank"),
        ("prefill", "knapsack"),
        ("decode", "rank"),
        ("decode", "knapsack"),
    ]
    for row in rows:
        assert row["predicted"] >= 1.02
        assert row["off_points"] == pytest.approx(
            100 * (row["measured"]["median"] - row["predicted"])
        )
        assert 1 <= row["attn"] + row["ffn"] <= 2 * N_LAYERS
