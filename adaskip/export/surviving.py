"""The sublayers that a plan leaves, written down in depth order and chunked into layers again.

A gain need not be computed. With `c` the product of the gains so far and `s` that of the gains
before the first sublayer that runs, the checkpoint's residual stream is `s / c` times the plan's:
the embedding is scaled by `s`, what a sublayer adds by `s / c`, and its norm takes the factor out
of what it reads. Anchored so, the stream is the plan's own where that is small, and the eps of the
norms hardly matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from adaskip.errors import PlanError
from adaskip.plan import Kind, SkipPlan, Sublayer, all_sublayers
from adaskip.replacements import Linear


@dataclass(frozen=True, slots=True)
class Survivor:
    """A sublayer that the checkpoint holds, or a linear map in its place.

    Attributes:
        source: which sublayer of the model it is, or stands for.
        scale: the checkpoint's residual stream over the plan's, where it stands: `s / c`.
        linear: the map, None for the sublayer itself.
    """

    source: Sublayer
    scale: float
    linear: Linear | None = None


@dataclass(frozen=True, slots=True)
class SurvivingLayer:
    """One layer of the checkpoint: an attention and the FFN right behind it, or one of them."""

    attn: Survivor | None = None
    ffn: Survivor | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is an ordinary layer: both sublayers, no linear map."""
        parts = (self.attn, self.ffn)
        return all(part is not None and part.linear is None for part in parts)

    def get(self, kind: Kind) -> Survivor | None:
        """Its attention or its FFN."""
        return self.attn if kind == "attn" else self.ffn


@dataclass(frozen=True, slots=True)
class Surviving:
    """What a plan leaves of a model.

    Attributes:
        layers: those of the checkpoint, in depth order.
        anchor: what the embedding is scaled by, `s`.
        final_scale: the checkpoint's stream over the plan's at the final norm.
    """

    layers: tuple[SurvivingLayer, ...]
    anchor: float
    final_scale: float

    @property
    def is_whole(self) -> bool:
        """Whether every layer survives whole, so that the family's own architecture holds it."""
        return all(layer.is_whole for layer in self.layers)

    @property
    def has_linears(self) -> bool:
        """Whether linear maps stand in the place of sublayers."""
        return any(part.linear is not None for _, part in self.parts())

    def parts(self) -> Iterator[tuple[int, Survivor]]:
        """Every survivor with the number of its layer, in depth order."""
        for index, layer in enumerate(self.layers):
            for part in (layer.attn, layer.ffn):
                if part is not None:
                    yield index, part

    def count(self, kind: Kind) -> int:
        """How many attentions or FFNs are computed, linear maps not counted."""
        return sum(part.linear is None and part.source.kind == kind for _, part in self.parts())


def surviving(plan: SkipPlan, n_layers: int) -> Surviving:
    """What a plan leaves of a model of `n_layers` layers.

    Raises:
        PlanError: no attention runs, the gains cannot be folded, or something else than a gain or
            a linear map takes a sublayer's place.
    """
    running = [s for s in all_sublayers(n_layers) if s not in plan]
    if all(sublayer.kind != "attn" for sublayer in running):
        raise PlanError(
            "The plan leaves no attention; engines need one to hold positions, so leave one at "
            "least."
        )
    anchor = _product(plan, before=running[0])
    survivors, product = [], 1.0
    for sublayer in all_sublayers(n_layers):
        replacement: Any = plan.get(sublayer, 1.0)
        if sublayer not in plan:
            survivors.append(Survivor(sublayer, anchor / product))
        elif isinstance(replacement, Linear):
            survivors.append(Survivor(sublayer, anchor / product, replacement))
        else:
            product *= _gain(sublayer, replacement)
    return Surviving(tuple(_chunked(survivors)), anchor, anchor / product)


def _product(plan: SkipPlan, *, before: Sublayer) -> float:
    """The product of the gains before a sublayer."""
    product = 1.0
    for sublayer, replacement in plan.items():
        if sublayer < before and not isinstance(replacement, Linear):
            product *= _gain(sublayer, replacement)
    return product


def _gain(sublayer: Sublayer, replacement: Any) -> float:
    """The factor in a sublayer's place.

    Raises:
        PlanError: it is none, or not positive.
    """
    if replacement is None:
        return 1.0
    if not isinstance(replacement, float):
        raise PlanError(
            f"The plan puts a {type(replacement).__name__} in the place of {sublayer}; a "
            "checkpoint holds gains and linear maps only, so skip it or leave it."
        )
    if replacement <= 0:
        raise PlanError(
            f"The gain of {sublayer} is {replacement:g}; only positive gains fold into weights, "
            "so skip it without a gain."
        )
    return replacement


def _chunked(survivors: list[Survivor]) -> Iterator[SurvivingLayer]:
    """Layers: an attention takes the FFN right behind it, whichever layer that one came from."""
    waiting: Survivor | None = None
    for part in survivors:
        if part.source.kind == "ffn":
            yield SurvivingLayer(waiting, part)
            waiting = None
            continue
        if waiting is not None:
            yield SurvivingLayer(waiting)
        waiting = part
    if waiting is not None:
        yield SurvivingLayer(waiting)
