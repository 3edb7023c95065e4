"""Greedy generation, and the audit of what ran in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_fixtures import A1, F1, F2, full_model
from run_fixtures import save_checkpoint
from tiny_loaded import as_prompt, character_tokenizer
from transformers import DynamicCache, PreTrainedModel

from adaskip.entering import skipping
from adaskip.errors import RunError
from adaskip.export.exporting import export_checkpoint
from adaskip.growing_cache import GrowingLayer
from adaskip.models.loading import load_model
from adaskip.plan import SkipPlan, Sublayer, whole_layers
from adaskip.policies import FixedSkipping
from adaskip.runs.audit import Audit
from adaskip.runs.generation import StopRule, generate_greedy
from adaskip.runs.perplexity import reference_perplexity


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return load_model(save_checkpoint(tmp_path_factory.mktemp("model")), device="cpu")


def test_greedy_is_what_generate_does(model: PreTrainedModel) -> None:
    prompts = [[5, 9, 33, 7], [40, 41, 42, 43, 44, 45, 46]]
    for ids in prompts:
        reference = model.generate(
            torch.tensor([ids]), max_new_tokens=9, do_sample=False, eos_token_id=None
        )[0, len(ids) :].tolist()
        made = generate_greedy(model, [ids], StopRule(frozenset(), 9))
        assert list(made.tokens[0]) == reference
    together = generate_greedy(model, prompts, StopRule(frozenset(), 9))
    alone = [generate_greedy(model, [ids], StopRule(frozenset(), 9)).tokens[0] for ids in prompts]
    assert list(together.tokens) == alone


def test_the_context_is_copied_once_per_answer(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[int] = []
    moved = GrowingLayer._moved

    def count(layer: GrowingLayer, old: Any, states: torch.Tensor, past: int) -> torch.Tensor:
        copies.append(past)
        return moved(layer, old, states, past)

    monkeypatch.setattr(GrowingLayer, "_moved", count)
    generate_greedy(model, [[5, 9, 33, 7]], StopRule(frozenset(), 300))
    assert copies == [0] * 2 * model.config.num_hidden_layers


def test_an_answer_ends_at_its_stop_token_but_not_too_early(model: PreTrainedModel) -> None:
    ids = [5, 9, 33, 7]
    free = generate_greedy(model, [ids], StopRule(frozenset(), 9)).tokens[0]
    end = next(token for token in free if token != free[0])
    made = generate_greedy(model, [ids], StopRule(frozenset({end}), 9))
    assert made.tokens[0] == free[: free.index(end)]
    assert made.n_generated[0] == free.index(end) + 1
    first = generate_greedy(model, [ids], StopRule(frozenset({free[0]}), 9))
    assert (first.tokens[0], first.n_generated[0], first.per_token) == ((), 1, None)
    later = generate_greedy(model, [ids], StopRule(frozenset({free[0]}), 9, min_new_tokens=1))
    assert later.tokens[0][0] != free[0]


class FakeSession:
    """A session that claims a plan."""

    def __init__(self, plan: SkipPlan) -> None:
        self.plan, self.step = plan, None


def test_a_plan_that_was_not_carried_out_names_the_sublayers(model: PreTrainedModel) -> None:
    claimed = SkipPlan({Sublayer(1, "attn"): None, Sublayer(3, "ffn"): 1.0})
    with Audit(model, FakeSession(claimed)), pytest.raises(RunError, match="attn1, ffn3; skipped"):
        model(torch.tensor([[3, 4]]))


def test_what_is_skipped_without_a_plan_is_named(model: PreTrainedModel) -> None:
    policy = FixedSkipping(whole_layers([2]))
    with skipping(model, policy), Audit(model, None), pytest.raises(RunError, match="attn2, ffn2"):
        model(torch.tensor([[3, 4]]))


def test_the_audit_leaves_no_hook(model: PreTrainedModel) -> None:
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with Audit(model, None):
        model(torch.tensor([[3, 4]]))
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_an_exported_model_goes_on_after_a_call_that_failed(tmp_path: Path) -> None:
    export_checkpoint(full_model("llama"), None, SkipPlan({A1: None}), tmp_path / "out")
    partial = load_model(tmp_path / "out", device="cpu")
    ids, found = torch.arange(3, 17)[None], {}
    for fails in (False, True):
        cache = DynamicCache(config=partial.config)
        with skipping(partial, SkipPlan({F2: None})), torch.no_grad():
            partial(ids[:, :12], past_key_values=cache)
            if fails:
                with pytest.raises(IndexError):
                    partial(torch.tensor([[10**6]]), past_key_values=cache)
            found[fails] = partial(ids[:, 12:], past_key_values=cache).logits
    assert torch.equal(found[True], found[False])


def test_an_exported_model_is_audited_by_what_it_has(tmp_path: Path) -> None:
    whole = full_model("llama")
    export_checkpoint(whole, None, SkipPlan({F1: None}), tmp_path / "out")
    partial = load_model(tmp_path / "out", device="cpu")
    tokenizer = character_tokenizer()
    items = [(as_prompt("What is it?", tokenizer), "A stone.")]
    for more in ({}, {A1: None}, {F1: None, F2: None}):
        found = reference_perplexity(partial, tokenizer, FixedSkipping(SkipPlan(more)), items)
        same = FixedSkipping(SkipPlan({F1: None, **more}))
        expected = reference_perplexity(whole, tokenizer, same, items)
        assert found.nll == pytest.approx(expected.nll, abs=1e-5)
        # What is gone was not skipped by this request.
        names = [str(sublayer) for sublayer in more if sublayer != F1]
        assert found.rows[0].skipped.prefill.sublayers == names
    with skipping(partial, SkipPlan({A1: None})) as session, Audit(partial, session) as audit:
        generate_greedy(partial, [items[0][0].input_ids], StopRule(frozenset(), 4))
    assert audit.counts().decode.sublayers == ["attn1"]
