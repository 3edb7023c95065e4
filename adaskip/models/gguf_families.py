"""How GGUF names and stores the weights of the families that are read from it, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from adaskip.errors import AdaskipError, unknown_name

# A Llama layer's matrices in GGUF, by their names in transformers.
LLAMA_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Gemma's has norms around each body, and of queries and keys.
GEMMA3_NAMES = LLAMA_NAMES | {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}

Rows = TypeVar("Rows", "np.ndarray[Any, Any]", Tensor)


@dataclass(frozen=True)
class GgufFamily:
    """One family in GGUF.

    Attributes:
        architecture: the class in transformers.
        names: a layer's weights in GGUF, by their names in transformers.
        heads: of the projections whose rows GGUF pairs for the rotary embedding, by their name in
            GGUF, the configuration's field that counts their heads.
        norm_offset: what GGUF has added to the weights of norms.
    """

    architecture: str
    names: Mapping[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    heads: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0

    def weight_name(self, name: str) -> str:
        """The name transformers gives a tensor in GGUF.

        Raises:
            AdaskipError: the family has no such tensor.
        """
        top = {gguf: own for own, gguf in TOP_NAMES.items()}
        parts = {gguf: own for own, gguf in self.names.items()}
        match name.split("."):
            case [part, "weight"] if part in top:
                return f"{top[part]}.weight"
            case ["blk", layer, part, "weight" | "bias" as kind] if part in parts:
                return f"model.layers.{layer}.{parts[part]}.{kind}"
        raise AdaskipError(f"GGUF tensor {name!r} is not part of a {self.architecture}.")

    def weight(self, name: str, values: Any, shape: Mapping[str, Any]) -> Any:
        """A tensor as transformers has it.

        Args:
            name: in GGUF.
            values: float32, as GGUF has it.
            shape: the model's configuration.
        """
        part = name.split(".")[-2]
        if part in self.heads:
            return unpaired(values, shape[self.heads[part]]).copy()
        if self.norm_offset and part.endswith("norm"):
            return values - np.float32(self.norm_offset)
        return values


FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(
        "LlamaForCausalLM",
        heads={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
    ),
    "gemma3_text": GgufFamily("Gemma3ForCausalLM", names=GEMMA3_NAMES, norm_offset=1.0),
    "qwen2": GgufFamily("Qwen2ForCausalLM"),
}


def gguf_family(model_type: str) -> GgufFamily:
    """The row of a family, by its `config.model_type`.

    Raises:
        AdaskipError: it has none.
    """
    if model_type not in FAMILIES:
        raise unknown_name("model type in GGUF", model_type, FAMILIES)
    return FAMILIES[model_type]


def unpaired(rows: Rows, heads: int) -> Rows:
    """Rows of a query or key projection with the two halves of each head one after the other.

    GGUF pairs neighbouring rotary dimensions, transformers the two halves of a head.

    Args:
        rows: [heads * head_dim, ...].
        heads: of this projection.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
