"""InternLM v1 as a Llama with biases: its configuration, and the range in which that is exact.

InternLM v1 has no class in transformers 5 and its remote code does not run there. Its layers are
Llama's with biases on q, k, v and o (config `bias`) and none in the MLP, and its rotary embedding
is Llama's default (`rotary.type` "origin") or the dynamic one with factor 1.0 ("dynamic").

Beyond `max_position_embeddings` the dynamic kind is not the same: InternLM caches unrotated keys
and rotates all of them again with the newest base, transformers keeps the rotation each key had.
The model therefore refuses longer sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel

from adaskip.batching import BEGINNINGS
from adaskip.cache_name import cache_in
from adaskip.errors import UnsupportedCallError, UnsupportedModelError

MODEL_TYPE = "internlm"
DEFAULT_ROTARY = {"base": 10000, "type": "dynamic"}
ROPE_TYPES = {"origin": "default", "dynamic": "dynamic"}
# What means the same to Llama. The rest of an InternLM configuration names its remote code.
SHARED_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("initializer_range", "use_cache", "tie_word_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
DEFAULTS = {"vocab_size": 103168, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}


def llama_config(config: Mapping[str, Any]) -> LlamaConfig:
    """The Llama configuration that computes what an InternLM v1 configuration describes.

    Args:
        config: the content of an InternLM v1 `config.json`.

    Raises:
        UnsupportedModelError: its rotary embedding has no counterpart.
    """
    rotary = {**DEFAULT_ROTARY, **(config.get("rotary") or {})}
    if rotary["type"] not in ROPE_TYPES or float(rotary.get("scaling_factor", 1.0)) != 1.0:
        raise UnsupportedModelError(
            f"InternLM rotary {dict(rotary)} is not supported: type must be one of "
            f"{', '.join(ROPE_TYPES)} and scaling_factor 1."
        )
    rope: dict[str, Any] = {
        "rope_type": ROPE_TYPES[rotary["type"]],
        "rope_theta": float(rotary["base"]),
    }
    if rope["rope_type"] == "dynamic":
        rope["factor"] = 1.0
    shared = {key: config[key] for key in SHARED_KEYS if config.get(key) is not None}
    return LlamaConfig(
        **{**DEFAULTS, **shared},
        attention_bias=bool(config.get("bias", True)),
        mlp_bias=False,
        rope_parameters=rope,
        architectures=["LlamaForCausalLM"],
    )


def position_limit(config: PretrainedConfig) -> int | None:
    """The number of tokens up to which a model is exact, None if it has no such limit.

    Only the dynamic rotary embedding with factor 1.0, InternLM v1's, has one; read from the rope
    settings, so that a converted checkpoint that was saved and loaded again still has it.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic" and float(rope.get("factor", 0.0)) == 1.0:
        return int(config.max_position_embeddings)
    return None


def check_prompt_length(model: PreTrainedModel, n_tokens: int, n_new: int = 0) -> None:
    """Refuses a prompt that the model, or its answer to it, would carry beyond its exact range.

    Args:
        model: any model; those without a limit accept every prompt.
        n_tokens: tokens of the prompt.
        n_new: tokens to generate; the last one is never an input.

    Raises:
        UnsupportedCallError: prompt and answer are longer than `position_limit` allows.
    """
    limit = position_limit(model.config)
    if limit is not None and n_tokens + max(n_new - 1, 0) > limit:
        answer = f" and up to {n_new} new ones" if n_new else ""
        raise UnsupportedCallError(
            f"InternLM v1 is exact only up to {limit} tokens (its max_position_embeddings), and "
            f"this prompt has {n_tokens} tokens{answer}: use a lower prompt limit."
        )


class PositionGuard:
    """A forward pre-hook of the base model that refuses sequences longer than a limit.

    Lengths are shapes, Python integers: nothing is read from the device but a static cache's count.
    Padding counts, because without explicit positions it takes up positions.
    """

    def __init__(self, model: nn.Module, limit: int) -> None:
        self.limit = limit
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]

    # Outside the compiler: traced lengths would recompile the model at every step.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises UnsupportedCallError if this forward reaches beyond the limit."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        inputs = given.get("input_ids")
        if inputs is None:
            inputs = given.get("inputs_embeds")
        new = 0 if inputs is None else int(inputs.shape[1])
        cache, mask = cache_in(given), given.get("attention_mask")
        # A static cache counts on the device, where nothing else knows how much of it is used.
        total = new + (int(cache.get_seq_length()) if cache is not None else 0)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            total = max(total, mask.shape[1])
        if total > self.limit:
            raise UnsupportedCallError(
                f"InternLM v1 is exact only up to {self.limit} tokens (its "
                f"max_position_embeddings), and this forward reaches {total}: shorten the prompt "
                "or the answer."
            )


def guard_positions(model: PreTrainedModel) -> None:
    """Lets a model that has a `position_limit` refuse longer sequences in its forward."""
    limit = position_limit(model.config)
    if limit is not None:
        base = model.base_model
        base.register_forward_pre_hook(PositionGuard(base, limit), with_kwargs=True)
        for name in BEGINNINGS:
            if hasattr(model, name):
                setattr(model, name, _refuse_batching)


def _refuse_batching(*_: object, **__: object) -> None:
    """Takes the place of a method that puts several requests into one row.

    Raises:
        UnsupportedCallError: always.
    """
    raise UnsupportedCallError(
        "InternLM v1 is exact only up to its max_position_embeddings, which the requests of "
        "continuous batching cannot be held to; use generate()."
    )
