"""What may take a sublayer's place: nothing, a gain, a linear map, or a window of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from adaskip.errors import AdaskipError
from adaskip.numbers import is_whole

# Keeps a row of zeros from being divided by zero; smaller than any mean square that matters.
TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Linear:
    """`x + n @ weight + bias` in the place of a sublayer, with `n = x / rms(x)`.

    A linear map is equal to itself only: its tensors are never compared.

    Attributes:
        weight: [hidden, hidden]; or two factors, [hidden, rank] and [rank, hidden], which are
            multiplied one after the other.
        bias: [hidden].

    Raises:
        AdaskipError: the tensors are no floating-point numbers of these shapes, or not finite.

    Source: NBL (arXiv 2505.21077) puts a linear map of the residual stream in the place of
    attention; of the normalized input, attention sinks do it no harm.
    """

    weight: Tensor | tuple[Tensor, Tensor]
    bias: Tensor

    def __post_init__(self) -> None:
        if not all(isinstance(t, Tensor) and t.is_floating_point() for t in self.tensors):
            raise AdaskipError("A Linear is made of floating-point tensors: weight and bias.")
        hidden = self.bias.shape[0] if self.bias.ndim == 1 else -1
        shapes = [tuple(t.shape) for t in self.factors]
        rank = shapes[0][-1]
        wanted = [(hidden, hidden)] if len(shapes) == 1 else [(hidden, rank), (rank, hidden)]
        if shapes != wanted:
            raise AdaskipError(
                f"A Linear has a weight [hidden, hidden] or two factors [hidden, rank] and [rank, "
                f"hidden], and a bias [hidden]; got {shapes} and {tuple(self.bias.shape)}."
            )
        if rank > hidden:
            raise AdaskipError(f"A Linear of rank {rank} is larger than the model ({hidden}).")
        if not all(bool(t.isfinite().all()) for t in self.tensors):
            raise AdaskipError("A Linear's weight or bias is not finite.")

    @classmethod
    def of(cls, factors: Sequence[Tensor], bias: Tensor) -> Linear:
        """The map of one factor or two, in a sequence.

        Raises:
            AdaskipError: there are others than one or two.
        """
        if len(factors) == 1:
            return cls(factors[0], bias)
        if len(factors) == 2:
            return cls((factors[0], factors[1]), bias)
        raise AdaskipError(f"A Linear has one factor or two, not {len(factors)}.")

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The matrices that are multiplied, in their order."""
        return self.weight if isinstance(self.weight, tuple) else (self.weight,)

    @property
    def rank(self) -> int | None:
        """Of the factors; None for a full map."""
        return self.factors[0].shape[1] if len(self.factors) == 2 else None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything it holds: the factors, then the bias."""
        return (*self.factors, self.bias)

    @property
    def hidden(self) -> int:
        """Width of the residual stream it is for."""
        return self.bias.shape[0]

    def to(self, device: torch.device, dtype: torch.dtype) -> Linear:
        """The same on a device, in a precision."""
        *factors, bias = (t.to(device, dtype).contiguous() for t in self.tensors)
        return Linear.of(factors, bias)

    def on(self, device: torch.device, dtype: torch.dtype) -> Linear:
        """The same on a device, made once: it stays there, where it lies, as long as this does.

        CUDA graphs read their maps where they lay when they were recorded. After the tensors were
        changed in place it is made anew.
        """
        if self.learns:
            # Made in every step of a training, where whether it is finite would be waited for.
            return self._moved(device, dtype)
        # Inference tensors count no versions.
        versions = tuple(0 if t.is_inference() else t._version for t in self.tensors)
        if self._copies.get((device, dtype), ((), self))[0] != versions:
            with torch.inference_mode(False):
                self._copies[device, dtype] = versions, self.to(device, dtype)
        return self._copies[device, dtype][1]

    def _moved(self, device: torch.device, dtype: torch.dtype) -> Linear:
        """`to`, but not looked at again."""
        made = object.__new__(Linear)
        *factors, bias = (t.to(device, dtype).contiguous() for t in self.tensors)
        weight = factors[0] if self.rank is None else tuple(factors)
        vars(made).update(weight=weight, bias=bias)
        return made

    @property
    def learns(self) -> bool:
        """Whether gradients change it, so that no copy of it stays right."""
        return any(tensor.requires_grad for tensor in self.tensors)

    @cached_property
    def _copies(self) -> dict[tuple[torch.device, torch.dtype], tuple[tuple[int, ...], Linear]]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of a map do without those on devices.
        return {"weight": self.weight, "bias": self.bias}

    def __call__(self, x: Tensor) -> Tensor:
        """The residual stream after the sublayer, from that before it: [..., hidden]."""
        *left, right = self.factors
        n = rms_norm(x, (self.hidden,), eps=TINY)
        for factor in left:
            n = n @ factor
        return x + linear(n, right.T, self.bias)


@dataclass(frozen=True)
class Window:
    """Attention over the last `size` tokens and the first `sinks` ones, in the place of all.

    Token t of a sequence sees tokens t - size + 1 to t, itself included, and the first `sinks`
    real tokens. Keys keep their own positions. A window may be of some key-value heads alone: the
    others, and the query heads that read them, see all tokens.

    Attributes:
        size: tokens, 1 or more.
        sinks: tokens, 0 or more.
        heads: the key-value heads that have it, ascending; None for all of them.
        of_heads: how many key-value heads the attention has, where `heads` says which; else None.

    Raises:
        AdaskipError: one of them is no such number, or the heads are none, all of them or others.

    Source: StreamingLLM (arXiv 2309.17453) for all layers; here for single ones, or for single
    heads as in DuoAttention (2410.10819).
    """

    size: int
    sinks: int = 4
    heads: tuple[int, ...] | None = None
    of_heads: int | None = None

    def __post_init__(self) -> None:
        self._check_heads()
        for name, least in (("size", 1), ("sinks", 0)):
            value = getattr(self, name)
            if not is_whole(value) or value < least:
                raise AdaskipError(
                    f"A Window's {name} is a whole number from {least} up, not {value!r}."
                )
            object.__setattr__(self, name, int(value))

    def __repr__(self) -> str:
        of = "" if self.heads is None else f", heads={self.heads}, of_heads={self.of_heads}"
        return f"Window(size={self.size}, sinks={self.sinks}{of})"

    # Every decode step asks for it.
    @cached_property
    def whole(self) -> Window:
        """The window of the same shape that all heads have."""
        return self if self.heads is None else Window(self.size, self.sinks)

    @property
    def share(self) -> float:
        """Of the key-value heads those that have it."""
        return 1.0 if not self.heads or not self.of_heads else len(self.heads) / self.of_heads

    def held(self, tokens: int) -> float:
        """Tokens whose keys and values are kept of a context of so many tokens, mean of heads."""
        seen = min(tokens, self.size + self.sinks)
        return seen if self.heads is None else tokens - self.share * (tokens - seen)

    def _check_heads(self) -> None:
        heads, of_heads = self.heads, self.of_heads
        if heads is None and of_heads is None:
            return
        if not is_whole(of_heads) or not isinstance(heads, list | tuple) or not heads:
            raise AdaskipError(
                f"A Window of some heads says which, and of how many: heads=(0, 2), of_heads=3; "
                f"not heads={heads!r}, of_heads={of_heads!r}."
            )
        given = sorted({int(head) if is_whole(head) else -1 for head in heads})
        if given[0] < 0 or given[-1] >= of_heads or len(given) >= of_heads:
            raise AdaskipError(
                f"A Window's heads are some of 0 to {of_heads - 1}, not {tuple(heads)}; leave "
                "them out where all have it."
            )
        object.__setattr__(self, "heads", tuple(given))
        object.__setattr__(self, "of_heads", int(of_heads))


def scaled(x: Tensor, gain: Tensor | float) -> Tensor:
    """`x * gain`, by the number that the gain is: only the product is rounded to x's precision.

    Args:
        x: [..., hidden].
        gain: a number, or a float32 scalar on the device of x.
    """
    if x.is_cuda and isinstance(gain, Tensor) and gain.dtype.itemsize > x.dtype.itemsize:
        # CUDA's product rounds a scalar that lies there beforehand (1.003 is 1 in bfloat16), not
        # a vector of one number; a CPU's rounds neither.
        return (x * gain[None]).to(x.dtype)
    return x * gain


# None leaves the residual stream as it is, a number scales it.
Replacement = float | Linear | Window | None
