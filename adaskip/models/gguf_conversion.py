"""From a GGUF file to a folder that transformers reads: safetensors, config, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adaskip.errors import AdaskipError
from adaskip.models.gguf_families import gguf_family
from adaskip.models.gguf_vocabulary import Vocabulary, check_ids, make_tokenizer
from adaskip.whole_files import give_usual_mode

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
PREFIX, TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"


def convert(name: str, gguf: Path, folder: Path, shape: Mapping[str, Any]) -> None:
    """Writes `FILES` into an existing empty folder.

    Args:
        name: the model's, for messages.
        gguf: its file; the caller has made sure that it is the one the shape belongs to.
        folder: where to.
        shape: the model's configuration, as `configs/models.yaml` has it.

    Raises:
        AdaskipError: the gguf reader is not installed, or the file does not fit the shape.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise AdaskipError(f"Model {name!r} needs the GGUF reader: pip install gguf.") from error
    reader = GGUFReader(str(gguf))
    fields = {
        key.removeprefix(PREFIX): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(PREFIX) or key == TEMPLATE
    }
    vocabulary = Vocabulary(fields)
    check_ids(name, vocabulary, shape)
    # Its own `save` tells of a full disk by a bare Exception.
    text = make_tokenizer(vocabulary).to_str(pretty=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", tokenizer_config(vocabulary, shape))
    config = model_config(shape)
    _write_json(folder / "config.json", config)
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", tokens)
    _write_weights(name, reader, shape, folder / "model.safetensors")


def model_config(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `config.json`."""
    family = gguf_family(shape["model_type"])
    return {"architectures": [family.architecture], **shape, "dtype": "float32"}


def tokenizer_config(vocabulary: Vocabulary, shape: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `tokenizer_config.json`; what the file does not name is left out."""
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    named = {
        **{f"{own}_token": vocabulary.special(role) for own, role in roles.items()},
        "chat_template": vocabulary.fields.get(TEMPLATE),
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **{key: value for key, value in named.items() if value is not None},
    }


def _write_weights(name: str, reader: Any, shape: Mapping[str, Any], path: Path) -> None:
    """Dequantizes every tensor to float32 and writes it as transformers names and stores it."""
    from gguf import dequantize
    from safetensors.numpy import save_file

    family = gguf_family(shape["model_type"])
    weights = {}
    for tensor in tqdm(reader.tensors, desc=f"Converting {name}", unit="tensor", leave=False):
        values = dequantize(tensor.data, tensor.tensor_type)
        weights[family.weight_name(tensor.name)] = family.weight(tensor.name, values, shape)
    save_file(weights, path, metadata={"format": "pt"})
    give_usual_mode(path)  # others may share the cache


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
