"""The two ROUGE-L of the tables: LongBench's official one, and rouge-score's, Chinese included."""

from __future__ import annotations

import re
import threading
from functools import cache
from typing import Any, Literal

from adaskip.tasks.optional import optional_module

Failure = Literal["empty text", "only dots", "empty reference", "too long for rouge's recursion"]


class Unscorable(Exception):  # noqa: N818 - an outcome that is counted, not an error
    """The `rouge` package cannot compare this pair of texts; LongBench counts it as 0."""

    def __init__(self, reason: Failure) -> None:
        super().__init__(reason)
        self.reason: Failure = reason


@cache
def _official_scorer() -> Any:
    """The `rouge` package's scorer for ROUGE-L alone: ROUGE-1 and 2 would cost time for nothing."""
    return optional_module("rouge", "rouge").Rouge(metrics=["rouge-l"], stats=["f"])


def _in_fresh_stack(prediction: str, reference: str) -> float:
    """ROUGE-L from a thread of its own.

    `rouge` recurses once per step through the text and gives up at Python's recursion limit, so on
    the caller's stack the same pair could score 0.9 in a script and 0 beneath a test runner.
    """
    outcome: list[float | Exception] = []

    def work() -> None:
        try:
            outcome.append(
                _official_scorer().get_scores([prediction], [reference])[0]["rouge-l"]["f"]
            )
        except Exception as error:  # handed to the caller's thread, which tells them apart
            outcome.append(error)

    thread = threading.Thread(target=work, name="rouge")
    thread.start()
    thread.join()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return float(outcome[0])


def official_rouge(prediction: str, reference: str) -> float:
    """LongBench's ROUGE-L: F of the sentence-union LCS over unique words (`rouge` package).

    Sentences end at every dot, the decimal point included. A word is what white space separates:
    Chinese must be segmented before.

    Raises:
        Unscorable: one text is empty or nothing but dots, or the pair is so long that `rouge`
            exceeds Python's recursion limit (near 1,200 words without a dot; TRAPS 14).
    """
    if not prediction.strip("."):
        raise Unscorable("only dots" if prediction else "empty text")
    if not reference.strip("."):
        raise Unscorable("empty reference")
    _official_scorer()  # a missing package is the caller's error, to be raised on its own thread
    try:
        return _in_fresh_stack(prediction, reference)
    except RecursionError:
        raise Unscorable("too long for rouge's recursion") from None


class WordAndCharacterTokenizer:
    """rouge-score's words (runs of a-z and 0-9), and every Chinese, Japanese or Korean character.

    rouge-score's own tokenizer drops every character outside a-z0-9, so that any two Chinese texts
    score 0. A token per character needs no dictionary and is the common choice for Chinese ROUGE.
    """

    _pattern = re.compile(
        "[a-z0-9]+"
        "|[\u3040-\u30ff"  # kana
        "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # ideographs, extension A, compatibility
        "\uac00-\ud7af"  # hangul syllables
        "\U00020000-\U0003ffff]"  # the supplementary ideographic planes
    )

    def tokenize(self, text: str) -> list[str]:
        """The tokens of `text`, in lower case."""
        return self._pattern.findall(text.lower())


@cache
def _rouge_score_scorer() -> Any:
    scorer = optional_module("rouge_score.rouge_scorer", "rouge-score")
    return scorer.RougeScorer(["rougeL"], tokenizer=WordAndCharacterTokenizer())


def rouge_l(prediction: str, reference: str) -> float:
    """rouge-score's rougeL F-measure, without stemming, 0..1; Chinese counts per character.

    Equal to `RougeScorer(["rougeL"])` on text without Chinese, Japanese or Korean characters.
    """
    scores = _rouge_score_scorer().score(target=reference, prediction=prediction)
    return float(scores["rougeL"].fmeasure)
