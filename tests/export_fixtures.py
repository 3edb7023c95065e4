"""Tiny models that can be exported, plans for them, and what the survivors must be."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from conftest import N_LAYERS, tiny_model
from hypothesis import strategies as st
from test_replacements import random_linear
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from adaskip import SkipPlan, Sublayer, skipping
from adaskip.plan import all_sublayers
from adaskip.replacements import Replacement

FULL: dict[str, Any] = {
    "mistral": {"sliding_window": None},
    "gemma2": {"layer_types": ["full_attention"] * N_LAYERS},
    "gemma3_text": {"layer_types": ["full_attention"] * N_LAYERS},
}
# transformers' Gemma2 knows no other attention by default.
ATTENTION = {"gemma2": "eager"}
ALL = all_sublayers(N_LAYERS)
A0, F0, A1, F1, A2, F2, A3, F3 = ALL
# The places where chunking, caches and engines are at their edge.
EDGES: dict[str, tuple[Sublayer, ...]] = {
    "nothing": (),
    "attention 0": (A0,),
    "last FFN": (F3,),
    "a whole layer": (A2, F2),
    "the first layer": (A0, F0),
    "across layers": (F1, A2),
    "neighbouring attentions": (F0, F1, F2),
    "everything but one attention": tuple(s for s in ALL if s != A2),
    "every attention but the last": (A0, A1, A2),
    "both ends": (A0, F3, A1),
}


@cache
def full_model(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """A tiny random model without a sliding window; shared, so not to be changed."""
    attention = ATTENTION.get(family, "sdpa")
    model = tiny_model(family, attention, **(FULL.get(family, {}) | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype)


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """Lets norms compute in float64; transformers' own go by float32 whatever they are given."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_wide_norm, module)
        if hasattr(module, "embed_scale"):
            # Rounded to the precision that the model was made in.
            module.embed_scale = torch.tensor(module.embedding_dim**0.5, dtype=torch.float64)
    return model


def _wide_norm(norm: Any, x: Tensor) -> Tensor:
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    weight = norm.weight + 1 if type(norm).__name__.startswith("Gemma") else norm.weight
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def plan_of(sublayers: tuple[Sublayer, ...], gain: float | None = None) -> SkipPlan:
    """The sublayers skipped; with gains that differ from each other, or none."""
    gains = {s: None if gain is None else gain + 0.07 * i for i, s in enumerate(sublayers)}
    return SkipPlan(gains)


def random_plans(*, gains: bool = False, linears: bool = False) -> st.SearchStrategy[SkipPlan]:
    """Plans that leave an attention."""
    choices: list[st.SearchStrategy[Replacement]] = [
        # In the process, gains are float32.
        st.floats(0.5, 2.0, width=32) if gains else st.none(),
    ]
    if linears:
        choices.append(st.builds(random_linear, st.integers(0, 99), st.sampled_from([None, 3])))
    made = st.dictionaries(st.sampled_from(ALL), st.one_of(choices), max_size=len(ALL) - 1)
    return made.map(SkipPlan).filter(lambda plan: len(plan.layers("attn")) < N_LAYERS)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, plan: SkipPlan | None = None) -> Tensor:
    """What a model makes of ids, under a plan if there is one: [batch, tokens, vocabulary]."""
    if plan is None:
        return model(ids).logits
    with skipping(model, plan):
        return model(ids).logits


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean KL(expected || found) over tokens, in nats."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


N_TOKENS = 320


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE split as SmolLM2 does, of 300 tokens, three of them special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet]
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("e", "r"), ("Ġ", "t"), ("i", "n")]
    tokens += ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens[:3]])
    made.add_tokens([AddedToken("<note>", normalized=False)])
    unknown, start, end = tokens[:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=start,
        eos_token=end,
        unk_token=unknown,
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


# What the families that GGUF holds need besides, so that every part of theirs is used.
GGUF: dict[str, Any] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "phi3": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
    "llama-3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama-linear": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    },
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "llama-untied": {"tie_word_embeddings": False},
    "granite-tied": {
        "tie_word_embeddings": True,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
    },
    "llama-wide-heads": {"head_dim": 16},
}


def gguf_model(name: str) -> PreTrainedModel:
    """A tiny model with the vocabulary of `byte_tokenizer`; shared, so not to be changed."""
    settings = {"vocab_size": N_TOKENS, "bos_token_id": 1, "eos_token_id": 2} | GGUF[name]
    if "rope_parameters" in settings:
        settings["rope_parameters"] = tuple(settings["rope_parameters"].items())
    return _gguf_model(name.partition("-")[0], **settings)


@cache
def _gguf_model(family: str, **settings: Any) -> PreTrainedModel:
    if "rope_parameters" in settings:
        settings["rope_parameters"] = dict(settings["rope_parameters"])
    return full_model.__wrapped__(family, **settings)
