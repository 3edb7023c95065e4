"""How byte-level BPE tokenizers split texts before byte pairs are merged, by llama.cpp's names.

llama.cpp has no regular expressions of its own to read: a GGUF file names how texts are split.
Three of these names are known here, with the settings that a tokenizer must have to go by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Splitting:
    """How a tokenizer splits texts before byte pairs are merged.

    Attributes:
        pattern: the regular expression; None for single digits and GPT-2's.
        ignore_merges: whether a word of the vocabulary is taken whole.
        normalizers: what may be done to texts before; the published tokenizer does the last one.
    """

    pattern: str | None
    ignore_merges: bool = False
    normalizers: tuple[str | None, ...] = (None,)


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTINGS = {
    "smollm": Splitting(None),
    "llama-bpe": Splitting(_WORDS + r"\p{N}{1,3}" + _REST, ignore_merges=True),
    "qwen2": Splitting(_WORDS + r"\p{N}" + _REST, normalizers=(None, "NFC")),
}


def splits(pre_tokenizer: Any) -> list[str | None]:
    """The patterns a byte-level pre-tokenizer splits by (None: digits and GPT-2's), or none.

    Args:
        pre_tokenizer: the part of a `tokenizer.json`.
    """
    match pre_tokenizer:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            ],
        }:
            return [None]
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return [pattern]
    return []


def pre_tokenizer(pattern: str | None) -> Any:
    """The byte-level pre-tokenizer that `splits` by a pattern."""
    from tokenizers import Regex, pre_tokenizers

    first = (
        pre_tokenizers.Digits(individual_digits=True)
        if pattern is None
        else pre_tokenizers.Split(Regex(pattern), "isolated")
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    return pre_tokenizers.Sequence([first, byte_level])
