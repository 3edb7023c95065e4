"""Compiled decoding with a static cache: same tokens, no graph per step, one per set skipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import prompt, tiny_model
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel, StaticCache

from adaskip import (
    AdaSkip,
    FixedSkipping,
    Linear,
    SkipPlan,
    SkipPolicy,
    Sublayer,
    Window,
    learn_importance,
    skipping,
)
from adaskip.profiling.timing import growing_cache, next_logits


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    torch._dynamo.reset()
    # What is traced goes layer by layer: more of them take longer and show no more.
    yield tiny_model("llama", num_hidden_layers=2)
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
    skipped = {Sublayer(0, "attn"): gain, Sublayer(1, "ffn"): gain, Sublayer(1, "attn"): gain}
    return FixedSkipping(SkipPlan(skipped))


def test_one_graph_per_set_of_sublayers(model: PreTrainedModel) -> None:
    # The base model and, after the hook, the language model's head.
    assert new_graphs(model, plan(1.1)) == 2
    # Other gains are other numbers in the same tensor, not another graph.
    assert new_graphs(model, plan(0.7)) == 0
    assert new_graphs(model, FixedSkipping(SkipPlan({Sublayer(0, "attn"): 1.1}))) == 1


def test_the_online_extension_costs_one_graph(model: PreTrainedModel) -> None:
    learned = learn_importance(model, [prompt(30)])
    # Every FFN reaches this threshold.
    importance = replace(learned, similarity=dict.fromkeys(learned.similarity, -1.0))
    assert new_graphs(model, AdaSkip(importance, 2, online=False)) == 2
    online = AdaSkip(importance, 2, online=True, window=4)
    # One for the window, which records FFNs, and one for the extended set.
    assert new_graphs(model, online) == 2
    assert new_graphs(model, online) == 0
    with skipping(model, online) as session:
        decode(model, "eager")
        assert session.plan.layers("ffn") == (0, 1)


def test_one_graph_per_plan_of_linear_maps(model: PreTrainedModel) -> None:
    def linears(seed: int) -> FixedSkipping:
        torch.manual_seed(seed)
        full = Linear(torch.randn(32, 32) / 50, torch.zeros(32))
        thin = Linear((torch.randn(32, 4) / 9, torch.randn(4, 32) / 9), torch.zeros(32))
        return FixedSkipping(SkipPlan({Sublayer(0, "attn"): full, Sublayer(1, "ffn"): thin}))

    assert new_graphs(model, linears(0)) == 2
    assert new_graphs(model, linears(1)) <= 1


@pytest.mark.slow
def test_inductor_gives_the_same_tokens(model: PreTrainedModel) -> None:
    assert new_graphs(model, plan(1.1), backend="inductor") == 2


@pytest.mark.parametrize("static", [False, True])
def test_a_compiled_prefill_is_the_same(model: PreTrainedModel, static: bool) -> None:
    linear = Linear((torch.randn(32, 4) / 9, torch.randn(4, 32) / 9), torch.zeros(32))
    plans = [
        SkipPlan({Sublayer(0, "attn"): None, Sublayer(1, "ffn"): 1.1}),
        SkipPlan({Sublayer(0, "attn"): linear, Sublayer(1, "attn"): Window(5, 2)}),
    ]
    compiled = torch.compile(model.__call__, backend="eager", dynamic=False)
    ids = prompt(20)
    for chosen in plans:
        kept, graphs = StaticCache(config=model.config, max_cache_len=26), []
        before = counters["stats"]["unique_graphs"]
        for _ in range(3):
            kept.reset()  # type: ignore[no-untyped-call]
            cache = kept if static else growing_cache(model)
            with torch.no_grad(), skipping(model, chosen):
                expected = next_logits(model, ids, growing_cache(model))
                found = next_logits(compiled, ids, cache)
            torch.testing.assert_close(found, expected)
            graphs.append(counters["stats"]["unique_graphs"] - before)
        # What a window held is used again from the second request on.
        assert graphs[1] == graphs[2] > 0
