"""The errors a user can cause. Each message says what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class AdaskipError(ValueError):
    """Base of every error this package raises on purpose; scripts print it and exit with code 2."""


class UnsupportedModelError(AdaskipError):
    """The model's architecture has no row in `adaskip.blocks.BLOCKS`, or cannot be skipped in."""


class UnsupportedCallError(AdaskipError):
    """The model was called in a way in which skipping would be silently wrong."""


class CacheHoleError(AdaskipError):
    """Attention was asked to run in a request that skipped it: its keys and values are missing."""


class ProfileError(AdaskipError):
    """An importance profile is damaged, or belongs to another model."""


class PlanError(AdaskipError):
    """A plan file is damaged, or was made for another model."""


class ExportError(AdaskipError):
    """What a checkpoint computes is not what its plan does."""


class DataError(AdaskipError):
    """A data file is missing, damaged, or holds no usable row."""


class RunError(AdaskipError):
    """A run cannot be started, continued or scored as asked."""


def unknown_name(kind: str, given: str, allowed: Iterable[str]) -> AdaskipError:
    """The error for a name that is not registered, with the nearest allowed one as a suggestion.

    Args:
        kind: what the name stands for, e.g. `"policy"`.
        given: the name that was given.
        allowed: every name that would have been accepted.
    """
    names = sorted(allowed)
    hint = did_you_mean(given, names)
    return AdaskipError(f"Unknown {kind} {given!r}.{hint} Choose one of: {', '.join(names)}.")


def no_numbers(dtype: object) -> AdaskipError:
    """The error for predictions that are not finite in the precision that a model computes in."""
    return AdaskipError(
        f"The predictions of the model or the plan are no numbers in {dtype}; load the model in "
        "bfloat16 or float32, and see whether the plan's gains are right."
    )


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """A sentence that names the nearest allowed name, after a space; empty if none is near."""
    # `str`: an enumeration of texts would show itself.
    nearest = {name.lower(): str(name) for name in allowed}
    close = difflib.get_close_matches(given.lower(), nearest, n=1)
    return f" Did you mean {nearest[close[0]]!r}?" if close else ""


def refuse_below_one(options: Mapping[str, int | None]) -> None:
    """Raises an `AdaskipError` for the first option, by its name, that is a number below 1."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise AdaskipError(f"--{name} is {value}; it must be at least 1.")


def first_problem(error: ValidationError) -> str:
    """The first thing pydantic found wrong, as a part of a sentence: where, what, and the value."""
    found = error.errors(include_url=False)[0]
    where = ".".join(map(str, found["loc"]))
    if found["type"] == "missing":
        return f"{where!r} is missing"
    if found["type"] == "extra_forbidden":
        return f"{where!r} is {found['input']!r}: it is unknown"
    what = found["msg"].removeprefix("Value error, ")
    what = re.sub(r"^\w+ should", "it must", what)
    return f"{where!r} is {found['input']!r}: {what}" if where else what
