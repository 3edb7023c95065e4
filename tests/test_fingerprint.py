"""A fingerprint tells models apart by their weights, and no two precisions of one model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import N_LAYERS, tiny_model
from torch import nn
from transformers import PreTrainedModel

from adaskip.blocks import BLOCKS
from adaskip.fingerprint import fingerprint_name, model_fingerprint, same_model

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def family_model(family: str, seed: int = 0) -> PreTrainedModel:
    return tiny_model(family, "eager", seed)


@pytest.mark.parametrize("family", BLOCKS)
def test_every_precision_of_a_model_is_that_model(family: str) -> None:
    # What is rounded is the same in all families; which weights are looked at is not.
    for seed in range(20 if family == "llama" else 2):
        whole = family_model(family, seed)
        made = [model_fingerprint(copy.deepcopy(whole).to(dtype)) for dtype in PRECISIONS]
        # fp16 weights that went through fp32 and on to bf16 are rounded twice.
        twice = whole.half().to(torch.bfloat16)
        for one, other in itertools.permutations([*made, model_fingerprint(twice)], 2):
            assert same_model(one, other)
    assert made[0] != made[2]  # they do round differently


@pytest.mark.parametrize("scale", [0.02, 1e-4, 1e-6])
def test_small_weights_in_every_precision(scale: float) -> None:
    made = []
    for dtype in PRECISIONS:
        model = tiny_model("llama")
        for parameter in model.parameters():
            parameter.data *= scale
        made.append(model_fingerprint(model.to(dtype)))
    assert all(same_model(one, other) for one, other in itertools.permutations(made, 2))


def low_rank(weight: torch.Tensor) -> torch.Tensor:
    """What merging a rank-2 LoRA adds, 3 % of the weight's norm."""
    a, b = torch.randn(weight.shape[0], 2), torch.randn(2, weight.shape[1])
    return a @ b * (0.03 * weight.norm() / (a @ b).norm())


@pytest.mark.parametrize("part", ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"])
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_a_change_of_one_matrix_is_another_model(part: str, layer: int) -> None:
    model = tiny_model("llama")
    before = model_fingerprint(model)
    (matrix,) = (m for name, m in model.model.layers[layer].named_modules() if part in name)
    with torch.no_grad():
        matrix.weight += low_rank(matrix.weight)
    assert not same_model(before, model_fingerprint(model))
    assert fingerprint_name(before) != fingerprint_name(model_fingerprint(model))


@pytest.mark.parametrize("relative", [0.01, 0.002])
def test_a_small_change_everywhere_is_another_model(relative: float) -> None:
    model = tiny_model("llama")
    before = model_fingerprint(model)
    with torch.no_grad():
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.weight += torch.randn_like(module.weight) * 0.25 * relative
    assert not same_model(before, model_fingerprint(model))


def other_seed() -> PreTrainedModel:
    return tiny_model("llama", seed=5)


def other_family() -> PreTrainedModel:
    return tiny_model("mistral")


def other_depth() -> PreTrainedModel:
    model = tiny_model("llama")
    del model.model.layers[3]
    model.config.num_hidden_layers = 3
    return model


@pytest.mark.parametrize("other", [other_seed, other_family, other_depth])
def test_other_models(other: Callable[[], PreTrainedModel]) -> None:
    assert not same_model(model_fingerprint(tiny_model("llama")), model_fingerprint(other()))


class Quantized(nn.Module):
    """A linear layer whose weight is in another place and of another type."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.abs().max() / 127
        self.register_buffer("packed", (linear.weight / self.scale).round().to(torch.int8))


def test_what_is_quantized_is_not_compared() -> None:
    plain = model_fingerprint(tiny_model("llama"))
    for replace in (Quantized, int8_weight, packed_weight):
        model, other = tiny_model("llama"), tiny_model("llama", seed=5)
        for quantized in (model, other):
            for layer in quantized.model.layers:
                layer.mlp.up_proj = replace(layer.mlp.up_proj)
        assert same_model(plain, model_fingerprint(model))
        assert not same_model(plain, model_fingerprint(other))


def int8_weight(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    return linear


class Packed(torch.Tensor):
    """Claims to be of fp32, as the weights of torchao and quanto do."""


def packed_weight(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter((linear.weight.detach() * 0).as_subclass(Packed))
    assert linear.weight.dtype == torch.float32
    return linear


@pytest.mark.parametrize("text", ["", "x", "llama-4x32-abc", "llama-4x32-abc:A", "llama:####"])
def test_what_is_no_fingerprint_is_no_model(text: str) -> None:
    model = model_fingerprint(tiny_model("llama"))
    assert not same_model(model, text)
    assert not same_model(f"{model.split(':')[0]}:{text}", model)
    assert same_model(text, text)
    assert fingerprint_name(text)[:5] == text[:5]


def test_a_fingerprint_is_short() -> None:
    fingerprint = model_fingerprint(tiny_model("llama"))
    assert len(fingerprint) < 60 * (10 * N_LAYERS + 2)
    assert len(fingerprint_name(fingerprint)) < 40
