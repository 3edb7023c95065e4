"""What is skipped when: small frozen values without any tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Literal, get_args

from adaskip.errors import AdaskipError
from adaskip.numbers import is_finite, is_whole

Kind = Literal["attn", "ffn"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Scope = Literal["prefill", "decode", "e2e"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


class Phase(StrEnum):
    """The part of a request a forward belongs to.

    Every forward of a request before its first decode step is prefill (one or more chunks); a
    decode step is one new token per sequence. METHOD, "Phases" says how they are told apart.
    """

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Step:
    """One forward of the model.

    Attributes:
        phase: prefill or decode.
        request: number of the request, counted from 0 over the life of a session.
        index: number of this forward, counted from 0 at the request's start.
        tokens: new tokens per sequence in this forward, padding included.
        decoded: decode steps already taken in this request; None if prefill was one forward.
    """

    phase: Phase
    request: int
    index: int
    tokens: int
    decoded: int | None = field(default=None, compare=False, repr=False)

    @property
    def decode_steps(self) -> int:
        """Decode steps already taken in this request before this forward."""
        if self.decoded is not None:
            return self.decoded
        return max(self.index - 1, 0) if self.phase is Phase.DECODE else 0


@dataclass(frozen=True, slots=True)
class Sublayer:
    """One half of a decoder layer: `"attn"` or `"ffn"`, each with its norm and residual add.

    Raises:
        AdaskipError: the layer is no whole number from 0 up, or the kind is neither of the two.
    """

    layer: int
    kind: Kind

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise AdaskipError(f"A sublayer's kind is 'attn' or 'ffn', not {self.kind!r}.")
        if not is_whole(self.layer) or self.layer < 0:
            raise AdaskipError(
                f"A sublayer's layer is a whole number from 0 up, not {self.layer!r}."
            )
        object.__setattr__(self, "layer", int(self.layer))

    def __lt__(self, other: Sublayer) -> bool:
        """Depth order: by layer, attention before FFN (METHOD, "Policies" breaks ties so)."""
        return self.position < other.position

    @property
    def position(self) -> int:
        """Place in the model's sequence of sublayers: `2 * layer`, plus 1 for the FFN."""
        return 2 * self.layer + (self.kind == "ffn")

    def __str__(self) -> str:
        return f"{self.kind}{self.layer}"


def all_sublayers(n_layers: int) -> tuple[Sublayer, ...]:
    """Every sublayer of a model of `n_layers` layers, in depth order."""
    return tuple(Sublayer(layer, kind) for layer in range(n_layers) for kind in KINDS)


def whole_layers(layers: Iterable[int]) -> SkipPlan:
    """The plan that skips both sublayers of each of `layers`, passing the residual on unchanged."""
    return SkipPlan({Sublayer(layer, kind): None for layer in layers for kind in KINDS})


@dataclass(frozen=True)
class SkipPlan:
    """Which sublayers one forward skips.

    Attributes:
        gains: a sublayer that is a key is skipped; its value scales the residual stream in its
            place (`h * gain`), None leaves it as it is.

    Raises:
        AdaskipError: a key is no `Sublayer`, or a gain is neither None nor a finite number.
    """

    gains: Mapping[Sublayer, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.gains, Mapping):
            raise AdaskipError(
                f"A SkipPlan is made of a mapping of sublayers to gains, not of a "
                f"{type(self.gains).__name__}; without gains: SkipPlan(dict.fromkeys(sublayers))."
            )
        for sublayer, gain in self.gains.items():
            if not isinstance(sublayer, Sublayer):
                raise AdaskipError(
                    f"A SkipPlan skips sublayers, not {sublayer!r}; write Sublayer(layer, kind)."
                )
            if gain is not None and not is_finite(gain):
                raise AdaskipError(
                    f"The gain of {sublayer} is a finite number or None, not {gain!r}."
                )
        ordered = {
            s: None if (g := self.gains[s]) is None else float(g) for s in sorted(self.gains)
        }
        object.__setattr__(self, "gains", MappingProxyType(ordered))

    def check(self, n_layers: int) -> None:
        """Raises an `AdaskipError` if a sublayer lies beyond a model of `n_layers` layers."""
        outside = [str(sublayer) for sublayer in self.gains if sublayer.layer >= n_layers]
        if outside:
            raise AdaskipError(
                f"The plan skips {', '.join(outside)}, but the model's layers are 0 to "
                f"{n_layers - 1}."
            )

    def __hash__(self) -> int:
        return hash(tuple(self.gains.items()))

    def __reduce__(self) -> tuple[type[SkipPlan], tuple[dict[Sublayer, float | None]]]:
        # A read-only view of a mapping can be neither copied nor stored.
        return SkipPlan, (dict(self.gains),)

    def __contains__(self, sublayer: object) -> bool:
        return sublayer in self.gains

    def __len__(self) -> int:
        return len(self.gains)

    def __or__(self, other: SkipPlan) -> SkipPlan:
        """Both plans together; where both skip a sublayer, the gain of `other` counts."""
        return SkipPlan({**self.gains, **other.gains})

    def layers(self, kind: Kind) -> tuple[int, ...]:
        """The layers whose sublayer of this kind is skipped, ascending."""
        return tuple(sublayer.layer for sublayer in self.gains if sublayer.kind == kind)


EMPTY_PLAN = SkipPlan()
