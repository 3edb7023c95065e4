"""The file of a plan: linear maps as tensors of a `.safetensors` file, all else as its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from adaskip.errors import AdaskipError, PlanError
from adaskip.replacements import Linear, Replacement, Window
from adaskip.shipped import find_plan
from adaskip.version import __version__
from adaskip.whole_files import write_whole

# Plans are written in the oldest version that can say them: the second has windows of some heads.
VERSIONS = (1, 2)
# In which linear maps may be kept.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Where a plan file's metadata has its JSON.
_KEY = "adaskip.plan"


class _Place(Hashable, Protocol):
    """A sublayer, which `adaskip.plan` defines."""

    @property
    def layer(self) -> int: ...

    @property
    def kind(self) -> str: ...


P = TypeVar("P", bound=_Place)


@dataclass(frozen=True)
class PlanContent(Generic[P]):
    """What a plan's file holds.

    Attributes:
        replacements: by sublayer.
        fingerprint: of the model it was made for.
        about: what it was made from and for.
    """

    replacements: Mapping[P, Replacement]
    fingerprint: str
    about: Mapping[str, Any]


def write_plan(
    content: PlanContent[P], path: str | os.PathLike[str], dtype: torch.dtype | None
) -> None:
    """Writes a plan's file, whole or not at all.

    Args:
        content: of the plan.
        path: the file.
        dtype: in which linear maps are kept; None for that which they have.

    Raises:
        AdaskipError: linear maps cannot be kept in this precision.
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    rows = []
    version = VERSIONS[0]
    for sublayer, replacement in content.replacements.items():
        row: dict[str, Any] = {"layer": sublayer.layer, "kind": sublayer.kind}
        if isinstance(replacement, Window):
            row["window"] = [replacement.size, replacement.sinks]
            if replacement.heads is not None:
                row["window"] += [replacement.heads, replacement.of_heads]
                version = VERSIONS[1]
        elif isinstance(replacement, Linear):
            row["factors"] = len(replacement.factors)
            kept = replacement if dtype is None else _narrowed(sublayer, replacement, dtype)
            names = _tensor_names(sublayer, len(replacement.factors))
            tensors |= dict(zip(names, kept.tensors, strict=True))
        else:
            row["gain"] = replacement
        rows.append(row)
    told = {
        "version": version,
        "adaskip": __version__,
        "fingerprint": content.fingerprint,
        "about": dict(content.about),
        "sublayers": rows,
    }
    # Copies: one map may be in several places, and a file has each tensor once.
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # Through bytes: save_file() makes a file that nobody else may read.
    write_whole(path, save(whole, metadata={_KEY: json.dumps(told)}))


def read_plan(path: str | os.PathLike[str], sublayer_of: Callable[[Any, Any], P]) -> PlanContent[P]:
    """Reads a plan's file, or the shipped plan of that name.

    Args:
        path: the file, or the name.
        sublayer_of: makes a sublayer of what the file has as layer and kind, or refuses them.

    Raises:
        PlanError: it is missing, damaged, or of another version.
    """
    try:
        with safe_open(find_plan(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PlanError(f"The plan {path} cannot be read: {error}.") from error
    try:
        told = json.loads(metadata[_KEY])
        version = told["version"]
    except (KeyError, TypeError, ValueError):
        raise PlanError(f"{path} is not a plan: it holds none in its metadata.") from None
    if version not in VERSIONS:
        raise PlanError(
            f"The plan {path} has version {version!r}; this adaskip reads versions "
            f"{' and '.join(map(str, VERSIONS))}. Make the plan anew."
        )
    try:
        made: dict[P, Replacement] = {}
        for row in told["sublayers"]:
            sublayer = sublayer_of(row["layer"], row["kind"])
            if sublayer in made:
                raise AdaskipError(f"it has {sublayer} twice")
            made[sublayer] = _replacement(sublayer, row, tensors)
        fingerprint, about = told["fingerprint"], told["about"]
        if not isinstance(fingerprint, str) or not isinstance(about, dict):
            raise AdaskipError("its fingerprint is no text, or what it is about no mapping")
    except (KeyError, TypeError, IndexError, AdaskipError) as error:
        raise damaged(path, error) from error
    return PlanContent(made, fingerprint, about)


def damaged(path: object, error: Exception) -> PlanError:
    """The error that says what is wrong with what a plan's file holds."""
    reason = str(error).rstrip(".") if isinstance(error, AdaskipError) else repr(error)
    return PlanError(f"The plan {path} is damaged: {reason}. Make it anew.")


def _replacement(
    sublayer: object, row: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Replacement:
    """What a row of a file has in a sublayer's place."""
    if "factors" in row:
        *factors, bias = (tensors[name] for name in _tensor_names(sublayer, row["factors"]))
        return Linear.of(factors, bias)
    if "window" in row:
        return Window(*row["window"])
    gain: float | None = row["gain"]
    return gain


def _narrowed(sublayer: object, linear: Linear, dtype: torch.dtype) -> Linear:
    """A linear map as a file keeps it."""
    if dtype not in _DTYPES:
        raise AdaskipError(
            f"A plan's linear maps cannot be kept in {dtype}; give one of "
            f"{', '.join(map(str, _DTYPES))}."
        )
    made = [tensor.to("cpu", dtype) for tensor in linear.tensors]
    if not all(bool(tensor.isfinite().all()) for tensor in made):
        raise AdaskipError(
            f"The linear map of {sublayer} has numbers too large for {dtype}; keep it in "
            "torch.bfloat16, or in the precision it has."
        )
    return Linear.of(made[:-1], made[-1])


def _tensor_names(sublayer: object, n_factors: int) -> list[str]:
    """What the tensors of a linear map are called."""
    return [*(f"{sublayer}.weight.{i}" for i in range(n_factors)), f"{sublayer}.bias"]
