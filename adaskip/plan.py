"""What is skipped when: small values that never change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from adaskip.errors import AdaskipError, PlanError
from adaskip.fingerprint import fingerprint_name, model_fingerprint, same_model
from adaskip.numbers import is_finite, is_whole
from adaskip.plan_file import PlanContent, damaged, read_plan, write_plan
from adaskip.replacements import Linear, Replacement, Window

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a plan's `about` calls how it came to be: `adaskip/search/course.py`.
COURSE = "course"

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


class SkipPlan(Mapping[Sublayer, Replacement]):
    """Which sublayers one forward does not compute, and what takes their place; never changes.

    A mapping in depth order. A plan may tell which model it is for and how it was made; such a plan
    is refused on another model. Two plans are equal if they skip and replace the same.

    Args:
        replacements: a sublayer that is a key is not computed. In its place None leaves the
            residual stream as it is, a number scales it (`h * gain`), a `Linear` maps it; a
            `Window`, of attention alone, lets each token see the last ones and the first.
        fingerprint: of the model it was made for (`adaskip.fingerprint`); empty if it is for any.
        about: what the plan was made from and for, e.g. its budget; texts and numbers.

    Raises:
        AdaskipError: a key is no `Sublayer`, or a value no replacement.
    """

    __slots__ = ("_hash", "_replacements", "about", "fingerprint")

    def __init__(
        self,
        replacements: Mapping[Sublayer, Replacement] = MappingProxyType({}),
        *,
        fingerprint: str = "",
        about: Mapping[str, str | float | None] | None = None,
    ) -> None:
        given: Any = replacements
        if not isinstance(given, Mapping):
            raise AdaskipError(
                f"A SkipPlan is made of a mapping of sublayers to gains, not of a "
                f"{type(given).__name__}; without gains: SkipPlan(dict.fromkeys(sublayers))."
            )
        for sublayer in given:
            if not isinstance(sublayer, Sublayer):
                raise AdaskipError(
                    f"A SkipPlan skips sublayers, not {sublayer!r}; write Sublayer(layer, kind)."
                )
        for name, value in (about or {}).items():
            if not isinstance(name, str) or not isinstance(value, str | int | float | None):
                raise AdaskipError(
                    f"What a plan is about is told in texts and numbers; {name!r} is a "
                    f"{type(value).__name__}."
                )
        self._replacements = {s: _checked(s, given[s]) for s in sorted(given)}
        self._hash = hash(tuple(self._replacements.items()))
        self.fingerprint = fingerprint
        self.about = MappingProxyType(dict(about or {}))

    def __getitem__(self, sublayer: Sublayer) -> Replacement:
        return self._replacements[sublayer]

    def __iter__(self) -> Iterator[Sublayer]:
        return iter(self._replacements)

    def __len__(self) -> int:
        return len(self._replacements)

    def __contains__(self, sublayer: object) -> bool:
        return sublayer in self._replacements

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, SkipPlan):
            return NotImplemented
        return self._hash == other._hash and self._replacements == other._replacements

    def __repr__(self) -> str:
        return f"SkipPlan({self._replacements})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only view of a mapping can be neither copied nor stored.
        return _restored, (self._replacements, self.fingerprint, dict(self.about))

    def __deepcopy__(self, memo: dict[int, Any]) -> SkipPlan:
        # It never changes, and a copied Linear would be another one.
        return self

    def __or__(self, other: SkipPlan) -> SkipPlan:
        """Both plans together; where both skip a sublayer, the replacement of `other` counts.

        Raises:
            PlanError: they were made for two models.
        """
        made_for = {plan.fingerprint for plan in (self, other) if plan.fingerprint}
        if len(made_for) > 1 and not same_model(*made_for):
            raise PlanError(
                "Plans of two models cannot be joined: one was made for "
                f"{' and the other for '.join(map(fingerprint_name, sorted(made_for)))}."
            )
        return SkipPlan({**self, **other}, fingerprint=next(iter(made_for), ""))

    @property
    def facts(self) -> dict[str, str | float | None]:
        """What the plan is about, without its course, which is long and for the plan's file."""
        return {key: value for key, value in self.about.items() if key != COURSE}

    @property
    def gains(self) -> Mapping[Sublayer, float | None]:
        """The sublayers in whose place the residual stream is scaled, or left as it is (None)."""
        return {s: r for s, r in self.items() if not isinstance(r, Linear | Window)}

    @property
    def windows(self) -> Mapping[int, Window]:
        """The layers whose attention sees a window."""
        return {s.layer: r for s, r in self.items() if isinstance(r, Window)}

    @property
    def has_linears(self) -> bool:
        """Whether linear maps take the place of sublayers."""
        return any(isinstance(r, Linear) for r in self._replacements.values())

    @property
    def digest(self) -> str:
        """A hash of the model and of all that the plan computes, whatever it says of itself."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for sublayer, replacement in self.items():
            told = "Linear" if isinstance(replacement, Linear) else repr(replacement)
            digest.update(f"{sublayer} {told}".encode())
            for tensor in replacement.tensors if isinstance(replacement, Linear) else ():
                whole = tensor.detach().cpu().contiguous()
                digest.update(f"{whole.dtype} {tuple(whole.shape)}".encode())
                digest.update(whole.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def check(self, n_layers: int, hidden: int | None = None) -> None:
        """Checks that the plan fits a model of `n_layers` layers, `hidden` wide.

        Raises:
            AdaskipError: a sublayer lies beyond the model, or a linear map is of another width.
        """
        outside = [str(sublayer) for sublayer in self if sublayer.layer >= n_layers]
        if outside:
            raise AdaskipError(
                f"The plan skips {', '.join(outside)}, but the model's layers are 0 to "
                f"{n_layers - 1}."
            )
        for sublayer, replacement in self.items():
            if isinstance(replacement, Linear) and hidden not in (None, replacement.hidden):
                raise AdaskipError(
                    f"The plan's Linear of {sublayer} is for a model {replacement.hidden} wide, "
                    f"this one is {hidden} wide."
                )

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises a `PlanError` if the plan was made for another model."""
        if not self.fingerprint:
            return
        found = model_fingerprint(model)
        if not same_model(found, self.fingerprint):
            raise PlanError(
                f"The plan was made for model {fingerprint_name(self.fingerprint)}, this model is "
                f"{fingerprint_name(found)}; make a plan for this model."
            )

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Writes the plan as a `.safetensors` file, whole or not at all.

        The tensors are those of its linear maps; everything else is JSON in the file's metadata.

        Args:
            path: the file.
            dtype: in which its linear maps are kept, e.g. `torch.bfloat16`: a model that computes
                in it uses the same numbers as with the larger file. None for that which they have.

        Raises:
            AdaskipError: linear maps cannot be kept in this precision.
            OSError: it cannot be written.
        """
        write_plan(PlanContent(self, self.fingerprint, self.about), path, dtype)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SkipPlan:
        """Reads a plan file.

        Args:
            path: a file; or the name of a shipped plan, e.g. "smollm2/1.2@1000".

        Raises:
            PlanError: it is missing, damaged, or of another version.
        """
        held = read_plan(path, Sublayer)
        try:
            return cls(held.replacements, fingerprint=held.fingerprint, about=held.about)
        except AdaskipError as error:
            raise damaged(path, error) from error

    def layers(self, kind: Kind) -> tuple[int, ...]:
        """The layers whose sublayer of this kind is not computed, ascending; windows are."""
        return tuple(
            s.layer for s, r in self.items() if s.kind == kind and not isinstance(r, Window)
        )


def _checked(sublayer: Sublayer, value: Any) -> Replacement:
    if isinstance(value, Window) and sublayer.kind != "attn":
        raise AdaskipError(f"A Window takes the place of attention, not of {sublayer}.")
    if value is None or isinstance(value, Linear | Window):
        return value
    if not is_finite(value):
        raise AdaskipError(
            f"The gain of {sublayer} is a finite number or None, not {value!r:.60}; a replacement "
            "that computes is a Linear or a Window."
        )
    return float(value)


def _restored(
    replacements: Mapping[Sublayer, Replacement], fingerprint: str, about: Mapping[str, Any]
) -> SkipPlan:
    return SkipPlan(replacements, fingerprint=fingerprint, about=about)


EMPTY_PLAN = SkipPlan()
