"""Perplexity of reference answers while sublayers are skipped: deterministic and cheap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from adaskip.cache_name import CACHE
from adaskip.entering import skipping
from adaskip.errors import AdaskipError, DataError, RunError
from adaskip.models.internlm import check_prompt_length
from adaskip.models.processes import team
from adaskip.plan import EMPTY_PLAN, Scope
from adaskip.policies import FixedSkipping, SkipPolicy
from adaskip.runs.audit import Audit
from adaskip.runs.rows import Skips, Stored
from adaskip.session import Session
from adaskip.tasks.prompts import Prompt

# Scripts that write no spaces begin here: CJK radicals.
_NO_SPACES = 0x2E80


@dataclass(frozen=True)
class RowLoss:
    """One reference under one policy.

    Attributes:
        nll: negative log-likelihood of the reference, in nats, summed over its tokens.
        tokens: how many there are.
        skipped: what was left out per phase, by phase.
    """

    nll: float
    tokens: int
    skipped: Skips


class Loss(Stored):
    """What is kept of references scored together.

    Attributes:
        id: which, in its file.
        nll: negative log-likelihood, in nats, summed over the tokens.
        tokens: how many there are.
    """

    id: str
    nll: float
    tokens: int


def perplexity_of(nll: float, tokens: float) -> float:
    """`exp(nll / tokens)`; infinity where that is beyond a float."""
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Perplexity:
    """Several references under one policy; every token weighs the same."""

    rows: tuple[RowLoss, ...]

    @property
    def nll(self) -> float:
        """Negative log-likelihood of all references, in nats."""
        return math.fsum(row.nll for row in self.rows)

    @property
    def tokens(self) -> int:
        """Reference tokens scored."""
        return sum(row.tokens for row in self.rows)

    @property
    def perplexity(self) -> float:
        """As `perplexity_of`."""
        return perplexity_of(self.nll, self.tokens)

    def __add__(self, other: Perplexity) -> Perplexity:
        """Both together, e.g. two tasks."""
        return Perplexity(self.rows + other.rows)


def reference_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, reference: str, max_tokens: int
) -> list[int]:
    """The first tokens of a reference as they would follow the prompt, without an end token.

    Prompt and reference are tokenized together, because what a tokenizer makes of a text depends
    on what stands before it. A space separates them, unless the prompt ends in white space or the
    reference is in a script without spaces.

    Raises:
        DataError: the reference is empty.
    """
    text = reference.strip()
    if not text:
        raise DataError("A reference answer is empty: it has no perplexity; leave the row out.")
    spaced = not prompt.text[-1:].isspace() and ord(text[0]) < _NO_SPACES
    text = f" {text}" if spaced else text
    ids = list(tokenizer(prompt.text + text, truncation=False, verbose=False)["input_ids"])
    n_prompt = len(prompt.input_ids)
    # One token further where the tokenizer puts a second BOS before one that is spelled out.
    for start in (0, 1):
        if ids[start : start + n_prompt] == prompt.input_ids:
            return ids[start + n_prompt :][:max_tokens]
    # The two merge into one token at the border.
    alone = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return list(alone)[:max_tokens]


def reference_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy: SkipPolicy | None,
    items: Iterable[tuple[Prompt, str]],
    *,
    scope: Scope = "e2e",
    max_tokens: int = 128,
    one_by_one: bool = False,
    progress: bool = False,
    on_row: Callable[[RowLoss], None] | None = None,
) -> Perplexity:
    """Teacher-forced perplexity of reference answers under a policy.

    The phases are those of generation: the prompt is prefilled and predicts the first token of the
    reference, whose tokens then are fed as decode steps. Under a policy whose plan does not follow
    the steps (`policy.stepwise` is False) all of them after the first go into one forward, which
    the session counts to the decode phase and which computes the same.

    Args:
        model: in eval mode, outside of any `skipping(...)`.
        tokenizer: the model's.
        policy: what is skipped; None skips nothing.
        items: prompts with a reference answer each.
        scope: where the policy applies.
        max_tokens: tokens of a reference that count, from its first.
        one_by_one: feed one token per forward under every policy.
        progress: whether to show a progress bar.
        on_row: is told of each row once it is scored, in their order.

    Raises:
        AdaskipError: the budget does not fit the model, or there is nothing to score.
        DataError: a reference is empty.
        RunError: what ran was not the plan, or a loss is not a number.
    """
    if max_tokens < 1:
        raise AdaskipError(f"max_tokens is {max_tokens}; score at least 1 reference token.")
    policy = FixedSkipping(EMPTY_PLAN) if policy is None else policy
    rows: list[RowLoss] = []
    with (
        torch.no_grad(),
        skipping(model, policy, scope=scope) as session,
        Audit(model, session) as audit,
    ):
        single = one_by_one or policy.stepwise
        listed = list(items)
        for prompt, reference in tqdm(listed, desc="perplexity", disable=not progress):
            answer = reference_ids(tokenizer, prompt, reference, max_tokens)
            check_prompt_length(model, len(prompt.input_ids), len(answer))
            audit.start_request()
            # The row's only read from the device.
            nll = _nll(model, session, prompt.input_ids, answer, single).item()
            if math.isnan(nll):
                raise RunError(
                    f"The loss of row {len(rows) + 1} of {len(listed)} (reference "
                    f"{reference.strip()[:40]!r}) is not a number in {model.dtype}: nothing can be "
                    "compared with it. Load the model in bfloat16 or float32, or make the plan "
                    "anew if it is the plan's gains or maps that are too large."
                )
            rows.append(RowLoss(nll, len(answer), audit.counts()))
            if on_row is not None:
                on_row(rows[-1])
    if not rows:
        raise AdaskipError("There is no reference answer to score; give at least one row.")
    return Perplexity(tuple(rows))


def shared_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy: SkipPolicy | None,
    items: Sequence[tuple[Prompt, str]],
    **options: Any,
) -> Perplexity:
    """`reference_perplexity` with the items shared out over the processes of this command.

    Args:
        model: as there, and so are `tokenizer`, `policy` and `options`.
        tokenizer: the model's.
        policy: what is skipped.
        items: prompts with a reference answer each; the same on every process.
        options: those of `reference_perplexity`.

    Raises:
        AdaskipError, DataError, RunError: as there, on all processes.
    """

    def measure(own: Sequence[tuple[Prompt, str]]) -> Sequence[RowLoss]:
        return reference_perplexity(model, tokenizer, policy, own, **options).rows

    return Perplexity(tuple(team().spread(items, measure)))


def _nll(
    model: PreTrainedModel,
    session: Session,
    prompt: Sequence[int],
    answer: Sequence[int],
    single: bool,
) -> Tensor:
    """Summed negative log-likelihood of an answer, a scalar on the device."""
    cache = DynamicCache(config=model.config)
    target = torch.tensor(answer, device=model.device)
    fed = target[:-1]
    logits = [_forward(model, torch.tensor(prompt, device=model.device), cache, 1)]
    for piece in torch.split(fed, 1) if single else (fed[:1], fed[1:]):
        if not len(piece):
            continue
        before = session.plan
        # Several tokens of an answer at once are still decoding.
        with session.decode():
            logits.append(_forward(model, piece, cache, len(piece)))
        if len(piece) > 1 and session.plan != before:
            raise AdaskipError(
                "The policy's plan changed between decode steps although it says it is not "
                "stepwise; let its `stepwise` be True."
            )
    return cross_entropy(torch.cat(logits).float(), target, reduction="sum")


def _forward(model: PreTrainedModel, ids: Tensor, cache: DynamicCache, keep: int) -> Tensor:
    """Logits after the last `keep` tokens: [keep, vocabulary]."""
    output = model(input_ids=ids[None], **{CACHE: cache}, use_cache=True, logits_to_keep=keep)
    logits: Tensor = output.logits[0, -keep:]
    return logits
