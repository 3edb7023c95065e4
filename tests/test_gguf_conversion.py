"""GGUF files as folders of transformers: written here from tiny models, and read back."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import tiny_model
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import PreTrainedModel

from adaskip.errors import AdaskipError
from adaskip.models.gguf_conversion import convert
from adaskip.models.gguf_families import FAMILIES, gguf_family
from adaskip.models.gguf_vocabulary import Vocabulary, make_tokenizer, sentencepiece_merges
from adaskip.models.loading import load_model, load_tokenizer

TEXTS = (
    "the quick  brown fox\n\n jumps over the lazy dog",
    " a space before, and   three between",
    "it's 12345 naïve 你好 😀",
    "<b>bold</b><b>",
    "thethethe",
    "",
)
ROLES = {"bos": 2, "eos": 1, "padding": 0, "unknown": 3}
# What llama.cpp calls a tensor, by a part of transformers' name, in the order they are looked for.
GGUF_PARTS = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "model.norm": "output_norm",
}


@pytest.fixture(scope="module")
def pieces() -> SentencePieceProcessor:
    """A SentencePiece model as Gemma's: bytes for what it lacks, texts of its own, no prefix."""
    made = io.BytesIO()
    words = "the quick brown fox jumps over the lazy dog, and it goes on: over and over. "
    SentencePieceTrainer.train(
        sentence_iterator=iter([words * 3, "a space before and between", "bold, it's naïve"]),
        model_writer=made,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n", "\n\n", "▁▁", "▁▁▁", "<b>", "</b>"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return SentencePieceProcessor(model_proto=made.getvalue())


def piece_fields(pieces: SentencePieceProcessor) -> dict[str, Any]:
    """Its vocabulary as llama.cpp keeps it: user-defined pieces with spaces, the rest as it is."""
    size = pieces.get_piece_size()
    kinds = [
        3 if pieces.is_control(i) or i == 3 else 6 if pieces.is_byte(i) else 1 for i in range(size)
    ]
    tokens = [pieces.id_to_piece(i) for i in range(size)]
    for own in ("\n", "\n\n", "▁▁", "▁▁▁", "<b>", "</b>"):
        index = tokens.index(own)
        tokens[index], kinds[index] = own.replace("▁", " "), 4
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [pieces.get_score(i) for i in range(size)],
        "token_type": kinds,
        "add_bos_token": True,
        "add_space_prefix": False,
        **{f"{role}_token_id": index for role, index in ROLES.items()},
    }


def shape_of(model: PreTrainedModel, vocab_size: int) -> dict[str, Any]:
    ids = {"bos_token_id": 2, "eos_token_id": [1, 2], "pad_token_id": 0, "vocab_size": vocab_size}
    left_out = ("architectures", "dtype", "transformers_version")
    made = {k: v for k, v in model.config.to_dict().items() if k not in left_out}
    return made | ids


def write_gguf(
    model: PreTrainedModel, fields: dict[str, Any], path: Path, more: dict[str, Any] | None = None
) -> None:
    """The model as llama.cpp's converter stores one of its family."""
    kind = model.config.model_type
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in fields.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    for name, tensor in model.state_dict().items():
        values = tensor.detach().numpy()
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            head_dim = model.config.head_dim
            halves = values.reshape(-1, 2, head_dim // 2, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape).copy()
        if kind == "gemma3_text" and "norm" in name:
            values = values + np.float32(1)
        writer.add_tensor(gguf_name(name, kind), values)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str, kind: str) -> str:
    parts = GGUF_PARTS | {
        "post_attention_layernorm": "post_attention_norm" if "gemma" in kind else "ffn_norm"
    }
    part = next(own for key, own in parts.items() if key in name)
    suffix = name.rpartition(".")[2]
    return f"blk.{name.split('.')[2]}.{part}.{suffix}" if ".layers." in name else f"{part}.{suffix}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_computes_what_its_source_does(
    family: str, pieces: SentencePieceProcessor, tmp_path: Path
):
    model = tiny_model(family, vocab_size=pieces.get_piece_size())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.rand_like(parameter))
    write_gguf(model, piece_fields(pieces), tmp_path / "m.gguf")
    folder = tmp_path / "made"
    folder.mkdir()
    convert("mine", tmp_path / "m.gguf", folder, shape_of(model, pieces.get_piece_size()))
    loaded = load_model(folder, device="cpu")
    assert type(loaded) is type(model)
    assert loaded.generation_config.eos_token_id == [1, 2]
    ids = torch.tensor([[2, *range(4, 40)]])
    found, expected = loaded(ids).logits, model(ids).logits
    # Gemma's norms have been moved by 1 and back, which rounds.
    assert torch.allclose(found, expected, atol=1e-5)
    assert load_tokenizer(folder)("the  fox").input_ids == [2, *pieces.encode("the  fox")]


def test_files_that_do_not_fit_are_refused(pieces: SentencePieceProcessor, tmp_path: Path):
    size = pieces.get_piece_size()
    model = tiny_model("llama", vocab_size=size)
    write_gguf(
        model,
        piece_fields(pieces),
        tmp_path / "m.gguf",
        {"blk.0.odd.weight": np.ones(2, np.float32)},
    )
    shape = shape_of(model, size)
    with pytest.raises(AdaskipError, match=r"'blk.0.odd.weight' is not part of a LlamaForCausalLM"):
        convert("mine", tmp_path / "m.gguf", tmp_path, shape)
    with pytest.raises(AdaskipError, match=r"GGUF file of 'mine' is not the model's: .*'eos': 1"):
        convert("mine", tmp_path / "m.gguf", tmp_path, shape | {"eos_token_id": 2})
    with pytest.raises(AdaskipError, match=f"'tokens': {size}"):
        convert("mine", tmp_path / "m.gguf", tmp_path, shape | {"vocab_size": 9})
    with pytest.raises(AdaskipError, match="Unknown model type in GGUF 'olmo2'"):
        gguf_family("olmo2")


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_those_of_sentencepiece(pieces: SentencePieceProcessor, text: str):
    tokenizer = make_tokenizer(Vocabulary(piece_fields(pieces)))
    ids = tokenizer.encode(text).ids
    assert ids == [2, *pieces.encode(text)]
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_cut_out_and_left_out(pieces: SentencePieceProcessor):
    tokenizer = make_tokenizer(Vocabulary(piece_fields(pieces)))
    ids = tokenizer.encode("the</s> fox").ids
    assert ids == [2, *pieces.encode("the"), 1, *pieces.encode(" fox")]
    assert tokenizer.decode(ids) == "the fox"
    pair = tokenizer.encode("the", "fox").ids
    assert pair == [2, *pieces.encode("the"), 2, *pieces.encode("fox")]


def test_merges_by_hand():
    tokens, scores = ["a", "b", "ab", "aab", "aa", "[x]"], [-3.0, -4.0, -1.0, -2.0, 0.0, 5.0]
    fields = {"tokens": tokens, "scores": scores, "token_type": [1, 1, 1, 1, 1, 3]}
    merges = [("a", "a"), ("a", "b"), ("aa", "b"), ("a", "ab")]
    assert sentencepiece_merges(Vocabulary(fields)) == merges


def test_tokenizers_of_another_kind_are_refused(pieces: SentencePieceProcessor):
    fields = piece_fields(pieces)
    with pytest.raises(AdaskipError, match="GGUF tokenizer 'bert' is not read"):
        make_tokenizer(Vocabulary(fields | {"model": "bert"}))
    with pytest.raises(AdaskipError, match="GGUF tokenizer 'llama' is not read"):
        make_tokenizer(Vocabulary(fields | {"add_space_prefix": True}))
    with pytest.raises(AdaskipError, match="splits texts by 'gpt-2' is not read: smollm, "):
        make_tokenizer(Vocabulary(fields | {"model": "gpt2", "pre": "gpt-2", "merges": []}))
