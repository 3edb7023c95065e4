"""Compiled decoding with a static cache: same tokens, no graph per step, one per set skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import prompt, tiny_model
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel

from adaskip import (
    AdaSkip,
    FixedSkipping,
    SkipPlan,
    SkipPolicy,
    Sublayer,
    learn_importance,
    skipping,
)


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    torch._dynamo.reset()
    yield tiny_model("llama")
    torch._dynamo.reset()


def config(backend: str) -> CompileConfig:
    compile_config = CompileConfig(fullgraph=False, mode=None, backend=backend)
    # generate() compiles on a GPU by itself; on a CPU only when told to.
    compile_config._compile_all_devices = True
    return compile_config


def decode(model: PreTrainedModel, compiled: str | None, tokens: int = 12) -> torch.Tensor:
    kwargs = {} if compiled is None else {"compile_config": config(compiled)}
    return model.generate(
        prompt(20),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        cache_implementation="static" if compiled else None,
        **kwargs,
    )


def new_graphs(model: PreTrainedModel, policy: SkipPolicy, backend: str = "eager") -> int:
    """Compiles and decodes twice under a policy; how many graphs that took."""
    with skipping(model, policy):
        expected = decode(model, None)
        before = counters["stats"]["unique_graphs"]
        for _ in range(2):
            assert torch.equal(decode(model, backend), expected)
        return counters["stats"]["unique_graphs"] - before


def plan(gain: float | None) -> FixedSkipping:
    skipped = {Sublayer(0, "attn"): gain, Sublayer(1, "ffn"): gain, Sublayer(2, "attn"): gain}
    return FixedSkipping(SkipPlan(skipped))


def test_one_graph_per_set_of_sublayers(model: PreTrainedModel) -> None:
    # The base model and, after the hook, the language model's head.
    assert new_graphs(model, plan(1.1)) == 2
    # Other gains are other numbers in the same tensor, not another graph.
    assert new_graphs(model, plan(0.7)) == 0
    assert new_graphs(model, FixedSkipping(SkipPlan({Sublayer(0, "attn"): 1.1}))) == 1


def test_the_online_extension_costs_one_graph(model: PreTrainedModel) -> None:
    importance = learn_importance(model, [prompt(30, seed=s) for s in range(3)])
    offline = AdaSkip(importance, 2, online=False)
    assert new_graphs(model, offline) == 2
    # The window records FFNs (another graph), then the extended set runs.
    online = AdaSkip(importance, 6, online=True, window=4)
    with skipping(model, online):
        expected = decode(model, None)
        extended = len(online.extension)
        assert torch.equal(decode(model, "eager"), expected)
        assert len(online.extension) == extended


@pytest.mark.slow
def test_inductor_gives_the_same_tokens(model: PreTrainedModel) -> None:
    assert new_graphs(model, plan(1.1), backend="inductor") == 2
