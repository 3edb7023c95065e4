"""Texts as words, the way LongBench's metrics see them: English and Chinese."""

from __future__ import annotations

import re
import string
from functools import cache
from typing import Any

from adaskip.tasks.optional import optional_module

# The Chinese and typographic punctuation LongBench strips, as ranges of code points. The opening
# book-title mark (300A) and the full-width dot (FF0E) are not among them.
_CHINESE_PUNCTUATION_RANGES = (
    (0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003),
    (0x300B, 0x3011), (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F),
    (0xFF01, 0xFF0D), (0xFF0F, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64),
)  # fmt: skip
_NO_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))
_NO_CHINESE_PUNCTUATION = _NO_PUNCTUATION | {
    code: None for first, last in _CHINESE_PUNCTUATION_RANGES for code in range(first, last + 1)
}


@cache
def _segmenter() -> Any:
    """A jieba tokenizer with its dictionary loaded, without jieba's log lines and cache file.

    The cache would be unmarshalled from the shared temporary folder, where anyone can put one.
    """
    jieba = optional_module("jieba", "jieba")
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer


def segment(text: str) -> list[str]:
    """The words of a Chinese text, by jieba; punctuation and white space are words too."""
    words: list[str] = _segmenter().lcut(text)
    return words


def english_tokens(text: str) -> list[str]:
    """Lower-case words without ASCII punctuation and articles (SQuAD's normalization)."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()


def chinese_tokens(text: str) -> list[str]:
    """The words of `segment` in lower case, without punctuation, white space and empty ones."""
    words = (word.lower().translate(_NO_CHINESE_PUNCTUATION) for word in segment(text))
    return [joined for word in words if (joined := "".join(word.split()))]
