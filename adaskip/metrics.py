"""LongBench's official metrics, and RULER's: texts in, a score from 0 to 1 out.

Written from the behaviour of LongBench's scorer (Bai et al., 2023, arXiv 2308.14508), its quirks
included, because published numbers contain them.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from adaskip.errors import AdaskipError
from adaskip.tasks.optional import optional_module
from adaskip.tasks.rouge import Failure, Unscorable, official_rouge, rouge_l
from adaskip.tasks.spec import RECALL, task_spec
from adaskip.tasks.words import chinese_tokens, english_tokens, segment

__all__ = [
    "METRICS",
    "ScoreLog",
    "Scored",
    "corpus_score",
    "rouge_l",
    "score",
    "score_each",
    "similarity_backend",
]

Classes = Sequence[str] | None
Metric = Callable[[str, str, Classes], float]


def _token_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two bags of tokens."""
    common = sum((Counter(prediction) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _qa_f1(prediction: str, reference: str, classes: Classes) -> float:
    return _token_f1(english_tokens(prediction), english_tokens(reference))


def _qa_f1_zh(prediction: str, reference: str, classes: Classes) -> float:
    return _token_f1(chinese_tokens(prediction), chinese_tokens(reference))


def _rouge(prediction: str, reference: str, classes: Classes) -> float:
    return official_rouge(prediction, reference)


def _rouge_zh(prediction: str, reference: str, classes: Classes) -> float:
    return official_rouge(" ".join(segment(prediction)), " ".join(segment(reference)))


def _classification(prediction: str, reference: str, classes: Classes) -> float:
    """1 / number of class names found in the prediction, if the right one is among them.

    A found name that is a part of the right one does not count against it. LongBench drops those
    from the list while it walks through it, so the name after each dropped one is never looked at
    and stays.
    """
    if not classes:
        raise AdaskipError("A classification task needs all_classes, the names of its classes.")
    found = [name for name in classes if name in prediction]
    index = 0
    while index < len(found):
        if found[index] in reference and found[index] != reference:
            del found[index]
        index += 1
    return 1 / len(found) if reference in found else 0.0


def _share_of_numbers(prediction: str, wanted: str) -> float:
    """Share of the numbers in the prediction that are `wanted`, compared as text."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def _paragraph_metric(pattern: str) -> Metric:
    def metric(prediction: str, reference: str, classes: Classes) -> float:
        match = re.search(pattern, reference)
        if match is None:
            raise AdaskipError(f"The reference {reference!r} names no paragraph ({pattern}).")
        return _share_of_numbers(prediction, match[1])

    return metric


def _count(prediction: str, reference: str, classes: Classes) -> float:
    return _share_of_numbers(prediction, reference)


@cache
def _fuzz() -> Any:
    return optional_module("fuzzywuzzy.fuzz", "fuzzywuzzy")


def _code_similarity(prediction: str, reference: str, classes: Classes) -> float:
    """Similarity of the reference and the first line without a backtick, `#` or `//`."""
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not re.search(r"`|#|//", line)), "")
    return float(_fuzz().ratio(code, reference)) / 100


def _occurs(prediction: str, reference: str, classes: Classes) -> float:
    """1 if the reference stands in the prediction, in capitals or not: RULER's rule.

    RULER: Hsieh et al., 2024, arXiv 2404.06654.
    """
    return float(reference.lower() in prediction.lower())


METRICS: dict[str, Metric] = {
    "qa_f1": _qa_f1,
    "qa_f1_zh": _qa_f1_zh,
    "rouge": _rouge,
    "rouge_zh": _rouge_zh,
    "classification": _classification,
    "retrieval": _paragraph_metric(r"Paragraph (\d+)"),
    "retrieval_zh": _paragraph_metric(r"段落(\d+)"),
    "count": _count,
    "code_sim": _code_similarity,
    RECALL: _occurs,
}


def similarity_backend() -> Literal["python-Levenshtein", "difflib"]:
    """What fuzzywuzzy compares code with; the two give different numbers (TRAPS 15)."""
    from_difflib = _fuzz().SequenceMatcher.__module__ == "difflib"
    return "difflib" if from_difflib else "python-Levenshtein"


@dataclass(frozen=True)
class Scored:
    """The comparison of one prediction with each of its references.

    Attributes:
        per_reference: score against each reference, 0..1.
        failures: per reference, why it could not be compared and counts 0; None where it could.
        asks_all: every reference was asked for.
    """

    per_reference: tuple[float, ...]
    failures: tuple[Failure | None, ...]
    asks_all: bool = False

    @property
    def score(self) -> float:
        """The best score over the references; the mean where all of them were asked for."""
        return (statistics.fmean if self.asks_all else max)(self.per_reference)


@dataclass
class ScoreLog:
    """Counts predictions that the metric could not compare (LongBench scores them 0 in silence).

    Attributes:
        n: predictions seen.
        unscored: reason -> predictions that no reference could be compared with; each counts 0.
        partly: reason -> predictions that only some references could be compared with.
    """

    n: int = 0
    unscored: Counter[Failure] = field(default_factory=Counter)
    partly: Counter[Failure] = field(default_factory=Counter)

    def add(self, scored: Scored) -> None:
        """Count one prediction."""
        self.n += 1
        reasons = [reason for reason in scored.failures if reason is not None]
        if reasons:
            complete = len(reasons) == len(scored.failures)
            (self.unscored if complete else self.partly)[reasons[0]] += 1

    def message(self) -> str | None:
        """One sentence on them; None if every prediction was compared with everything."""
        parts = []
        for counts, outcome in (
            (self.unscored, "could not be scored and count 0"),
            (self.partly, "could not be compared with every reference"),
        ):
            if counts:
                why = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
                parts.append(f"{counts.total()} of {self.n} predictions {outcome} ({why})")
        return "; ".join(parts) or None


def score_each(
    task: str, prediction: str, references: Sequence[str], all_classes: Classes = None
) -> Scored:
    """The metric of `task` against every reference, failures kept apart.

    For trec, triviaqa, samsum and lsht only the first line counts, after leading newlines.

    Args:
        task: a name of `adaskip.tasks.spec.task_names()`.
        prediction: the model's answer, uncut.
        references: the reference answers, at least one.
        all_classes: the names of the classes, for a classification task.

    Raises:
        AdaskipError: unknown task, no reference, or no classes for a classification task.
    """
    spec = task_spec(task)
    if isinstance(references, str) or not references:
        raise AdaskipError(f"{task} needs a list of at least one reference, not {references!r}.")
    if spec.first_line_only:
        prediction = prediction.lstrip("\n").split("\n")[0]
    scores: list[float] = []
    failures: list[Failure | None] = []
    for reference in references:
        try:
            scores.append(METRICS[spec.metric](prediction, reference, all_classes))
            failures.append(None)
        except Unscorable as outcome:
            scores.append(0.0)
            failures.append(outcome.reason)
    return Scored(tuple(scores), tuple(failures), spec.asks_all)


def score(
    task: str, prediction: str, references: Sequence[str], all_classes: Classes = None
) -> float:
    """The metric of `task`, 0..1: the best over the references, or the share that was found.

    Arguments and errors as `score_each`, which also tells what could not be compared.
    """
    return score_each(task, prediction, references, all_classes).score


def corpus_score(
    scores: Sequence[float], lengths: Sequence[int], *, min_length: int = 4000
) -> float:
    """Mean score of the rows longer than `min_length` words, x100, rounded to 2 decimals.

    Args:
        scores: one per row, 0..1.
        lengths: `Row.length` of each row.
        min_length: LongBench counts rows with length > 4000; 0 counts all.

    Returns:
        0..100, or NaN when no row is long enough, as LongBench's scorer.
    """
    kept = [value for value, length in zip(scores, lengths, strict=True) if length > min_length]
    return round(100 * math.fsum(kept) / len(kept), 2) if kept else math.nan
