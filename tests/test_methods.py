"""The field's methods, each against a few lines written by hand on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import N_LAYERS, prompt, tiny_model
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from adaskip import Importance, ProfileError, SkipPlan, learn_importance, skipping
from adaskip.errors import AdaskipError
from adaskip.plan import Phase, Step, all_sublayers, whole_layers
from adaskip.policies import POLICIES, SkipPolicy

PREFILL = Step(Phase.PREFILL, request=0, index=0, tokens=9)
PROMPTS = [prompt(21, seed=5), prompt(14, seed=6)]


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def importance(model: PreTrainedModel) -> Importance:
    return learn_importance(model, PROMPTS)


def planned(policy: SkipPolicy) -> SkipPlan:
    policy.bind(N_LAYERS)
    return policy.plan(PREFILL)


@torch.no_grad()
def streams(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """The stream before every layer and behind the last one, by hooks: [tokens, hidden]."""
    found: list[torch.Tensor] = []
    layers: Any = model.model.layers
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
        for layer in layers
    ]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, a: found.append(a[0][0])))
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


def test_short_gpt_skips_the_layers_of_least_block_influence(
    model: PreTrainedModel, importance: Importance
) -> None:
    influence = torch.zeros(N_LAYERS)
    for ids in PROMPTS:
        h = streams(model, ids)
        for layer in range(N_LAYERS):
            cosine = cosine_similarity(h[layer], h[layer + 1], dim=-1)
            influence[layer] += (1 - cosine).mean() / len(PROMPTS)
    assert [1 - s for s in importance.layer_similarity] == pytest.approx(
        influence.tolist(), abs=1e-6
    )
    order = influence.argsort().tolist()
    for n_skip in range(N_LAYERS + 1):
        expected = whole_layers(order[:n_skip])
        assert planned(POLICIES["SHORTGPT"](importance=importance, n_skip=n_skip)) == expected


def test_a_profile_without_whole_layers_is_refused(importance: Importance) -> None:
    policy = POLICIES["SHORTGPT"](importance=replace(importance, layer_similarity=()), n_skip=1)
    with pytest.raises(ProfileError, match="tells nothing of whole layers"):
        policy.bind(N_LAYERS)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("LLMDROP", ("attn", "ffn")), ("LLMDROP_ATTN", ("attn",)), ("LLMDROP_FFN", ("ffn",))],
)
def test_llm_drop_skips_the_most_similar_of_its_kinds(
    importance: Importance, name: str, kinds: tuple[str, ...]
) -> None:
    kept = [s for s in all_sublayers(N_LAYERS) if s.kind in kinds]
    order = sorted(kept, key=lambda s: 1 - importance.similarity[s])
    for n_skip in (0, 1, 3, len(kept)):
        policy = POLICIES[name](importance=importance, n_skip=n_skip)
        assert planned(policy) == SkipPlan(dict.fromkeys(order[:n_skip]))
    with pytest.raises(AdaskipError, match=f"from 0 to {len(kept)}"):
        POLICIES[name](importance=importance, n_skip=len(kept) + 1).bind(N_LAYERS)


@pytest.mark.parametrize("name", ["SHORTGPT", "LLMDROP", "LLMDROP_ATTN", "LLMDROP_FFN"])
def test_what_was_learned_has_to_be_of_the_model(importance: Importance, name: str) -> None:
    policy = POLICIES[name](importance=importance, n_skip=1)
    with pytest.raises(AdaskipError, match="of a model of 4 layers, the model has 5"):
        policy.bind(5)
    other = tiny_model("llama", seed=1)
    with (
        pytest.raises(ProfileError, match="learn a profile of this model"),
        skipping(other, policy),
    ):
        pass
