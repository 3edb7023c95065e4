"""Reads a GGUF file that was written here back into a model, to be compared with the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaskip.blocks import block_spec
from adaskip.export.gguf_file import gguf_package
from adaskip.export.hf import module_names
from adaskip.models.exported import exported_class
from adaskip.models.gguf_families import LLAMA_NAMES, unpaired

_MODULES = {own: name for name, own in LLAMA_NAMES.items()}


class GgufFile:
    """The shape and the numbers in a GGUF file of architecture `llama` or `deci`.

    Attributes:
        fields: its metadata.
        tensors: float32, by name.
        n_layers: decoder layers.
    """

    def __init__(self, path: Path) -> None:
        gguf = gguf_package()
        reader = gguf.GGUFReader(str(path))
        self.fields: dict[str, Any] = {k: f.contents() for k, f in reader.fields.items()}
        self.tensors: dict[str, Tensor] = {
            tensor.name: torch.from_numpy(
                np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            )
            for tensor in reader.tensors
        }
        self.n_layers: int = self.shape("block_count")
        self._heads = self._per_layer("attention.head_count")
        self._kv_heads = self._per_layer("attention.head_count_kv")

    def shape(self, name: str) -> Any:
        """A field of the architecture."""
        return self.fields[f"{self.fields['general.architecture']}.{name}"]

    def _per_layer(self, name: str) -> list[int]:
        value = self.shape(name)
        return list(value) if isinstance(value, list) else [value] * self.n_layers

    def state(self) -> dict[str, Tensor]:
        """The weights by the names of transformers, without stand-ins that add nothing."""
        top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
        found = {}
        for name, tensor in self.tensors.items():
            match name.split("."):
                case [part, kind] if part in top:
                    found[f"{top[part]}.{kind}"] = tensor
                case ["blk", layer, part, kind]:
                    found |= self._named(int(layer), part, kind, tensor)
        return found

    def _named(self, layer: int, part: str, kind: str, tensor: Tensor) -> dict[str, Tensor]:
        target = f"model.layers.{layer}."
        if part.startswith("ffn"):
            return {f"{target}{_MODULES[part]}.{kind}": tensor} if self.has_ffn(layer) else {}
        if self.has_attention(layer):
            if part in ("attn_q", "attn_k"):
                heads = self._heads if part == "attn_q" else self._kv_heads
                tensor = unpaired(tensor, heads[layer])
            return {f"{target}{_MODULES[part]}.{kind}": tensor}
        if part == "attn_output" and self.has_matrix(layer):
            body = f"{target}self_attn"
            return {f"{body}.factors.0": tensor.T, f"{body}.bias": torch.zeros(len(tensor))}
        return {}

    def has_attention(self, layer: int) -> bool:
        """Whether a layer computes attention."""
        return self._kv_heads[layer] > 0

    def has_matrix(self, layer: int) -> bool:
        """Whether a layer has a matrix in the place of its attention, and not only zeros."""
        if self.has_attention(layer) or not self._heads[layer]:
            return False
        return bool(self.tensors[f"blk.{layer}.attn_output.weight"].any())

    def has_ffn(self, layer: int) -> bool:
        """Whether a layer computes an FFN, and not only zeros."""
        return bool(self.tensors[f"blk.{layer}.ffn_down.weight"].any())

    def config(self) -> dict[str, Any]:
        """The content of a `config.json` of ours; of the rotary embedding, `frequencies` tells."""
        attention = next(i for i in range(self.n_layers) if self.has_attention(i))
        ffn = next((i for i in range(self.n_layers) if self.has_ffn(i)), 0)
        biased = {part for part in _MODULES if f"blk.{attention}.{part}.bias" in self.tensors}
        return {
            "vocab_size": self.shape("vocab_size"),
            "hidden_size": self.shape("embedding_length"),
            "intermediate_size": self._per_layer("feed_forward_length")[ffn],
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self._heads[attention],
            "num_key_value_heads": self._kv_heads[attention],
            "head_dim": self.shape("attention.key_length"),
            "rms_norm_eps": float(f"{self.shape('attention.layer_norm_rms_epsilon'):.6g}"),
            "max_position_embeddings": self.shape("context_length"),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attention_bias": "attn_output" in biased,
            "qkv_bias": "attn_q" in biased,
            "mlp_bias": f"blk.{ffn}.ffn_down.bias" in self.tensors,
            "block_configs": [self._block(layer) for layer in range(self.n_layers)],
            "adaskip": {"modules": module_names(block_spec("llama"))},
        }

    def frequencies(self) -> Tensor:
        """Those of the rotary embedding, as llama.cpp computes them: [head_dim / 2]."""
        size = self.shape("rope.dimension_count")
        found = 1 / self.shape("rope.freq_base") ** (torch.arange(0, size, 2) / size)
        # Without a factor, or factors, llama.cpp stretches nothing either.
        architecture = self.fields["general.architecture"]
        stretched: Tensor = found / self.fields.get(f"{architecture}.rope.scaling.factor", 1.0)
        return stretched / self.tensors.get("rope_freqs.weight", 1.0)

    def _block(self, layer: int) -> dict[str, Any]:
        matrix = self.has_matrix(layer)
        attention: dict[str, Any] = {"no_op": not (self.has_attention(layer) or matrix)}
        if matrix:
            attention["linear"] = {"rank": None}
        return {"attention": attention, "ffn": {"no_op": not self.has_ffn(layer)}}


def read(path: Path, source: PreTrainedModel) -> PreTrainedModel:
    """A GGUF file that was written here as a model of ours, in float32.

    Args:
        path: the file.
        source: the model it was made from, which tells device and precision.
    """
    file = GgufFile(path)
    kind = exported_class("adaskip_llama")
    made: PreTrainedModel = kind(kind.config_class.from_dict(file.config()))
    missing, unexpected = made.load_state_dict(file.state(), strict=False, assign=True)
    made.tie_weights()
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"{path} does not fit its own shape: {missing}, {unexpected}.")
    placed: Any = made
    placed = placed.to(source.device, source.dtype)
    # In float32 whatever the model is in, as transformers loads them.
    placed.model.rotary_emb.inv_freq = file.frequencies().to(source.device)
    ready: PreTrainedModel = placed.eval()
    return ready
