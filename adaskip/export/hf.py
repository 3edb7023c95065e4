"""Writes a folder for transformers, which vLLM serves too where it can."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from adaskip.blocks import BlockSpec, SublayerSpec, block_spec
from adaskip.export.folding import Folded, head_of, is_tied
from adaskip.export.refusing import ONE_WINDOW
from adaskip.export.report import Written
from adaskip.export.surviving import Surviving, Survivor
from adaskip.models.exported import exported_class

# Families whose layers compute what Llama's do; Qwen2 has biases besides.
LLAMA_FORM = ("llama", "mistral", "qwen2")
_DECI = "nemotron-nas"


def write(
    model: PreTrainedModel,
    surviving: Surviving,
    folder: Path,
    dtype: torch.dtype,
    about: Mapping[str, Any],
) -> Written:
    """Writes weights, configuration and modelling file into an existing folder.

    Args:
        model: where the weights come from; it is not changed.
        surviving: what the plan leaves.
        folder: where to.
        dtype: of the weights.
        about: plan, source and version, kept in `config.json`.
    """
    kind, config = _whole(model, surviving) if surviving.is_whole else _partial(model, surviving)
    config.adaskip = getattr(config, "adaskip", {}) | dict(about)
    config.dtype = dtype
    with torch.device("meta"):
        made = kind(config)
    state = _state(model, surviving, dtype)
    missing, unexpected = made.load_state_dict(state, strict=False, assign=True)
    made.tie_weights()
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"The surviving weights do not fit: {missing}, {unexpected}.")
    if model.generation_config is not None:
        made.generation_config = model.generation_config
    made.save_pretrained(folder)
    parameters = sum(tensor.numel() for tensor in state.values())
    weights = tuple(folder.glob("*.safetensors"))
    return Written(kind.__name__, parameters, weights, _engines(model, surviving))


def _engines(model: PreTrainedModel, surviving: Surviving) -> dict[str, str]:
    """What loads the folder, and on what condition; or why not."""
    if surviving.is_whole:
        said = f"as {type(model).__name__}, without remote code"
        return {"transformers": said, "vLLM": said}
    found = {"transformers": "AutoModelForCausalLM with trust_remote_code, or adaskip.load_model"}
    family = model.config.model_type
    if family not in LLAMA_FORM:
        found["vLLM"] = f"no: its DeciLMForCausalLM is a Llama, this is {family}"
    elif surviving.has_linears:
        found["vLLM"] = "no: it has no place for linear maps"
    elif surviving.layers[0].attn is None:
        found["vLLM"] = "no: its first layer needs an attention, and the plan skips that"
    else:
        found["vLLM"] = "as DeciLMForCausalLM, with --trust-remote-code"
    return found


def _state(model: PreTrainedModel, surviving: Surviving, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights by the names of transformers, in their precision."""
    folded = Folded(model, surviving)
    names = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    around = folded.around().items()
    found = {f"{names[name]}.weight": tensor.to(dtype) for name, tensor in around}
    head = head_of(model)
    if head.bias is not None:
        found["lm_head.bias"] = head.bias.detach().to(dtype)
    for index, _, tensors in folded.parts():
        # Sublayer by sublayer: what is scaled is in float64 until here.
        found |= {f"model.layers.{index}.{name}": each.to(dtype) for name, each in tensors.items()}
    return found


def _whole(model: PreTrainedModel, surviving: Surviving) -> tuple[type[Any], Any]:
    """The family's own class, with fewer layers."""
    kind = type(model)
    return kind, type(model.config).from_dict(_shortened(model, surviving))


def _shortened(model: PreTrainedModel, surviving: Surviving) -> dict[str, Any]:
    """The model's configuration with the checkpoint's number of layers."""
    content = model.config.to_dict()
    # Code beside the source's weights, and how those were quantized: neither goes along.
    for name in ("auto_map", "quantization_config"):
        content.pop(name, None)
    n_layers = len(surviving.layers)
    content |= {"num_hidden_layers": n_layers, "tie_word_embeddings": is_tied(model)}
    if content["model_type"] in ONE_WINDOW:
        # With them, transformers would take the folder of a Mistral for a Ministral.
        content.pop("layer_types", None)
    if content.get("layer_types"):
        content["layer_types"] = content["layer_types"][:n_layers]
    if "max_window_layers" in content:
        # Where windows would begin, had it any.
        content["max_window_layers"] = n_layers
    return content


def _partial(model: PreTrainedModel, surviving: Surviving) -> tuple[type[Any], Any]:
    """Our class of the family, with what each layer has."""
    config: Any = model.config
    family = config.model_type
    kind = exported_class(_model_type(family, surviving))
    content = _shortened(model, surviving)
    if family in LLAMA_FORM:
        known = LlamaConfig().to_dict().keys() | {"dtype"}
        content = {key: value for key, value in content.items() if key in known}
    if family == "qwen2":
        content["qkv_bias"] = True
    name, own = kind.__name__, kind.config_class.__name__
    content |= {
        "model_type": kind.config_class.model_type,
        "architectures": [name],
        "auto_map": {
            "AutoConfig": f"modeling_adaskip.{own}",
            "AutoModelForCausalLM": f"modeling_adaskip.{name}",
        },
        "block_configs": [
            {
                "attention": _block(layer.attn)
                | {"n_heads_in_group": config.num_attention_heads // config.num_key_value_heads},
                "ffn": _block(layer.ffn)
                | {
                    "intermediate_size": config.intermediate_size,
                    "hidden_act": _activation(config),
                },
            }
            for layer in surviving.layers
        ],
        "adaskip": {"modules": module_names(block_spec(family))},
    }
    return kind, kind.config_class.from_dict(content)


def _model_type(family: str, surviving: Surviving) -> str:
    """The name in `config.json`: vLLM's where it can serve the folder."""
    if family not in LLAMA_FORM:
        return f"adaskip_{family}"
    served = surviving.layers[0].attn is not None and not surviving.has_linears
    return _DECI if served else "adaskip_llama"


def _block(part: Survivor | None) -> dict[str, Any]:
    """Whether a sublayer is gone, and the rank of a linear map that stands there."""
    if part is None or part.linear is None:
        return {"no_op": part is None}
    *left, _ = part.linear.factors
    return {"no_op": False, "linear": {"rank": left[0].shape[1] if left else None}}


def module_names(block: BlockSpec) -> dict[str, Any]:
    """The names of a layer's modules, as the modelling file reads them in `config.json`."""

    def names(spec: SublayerSpec) -> list[str | None]:
        return [spec.pre, spec.body, spec.post]

    return {
        "attn": names(block.attn),
        "ffn": names(block.ffn),
        "multiplier": block.multiplier,
    }


def _activation(config: Any) -> str:
    """The name of an MLP's activation, which Gemma calls otherwise."""
    return str(getattr(config, "hidden_act", None) or config.hidden_activation)
