"""Skips the attention and FFN sublayers that matter least: AdaSkip for HuggingFace models."""

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
from adaskip.version import __version__

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
