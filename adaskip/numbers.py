"""What counts as a number where a user gives one: Python's and numpy's, but never a bool."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from numbers import Integral, Real
from typing import TypeGuard

from adaskip.errors import AdaskipError


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number; a bool, a float and a tensor are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a real number other than an infinity or NaN; a tensor is not."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def check_counts(counts: Mapping[str, object]) -> None:
    """Raises an `AdaskipError` for the first count, by its name, that is no whole number from 1."""
    for name, count in counts.items():
        if not (is_whole(count) and count >= 1):
            raise AdaskipError(f"{name} is {count!r}; give a whole number, 1 or more.")
