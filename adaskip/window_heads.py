"""Key-value heads apart: those that have a window, and those that see all tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from adaskip.replacements import Window

# First and last, exclusive.
Run = tuple[int, int]


@dataclass(frozen=True)
class HeadSplit:
    """Takes the heads of a window out of an attention's, and puts the outputs together again.

    Runs of neighbouring heads are views, and nothing of it is read from the device.

    Attributes:
        n_heads: key-value heads of the attention.
        own: runs of those that have the window.
        others: runs of the others.
    """

    n_heads: int
    own: tuple[Run, ...]
    others: tuple[Run, ...]

    @classmethod
    def of(cls, window: Window) -> HeadSplit | None:
        """That of a window; None where all heads have it."""
        if window.heads is None or window.of_heads is None:
            return None
        rest = sorted({*range(window.of_heads)} - {*window.heads})
        return cls(window.of_heads, _runs(window.heads), _runs(rest))

    def windowed(self, states: Tensor) -> Tensor:
        """Of queries, keys or values [batch, heads, ...] those of heads that have the window."""
        return self._among(states, self.own)

    def rest(self, states: Tensor) -> Tensor:
        """Those of the other heads."""
        return self._among(states, self.others)

    def joined(self, windowed: Tensor, rest: Tensor) -> Tensor:
        """Outputs [batch, tokens, heads, head_dim] of both, in the order of the heads."""
        group = (windowed.shape[2] + rest.shape[2]) // self.n_heads
        parts, at = [], {True: 0, False: 0}
        for is_own, (first, last) in sorted(
            [(True, run) for run in self.own] + [(False, run) for run in self.others],
            key=lambda part: part[1],
        ):
            n = (last - first) * group
            source = windowed if is_own else rest
            parts.append(source[:, :, at[is_own] : at[is_own] + n])
            at[is_own] += n
        return torch.cat(parts, dim=2)

    def _among(self, states: Tensor, runs: tuple[Run, ...]) -> Tensor:
        # The query heads of one key-value head lie beside each other.
        group = states.shape[1] // self.n_heads
        parts = [states[:, first * group : last * group] for first, last in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _runs(heads: Iterable[int]) -> tuple[Run, ...]:
    """Ascending numbers as runs of neighbours."""
    runs = []
    for _, pairs in groupby(enumerate(heads), key=lambda pair: pair[1] - pair[0]):
        run = [head for _, head in pairs]
        runs.append((run[0], run[-1] + 1))
    return tuple(runs)
