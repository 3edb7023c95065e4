"""From SmolLM2's GGUF file to a folder that transformers reads: safetensors, config, tokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adaskip.errors import AdaskipError

logger = logging.getLogger(__name__)

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
CONTROL_TOKEN = 3  # GGUF's token type of special tokens
START, END, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

Field = Callable[[str], Any]


def convert(gguf: Path, folder: Path) -> None:
    """Writes `FILES` into an existing empty folder.

    Args:
        gguf: a SmolLM2 GGUF file.
        folder: where to.

    Raises:
        AdaskipError: the gguf reader is not installed, or the file is not a SmolLM2.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise AdaskipError("Model 'smollm2' needs the GGUF reader: pip install gguf.") from error
    logger.info("Converting %s to safetensors, once, in %s", gguf.name, folder.parent.parent)
    reader = GGUFReader(str(gguf))

    def field(name: str) -> Any:
        if name not in reader.fields:
            raise AdaskipError(f"{gguf} is not a SmolLM2 GGUF file: it has no {name!r}.")
        return reader.fields[name].contents()

    config = model_config(field)
    _write_tokenizer(field, folder)
    _write_json(folder / "config.json", config)
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", tokens)
    _write_weights(reader, config, folder / "model.safetensors")


def model_config(field: Field) -> dict[str, Any]:
    """The content of `config.json` by GGUF metadata."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "max_position_embeddings": field("llama.context_length"),
        # Stored as float32: 9.999999747378752e-06 is 1e-05.
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(field("llama.rope.freq_base")),
        },
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


def _write_tokenizer(field: Field, folder: Path) -> None:
    """Byte-level BPE after single digits, as SmolLM2's own tokenizer ("smollm" in GGUF)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = field("tokenizer.ggml.tokens")
    kinds = field("tokenizer.ggml.token_type")
    ids = {token: index for index, token in enumerate(tokens)}
    expected = (ids.get(START), field("tokenizer.ggml.eos_token_id"), ids.get(UNKNOWN))
    if expected != (1, ids.get(END), 0) or field("tokenizer.ggml.pre") != "smollm":
        raise AdaskipError(f"Not SmolLM2's tokenizer: special token ids are {expected}.")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    pairs = zip(tokens, kinds, strict=True)
    special = [token for token, kind in pairs if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": field("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": UNKNOWN,
        "chat_template": field("tokenizer.chat_template"),
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_weights(reader: Any, config: dict[str, Any], path: Path) -> None:
    """Dequantizes every tensor to float32 and names it as transformers does."""
    from gguf import dequantize
    from safetensors.numpy import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in tqdm(reader.tensors, desc="Converting SmolLM2", unit="tensor", leave=False):
        values = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            # GGUF pairs neighbouring rotary dimensions, transformers the two halves of a head.
            rows, columns = values.shape
            pairs = values.reshape(heads[part], rows // heads[part] // 2, 2, columns)
            values = pairs.swapaxes(1, 2).reshape(rows, columns).copy()
        weights[weight_name(tensor.name)] = values
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors leaves it unreadable to others, who may share the cache


def weight_name(name: str) -> str:
    """The name transformers gives a Llama tensor in GGUF.

    Raises:
        AdaskipError: a Llama has no such tensor.
    """
    top = {"token_embd": "embed_tokens", "output_norm": "norm"}
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
        "attn_output": "self_attn.o_proj",
        **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    }
    match name.split("."):
        case [part, "weight"] if part in top:
            return f"model.{top[part]}.weight"
        case ["blk", layer, part, "weight"] if part in parts:
            return f"model.layers.{layer}.{parts[part]}.weight"
    raise AdaskipError(f"GGUF tensor {name!r} is not part of a Llama with tied embeddings.")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
