"""Surviving weights of several families as those of a Llama, which is what GGUF can hold.

Phi3's fused matrices are split, Granite's multipliers folded into weights; query and key rows are
paired as llama.cpp rotates them. All of it is exact up to rounding: multipliers are folded in
float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaskip.errors import PlanError, UnsupportedModelError
from adaskip.export.folding import Folded, head_of, is_tied
from adaskip.export.surviving import Surviving, Survivor
from adaskip.models.gguf_families import LLAMA_NAMES

# Rows of the FFN that stands where llama.cpp needs one: it adds zero.
ZERO_FFN = 32


class LlamaForm:
    """A model's survivors as the tensors of a GGUF file.

    Args:
        model: of a family that GGUF can hold.
        surviving: what a plan leaves of it.

    Raises:
        PlanError: a linear map has no place in GGUF.
        UnsupportedModelError: a rotary embedding or an activation that GGUF does not know.
    """

    def __init__(self, model: PreTrainedModel, surviving: Surviving) -> None:
        config: Any = model.config
        self.config = config
        self.surviving = surviving
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self._folded = Folded(model, surviving)
        self._tied = is_tied(model)
        head = head_of(model)
        if head.bias is not None or config.hidden_act != "silu":
            raise UnsupportedModelError(
                f"This {config.model_type} has a biased head or the activation "
                f"{config.hidden_act!r}; llama.cpp's Llama has silu and no bias. Use format 'hf'."
            )
        for _, part in surviving.parts():
            _check_linear(part)

    def around(self) -> Iterator[tuple[str, Tensor]]:
        """Embedding, final norm, and the head if it is not the embedding."""
        found = self._folded.around()
        embed = getattr(self.config, "embedding_multiplier", 1.0)
        logits = 1 / getattr(self.config, "logits_scaling", 1.0)
        yield "token_embd.weight", found["embed"].double() * embed
        if self._tied:
            logits, norm = 1.0, logits / embed
        else:
            norm = 1.0
        yield "output_norm.weight", found["norm"].double() * norm
        if not self._tied:
            yield "output.weight", found["head"].double() * logits
        factors = rope_factors(self.config, self.head_dim)
        if factors is not None:
            yield "rope_freqs.weight", factors

    def layers(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of all layers, with those llama.cpp needs where something is gone."""
        for index, part, tensors in self._folded.parts():
            named = self._computed(tensors) if part.linear is None else self._linear(part)
            for name, tensor in named.items():
                yield f"blk.{index}.{name}", tensor
        if not self.surviving.is_whole:
            yield from self._stand_ins()

    @property
    def head_counts(self) -> list[tuple[int, int]]:
        """Per layer the query and KV heads; without KV heads it is a matrix, or nothing."""
        found = []
        for index, layer in enumerate(self.surviving.layers):
            if layer.attn is not None and layer.attn.linear is None:
                found.append((self.heads, self.kv_heads))
            else:
                # llama.cpp reads the size of a head from layer 0.
                found.append((0 if layer.attn is None and index else self.heads, 0))
        return found

    @property
    def ffn_lengths(self) -> list[int]:
        """Per layer the width of its FFN."""
        length = int(self.config.intermediate_size)
        # Without an FFN, llama.cpp leaves an attention out or aborts.
        return [ZERO_FFN if layer.ffn is None else length for layer in self.surviving.layers]

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """How many numbers a row of its matrices has, each length that there is."""
        return (self.config.hidden_size, self.heads * self.head_dim, *self.ffn_lengths)

    def _stand_ins(self) -> Iterator[tuple[str, Tensor]]:
        hidden = self.config.hidden_size
        if self.surviving.layers[0].attn is None:
            yield "blk.0.attn_norm.weight", torch.ones(hidden)
            yield "blk.0.attn_output.weight", torch.zeros(hidden, hidden)
        for index, layer in enumerate(self.surviving.layers):
            if layer.ffn is None:
                yield f"blk.{index}.ffn_norm.weight", torch.ones(hidden)
                yield f"blk.{index}.ffn_gate.weight", torch.zeros(ZERO_FFN, hidden)
                yield f"blk.{index}.ffn_up.weight", torch.zeros(ZERO_FFN, hidden)
                yield f"blk.{index}.ffn_down.weight", torch.zeros(hidden, ZERO_FFN)

    def _linear(self, part: Survivor) -> dict[str, Tensor]:
        """A linear map of the normalized stream: llama.cpp's attention of one matrix."""
        assert part.linear is not None  # noqa: S101 - the caller has looked
        hidden = self.config.hidden_size
        weight = torch.eye(hidden, dtype=torch.float64)
        for factor in part.linear.factors:
            weight = weight @ factor.detach().cpu().double()
        return {
            "attn_norm.weight": torch.ones(hidden),
            "attn_output.weight": weight.T * part.scale,
        }

    def _computed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """An attention or FFN, by GGUF's names."""
        found = {}
        for name, tensor in self._split(tensors):
            module, _, kind = name.rpartition(".")
            wide = tensor.double() * self._multiplier(module)
            if module.endswith(("q_proj", "k_proj")):
                wide = paired(wide, self.heads if module.endswith("q_proj") else self.kv_heads)
            found[f"{LLAMA_NAMES[module]}.{kind}"] = wide
        return found

    def _split(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Tensors with Phi3's fused ones taken apart."""
        for name, tensor in tensors.items():
            body, _, rest = name.partition(".")
            if rest.startswith("qkv_proj."):
                sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
                for letter, piece in zip("qkv", torch.split(tensor, sizes), strict=True):
                    yield f"{body}.{letter}_proj.weight", piece
            elif rest.startswith("gate_up_proj."):
                gate, up = tensor.chunk(2)
                yield f"{body}.gate_proj.weight", gate
                yield f"{body}.up_proj.weight", up
            else:
                yield name, tensor

    def _multiplier(self, module: str) -> float:
        """What Granite multiplies a matrix's output with, besides what a Llama does."""
        if module.endswith("q_proj"):
            scaling = getattr(self.config, "attention_multiplier", None)
            return 1.0 if scaling is None else float(scaling) * math.sqrt(self.head_dim)
        if module.endswith(("o_proj", "down_proj")):
            return float(getattr(self.config, "residual_multiplier", 1.0))
        return 1.0


def paired(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection with the two halves of each head interleaved.

    Args:
        rows: [heads * head_dim, ...], rotary dimensions i and i + head_dim / 2 being a pair.
        heads: how many.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def rope_factors(config: Any, head_dim: int) -> Tensor | None:
    """What llama.cpp divides each rotary frequency by, for Llama 3's scaling: [head_dim / 2].

    Raises:
        UnsupportedModelError: the rotary embedding is of a kind that is not written.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"A rotary embedding of type {kind!r} (partial factor "
            f"{rope.get('partial_rotary_factor', 1.0)}) is not written as GGUF; use format 'hf'."
        )
    if kind != "llama3":
        return None
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    turns = float(rope["original_max_position_embeddings"]) / wavelengths
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    # Few turns over the original context are stretched, many are left, between them it is smooth.
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - share) / float(rope["factor"]) + share)


def _check_linear(part: Survivor) -> None:
    if part.linear is None:
        return
    if part.source.kind == "ffn" or bool(part.linear.bias.any()):
        raise PlanError(
            f"The linear map of {part.source} has no place in GGUF, which holds those of an "
            "attention without a bias; export with format 'hf'."
        )
