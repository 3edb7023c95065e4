"""The plan in the process beside an engine that runs the checkpoint, on real text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from adaskip.cache_name import CACHE
from adaskip.entering import skipping
from adaskip.errors import AdaskipError, ExportError
from adaskip.evaluating import evaluating
from adaskip.export.report import Check
from adaskip.plan import SkipPlan
from adaskip.profiling.calibration import random_prompt

TEXTS = (
    "The lighthouse keeper wrote down the weather every evening, although nobody had asked him to "
    "for eleven years. On the first page he had noted a storm from the north-west and the loss of "
    "two panes of glass; on the last one so far, that the gulls were late and the sea was as flat "
    "as a table. When the inspector finally came, she read the book from cover to cover, asked for "
    "a pencil, and corrected a single date. Then she said that the lamp would be run by wire from "
    "the mainland, beginning in March, and that the book should go on.",
    "To find the shortest route between two towns, keep a list of the towns reached so far, each "
    "with the length of the way to it. Take the nearest one, and look at every road that leaves "
    "it: if the way over this town is shorter than the one known, write down the new length. In "
    "Python, with 3 towns and 4 roads, that is: `while queue: distance, town = heappop(queue)`. A "
    "town that was taken from the list is finished (no road is longer than 0 km short of nothing), "
    "so the search ends when the goal is taken. How many steps does it need for 1,000 towns?",
)
# What rounding the weights may cost: mean divergence from the plan in nats per token.
KL_TOLERANCE = {"f32": 1e-5, "f16": 1e-3, "bf16": 3e-2, "q8_0": 3e-2}
N_TEXT, N_PROMPT, N_NEW = 192, 48, 24
# Tokens of a text at least.
_LEAST = 2


@dataclass(frozen=True)
class Sample:
    """What the plan in the process makes of one text.

    Attributes:
        ids: the text: [tokens].
        log_probs: at each of its tokens: [tokens, vocabulary], float64 on the CPU.
        prompt: how many of the tokens the greedy answer follows.
        answer: the greedy answer: [new tokens].
        answer_log_probs: at each of them: [new tokens, vocabulary].
    """

    ids: Tensor
    log_probs: Tensor
    prompt: int
    answer: Tensor
    answer_log_probs: Tensor


def texts_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[Tensor]:
    """Ids of the texts, short enough for the model: [tokens] each; random without tokenizer.

    Raises:
        AdaskipError: the tokenizer is another model's, or the model has too few positions.
    """
    config: Any = model.config
    most = min(N_TEXT, config.max_position_embeddings - N_NEW)
    if most < _LEAST:
        raise AdaskipError(
            f"The model has {config.max_position_embeddings} positions, and comparing a checkpoint "
            f"with the plan takes {_LEAST + N_NEW}."
        )
    if tokenizer is None:
        return list(random_prompt(model, most, batch=len(TEXTS)).cpu())
    encoded = [tokenizer(text, return_tensors="pt").input_ids[0] for text in TEXTS]
    if (largest := max(int(ids.max()) for ids in encoded)) >= config.vocab_size:
        raise AdaskipError(
            f"The tokenizer has a token {largest}, the model knows 0 to {config.vocab_size - 1}; "
            "give the model's own."
        )
    return [ids[:most] for ids in encoded]


@torch.no_grad()
def samples(model: PreTrainedModel, plan: SkipPlan, texts: Sequence[Tensor]) -> list[Sample]:
    """What the plan in the process makes of the texts."""
    with skipping(model, plan), evaluating(model):
        return [_sample(model, ids) for ids in texts]


def _sample(model: PreTrainedModel, ids: Tensor) -> Sample:
    prompt = min(N_PROMPT, len(ids))
    answer, answer_log_probs = greedy(model, ids[:prompt], N_NEW)
    return Sample(ids, log_probs(model, ids), prompt, answer, answer_log_probs)


@torch.no_grad()
def log_probs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probabilities at every token: [tokens, vocabulary], float64 on the CPU."""
    logits = model(ids[None].to(model.device), use_cache=False).logits[0]
    found: Tensor = logits.double().log_softmax(-1).cpu()
    return found


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: Tensor, n_new: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens [n_new], step by step on a cache, and the log-probabilities they come from.

    No processor, no end: `generate()` would obey the model's generation configuration.
    """
    cache = DynamicCache(config=model.config)
    given, steps = ids[None].to(model.device), list[Tensor]()
    while len(steps) < n_new:
        logits = model(given, **{CACHE: cache}, logits_to_keep=1).logits[0, -1]
        steps.append(logits.double().log_softmax(-1).cpu())
        given = logits.argmax()[None, None]
    found = torch.stack(steps)
    return found.argmax(-1), found


@dataclass(frozen=True)
class Found:
    """What an engine makes of one text, as far as it tells.

    Attributes:
        positions: at which tokens of the text it told log-probabilities.
        log_probs: there: [positions, vocabulary].
        answer: its greedy tokens after the prompt; fewer if it ended there.
    """

    positions: Sequence[int]
    log_probs: Tensor
    answer: Tensor


def compared(
    engine: str, expected: Sequence[Sample], found: Sequence[Found], tolerance: float
) -> Check:
    """An engine's outputs beside those of the plan.

    A greedy token may differ only where the plan's two best lie closer than twice the largest
    difference of log-probabilities; what comes after it is another text.
    """
    kls, largest, worst, wrong = [], 0.0, "", ""
    equal = total = 0
    for number, (sample, other) in enumerate(zip(expected, found, strict=True)):
        reference = sample.log_probs[list(other.positions)]
        kls.append((reference.exp() * (reference - other.log_probs)).sum(-1))
        difference = (reference - other.log_probs).abs().amax(-1)
        at = int(difference.argmax())
        if float(difference[at]) > largest:
            largest = float(difference[at])
            worst = f"text {number + 1}, token {other.positions[at]}"
    for number, (sample, other) in enumerate(zip(expected, found, strict=True)):
        length = len(other.answer)
        same = (sample.answer[:length] == other.answer).long().cumprod(0).sum()
        equal, total = equal + int(same), total + length
        if same < length:
            best = sample.answer_log_probs[same].topk(2).values
            if float(best[0] - best[1]) > 2 * largest:
                wrong = f"text {number + 1}, greedy token {int(same)}"
    kl = torch.cat(kls)
    mean = max(float(kl.mean()), 0.0)
    passed = mean <= tolerance and not wrong
    return Check(
        engine=engine,
        tokens=len(kl),
        max_logit_difference=largest,
        kl=mean,
        kl_tolerance=tolerance,
        greedy_equal=equal,
        greedy_tokens=total,
        worst=wrong or worst,
        passed=passed,
    )


def run(loaded: PreTrainedModel, model: PreTrainedModel, expected: Sequence[Sample]) -> list[Found]:
    """What a model in this process makes of the texts, by the attention function of `model`."""
    attention: Any = model.config._attn_implementation
    loaded.set_attn_implementation(attention)
    with evaluating(loaded):
        return [
            Found(
                range(len(sample.ids)),
                log_probs(loaded, sample.ids),
                greedy(loaded, sample.ids[: sample.prompt], len(sample.answer))[0],
            )
            for sample in expected
        ]


def tolerance(dtype: str, computed: str) -> float:
    """The largest mean divergence: that of the coarser of two precisions.

    Args:
        dtype: of the checkpoint.
        computed: of what it is compared in.
    """
    return max(KL_TOLERANCE[dtype], KL_TOLERANCE[computed])


def accepted(check: Check) -> Check:
    """The check, if it passed.

    Raises:
        ExportError: it did not.
    """
    if not check.passed:
        raise ExportError(
            f"What {check.engine} makes of the checkpoint is not what the plan does: KL "
            f"{check.kl:.2e} (at most {check.kl_tolerance:.0e}), largest difference "
            f"{check.max_logit_difference:.2e}, at {check.worst}; nothing was written."
        )
    return check
