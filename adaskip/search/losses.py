"""What a plan costs in quality, measured over the answer tokens of calibration rows.

The residual stream before every sublayer is kept, so that only what lies behind a candidate is
computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, log_softmax, nll_loss

from adaskip.errors import no_numbers, unknown_name
from adaskip.fitting import Moments
from adaskip.plan import Sublayer, all_sublayers
from adaskip.recorders import median
from adaskip.replacements import Replacement, Window
from adaskip.search.cross_fitting import CrossFitted, Learned, for_all, for_row, settled
from adaskip.search.rows import Row, checked_rows, row_ids
from adaskip.streams import Calls, Sublayers

# "kl": KL(dense || plan); "nll": negative log-likelihood of the answer itself.
Measure = Literal["kl", "nll"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
# Of so many rows one is looked at where a first estimate will do.
_STRIDE = 4
# Streams behind a change are kept until the next one, as it may be accepted; if they fit in this.
_KEPT_BYTES = 2**30
# First tokens of a row that no linear map is fitted on, attention sinks.
_SINKS, _RIDGE = 4, 1e-3


@dataclass
class _Stream:
    """One calibration row under the plan so far.

    Attributes:
        number: of the row.
        ids: prompt and answer without its last token: [1, tokens].
        answer: the answer's tokens, each predicted by the position before it: [n].
        calls: what each layer is given besides the residual stream.
        before: the stream before every sublayer, and behind the last one.
        dense: the dense model's log-probabilities of the answer's positions.
    """

    number: int
    ids: Tensor
    answer: Tensor
    calls: Calls
    before: list[Tensor]
    dense: Tensor = field(init=False)


@dataclass(frozen=True)
class _Looked:
    """A change that rows were looked at under.

    Attributes:
        change: what is replaced and what runs again; None if none was looked at.
        behind: by row, the streams behind every sublayer from the first changed one on.
    """

    change: tuple[Mapping[Sublayer, Learned], Sublayer | None] | None = None
    behind: Mapping[int, list[Tensor]] = field(default_factory=dict)

    def under(
        self, changed: Mapping[Sublayer, Learned], dropped: Sublayer | None
    ) -> Mapping[int, list[Tensor]]:
        """The streams behind a change; none if it was another one, learned anew for instance."""
        if self.change is None:
            return {}
        own, runs = self.change
        return self.behind if own is changed and runs == dropped else {}


class Losses:
    """The loss of candidates, under a plan that grows.

    Args:
        sublayers: of the model.
        rows: `(prompt ids, answer ids)` each.
        measure: "kl", the divergence from the dense model, or "nll", that of the answer.

    Raises:
        AdaskipError: there is no row, or one that is none; or the model's predictions are no
            numbers.

    Attributes:
        measure: "kl" or "nll".
        n_run: what was computed, in sublayers of a row.
    """

    def __init__(self, sublayers: Sublayers, rows: Iterable[Row], measure: Measure = "kl") -> None:
        if measure not in MEASURES:
            raise unknown_name("measure", str(measure), MEASURES)
        self.sublayers = sublayers
        self.order = all_sublayers(len(sublayers.decoder.layers))
        self._plan: dict[Sublayer, Learned] = {}
        self.n_run = 0
        self.measure: Measure = measure
        # The latest changes that all rows, and that few, were looked at under.
        self._latest, self._few = _Looked(), _Looked()
        config = sublayers.model.config.get_text_config(decoder=True)
        checked = checked_rows(rows, config.vocab_size)
        self._streams = [self._stream(number, row) for number, row in enumerate(checked)]

    @property
    def forwards(self) -> float:
        """What was computed, in forwards of a row."""
        return self.n_run / len(self.order)

    @property
    def plan(self) -> dict[Sublayer, Replacement]:
        """The replacements so far."""
        return for_all(self._plan)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest calibration prompt."""
        return max(stream.ids.shape[1] + 1 - len(stream.answer) for stream in self._streams)

    def before(self, sublayer: Sublayer) -> list[Tensor]:
        """Per row the present stream before a sublayer: [tokens, hidden]."""
        return [stream.before[sublayer.position][0] for stream in self._streams]

    def behind(self, sublayer: Sublayer) -> list[Tensor]:
        """Per row the present stream behind a sublayer, or what takes its place."""
        return [stream.before[sublayer.position + 1][0] for stream in self._streams]

    def gain(self, sublayer: Sublayer) -> float:
        """Median over tokens of a sublayer's output norm / input norm, on the present streams."""
        pairs = self.pairs(sublayer)
        return token_gain([x for x, _ in pairs], [x + delta for x, delta in pairs])

    def linear(self, sublayer: Sublayer, rank: int | None) -> CrossFitted:
        """The linear map nearest to a sublayer, fitted on the present streams.

        Raises:
            AdaskipError: the rows have too few tokens.
        """
        by_row = []
        for x, delta in self.pairs(sublayer):
            moments = Moments(x)
            moments.add(x[_SINKS:], delta[_SINKS:])
            by_row.append(moments)
        return CrossFitted(by_row, rank, _RIDGE)

    def heads_by_harm(self, sublayer: Sublayer, window: Window, of_heads: int) -> tuple[int, ...]:
        """Key-value heads of an attention, the one first that a window changes least.

        A change is that of the stream behind the attention when one head alone has the window:
        the mean over tokens of its norm against the stream's. Nothing behind it is computed.
        """
        harm = []
        for head in range(of_heads):
            alone = {sublayer: Window(window.size, window.sinks, (head,), of_heads)}
            total = torch.zeros(())
            for stream in self._streams:
                x, y = stream.before[sublayer.position : sublayer.position + 2]
                found = self.sublayers.through(sublayer, x, stream.calls, alone)
                change = (found - y).float().norm(dim=-1) / y.float().norm(dim=-1)
                total = total + change.mean().cpu()
            harm.append(float(total))
        self.n_run += of_heads * len(self._streams)
        return tuple(sorted(range(of_heads), key=lambda head: harm[head]))

    def pairs(self, sublayer: Sublayer) -> list[tuple[Tensor, Tensor]]:
        """Per row a sublayer's input and what it adds: [tokens, hidden] each."""
        found, replaced = [], sublayer in self._plan
        for stream in self._streams:
            x, y = stream.before[sublayer.position : sublayer.position + 2]
            if replaced:
                y = self.sublayers.run(sublayer, x, stream.calls)
            found.append((x[0], (y - x)[0]))
        self.n_run += len(self._streams) * replaced
        return found

    def loss(
        self,
        changed: Mapping[Sublayer, Learned],
        *,
        dropped: Sublayer | None = None,
        few: bool = False,
        measure: Measure | None = None,
    ) -> float:
        """Nats per answer token of the plan with some sublayers replaced in addition.

        Where predictions are no numbers it is infinite: a NaN would compare as no worse than
        anything, and one candidate that overflows need not end a search that can go without it.
        Rows that the same change was just looked at under, as one of few, are not computed again.

        Args:
            changed: what is replaced in addition, or otherwise.
            dropped: a sublayer of the plan that runs again.
            few: whether to look at every fourth row only.
            measure: in place of the one that was given.
        """
        measure = measure or self.measure
        plan, first = self._changed(changed, dropped)
        streams, known = self._looked_at(few=few), self._few.under(changed, dropped)
        losses, kept, room = [], {}, _KEPT_BYTES
        for stream in streams:
            behind = known.get(stream.number) or self._behind(stream, first, plan)
            losses.append(self._lost(stream, behind[-1], measure))
            room -= sum(x.nbytes for x in behind)
            if room > 0:
                kept[stream.number] = behind
        looked = _Looked((changed, dropped), kept)
        if few:
            self._few = looked
        else:
            self._latest, self._few = looked, _Looked()
        lost = float(torch.stack(losses).sum()) / sum(len(s.answer) for s in streams)
        return lost if math.isfinite(lost) else math.inf

    def of_the_plan(self) -> float:
        """KL(dense || plan) of the plan as it is, in nats per answer token.

        Raises:
            AdaskipError: its predictions are no numbers.
        """
        lost = self.loss({}, measure="kl")
        if lost == math.inf:
            raise no_numbers(self.sublayers.model.dtype)
        return lost

    def accept(
        self, changed: Mapping[Sublayer, Learned], *, dropped: Sublayer | None = None
    ) -> None:
        """Makes a change part of the plan; what was just looked at is not computed again."""
        known = self._latest.under(changed, dropped)
        self._plan, first = self._changed(settled(changed), dropped)
        self._latest, self._few = _Looked(), _Looked()
        for stream in self._streams:
            behind = known.get(stream.number) or self._behind(stream, first, self._plan)
            stream.before[first + 1 :] = behind

    def relearn(self, learn: Callable[[Sublayer], Learned]) -> bool:
        """Learns every replacement of the plan anew, in depth order, if that lowers the loss.

        Args:
            learn: what takes a sublayer's place, learned on the present streams.

        Returns:
            Whether it did.
        """
        loss, plan = self.loss({}), self._plan
        self._latest, self._few = _Looked(), _Looked()
        streams = [stream.before[:] for stream in self._streams]
        self._plan = dict(plan)
        for sublayer in self.order:
            if sublayer in plan:
                self._plan |= settled({sublayer: learn(sublayer)})
            position = sublayer.position
            for stream in self._streams:
                x, own = stream.before[position], for_row(self._plan, stream.number)
                stream.before[position + 1] = self.sublayers.through(sublayer, x, stream.calls, own)
        self.n_run += len(self._streams) * len(self.order)
        if self.loss({}) < loss:
            return True
        self._plan = plan
        for stream, before in zip(self._streams, streams, strict=True):
            stream.before = before
        return False

    def price(
        self,
        touched: Iterable[Sublayer],
        n_learned: int,
        *,
        few: bool = False,
        seen: bool = False,
    ) -> int:
        """What the loss of a change takes, in sublayers of a row.

        Args:
            touched: what is replaced in addition or otherwise, or runs again.
            n_learned: gains and linear maps that are learned for it in the place of others.
            few: whether it is of every fourth row only.
            seen: whether every fourth row was just looked at.
        """
        behind = len(self.order) - min((s.position for s in touched), default=len(self.order))
        n_rows = len(self._looked_at(few=few)) - (len(self._looked_at(few=True)) if seen else 0)
        return n_learned * len(self._streams) + behind * n_rows

    def _looked_at(self, *, few: bool) -> list[_Stream]:
        return self._streams[::_STRIDE] if few else self._streams

    def _changed(
        self, changed: Mapping[Sublayer, Learned], dropped: Sublayer | None
    ) -> tuple[dict[Sublayer, Learned], int]:
        """The plan after a change, and the position of the first sublayer that it touches."""
        plan = {s: r for s, r in (self._plan | dict(changed)).items() if s != dropped}
        touched = [*changed, *([] if dropped is None else [dropped])]
        return plan, min((s.position for s in touched), default=len(self.order))

    def _stream(self, number: int, row: Row) -> _Stream:
        both, answer_ids = row_ids(row)
        ids = both[:, :-1]
        x, calls = self.sublayers.begin({"input_ids": ids})
        stream = _Stream(number, ids.to(x.device), answer_ids.to(x.device), calls, [x])
        stream.before += self._behind(stream, 0, {})
        stream.dense = self._log_probabilities(stream, stream.before[-1])
        if not (stream.before[-1].isfinite().all() and stream.dense.isfinite().all()):
            raise no_numbers(self.sublayers.model.dtype)
        return stream

    def _behind(
        self, stream: _Stream, first: int, plan: Mapping[Sublayer, Learned]
    ) -> list[Tensor]:
        """The streams behind every sublayer from the first changed one on."""
        own = for_row({s: r for s, r in plan.items() if s.position >= first}, stream.number)
        x = stream.before[first] if first < len(stream.before) else stream.before[-1]
        behind = [] if first < len(self.order) else [x]
        for sublayer in self.order[first:]:
            x = self.sublayers.through(sublayer, x, stream.calls, own)
            behind.append(x)
        self.n_run += len(self.order) - first
        return behind

    def _log_probabilities(self, stream: _Stream, x: Tensor) -> Tensor:
        logits = self.sublayers.logits(stream.ids, x, len(stream.answer))
        return log_softmax(logits[0].float(), dim=-1)

    def _lost(self, stream: _Stream, x: Tensor, measure: Measure) -> Tensor:
        """The loss of a row, summed over its answer: a scalar on the device."""
        found = self._log_probabilities(stream, x)
        if measure == "nll":
            return nll_loss(found, stream.answer, reduction="sum")
        return kl_div(found, stream.dense, reduction="sum", log_target=True)


def stream_similarity(before: Sequence[Tensor], behind: Sequence[Tensor]) -> float:
    """Cosine of two streams, per row [tokens, hidden]: mean over tokens, then over rows."""
    cosines = [
        cosine_similarity(x.float(), y.float(), dim=-1).mean()
        for x, y in zip(before, behind, strict=True)
    ]
    return float(sum(cosines)) / len(cosines)


def token_gain(before: Sequence[Tensor], behind: Sequence[Tensor]) -> float:
    """Median over the tokens of all rows together of the ratio of two streams' norms.

    An importance profile has the mean over requests of the median of each. Rows of equal length
    weigh the same in both; a longer one weighs more here: METHOD, "Gain".
    """
    ratios = torch.cat(
        [
            y.float().norm(dim=-1) / x.float().norm(dim=-1)
            for x, y in zip(before, behind, strict=True)
        ]
    )
    return float(median(ratios[None, None], torch.ones_like(ratios)[None]))
