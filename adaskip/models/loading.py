"""Loads models and tokenizers by short name, folder or hub id; knows their limits and templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adaskip.blocks import block_spec
from adaskip.chance import SEED
from adaskip.errors import AdaskipError, unknown_name
from adaskip.models import internlm
from adaskip.models.devices import resolve_device, resolve_dtype
from adaskip.models.exported import exported_class, exported_config, is_exported
from adaskip.models.spec import (
    ModelSpec,
    first_line,
    model_names,
    model_source,
    model_spec,
    read_model_config,
)
from adaskip.models.splitting import split_options

__all__ = [
    "ModelSpec",
    "load_model",
    "load_tokenizer",
    "model_names",
    "model_spec",
    "random_model",
]

TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "tekken.json")
PICKLE_HINT = (
    "If its weights are .bin files, which are pickles: convert them to safetensors, or allow them "
    "(--allow_pickle, allow_pickle=True) to be read by torch's unpickler, restricted to tensors."
)
# Its methods are typed too narrowly: what they return depends on their arguments.
AUTO_MODEL: Any = AutoModelForCausalLM


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: str | None = None,
    tp_plan: str | None = None,
    allow_pickle: bool = False,
) -> PreTrainedModel:
    """A causal language model in eval mode, on one device unless it is split.

    Weights are read from safetensors, and no code that comes with a checkpoint is run. InternLM v1
    becomes a Llama that refuses sequences beyond its exact range.

    Args:
        name_or_path: a short name, a folder, or a hub id of a supported family.
        dtype: `torch.dtype` or its name; by default bfloat16 on CUDA and float32 elsewhere.
        device: by default CUDA if there is one, else the CPU; a split model has no other.
        device_map: "auto" splits the model over this process's devices (accelerate).
        tp_plan: "auto" splits each layer over the processes of torchrun.
        allow_pickle: where there are no safetensors, read `.bin` files. They are pickles; torch's
            restricted unpickler (`weights_only`) makes nothing but tensors of them.

    Raises:
        AdaskipError: no such model, dtype or device; weights missing, damaged or incomplete; a
            device that a split model would not keep to.
        UnsupportedModelError: a family without a row in `adaskip.blocks.BLOCKS`; found before any
            weights are read.
    """
    target = resolve_device(device)
    if (device_map or tp_plan) and target != (default := resolve_device()):
        raise AdaskipError(
            f"A model that is split (device_map, tp_plan) is on all {default} devices, not on "
            f"{target}: leave the device out; CUDA_VISIBLE_DEVICES says which ones there are."
        )
    precision = resolve_dtype(dtype, target)
    source = model_source(str(name_or_path))
    raw = read_model_config(source)
    split = split_options(device_map, tp_plan)
    loader = exported_class(raw["model_type"]) if is_exported(raw) else AUTO_MODEL
    model, report = _load_weights(loader, source, build_config(raw), precision, allow_pickle, split)
    _check_complete(source, report, refuse_extra=raw["model_type"] == internlm.MODEL_TYPE)
    internlm.guard_positions(model)
    try:
        ready: PreTrainedModel = (model if split else model.to(target)).eval()
    except (RuntimeError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise AdaskipError(f"The model cannot be put on {target}: {error}") from error
    return ready


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, ready for batches: padded on the left.

    Raises:
        AdaskipError: no such model, or no tokenizer in it.
    """
    source = model_source(str(name_or_path))
    # Without this, some releases of transformers make an empty tokenizer.
    if Path(source).is_dir() and not any(f for glob in TOKENIZERS for f in Path(source).glob(glob)):
        raise AdaskipError(
            f"{source} holds no tokenizer: put the model's own (tokenizer.json or tokenizer.model) "
            "beside its config.json."
        )
    is_internlm = read_model_config(source)["model_type"] == internlm.MODEL_TYPE
    try:
        if is_internlm or _tokenizer_class(source) == "InternLMTokenizer":
            from adaskip.models.internlm_tokenizer import InternLMTokenizer

            tokenizer: PreTrainedTokenizerBase = InternLMTokenizer.from_pretrained(source)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except AdaskipError:
        raise
    except Exception as error:  # tokenizers, sentencepiece and hub errors share no base class
        raise AdaskipError(f"Cannot load the tokenizer of {source}: {first_line(error)}") from error
    if tokenizer.pad_token is None:  # Llama 3 names none
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def random_model(
    name: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    n_layers: int | None = None,
) -> PreTrainedModel:
    """A model of a known shape with random weights, made on the device, for measuring speed.

    The same weights for the same arguments; the state of the random generators is left as it was.

    Args:
        name: a short name of `configs/models.yaml`.
        dtype: as for `load_model`.
        device: as for `load_model`.
        n_layers: decoder layers, by default as many as the real model has.

    Raises:
        AdaskipError: no such name, dtype or device, or `n_layers` is not positive.
    """
    if name not in model_names():
        raise unknown_name("model", name, model_names())
    if n_layers is not None and n_layers < 1:
        raise AdaskipError(f"n_layers must be at least 1, got {n_layers}.")
    target = resolve_device(device)
    shape = dict(model_spec(name).shape)
    if n_layers is not None:
        shape["num_hidden_layers"] = n_layers
        if kinds := shape.get("layer_types"):
            # The pattern goes on in a model with more layers.
            shape["layer_types"] = [kinds[layer % len(kinds)] for layer in range(n_layers)]
    config = build_config(shape)
    cuda = [target] if target.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.device(target):
        torch.manual_seed(SEED)
        model = AUTO_MODEL.from_config(config, dtype=resolve_dtype(dtype, target))
    internlm.guard_positions(model)
    ready: PreTrainedModel = model.to(target).eval()
    return ready


def build_config(raw: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers configuration for the content of a `config.json`.

    Raises:
        UnsupportedModelError: the family is not supported.
    """
    if raw["model_type"] == internlm.MODEL_TYPE:
        return internlm.llama_config(raw)
    if is_exported(raw):
        return exported_config(raw)
    family = raw["model_type"]
    if family == "mistral" and "layer_types" in raw:
        # AutoConfig takes it for this one; a Mistral's layers would all slide.
        family = "ministral"
    block_spec(family)
    kind = type(AutoConfig.for_model(family))
    config: PretrainedConfig = kind.from_dict({**raw, "model_type": family})
    return config


def _tokenizer_class(source: str) -> str | None:
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    name = get_tokenizer_config(source).get("tokenizer_class")
    return str(name) if name else None


def _load_weights(
    loader: Any,
    source: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    allow_pickle: bool,
    split: Mapping[str, Any],
) -> tuple[Any, Mapping[str, Any]]:
    """The model with its weights, and transformers' report of which tensors fitted."""
    try:
        loaded: tuple[Any, Mapping[str, Any]] = loader.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=None if allow_pickle else True,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by the caller, by name
            **split,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # safetensors, torch, pickle and hub errors share no base class
        hint = "" if allow_pickle or not isinstance(error, OSError) else f" {PICKLE_HINT}"
        message = f"Cannot load the weights of {source}: {first_line(error)}{hint}"
        raise AdaskipError(message) from error
    return loaded


def _check_complete(source: str, report: Mapping[str, Any], *, refuse_extra: bool) -> None:
    """Refuses a checkpoint whose tensors are not the model's: what is missing would be random."""
    wrong = ["missing_keys", "mismatched_keys"] + (["unexpected_keys"] if refuse_extra else [])
    for kind in wrong:
        # A mismatch comes with its shapes behind the name.
        names = sorted(key if isinstance(key, str) else key[0] for key in report.get(kind) or ())
        if names:
            shown = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
            raise AdaskipError(
                f"The weights of {source} do not fit its config.json: {len(names)} "
                f"{kind.removesuffix('_keys')} ({shown})."
            )
