"""The skipping policies: one file each. A new one is a file here and an import below."""

from adaskip.policies.ada_skip import AdaSkip
from adaskip.policies.early_exit import EarlyExit
from adaskip.policies.llm_drop import AttentionDrop, FFNDrop, JointDrop
from adaskip.policies.made_plan import MadePlan
from adaskip.policies.short_gpt import ShortGPT
from adaskip.policies.skip_decode import SkipDecode
from adaskip.policies.unified_skipping import UnifiedSkipping
from adaskip.policy import POLICIES, FixedSkipping, SkipPolicy, policy_class, register

__all__ = [
    "POLICIES",
    "AdaSkip",
    "AttentionDrop",
    "EarlyExit",
    "FFNDrop",
    "FixedSkipping",
    "JointDrop",
    "MadePlan",
    "ShortGPT",
    "SkipDecode",
    "SkipPolicy",
    "UnifiedSkipping",
    "policy_class",
    "register",
]
