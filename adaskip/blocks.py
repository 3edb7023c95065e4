"""The decoder layers we can skip in, as data: one row per model family.

A sublayer of every family here computes `y = x + post(body(pre(x))) * multiplier`. A row says which
attribute of the layer plays which part; what a family does not have is None. Each row is proved by
`tests/test_families.py` to be bit-identical to the family's own layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adaskip.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class SublayerSpec:
    """Names of a layer's attributes that make up one sublayer.

    Attributes:
        body: the attention or MLP module.
        pre: the norm applied to the body's input, None if the body reads the residual itself.
        post: the module applied to the body's output before the residual add, None if none.
    """

    body: str
    pre: str | None
    post: str | None = None


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One family's decoder layer.

    Attributes:
        attn, ffn: its two sublayers.
        multiplier: the attribute that scales what they add, None if nothing does.
        package: where the layer's class is defined; None for transformers' folder of the family.
        partial: whether layers may lack a sublayer.
    """

    attn: SublayerSpec = SublayerSpec("self_attn", "input_layernorm")
    ffn: SublayerSpec = SublayerSpec("mlp", "post_attention_layernorm")
    multiplier: str | None = None
    package: str | None = None
    partial: bool = False


LLAMA = BlockSpec()
# Norms behind each body alone.
OLMO = BlockSpec(
    SublayerSpec("self_attn", None, "post_attention_layernorm"),
    SublayerSpec("mlp", None, "post_feedforward_layernorm"),
)
# Two norms around each body.
GEMMA = BlockSpec(
    SublayerSpec("self_attn", "input_layernorm", "post_attention_layernorm"),
    SublayerSpec("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)

BLOCKS: dict[str, BlockSpec] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "phi3": BlockSpec(
        SublayerSpec("self_attn", "input_layernorm", "resid_attn_dropout"),
        SublayerSpec("mlp", "post_attention_layernorm", "resid_mlp_dropout"),
    ),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "olmo2": OLMO,
    "olmo3": OLMO,
    "granite": BlockSpec(multiplier="residual_multiplier"),
    "smollm3": LLAMA,
    "arcee": LLAMA,
    "seed_oss": LLAMA,
    "ministral": LLAMA,
    # The router belongs to the body: it is not computed either where an FFN is skipped.
    "mixtral": LLAMA,
    "qwen3_moe": LLAMA,
}
# Families that `export_checkpoint` writes under model types of its own: layers that lack sublayers.
# Mistral and Qwen2 are written as Llama.
EXPORTED: dict[str, BlockSpec] = {
    f"adaskip_{family}": replace(
        BLOCKS[family], package="adaskip.models.modeling_adaskip", partial=True
    )
    for family in ("llama", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2", "granite")
}
EXPORTED["nemotron-nas"] = EXPORTED["adaskip_llama"]


def block_spec(model_type: str) -> BlockSpec:
    """The row of a family, by its `config.model_type`.

    Raises:
        UnsupportedModelError: the family has no row, e.g. because its attention and MLP run in
            parallel and there is no residual stream between them.
    """
    if model_type in EXPORTED:
        return EXPORTED[model_type]
    if model_type not in BLOCKS:
        raise UnsupportedModelError(
            f"Architecture {model_type!r} is not supported: its decoder layer is not described in "
            f"adaskip.blocks.BLOCKS. Supported: {', '.join(BLOCKS)}. CONTRIBUTING.md says how to "
            "add a family whose attention and MLP follow each other."
        )
    return BLOCKS[model_type]


def bound_parts(
    layer: nn.Module, spec: SublayerSpec
) -> tuple[nn.Module, nn.Module | None, nn.Module | None]:
    """The modules `(body, pre, post)` of one sublayer of `layer`.

    Raises:
        UnsupportedModelError: the layer lacks one of them.
    """
    parts: list[Any] = []
    for name in (spec.body, spec.pre, spec.post):
        part = None if name is None else getattr(layer, name, None)
        if name is not None and not isinstance(part, nn.Module):
            if EXPORTED["adaskip_llama"].package == type(layer).__module__:
                raise UnsupportedModelError(
                    f"A layer of this exported model lacks {name!r}: its sublayer is gone. It can "
                    "be skipped in; do the rest with the model it was made from."
                )
            raise UnsupportedModelError(
                f"{type(layer).__name__} has no module {name!r}, which its family's row in "
                "adaskip.blocks.BLOCKS names; the installed transformers is not supported."
            )
        parts.append(part)
    return parts[0], parts[1], parts[2]


def lacks(layer: nn.Module, spec: SublayerSpec, block: BlockSpec) -> bool:
    """Whether a layer was made without this sublayer."""
    return block.partial and not hasattr(layer, spec.body)


def execution_device(module: nn.Module) -> torch.device:
    """The device a module computes on, also where accelerate keeps its weights elsewhere."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def first_tensor(output: Tensor | tuple[Any, ...]) -> Tensor:
    """The hidden states a body returned: attention returns them with its weights."""
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result
