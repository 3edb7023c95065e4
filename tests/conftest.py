"""Tiny random models of every family, and where the tests' data lie."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
# Figures of the released code; their README says what they are.
GOLDEN = ROOT / "tests" / "golden"
# What may not be copied into the repository: rows of LongBench.
SHARED = ROOT.parent / "shared"

N_LAYERS = 4
VOCAB = 97

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # Large enough that every sublayer changes the output visibly.
    "initializer_range": 0.25,
}
_EXTRA: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "mistral": {"sliding_window": 24},
    "granite": {"residual_multiplier": 0.5},
    "olmo3": {"sliding_window": 16},
    "ministral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4},
    # The second layer has no experts.
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    | {"mlp_only_layers": [1]},
}

torch.set_num_threads(1)

# Minutes in few tests: they begin, so that no process waits for one at the end.
_LONG = ("test_quickstart.py", "test_kill.py", "test_cli.py", "test_scale.py", "test_smollm2.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, all others in their order."""
    items.sort(key=lambda item: item.path.name not in _LONG)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where a package was installed to be tested, a test that skips for want of it has failed."""
    report = yield
    if report.skipped and os.environ.get("ADASKIP_SKIPS_FAIL"):
        report.outcome = "failed"
    return report


def tiny_model(
    family: str, attention: str = "sdpa", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A random model of `N_LAYERS` layers, in eval mode, fp32; `changes` to its configuration."""
    torch.manual_seed(seed)
    try:
        config = AutoConfig.for_model(family, **(_SMALL | _EXTRA.get(family, {}) | changes))
    except Exception as error:
        # transformers 5.4 declares this field of Olmo2's configuration as an int.
        if "tie_word_embeddings" in str(error):
            pytest.skip(f"this transformers cannot make a configuration of {family}")
        raise
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    # Random norms too, so that a swapped pair of norms would be noticed.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand_like(parameter) * 0.5)
    return model.eval()


def prompt(tokens: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Random ids without special tokens: [batch, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, tokens), generator=generator)


def reset_empties() -> bool:
    """Whether transformers' own reset of a dynamic cache empties it; in 5.17 it only zeroes."""
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    cache.reset()
    return cache.get_seq_length() == 0
