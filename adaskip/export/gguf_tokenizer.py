"""A tokenizer as the fields of a GGUF file: copied from another one, or written from its parts."""

from __future__ import annotations

import json
import re
from operator import itemgetter
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from adaskip.errors import AdaskipError
from adaskip.export.gguf_file import gguf_package
from adaskip.models.text_splitting import SPLITTINGS, splits

# Each field's value, and ggml's name of its type, of its items for a list.
TokenizerFields = dict[str, tuple[Any, str]]
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def from_gguf(
    path: Path, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> TokenizerFields:
    """The tokenizer's fields in another GGUF file.

    Args:
        path: the file.
        vocab_size: of the model.
        tokenizer: the model's own, whose tokens the file's must be; None leaves them unseen.

    Raises:
        AdaskipError: it cannot be read, holds no tokenizer, or one of another vocabulary.
    """
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(str(path))
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise AdaskipError(f"{path} cannot be read as GGUF: {error}.") from error
    fields = {
        key: (field.contents(), field.types[-1].name)
        for key, field in reader.fields.items()
        if key.startswith("tokenizer.")
    }
    n_tokens = len(fields.get("tokenizer.ggml.tokens", ((), ""))[0])
    if n_tokens != vocab_size:
        raise AdaskipError(
            f"The tokenizer in {path} has {n_tokens} tokens, the model {vocab_size}; give the GGUF "
            "file of this model."
        )
    if tokenizer is not None:
        _check_tokens(path, fields, tokenizer)
    return fields


def _check_tokens(path: Path, fields: TokenizerFields, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a token that is another one than the tokenizer's of the same id.

    Raises:
        AdaskipError: there is one.
    """
    tokens = fields["tokenizer.ggml.tokens"][0]
    kinds = fields.get("tokenizer.ggml.token_type", ([_NORMAL] * len(tokens), ""))[0]
    for own, index in sorted(tokenizer.get_vocab().items(), key=itemgetter(1)):
        if index >= len(tokens) or kinds[index] == _UNUSED:
            continue
        # Converters write SentencePiece's sign for a space out in tokens that were added.
        if tokens[index].replace("▁", " ") != own.replace("▁", " "):
            raise AdaskipError(
                f"Token {index} is {tokens[index]!r} in {path} and {own!r} in the model's "
                "tokenizer; give the GGUF file of this model."
            )


def from_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TokenizerFields:
    """The fields of a byte-level BPE tokenizer of SmolLM2, Llama 3 or Qwen2.

    Args:
        tokenizer: a fast one.
        vocab_size: of the model; ids beyond the tokenizer's are unused.

    Raises:
        AdaskipError: the tokenizer is another one.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {"model": {"type": None}}
    if backend is not None:
        content = json.loads(backend.to_str())
    name = splitting_name(content)
    vocabulary = tokenizer.get_vocab()
    added = {token["id"]: token for token in content["added_tokens"]}
    if max(vocabulary.values()) >= vocab_size:
        raise AdaskipError(
            f"The tokenizer has {max(vocabulary.values()) + 1} tokens, the model {vocab_size}; "
            "give the model's own tokenizer."
        )
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [_UNUSED] * vocab_size
    for token, index in vocabulary.items():
        tokens[index] = token
        own = added.get(index)
        kinds[index] = _NORMAL if own is None else _CONTROL if own["special"] else _USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    fields: TokenizerFields = {
        "tokenizer.ggml.model": ("gpt2", "STRING"),
        "tokenizer.ggml.pre": (name, "STRING"),
        "tokenizer.ggml.tokens": (tokens, "STRING"),
        "tokenizer.ggml.token_type": (kinds, "INT32"),
        "tokenizer.ggml.merges": (merges, "STRING"),
        "tokenizer.ggml.add_space_prefix": (False, "BOOL"),
        "tokenizer.ggml.add_bos_token": (_begins(tokenizer), "BOOL"),
    }
    return fields | _special(tokenizer)


def splitting_name(content: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer splits texts, by the content of its `tokenizer.json`.

    Raises:
        AdaskipError: it is none of those known here.
    """
    model = content["model"]
    if model["type"] == "BPE" and not model.get("byte_fallback"):
        normalizer = (content.get("normalizer") or {}).get("type")
        for name, wanted in SPLITTINGS.items():
            fits = splits(content.get("pre_tokenizer")) == [wanted.pattern]
            merges = bool(model.get("ignore_merges")) == wanted.ignore_merges
            if fits and merges and normalizer in wanted.normalizers:
                return name
    raise AdaskipError(
        "The tokenizer is not written as GGUF: it splits texts otherwise than the byte-level BPE "
        "of SmolLM2, Llama 3 and Qwen2. Give a GGUF file of the same model to copy it from "
        "(--tokenizer FILE.gguf, tokenizer_gguf=)."
    )


def _begins(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text is begun with a token of its own."""
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _special(tokenizer: PreTrainedTokenizerBase) -> TokenizerFields:
    """The ids of special tokens and the chat templates, those that there are."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    fields: TokenizerFields = {}
    for name, own in names.items():
        index = getattr(tokenizer, f"{own}_token_id", None)
        if index is not None:
            fields[f"tokenizer.ggml.{name}_token_id"] = (int(index), "UINT32")
    return fields | _templates(tokenizer.chat_template)


def _templates(given: str | dict[str, str] | None) -> TokenizerFields:
    """Chat templates, of which there may be several, by name."""
    named = given if isinstance(given, dict) else {"default": given} if given else {}
    fields: TokenizerFields = {}
    others = []
    for name, template in named.items():
        if name == "default":
            fields["tokenizer.chat_template"] = (template, "STRING")
            continue
        # Only such names do converters write.
        others.append(re.sub("[^a-zA-Z0-9]", "_", name))
        fields[f"tokenizer.chat_template.{others[-1]}"] = (template, "STRING")
    return fields | ({"tokenizer.chat_templates": (others, "STRING")} if others else {})
