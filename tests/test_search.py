"""The search: its loss against whole forwards, its choices, its budget, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import N_LAYERS, prompt, tiny_model
from test_families import CELLS
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from adaskip import AdaskipError, Linear, SkipPlan, Sublayer, search_plan, skipping
from adaskip.plan import Phase, all_sublayers
from adaskip.search.losses import Losses, Row
from adaskip.streams import Sublayers, measuring
from adaskip.sublayer_times import SublayerTimes

ROWS: list[Row] = [
    (prompt(40, seed=2), prompt(7, seed=3)),
    (prompt(31, seed=4)[0], [5, 6, 7]),
]
EVERY = all_sublayers(N_LAYERS)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module", params=CELLS, ids=["-".join(cell) for cell in CELLS])
def cell(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(*request.param)


def times(attn: float = 2.0, ffn: float = 1.0, other: float = 3.0) -> SublayerTimes:
    seconds = {s: attn if s.kind == "attn" else ffn for s in EVERY}
    return SublayerTimes(sum(seconds.values()) + other, seconds, Phase.PREFILL, 40, 1)


@torch.no_grad()
def divergence(model: PreTrainedModel, plan: SkipPlan) -> float:
    """Nats per answer token from whole forwards of the model."""
    total, count = 0.0, 0
    for row in ROWS:
        question, answer = (torch.as_tensor(part).flatten() for part in row)
        ids = torch.cat([question, answer])[None, :-1]
        dense = log_softmax(model(ids).logits[0, -len(answer) :].float(), dim=-1)
        with skipping(model, plan):
            found = log_softmax(model(ids).logits[0, -len(answer) :].float(), dim=-1)
        total += float(kl_div(found, dense, reduction="sum", log_target=True))
        count += len(answer)
    return total / count


def test_a_loss_is_that_of_whole_forwards(cell: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = Linear(torch.randn(32, 32, generator=generator) * 0.1, torch.zeros(32))
    first: dict[Sublayer, Any] = {Sublayer(2, "attn"): 1.1, Sublayer(1, "ffn"): linear}
    with measuring(cell):
        losses = Losses(Sublayers(cell), ROWS)
        assert losses.loss({}) == pytest.approx(0, abs=1e-5)
        for sublayer, replacement in first.items():
            losses.accept({sublayer: replacement})
        assert losses.loss({}) == pytest.approx(divergence(cell, SkipPlan(first)), rel=1e-3)
        more = {Sublayer(0, "ffn"): None}
        expected = divergence(cell, SkipPlan(first | more))
        assert losses.loss(more) == pytest.approx(expected, rel=1e-3)
        rest = {s: r for s, r in first.items() if s.layer != 1}
        expected = divergence(cell, SkipPlan(rest | more))
        assert losses.loss(more, dropped=Sublayer(1, "ffn")) == pytest.approx(expected, rel=1e-3)
        losses.accept(more, dropped=Sublayer(1, "ffn"))
        assert losses.plan == rest | more
        assert losses.loss({}) == pytest.approx(expected, rel=1e-3)
    assert all("forward" not in vars(layer) for layer in cell.model.layers)


def test_the_first_choice_is_the_best_by_loss_per_second(model: PreTrainedModel) -> None:
    with measuring(model):
        losses = Losses(Sublayers(model), ROWS)
        per_second = {
            s: losses.loss({s: losses.gain(s)}) / (2.0 if s.kind == "attn" else 1.0) for s in EVERY
        }
    best = min(per_second, key=lambda s: (per_second[s], s.position))
    plan = search_plan(
        model, ROWS, acceleration=1.01, times=times(), replacements=["gain"], exchanges=0
    )
    assert list(plan) == [best]
    assert plan.about["loss"] == pytest.approx(divergence(model, plan), rel=1e-3)


@pytest.mark.parametrize("acceleration", [1.1, 1.5, 2.5])
def test_a_plan_meets_its_budget_by_the_times(model: PreTrainedModel, acceleration: float) -> None:
    plan = search_plan(model, ROWS, acceleration=acceleration, times=times(), replacements=["gain"])
    predicted = times().speedup(plan)
    assert predicted >= acceleration
    assert plan.about["predicted acceleration"] == pytest.approx(predicted)
    again = search_plan(
        model, ROWS, acceleration=acceleration, times=times(), replacements=["gain"]
    )
    assert again == plan
    # Without its least saving sublayer it would miss the budget, or exchange found it better.
    assert all(isinstance(gain, float) for gain in plan.values())


def test_exchange_only_lowers_the_loss(model: PreTrainedModel) -> None:
    options: Any = {"acceleration": 1.6, "times": times(), "replacements": ["gain"]}
    greedy = search_plan(model, ROWS, exchanges=0, **options)
    swapped = search_plan(model, ROWS, exchanges=40, **options)
    assert swapped.about["loss"] <= greedy.about["loss"]
    assert times().speedup(swapped) >= 1.6


def test_linear_maps_are_fitted_last_and_lose_less(model: PreTrainedModel) -> None:
    # With as many tokens as the fit needs.
    rows = [(prompt(90, seed=2), prompt(7, seed=3)), (prompt(80, seed=4), prompt(5, seed=5))]
    options: Any = {"acceleration": 1.5, "times": times(1e3, 1e3, 1.0)}
    gains = search_plan(model, rows, replacements=["gain"], **options)
    linears = search_plan(model, rows, rank=16, **options)
    assert list(linears) == list(gains)
    assert all(isinstance(linear, Linear) for linear in linears.values())
    assert linears.about["loss"] < gains.about["loss"]


def test_keys_and_values_are_a_budget_too(model: PreTrainedModel) -> None:
    options: Any = {"acceleration": 1.05, "times": times(1, 2), "replacements": ["gain"]}
    plan = search_plan(model, ROWS, kv_share=0.5, **options)
    assert len(plan.layers("attn")) >= N_LAYERS // 2


def test_times_are_measured_where_none_are_given(
    model: PreTrainedModel, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADASKIP_CACHE", str(tmp_path))
    plan = search_plan(model, ROWS, acceleration=1.05, phase="decode", replacements=["gain"])
    assert (plan.about["phase"], plan.about["context"]) == ("decode", 40)
    plan.save(tmp_path / "plan.safetensors")
    assert SkipPlan.load(tmp_path / "plan.safetensors").about == plan.about


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acceleration": 100}, r"cannot be reached in prefill at 40 tokens; .* best is 5\.00"),
        ({"acceleration": 0.5}, "give a ratio of times"),
        ({"replacements": ["window"]}, "Unknown replacement 'window'"),
        ({"replacements": "gain"}, "give a sequence"),
        ({"replacements": []}, "give a sequence"),
        ({"rank": 33}, "from 1 to 32"),
        ({"kv_share": 0}, "above 0, up to 1"),
        ({"calibration": []}, "No calibration row"),
        ({"calibration": [(prompt(5), [])]}, "no prompt or no answer tokens"),
        ({"calibration": [(prompt(5), [3, 4])], "replacements": ["linear"]}, "at least 33 tokens"),
    ],
)
def test_what_cannot_be_searched(
    model: PreTrainedModel, options: dict[str, Any], message: str
) -> None:
    given = {"calibration": ROWS, "times": times(), "replacements": ["gain"]} | options
    with pytest.raises(AdaskipError, match=message):
        search_plan(model, given.pop("calibration"), **given)
