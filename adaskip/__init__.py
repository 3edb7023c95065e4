"""Skips the attention and FFN sublayers that matter least: AdaSkip for HuggingFace models.

The names below are loaded when they are first used: `import adaskip` alone loads no torch, so that
a command can still say how its threads are to wait; see `adaskip.waiting`.
"""

from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING

from adaskip.version import __version__ as __version__

if TYPE_CHECKING:
    from adaskip.distilling import distill_plan as distill_plan
    from adaskip.entering import skipping as skipping
    from adaskip.errors import (
        AdaskipError as AdaskipError,
        CacheHoleError as CacheHoleError,
        DataError as DataError,
        ExportError as ExportError,
        PlanError as PlanError,
        ProfileError as ProfileError,
        RunError as RunError,
        UnsupportedCallError as UnsupportedCallError,
        UnsupportedModelError as UnsupportedModelError,
    )
    from adaskip.export.exporting import export_checkpoint as export_checkpoint
    from adaskip.export.report import ExportReport as ExportReport
    from adaskip.fitting import (
        fit_linears as fit_linears,
        refit_linears as refit_linears,
    )
    from adaskip.growing_cache import GrowingCache as GrowingCache
    from adaskip.importance import Importance as Importance
    from adaskip.learning import learn_importance as learn_importance
    from adaskip.methods import make_plan as make_plan
    from adaskip.models.loading import (
        load_model as load_model,
        load_tokenizer as load_tokenizer,
    )
    from adaskip.plan import (
        Phase as Phase,
        Scope as Scope,
        SkipPlan as SkipPlan,
        Step as Step,
        Sublayer as Sublayer,
        all_sublayers as all_sublayers,
    )
    from adaskip.policies import (
        POLICIES as POLICIES,
        AdaSkip as AdaSkip,
        EarlyExit as EarlyExit,
        FixedSkipping as FixedSkipping,
        SkipDecode as SkipDecode,
        SkipPolicy as SkipPolicy,
        UnifiedSkipping as UnifiedSkipping,
        register as register,
    )
    from adaskip.profiling.calibration import measured_times as measured_times
    from adaskip.profiling.memory import keep_freed_memory as keep_freed_memory
    from adaskip.recorders import (
        Recorder as Recorder,
        Span as Span,
        StepStats as StepStats,
    )
    from adaskip.replacements import (
        Linear as Linear,
        Replacement as Replacement,
        Window as Window,
    )
    from adaskip.search import search_plan as search_plan
    from adaskip.session import Session as Session
    from adaskip.summary import PhaseSummary as PhaseSummary, Summary as Summary

_HOMES = {
    "adaskip.distilling": ("distill_plan",),
    "adaskip.entering": ("skipping",),
    "adaskip.errors": (
        "AdaskipError",
        "CacheHoleError",
        "DataError",
        "ExportError",
        "PlanError",
        "ProfileError",
        "RunError",
        "UnsupportedCallError",
        "UnsupportedModelError",
    ),
    "adaskip.export.exporting": ("export_checkpoint",),
    "adaskip.export.report": ("ExportReport",),
    "adaskip.fitting": ("fit_linears", "refit_linears"),
    "adaskip.growing_cache": ("GrowingCache",),
    "adaskip.importance": ("Importance",),
    "adaskip.learning": ("learn_importance",),
    "adaskip.profiling.memory": ("keep_freed_memory",),
    "adaskip.methods": ("make_plan",),
    "adaskip.models.loading": ("load_model", "load_tokenizer"),
    "adaskip.plan": ("Phase", "Scope", "SkipPlan", "Step", "Sublayer", "all_sublayers"),
    "adaskip.policies": (
        "POLICIES",
        "AdaSkip",
        "EarlyExit",
        "FixedSkipping",
        "SkipDecode",
        "SkipPolicy",
        "UnifiedSkipping",
        "register",
    ),
    "adaskip.recorders": ("Recorder", "Span", "StepStats"),
    "adaskip.replacements": ("Linear", "Replacement", "Window"),
    "adaskip.search": ("search_plan",),
    "adaskip.session": ("Session",),
    "adaskip.summary": ("PhaseSummary", "Summary"),
    "adaskip.profiling.calibration": ("measured_times",),
}

__all__ = sorted(["__version__", *chain.from_iterable(_HOMES.values())])


def _load(name: str) -> object:
    """A public name, from the module that defines it, or a module (PEP 562)."""
    for module, names in _HOMES.items():
        if name in names:
            value: object = getattr(import_module(module), name)
            globals()[name] = value
            return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not TYPE_CHECKING:  # or every misspelt name would pass for an object
    __getattr__ = _load


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
