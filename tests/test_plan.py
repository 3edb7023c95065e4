"""A sublayer or a plan that cannot be right is refused when it is made, not ignored when used."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import N_LAYERS, prompt, tiny_model

from adaskip import AdaskipError, FixedSkipping, SkipPlan, SkipPolicy, Step, Sublayer, skipping


@pytest.mark.parametrize("kind", ["mlp", "attention", "", None, ["attn"]])
def test_a_sublayer_is_attention_or_ffn(kind: Any) -> None:
    with pytest.raises(AdaskipError, match="kind is 'attn' or 'ffn', not"):
        Sublayer(1, kind)


@pytest.mark.parametrize("layer", [-1, True, 1.0, "1", None, torch.tensor(1), np.bool_(True)])
def test_a_layer_is_a_whole_number_from_zero(layer: Any) -> None:
    with pytest.raises(AdaskipError, match="whole number from 0 up, not"):
        Sublayer(layer, "ffn")


def test_a_layer_may_be_numpys() -> None:
    sublayer = Sublayer(np.int64(3), "ffn")
    assert sublayer == Sublayer(3, "ffn")
    assert type(sublayer.layer) is int


@pytest.mark.parametrize("key", [(1, "ffn"), "ffn1", 1, None])
def test_a_plan_is_of_sublayers(key: Any) -> None:
    with pytest.raises(AdaskipError, match="skips sublayers, not"):
        SkipPlan({key: None})


@pytest.mark.parametrize(
    "gains", [[Sublayer(1, "ffn")], {Sublayer(1, "ffn")}, None, Sublayer(1, "ffn")]
)
def test_a_plan_is_made_of_a_mapping(gains: Any) -> None:
    with pytest.raises(AdaskipError, match=r"not of a .*dict\.fromkeys"):
        SkipPlan(gains)


@pytest.mark.parametrize(
    "gain", [float("nan"), float("-inf"), "1.1", True, torch.tensor(1.1), np.array([1.1]), 1j]
)
def test_a_gain_is_a_finite_number(gain: Any) -> None:
    with pytest.raises(AdaskipError, match="gain of attn0 is a finite number or None, not"):
        SkipPlan({Sublayer(0, "attn"): gain})


def test_a_gain_may_be_numpys() -> None:
    plan = SkipPlan({Sublayer(0, "attn"): np.float32(1.5), Sublayer(1, "attn"): 2})
    assert plan == SkipPlan({Sublayer(0, "attn"): 1.5, Sublayer(1, "attn"): 2.0})
    assert all(type(gain) is float for gain in plan.gains.values())


class Growing(SkipPolicy):
    """Skips one FFN further down at every step, until it is below the model."""

    def plan(self, step: Step) -> SkipPlan:
        return SkipPlan({Sublayer(N_LAYERS - 2 + step.index, "ffn"): None})


def test_a_plan_beyond_the_model_is_refused_when_it_comes_up() -> None:
    model = tiny_model("llama")
    with skipping(model, Growing()) as session:
        with pytest.raises(AdaskipError, match=r"skips ffn4, but the model's layers are 0 to 3"):
            model.generate(prompt(6), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert session.plan == SkipPlan({Sublayer(3, "ffn"): None})


def test_a_fixed_plan_is_a_plan() -> None:
    with pytest.raises(AdaskipError, match="applies a SkipPlan, not a list"):
        FixedSkipping([Sublayer(1, "ffn")])  # type: ignore[arg-type]
