"""The cache without copies: the numbers of DynamicCache, in every way a cache is used."""

from __future__ import annotations

import pytest
import torch
from conftest import N_LAYERS, prompt, tiny_model
from transformers import DynamicCache

from adaskip import AdaskipError, FixedSkipping, SkipPlan, Sublayer, skipping
from adaskip.growing_cache import GrowingCache, GrowingLayer, kv_tensors


def states(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(2, 2, tokens, 4, generator=generator)
    return key, key + 1


@pytest.mark.parametrize("room", [1, 3, 256])
def test_equals_dynamic_cache_step_by_step(room: int) -> None:
    config = tiny_model("llama").config
    growing, dynamic = GrowingCache(config, room), DynamicCache(config=config)
    for step, tokens in enumerate([5, 1, 1, 3, 1, 1, 1]):
        pairs = [cache.update(*states(tokens, step), 1) for cache in (growing, dynamic)]
        assert torch.equal(pairs[0][0], pairs[1][0])
        assert torch.equal(pairs[0][1], pairs[1][1])
        assert growing.layers[1].get_seq_length() == dynamic.layers[1].get_seq_length()


def test_does_not_allocate_within_its_room() -> None:
    layer = GrowingLayer(room=4)
    layer.update(*states(5, 0))
    assert layer.keys is not None
    place = layer.keys.data_ptr()
    for step in range(4):
        layer.update(*states(1, step))
        assert layer.keys.data_ptr() == place
    layer.update(*states(1, 9))
    assert layer.keys.data_ptr() != place
    assert layer.keys.shape[-2] == 10


@pytest.mark.parametrize("change", ["crop", "reorder", "select", "repeat", "reset"])
def test_goes_on_after_its_tensors_were_replaced(change: str) -> None:
    config = tiny_model("llama").config
    both = [GrowingCache(config, 8), DynamicCache(config=config)]
    for cache in both:
        cache.update(*states(5, 0), 0)
        layer = cache.layers[0]
        if change == "crop":
            layer.crop(-2)
        elif change == "reorder":
            layer.reorder_cache(torch.tensor([1, 0]))
        elif change == "select":
            layer.batch_select_indices(torch.tensor([1]))
        elif change == "repeat":
            layer.batch_repeat_interleave(2)
        else:
            cache.reset()
    if change == "reset":  # some releases of transformers keep the length, as zeros
        both[1] = DynamicCache(config=config)
    batch = {"select": 1, "repeat": 4}.get(change, 2)
    for step in range(3):
        key, value = states(1, step)
        new = (key[:1].expand(batch, -1, -1, -1), value[:1].expand(batch, -1, -1, -1))
        one, other = (cache.update(*new, 0) for cache in both)
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generates_the_same_tokens(family: str, beams: int) -> None:
    model = tiny_model(family)
    plan = SkipPlan({Sublayer(0, "attn"): None, Sublayer(2, "ffn"): 1.1})
    arguments = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    with skipping(model, FixedSkipping(plan)):
        expected = model.generate(prompt(20), **arguments)
        cache = GrowingCache(model.config, room=5)
        assert torch.equal(model.generate(prompt(20), past_key_values=cache, **arguments), expected)
    # Nothing for the skipped attention.
    assert len(kv_tensors(cache)) == 2 * (N_LAYERS - 1)


def test_refuses_no_room() -> None:
    with pytest.raises(AdaskipError, match="room for 0 more tokens"):
        GrowingCache(tiny_model("llama").config, room=0)
