"""IO similarity and gain of sublayers, measured on the device while the model runs.

A recorder says which statistics it wants of a step (`watch`) and is handed them afterwards
(`observe`). Everything stays on the device; whoever decides something reads it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from adaskip.errors import AdaskipError
from adaskip.plan import Step

Span = Literal["attn", "ffn", "layer"]

# More tokens than this are reduced at once, layer by layer; fewer are kept until the forward ends
# and reduced together, which saves launching six kernels per sublayer in a decode step.
_KEPT_TOKENS = 16
# Tokens converted to fp32 at a time, so that the copy stays in the device's cache.
_TILE = 2048


class Recorder(Protocol):
    """Anything that wants statistics of forwards."""

    def watch(self, step: Step) -> frozenset[Span]:
        """The parts of every layer whose statistics are wanted of this step."""
        ...

    def observe(self, step: Step, stats: StepStats) -> None:
        """Takes the statistics of one forward; must not read them from the device."""
        ...


@dataclass(frozen=True)
class StepStats:
    """What one forward did to the residual stream, per watched part and token, in fp32.

    Attributes:
        rows: the layer and part of each row; parts that were skipped have none.
        inner: inner product of residual before and after: [rows, batch, tokens].
        squared_in: squared norm of the residual before: [rows, batch, tokens].
        squared_out: squared norm of the residual after: [rows, batch, tokens].
        real: False at padding: [batch, tokens]; None if there is no padding.
    """

    rows: tuple[tuple[int, Span], ...]
    inner: Tensor
    squared_in: Tensor
    squared_out: Tensor
    real: Tensor | None

    def select(self, *spans: Span) -> StepStats:
        """The rows of these parts only."""
        keep = [i for i, (_, span) in enumerate(self.rows) if span in spans]
        if len(keep) == len(self.rows):
            return self

        def kept(values: Tensor) -> Tensor:
            # A list as an index is copied to the device, which waits for it.
            by_row = values.unbind()
            return torch.stack([by_row[i] for i in keep]) if keep else values[:0]

        rows = tuple(self.rows[i] for i in keep)
        return StepStats(
            rows, kept(self.inner), kept(self.squared_in), kept(self.squared_out), self.real
        )

    def weights(self) -> Tensor:
        """1 at real tokens and 0 at padding, fp32: [batch, tokens]."""
        if self.real is None:
            return torch.ones_like(self.inner[0])
        return self.real.to(self.inner.device, torch.float32)

    def similarity(self) -> Tensor:
        """IO similarity (cosine of residual before and after): [rows, batch, tokens]."""
        return self.inner * (self.squared_in * self.squared_out).clamp_min(1e-30).rsqrt()

    def gain(self) -> Tensor:
        """Output norm / input norm: [rows, batch, tokens]."""
        return (self.squared_out / self.squared_in.clamp_min(1e-30)).sqrt()

    @staticmethod
    def concatenated(parts: Sequence[StepStats]) -> StepStats:
        """The statistics of several forwards of one request, joined along the tokens.

        Raises:
            AdaskipError: they are of different sublayers.
        """
        if len(parts) == 1:
            return parts[0]
        if any(part.rows != parts[0].rows for part in parts):
            raise AdaskipError(
                "The chunks of a prompt ran different sublayers; learn from prompts under a plan "
                "that stays the same, or none."
            )
        real = torch.cat([part.weights() for part in parts], dim=-1) > 0
        return StepStats(
            parts[0].rows,
            torch.cat([part.inner for part in parts], dim=-1),
            torch.cat([part.squared_in for part in parts], dim=-1),
            torch.cat([part.squared_out for part in parts], dim=-1),
            real,
        )


class StepRecording:
    """Collects the statistics of one forward, written to by the layers as they run."""

    def __init__(self, spans: frozenset[Span], tokens: int, real: Tensor | None) -> None:
        self.spans = spans
        self._keep = tokens <= _KEPT_TOKENS
        self._real = real
        self._rows: list[tuple[int, Span]] = []
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._reduced: list[tuple[Tensor, Tensor, Tensor]] = []
        self._last: tuple[Tensor, Tensor] | None = None

    def write(self, layer: int, span: Span, before: Tensor, after: Tensor) -> None:
        """Takes the residual before and after one part: [batch, tokens, hidden] each."""
        self._rows.append((layer, span))
        # Statistics outlive the forward; the graph behind them would live as long.
        if self._keep:
            self._kept.append((before.detach(), after.detach()))
            return
        # One part's output is the next one's input: its norm is already known.
        known = self._last[1] if self._last is not None and self._last[0] is before else None
        reduced = _reduce(before.detach(), after.detach(), known)
        self._reduced.append(reduced)
        self._last = (after, reduced[2])

    def finish(self) -> StepStats | None:
        """The statistics, on the device of the first layer; None if nothing watched ran."""
        if not self._rows:
            return None
        if self._kept:
            device = self._kept[0][0].device
            before = torch.stack([pair[0].to(device) for pair in self._kept])
            after = torch.stack([pair[1].to(device) for pair in self._kept])
            inner, squared_in, squared_out = _reduce(before, after, None)
        else:
            device = self._reduced[0][0].device
            inner, squared_in, squared_out = (
                torch.stack([reduced[i].to(device) for reduced in self._reduced]) for i in range(3)
            )
        return StepStats(tuple(self._rows), inner, squared_in, squared_out, self._real)


def _reduce(
    before: Tensor, after: Tensor, squared_in: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(inner, squared_in, squared_out)` over the last dimension, in fp32, tile by tile."""
    inner, norms_in, norms_out = [], [], []
    for start in range(0, before.shape[-2], _TILE):
        x = before[..., start : start + _TILE, :].float()
        y = after[..., start : start + _TILE, :].float()
        inner.append(torch.linalg.vecdot(x, y))
        # A norm makes no product as large as its input first, as an inner product does.
        norms_out.append(torch.linalg.vector_norm(y, dim=-1).square())
        if squared_in is None:
            norms_in.append(torch.linalg.vector_norm(x, dim=-1).square())
    if squared_in is None:
        squared_in = torch.cat(norms_in, dim=-1)
    return torch.cat(inner, dim=-1), squared_in, torch.cat(norms_out, dim=-1)


class TokenStatistics:
    """Sums over all tokens of one phase or several, each token weighing the same.

    This is how the paper's observation figures average (METHOD, "Words").

    Attributes:
        count: real tokens seen, on the device.
        total: sum of similarities per row; `squares`: sum of their squares.
    """

    def __init__(self, *spans: Span, phase: str | None = None) -> None:
        self._spans: frozenset[Span] = frozenset(spans)
        self._phase = phase
        self.rows: tuple[tuple[int, Span], ...] = ()
        self.count: Tensor | None = None
        self.total: Tensor | None = None
        self.squares: Tensor | None = None

    def watch(self, step: Step) -> frozenset[Span]:
        """The parts it was made for, in the phase it was made for."""
        return self._spans if self._phase in (None, step.phase) else frozenset()

    def observe(self, step: Step, stats: StepStats) -> None:
        """Adds one forward to the sums, in float64: 100,000 tokens must not lose digits."""
        stats = stats.select(*self._spans)
        if self.rows and stats.rows != self.rows:
            raise AdaskipError(
                "TokenStatistics was given other sublayers than before, as under a plan that "
                "changes; take one for each phase (phase='prefill', 'decode'), or a fixed plan."
            )
        weights = stats.weights().double()
        similarity = stats.similarity().double()
        total = (similarity * weights).sum(dim=(1, 2))
        squares = (similarity.square() * weights).sum(dim=(1, 2))
        if self.total is None or self.squares is None or self.count is None:
            self.rows, self.count, self.total, self.squares = (
                stats.rows,
                weights.sum(),
                total,
                squares,
            )
        else:
            self.count, self.total, self.squares = (
                self.count + weights.sum(),
                self.total + total,
                self.squares + squares,
            )


def median(values: Tensor, weights: Tensor) -> Tensor:
    """The median over the last dimension of the values whose weight is not 0.

    The mean of the two middle ones for an even count. Unlike torch.nanquantile it reads nothing
    from the device.

    Args:
        values: [rows, batch, tokens].
        weights: [batch, tokens], at least one not 0 per sequence.
    """
    ordered = values.masked_fill(weights == 0, float("inf")).sort(dim=-1).values
    count = (weights != 0).sum(dim=-1).expand(values.shape[:-1]).unsqueeze(-1)
    middle = torch.cat([(count - 1) // 2, count // 2], dim=-1)
    return ordered.gather(-1, middle).mean(dim=-1)
