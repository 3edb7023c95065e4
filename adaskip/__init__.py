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
from adaskip.importance import Importance
from adaskip.learning import learn_importance
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
from adaskip.version import __version__

__all__ = [
    "POLICIES",
    "AdaSkip",
    "AdaskipError",
    "CacheHoleError",
    "DataError",
    "EarlyExit",
    "FixedSkipping",
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
    "learn_importance",
    "load_model",
    "load_tokenizer",
    "skipping",
]
