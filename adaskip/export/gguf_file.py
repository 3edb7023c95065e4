"""Writes a GGUF file for llama.cpp: `deci` where layers lack sublayers, `llama` where none does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from adaskip.errors import AdaskipError
from adaskip.export.llama_form import LlamaForm
from adaskip.export.report import Written
from adaskip.export.surviving import Surviving
from adaskip.positions import positions

NAME = "model.gguf"
# The names of llama.cpp's file types and ggml's types.
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_Q8_BLOCK = 32


def gguf_package() -> Any:
    """The package `gguf`.

    Raises:
        AdaskipError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise AdaskipError("Format 'gguf' needs the package gguf: pip install gguf.") from error
    return gguf


def check_rows(form: LlamaForm, dtype: str) -> None:
    """Refuses matrices that a precision cannot hold.

    Raises:
        AdaskipError: q8_0 takes whole blocks, and a row is none.
    """
    odd = [length for length in form.row_lengths if length % _Q8_BLOCK]
    if dtype == "q8_0" and odd:
        raise AdaskipError(
            f"Precision q8_0 takes rows of a multiple of {_Q8_BLOCK} numbers, and this model has "
            f"some of {odd[0]}; take f16."
        )


def write(
    model: PreTrainedModel,
    surviving: Surviving,
    folder: Path,
    dtype: str,
    about: Mapping[str, Any],
    tokenizer_fields: Mapping[str, Any],
) -> Written:
    """Writes `model.gguf` into an existing folder.

    Args:
        model: where the weights come from; it is not changed.
        surviving: what the plan leaves.
        folder: where to.
        dtype: "f32", "f16", "bf16" or "q8_0"; vectors stay in float32.
        about: plan, source and version, kept as the file's metadata.
        tokenizer_fields: as `gguf_tokenizer` makes them.
    """
    gguf = gguf_package()
    form = LlamaForm(model, surviving)
    architecture = "llama" if surviving.is_whole else "deci"
    path = folder / NAME
    writer = gguf.GGUFWriter(path, architecture)
    _write_shape(writer, form, architecture)
    writer.add_name(str(about["source"]) or model.config.model_type)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, (value, kind) in tokenizer_fields.items():
        _write_field(writer, key, value, kind)
    for key, value in about.items():
        writer.add_string(f"adaskip.{key}", value if isinstance(value, str) else json.dumps(value))
    parameters = 0
    # One by one: each is in float64 until it is encoded.
    tensors = chain(form.around(), form.layers())
    for name, tensor in tqdm(tensors, "writing GGUF", unit="tensor", leave=False):
        parameters += tensor.numel()
        values, kind = _encoded(tensor, dtype)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(architecture, parameters, (path,), {"llama.cpp": f"architecture {architecture}"})


def _write_shape(writer: Any, form: LlamaForm, architecture: str) -> None:
    config = form.config
    writer.add_block_count(len(form.surviving.layers))
    writer.add_context_length(positions(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(form.head_dim)
    writer.add_key_length(form.head_dim)
    writer.add_value_length(form.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf_package().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if architecture == "llama":
        writer.add_head_count(form.heads)
        writer.add_head_count_kv(form.kv_heads)
        writer.add_feed_forward_length(config.intermediate_size)
    else:
        writer.add_head_count([heads for heads, _ in form.head_counts])
        writer.add_head_count_kv([kv_heads for _, kv_heads in form.head_counts])
        writer.add_feed_forward_length(form.ffn_lengths)


def _write_field(writer: Any, key: str, value: Any, kind: str) -> None:
    """A tokenizer's field: `kind` is ggml's name of its type, of its items for a list."""
    types = gguf_package().GGUFValueType
    if isinstance(value, list):
        writer.add_key_value(key, value, types.ARRAY, sub_type=types[kind])
    else:
        writer.add_key_value(key, value, types[kind])


def _encoded(tensor: Tensor, dtype: str) -> tuple[np.ndarray[Any, Any], Any]:
    """A tensor's numbers in the file, and ggml's type of them."""
    gguf = gguf_package()
    values = tensor.detach().cpu().float().contiguous().numpy()
    if values.ndim == 1 or dtype == "f32":
        return values, gguf.GGMLQuantizationType.F32
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    return gguf.quantize(values, kind), kind
