"""Quantized weights and quantized KV caches: work as the plain model does, or are refused."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from conftest import prompt, tiny_model
from test_windows import narrowed
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, QuantizedCache

from adaskip import (
    AdaSkip,
    FixedSkipping,
    SkipPlan,
    Sublayer,
    Window,
    learn_importance,
    skipping,
)

PLAN = SkipPlan({Sublayer(0, "attn"): None, Sublayer(2, "ffn"): None, Sublayer(3, "attn"): 1.1})
BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}


def need(module: str) -> None:
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        pytest.skip(f"{module} is not installed")


def with_torchao(model: PreTrainedModel, folder: Any) -> PreTrainedModel:
    need("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model.save_pretrained(folder)
    loaded: Any = AutoModelForCausalLM
    quantized: PreTrainedModel = loaded.from_pretrained(
        folder,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2)),
        dtype=torch.float32,
    )
    return quantized.eval()


def with_bitsandbytes(model: PreTrainedModel, folder: Any) -> PreTrainedModel:
    need("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model.save_pretrained(folder)
    loaded: Any = AutoModelForCausalLM
    quantized: PreTrainedModel = loaded.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.float32,
        device_map="cpu",
    )
    return quantized.eval()


def tokens(model: PreTrainedModel) -> list[int]:
    made: Any = model.generate(prompt(20), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    return [int(token) for token in made[0]]


@pytest.mark.parametrize("quantize", [with_torchao, with_bitsandbytes])
def test_skipping_a_quantized_model_is_leaving_its_sublayers_out(
    quantize: Any, tmp_path: Any
) -> None:
    model = quantize(tiny_model("llama"), tmp_path)
    assert any(
        "Int8" in type(p).__name__ or p.dtype == torch.int8 for p in model.parameters()
    ) or any("8bit" in type(m).__name__ for m in model.modules())
    dense = tokens(model)
    with torch.no_grad(), skipping(model, FixedSkipping(PLAN)):
        cache = DynamicCache(config=model.config)
        skipped = model(prompt(20), past_key_values=cache).logits
    # The same layers by hand: the residual passed on in place of the skipped sublayer.
    hooks = [
        model.model.layers[0].self_attn.register_forward_hook(
            lambda m, a, out: (torch.zeros_like(out[0]), *out[1:])
        ),
        model.model.layers[2].mlp.register_forward_hook(lambda m, a, out: torch.zeros_like(out)),
    ]
    plain = SkipPlan({Sublayer(3, "attn"): 1.1})
    with torch.no_grad(), skipping(model, FixedSkipping(plain)):
        by_hand = model(prompt(20)).logits
    for hook in hooks:
        hook.remove()
    assert torch.equal(skipped, by_hand)
    window = Window(7, sinks=3, heads=(1,), of_heads=2)
    with torch.no_grad(), skipping(model, SkipPlan({Sublayer(1, "attn"): window})):
        windowed = model(prompt(20)).logits
    hook = model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, narrowed(module, kwargs, window)), with_kwargs=True
    )
    with torch.no_grad():
        torch.testing.assert_close(windowed, model(prompt(20)).logits, rtol=1e-3, atol=1e-3)
    hook.remove()
    importance = learn_importance(model, [prompt(30)])
    with skipping(model, AdaSkip(importance, 2)):
        assert len(tokens(model)) == 28
    assert tokens(model) == dense


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quantized_cache_holds_nothing_of_skipped_attention(backend: str) -> None:
    need(BACKENDS[backend])
    layers = (0, 3)
    skipped, zeroed = tiny_model("llama"), tiny_model("llama")
    for layer in layers:
        torch.nn.init.zeros_(zeroed.model.layers[layer].self_attn.o_proj.weight)

    def generated(model: PreTrainedModel) -> tuple[list[int], Any]:
        # Long enough that old tokens are quantized while new ones come.
        cache = QuantizedCache(backend, model.config, nbits=4, residual_length=8, q_group_size=8)
        made: Any = model.generate(
            prompt(20), past_key_values=cache, max_new_tokens=24, do_sample=False
        )
        return [int(token) for token in made[0]], cache

    expected, _ = generated(zeroed)
    plan = SkipPlan({Sublayer(layer, "attn"): None for layer in layers})
    with skipping(skipped, FixedSkipping(plan)):
        found, cache = generated(skipped)
    assert found == expected
    for index, layer in enumerate(cache.layers):
        held = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        big = [value for value in held if value.numel() > 1]
        assert bool(big) == (index not in layers)
