"""The tiny checkpoints that the released code was run on, made again from their seeds."""

from __future__ import annotations

import atexit
import json
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from conftest import GOLDEN
from safetensors.torch import save_file
from torch import Tensor

# What a matrix's random numbers are multiplied by.
SCALES = {"lm_head": 0.3, "embed_tokens": 1.0, "q_proj": 0.2, "k_proj": 0.2}
# And rows of ids from 128 on, once more.
LARGER = {"lm_head": 1.4, "embed_tokens": 1.7}


@cache
def golden_checkpoint(family: str) -> Path:
    """A folder with one of the checkpoints, to load it from."""
    made = tempfile.TemporaryDirectory(prefix=f"golden-{family}-")
    atexit.register(made.cleanup)
    folder = Path(made.name)
    (folder / "config.json").write_text(json.dumps(recipe()["configs"][family]))
    save_file(weights(family), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@cache
def recipe() -> Any:
    """Configurations by family; seed, factors and digest of the weights."""
    return json.loads((GOLDEN / "checkpoints.json").read_text())


def weights_recipe(family: str) -> Any:
    """The InternLM checkpoint with plain rotary embeddings has the weights of the other one."""
    return recipe()["weights"][family.removesuffix("-origin")]


def weights(family: str) -> dict[str, Tensor]:
    """Every tensor by name, drawn in alphabetical order from one generator."""
    generator = torch.Generator().manual_seed(weights_recipe(family)["seed"])
    made = {}
    for name, shape in sorted(shapes(recipe()["configs"][family]).items()):
        drawn = torch.randn(shape, generator=generator)
        made[name] = 1 + 0.1 * drawn if "norm" in name else _scaled(family, name, drawn)
    # No answer ends (2), nor begins anew (0, 1); InternLM's padding has no embedding.
    made["lm_head.weight"][:3] = 0
    if family.startswith("internlm"):
        made["model.embed_tokens.weight"][0] = 0
    return made


def _scaled(family: str, name: str, drawn: Tensor) -> Tensor:
    module, kind = name.split(".")[-2:]
    scaled = drawn * (0.2 if kind == "bias" else SCALES.get(module, 0.08))
    if module in LARGER:
        scaled[128:] *= LARGER[module]
    if module in ("o_proj", "down_proj"):
        # What a sublayer adds, by layer, so that similarities differ.
        factors = weights_recipe(family)["attn" if module == "o_proj" else "ffn"]
        scaled *= factors[int(name.split(".")[2])]
    return scaled


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a Llama, with InternLM's biases if it has some."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    outputs = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "o_proj": hidden}
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        **{f"self_attn.{name}.weight": (size, hidden) for name, size in outputs.items()},
    }
    if config.get("bias"):
        layer |= {f"self_attn.{name}.bias": (size,) for name, size in outputs.items()}
    ends = {"lm_head.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    ends["model.embed_tokens.weight"] = ends["lm_head.weight"]
    return ends | {
        f"model.layers.{index}.{name}": shape
        for index in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of all tensors' bytes, in alphabetical order of their names."""
    made = sha256()
    for name in sorted(tensors):
        made.update(tensors[name].numpy().tobytes())
    return made.hexdigest()
