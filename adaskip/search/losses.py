"""What a plan costs in quality: the divergence from the dense model over answer tokens.

The residual stream before every sublayer is kept, so that only what lies behind a candidate is
computed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from adaskip.errors import AdaskipError
from adaskip.plan import Sublayer, all_sublayers
from adaskip.recorders import median
from adaskip.replacements import Replacement
from adaskip.streams import Calls, Sublayers
from adaskip.warmup import checked_prompts

Ids = Tensor | Sequence[int]
Row = tuple[Ids, Ids]


@dataclass
class _Stream:
    """One calibration row under the plan so far.

    Attributes:
        ids: prompt and answer without its last token: [1, tokens].
        n_answer: answer tokens, each predicted by the position before it.
        calls: what each layer is given besides the residual stream.
        before: the stream before every sublayer, and behind the last one.
        dense: the dense model's log-probabilities of the answer's positions.
    """

    ids: Tensor
    n_answer: int
    calls: Calls
    before: list[Tensor]
    dense: Tensor


class Losses:
    """The loss of candidates, under a plan that grows.

    Args:
        sublayers: of the model.
        rows: `(prompt ids, answer ids)` each.

    Raises:
        AdaskipError: there is no row, or one without prompt or answer tokens.

    Attributes:
        plan: the replacements so far.
        forwards: what was computed, in forwards of a row.
    """

    def __init__(self, sublayers: Sublayers, rows: Iterable[Row]) -> None:
        self._sublayers = sublayers
        self._order = all_sublayers(len(sublayers.decoder.layers))
        self.plan: dict[Sublayer, Replacement] = {}
        self.forwards = 0.0
        self._streams = [self._stream(*row) for row in rows]
        if not self._streams:
            raise AdaskipError("No calibration row was given; a search needs at least one.")
        self._n_tokens = sum(stream.n_answer for stream in self._streams)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest calibration prompt."""
        return max(stream.ids.shape[1] + 1 - stream.n_answer for stream in self._streams)

    def gain(self, sublayer: Sublayer) -> float:
        """Median over tokens of a sublayer's output norm / input norm, on the present streams."""
        ratios = []
        for stream in self._streams:
            x = stream.before[sublayer.position]
            y = self._sublayers.run(sublayer, x, stream.calls)
            ratios.append((y.float().norm(dim=-1) / x.float().norm(dim=-1)).flatten())
        together = torch.cat(ratios)
        return float(median(together[None, None], torch.ones_like(together)[None]))

    def pairs(self, sublayer: Sublayer) -> list[tuple[Tensor, Tensor]]:
        """Per row a sublayer's input and what it adds: [tokens, hidden] each."""
        found = []
        for stream in self._streams:
            x = stream.before[sublayer.position]
            found.append((x[0], (self._sublayers.run(sublayer, x, stream.calls) - x)[0]))
        return found

    def loss(
        self, changed: Mapping[Sublayer, Replacement], *, dropped: Sublayer | None = None
    ) -> float:
        """Nats per answer token of the plan with some sublayers replaced in addition.

        Args:
            changed: what is replaced in addition, or otherwise.
            dropped: a sublayer of the plan that runs again.
        """
        plan = {s: r for s, r in (self.plan | dict(changed)).items() if s != dropped}
        touched = [*changed, *([] if dropped is None else [dropped])]
        first = min((s.position for s in touched), default=len(self._order))
        losses = [self._divergence(s, self._behind(s, first, plan)[-1]) for s in self._streams]
        return float(torch.stack(losses).sum()) / self._n_tokens

    def accept(
        self, changed: Mapping[Sublayer, Replacement], *, dropped: Sublayer | None = None
    ) -> None:
        """Makes a change part of the plan."""
        self.plan |= changed
        if dropped is not None:
            del self.plan[dropped]
        first = min(s.position for s in (*changed, *([] if dropped is None else [dropped])))
        for stream in self._streams:
            stream.before[first + 1 :] = self._behind(stream, first, self.plan)

    def _stream(self, prompt: Ids, answer: Ids) -> _Stream:
        vocab_size = self._sublayers.model.config.get_text_config(decoder=True).vocab_size
        parts = [torch.as_tensor(part, dtype=torch.long).flatten() for part in (prompt, answer)]
        if not all(map(len, parts)):
            raise AdaskipError(
                "A calibration row has no prompt or no answer tokens; the loss is taken over the "
                "answer's. Give (prompt ids, answer ids) with one token or more each."
            )
        [inputs] = checked_prompts([torch.cat(parts)[None]], vocab_size)
        ids = inputs["input_ids"][:, :-1]
        x, calls = self._sublayers.begin({"input_ids": ids})
        stream = _Stream(ids.to(x.device), len(parts[1]), calls, [x], x)
        stream.before += self._behind(stream, 0, {})
        stream.dense = self._log_probabilities(stream, stream.before[-1])
        return stream

    def _behind(
        self, stream: _Stream, first: int, plan: Mapping[Sublayer, Replacement]
    ) -> list[Tensor]:
        """The streams behind every sublayer from the first changed one on."""
        x = stream.before[first] if first < len(stream.before) else stream.before[-1]
        behind = [] if first < len(self._order) else [x]
        for sublayer in self._order[first:]:
            x = self._sublayers.through(sublayer, x, stream.calls, plan)
            behind.append(x)
        self.forwards += (len(self._order) - first) / len(self._order)
        return behind

    def _log_probabilities(self, stream: _Stream, x: Tensor) -> Tensor:
        logits = self._sublayers.logits(stream.ids, x, stream.n_answer)
        return log_softmax(logits[0].float(), dim=-1)

    def _divergence(self, stream: _Stream, x: Tensor) -> Tensor:
        """Sum over the answer of KL(dense || plan), a scalar on the device."""
        found = self._log_probabilities(stream, x)
        return kl_div(found, stream.dense, reduction="sum", log_target=True)
