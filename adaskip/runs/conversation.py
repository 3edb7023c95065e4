"""A conversation with a model, answer by answer: streamed, and timed in its two phases."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer
from typing_extensions import override

from adaskip.cache_name import CACHE
from adaskip.entering import skipping
from adaskip.errors import UnsupportedCallError
from adaskip.growing_cache import GrowingCache, kv_tensors
from adaskip.models.spec import ModelSpec
from adaskip.plan import Scope
from adaskip.policy import SkipPolicy
from adaskip.positions import positions


@dataclass(frozen=True)
class Answer:
    """One answer and what it took.

    Attributes:
        text: without special tokens.
        n_prompt: tokens of the prompt.
        n_tokens: tokens of the answer, the one that ended it included.
        ttft: seconds to the first token.
        per_second: tokens per second after the first; None without a second one.
        kv_bytes: keys and values held at the end.
    """

    text: str
    n_prompt: int
    n_tokens: int
    ttft: float
    per_second: float | None
    kv_bytes: int


class _TimedStreamer(TextStreamer):
    """Hands text on as soon as it is certain, and notes when each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self._write = write

    @override
    def put(self, value: Tensor) -> None:
        """Takes the prompt, then token by token."""
        self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]

    @override
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hands on a piece of text."""
        if text:
            self._write(text)


@dataclass
class Conversation:
    """Questions and answers so far, of one model under one policy.

    Attributes:
        model: outside of `skipping(...)`.
        tokenizer: its own; with a chat template, earlier turns are part of each prompt.
        spec: how a prompt is wrapped where the tokenizer has no template.
        ends: tokens that end an answer.
        policy: what is skipped; None is dense.
        scope: where.
        max_new_tokens: the longest answer.
        messages: the turns so far.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec
    ends: Collection[int]
    policy: SkipPolicy | None = None
    scope: Scope = "e2e"
    max_new_tokens: int = 256
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def remembers(self) -> bool:
        """Whether earlier turns are part of a prompt."""
        return bool(self.tokenizer.chat_template)

    def ask(self, question: str, write: Callable[[str], None]) -> Answer:
        """Answers greedily; the turn is kept once the answer is complete.

        Args:
            question: what the user says.
            write: takes the answer, piece by piece.

        Raises:
            UnsupportedCallError: the conversation is longer than the model has positions.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        ids = self._prompt(asked)
        cache = GrowingCache(self.model.config, room=self.max_new_tokens)
        streamer = _TimedStreamer(self.tokenizer, write)
        within = skipping(self.model, self.policy, scope=self.scope) if self.policy else None
        start = time.perf_counter()
        generate: Any = self.model.generate
        with within or nullcontext(), torch.inference_mode():
            made: Tensor = generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                eos_token_id=sorted(self.ends) or None,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=streamer,
                **{CACHE: cache},
            )
        text = self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert isinstance(text, str)  # noqa: S101 - of one sequence
        self.messages = [*asked, {"role": "assistant", "content": text}]
        _, first, *others = streamer.times
        held = sum(tensor.nbytes for tensor in kv_tensors(cache))
        speed = len(others) / (others[-1] - first) if others else None
        return Answer(text, ids.shape[1], 1 + len(others), first - start, speed, held)

    def _prompt(self, asked: list[dict[str, str]]) -> Tensor:
        """The ids of the turns, [1, tokens], on the model's device."""
        if self.remembers:
            text = self.tokenizer.apply_chat_template(
                asked, add_generation_prompt=True, tokenize=False
            )
            found = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        else:
            text = self.spec.wrap(asked[-1]["content"])
            found = self.tokenizer(text, return_tensors="pt")
        ids: Tensor = found["input_ids"]
        limit = positions(self.model.config)
        if limit is not None and ids.shape[1] + self.max_new_tokens > limit:
            raise UnsupportedCallError(
                f"The conversation has {ids.shape[1]} tokens and an answer may take "
                f"{self.max_new_tokens}, but the model has {limit} positions: begin a new one "
                "(/new), or give a lower --max_new_tokens."
            )
        return ids.to(self.model.device)
