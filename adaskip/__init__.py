"""Skips the attention and FFN sublayers that matter least: AdaSkip for HuggingFace models.

The names below are loaded when they are first used: `import adaskip` alone loads no torch, so that
a command can still say how its threads are to wait; see `adaskip.waiting`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from adaskip.version import __version__

if TYPE_CHECKING:
    from adaskip.errors import (
        AdaskipError,
        CacheHoleError,
        DataError,
        ProfileError,
        RunError,
        UnsupportedCallError,
        UnsupportedModelError,
    )
    from adaskip.growing_cache import GrowingCache
    from adaskip.importance import Importance
    from adaskip.learning import learn_importance
    from adaskip.memory import keep_freed_memory
    from adaskip.models import load_model, load_tokenizer
    from adaskip.plan import Phase, SkipPlan, Step, Sublayer
    from adaskip.policies import (
        POLICIES,
        AdaSkip,
        EarlyExit,
        FixedSkipping,
        SkipDecode,
        SkipPolicy,
        UnifiedSkipping,
    )
    from adaskip.session import Session, skipping
    from adaskip.speed.calibration import measured_times

__all__ = [
    "POLICIES",
    "AdaSkip",
    "AdaskipError",
    "CacheHoleError",
    "DataError",
    "EarlyExit",
    "FixedSkipping",
    "GrowingCache",
    "Importance",
    "Phase",
    "ProfileError",
    "RunError",
    "Session",
    "SkipDecode",
    "SkipPlan",
    "SkipPolicy",
    "Step",
    "Sublayer",
    "UnifiedSkipping",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "__version__",
    "keep_freed_memory",
    "learn_importance",
    "load_model",
    "load_tokenizer",
    "measured_times",
    "skipping",
]

_HOMES = {
    "adaskip.errors": (
        "AdaskipError",
        "CacheHoleError",
        "DataError",
        "ProfileError",
        "RunError",
        "UnsupportedCallError",
        "UnsupportedModelError",
    ),
    "adaskip.growing_cache": ("GrowingCache",),
    "adaskip.importance": ("Importance",),
    "adaskip.learning": ("learn_importance",),
    "adaskip.memory": ("keep_freed_memory",),
    "adaskip.models": ("load_model", "load_tokenizer"),
    "adaskip.plan": ("Phase", "SkipPlan", "Step", "Sublayer"),
    "adaskip.policies": (
        "POLICIES",
        "AdaSkip",
        "EarlyExit",
        "FixedSkipping",
        "SkipDecode",
        "SkipPolicy",
        "UnifiedSkipping",
    ),
    "adaskip.session": ("Session", "skipping"),
    "adaskip.speed.calibration": ("measured_times",),
}


def _load(name: str) -> object:
    """A public name, from the module that defines it (PEP 562)."""
    for module, names in _HOMES.items():
        if name in names:
            value: object = getattr(import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not TYPE_CHECKING:  # or every misspelt name would pass for an object
    __getattr__ = _load


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
