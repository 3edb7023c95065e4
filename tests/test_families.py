"""The test matrix: every family x attention implementation, and the invariants of skipping."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import N_LAYERS, prompt, reset_empties, tiny_model
from oracle import zeroed
from transformers import DynamicCache, PreTrainedModel, StaticCache

from adaskip import (
    CacheHoleError,
    EarlyExit,
    FixedSkipping,
    SkipPlan,
    Sublayer,
    UnsupportedCallError,
    UnsupportedModelError,
    learn_importance,
    skipping,
)
from adaskip.blocks import BLOCKS
from adaskip.plan import KINDS, all_sublayers

FAMILIES = sorted(BLOCKS)
# Their attention is that of another family; what differs is seen with one implementation.
ALIKE = frozenset({"smollm3", "arcee", "seed_oss", "ministral", "olmo3", "mixtral", "qwen3_moe"})
# Gemma2 caps its attention scores, which transformers offers with eager attention only.
LEFT_OUT = {("gemma2", "sdpa"), *((family, "eager") for family in ALIKE)}
CELLS = [cell for cell in itertools.product(FAMILIES, ["sdpa", "eager"]) if cell not in LEFT_OUT]
# Those that other files go through as well.
DISTINCT = [cell for cell in CELLS if cell[0] not in ALIKE]

# Attention of layer 0 is the hard case; both of a layer, and one alone, are covered too.
SKIPPED = [Sublayer(0, "attn"), Sublayer(1, "ffn"), Sublayer(2, "attn"), Sublayer(2, "ffn")]
PLAN = SkipPlan(dict.fromkeys(SKIPPED))

GENERATE = {
    "greedy": {"do_sample": False},
    "beam search": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 8},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.fixture(scope="module", params=CELLS, ids=["-".join(cell) for cell in CELLS])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(*request.param)


def generated(
    model: PreTrainedModel, ids: torch.Tensor, **kwargs: object
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens, and the logits they came from where the mode keeps them."""
    torch.manual_seed(7)
    out = model.generate(
        ids,
        max_new_tokens=12,
        min_new_tokens=12,
        return_dict_in_generate=True,
        output_logits=kwargs.get("num_beams") is None,
        **kwargs,
    )
    if out.logits is None:
        return out.sequences, None
    return out.sequences, torch.stack(out.logits)


def test_every_family_is_in_the_matrix() -> None:
    assert {family for family, _ in CELLS} == set(BLOCKS) > ALIKE
    assert {"llama", "mistral", "qwen2", "qwen3", "phi3"} <= set(BLOCKS)


def test_empty_plan_is_bit_identical(model: PreTrainedModel) -> None:
    ids = prompt(21, batch=2)
    expected = generated(model, ids, do_sample=False)
    with skipping(model, FixedSkipping(SkipPlan())):
        actual = generated(model, ids, do_sample=False)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("mode", GENERATE)
def test_skipping_equals_zeroed_projections(model: PreTrainedModel, mode: str) -> None:
    ids = prompt(29, batch=2)
    expected = generated(zeroed(model, SKIPPED), ids, **GENERATE[mode])
    with skipping(model, FixedSkipping(PLAN)):
        first = generated(model, ids, **GENERATE[mode])
        second = generated(model, ids, **GENERATE[mode])
    for actual in (first, second):
        assert torch.equal(actual[0], expected[0])
        if expected[1] is not None:
            torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "dynamic without config", "static"])
def test_hand_written_loop(model: PreTrainedModel, cache: str) -> None:
    ids = prompt(26)
    expected = zeroed(model, SKIPPED)(ids).logits
    made = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "dynamic without config": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=40),
    }[cache]()
    if cache == "static" and any(made.is_sliding):
        pytest.skip("a sliding static cache needs the mask that generate() prepares")
    with skipping(model, FixedSkipping(PLAN)), torch.no_grad():
        logits = [model(ids[:, :10], past_key_values=made).logits]
        # Two chunks of prefill, then one token at a time; no mask, no positions given.
        logits.append(model(ids[:, 10:15], past_key_values=made).logits)
        logits.extend(model(ids[:, i : i + 1], past_key_values=made).logits for i in range(15, 26))
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-5)


def test_skipped_attention_holds_no_kv(model: PreTrainedModel) -> None:
    def kv_bytes(plan: SkipPlan) -> list[int]:
        with skipping(model, FixedSkipping(plan)):
            cache = model.generate(
                prompt(20), max_new_tokens=5, do_sample=False, return_dict_in_generate=True
            ).past_key_values
        assert len(cache) == N_LAYERS
        return [
            0 if layer.keys is None else layer.keys.nbytes + layer.values.nbytes
            for layer in cache.layers
        ]

    dense, skipped = kv_bytes(SkipPlan()), kv_bytes(PLAN)
    assert all(dense)
    assert skipped == [0, dense[1], 0, dense[3]]


def test_decode_scope_freezes_the_prompt(model: PreTrainedModel) -> None:
    with skipping(model, FixedSkipping(PLAN), scope="decode") as session:
        cache = DynamicCache()
        model(prompt(14), past_key_values=cache)
        assert len(session.plan) == 0
        for i in range(3):
            model(prompt(1, seed=i), past_key_values=cache)
            assert session.plan == PLAN
    lengths = [layer.keys.shape[-2] for layer in cache.layers]
    assert lengths == [14, 17, 14, 17]
    assert cache.get_seq_length() == 17


def test_attention_does_not_run_again(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    with skipping(model, FixedSkipping(PLAN)):
        model(prompt(8), past_key_values=cache)
    only_ffn = FixedSkipping(SkipPlan({Sublayer(1, "ffn"): None}))
    with skipping(model, only_ffn), pytest.raises(CacheHoleError, match="layer 0 was skipped"):
        model(prompt(1), past_key_values=cache)
    with pytest.raises(CacheHoleError, match="start a new request"):
        model(prompt(1), past_key_values=cache)


@pytest.mark.skipif(not reset_empties(), reason="this transformers only zeroes a cache")
def test_after_a_reset_attention_runs_again(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    with skipping(model, FixedSkipping(PLAN)):
        model(prompt(8), past_key_values=cache)
    # A new request, and the model's own cache again.
    cache.reset()
    expected = model(prompt(8)).logits
    torch.testing.assert_close(model(prompt(8), past_key_values=cache).logits, expected)


def test_leaving_restores_everything(model: PreTrainedModel) -> None:
    def attributes() -> list[tuple[str, tuple[str, ...]]]:
        return [(name, tuple(vars(module))) for name, module in model.named_modules()]

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before, n_hooks = attributes(), hooks()
    types = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    expected = model(prompt(9)).logits

    def fail_inside() -> None:
        with skipping(model, EarlyExit(2)):
            model(prompt(9))
            assert list(model.state_dict()) == keys
            assert [type(module) for module in model.modules()] == types
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_inside()
    assert attributes() == before
    assert hooks() == n_hooks
    assert torch.equal(model(prompt(9)).logits, expected)


def test_cached_equals_uncached_with_gains(model: PreTrainedModel) -> None:
    plan = SkipPlan({Sublayer(0, "attn"): 1.5, Sublayer(3, "ffn"): 0.8, Sublayer(2, "attn"): None})
    with skipping(model, FixedSkipping(plan)):
        cached = generated(model, prompt(17), do_sample=False)
        uncached = generated(model, prompt(17), do_sample=False, use_cache=False)
    assert torch.equal(cached[0], uncached[0])
    torch.testing.assert_close(cached[1], uncached[1], rtol=0, atol=1e-4)


def residuals(model: PreTrainedModel, **inputs: torch.Tensor) -> list[torch.Tensor]:
    """The residual stream before, between and after all sublayers, by hooks on the stock model."""
    spec = BLOCKS[model.config.model_type]
    found: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, object]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    watched = []
    for layer in model.model.layers:
        watched += [layer, getattr(layer, spec.ffn.pre or spec.ffn.body)]
    hooks = [
        module.register_forward_pre_hook(keep, with_kwargs=True)
        for module in (*watched, model.model.norm)
    ]
    model.model(**inputs)
    for hook in hooks:
        hook.remove()
    assert len(found) == 2 * N_LAYERS + 1
    return found


def test_similarity_and_gain_of_a_padded_batch(model: PreTrainedModel) -> None:
    ids, mask = prompt(21, batch=2), torch.ones(2, 21, dtype=torch.long)
    ids[0, :6], mask[0, :6] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    importance = learn_importance(model, [inputs])
    stream = residuals(model, **inputs)
    for sublayer in all_sublayers(N_LAYERS):
        similarity, norm, token = [], [], []
        for row, start in ((0, 6), (1, 0)):
            x = stream[sublayer.position][row, start:]
            y = stream[sublayer.position + 1][row, start:]
            similarity.append(torch.nn.functional.cosine_similarity(x, y, dim=-1).mean())
            norm.append(y.norm() / x.norm())
            token.append((y.norm(dim=-1) / x.norm(dim=-1)).quantile(0.5))
        for found, values in (
            (importance.similarity, similarity),
            (importance.gain_norm, norm),
            (importance.gain_token, token),
        ):
            expected = torch.stack(values).mean().item()
            assert found[sublayer] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padded_batch_of_two_requests(model: PreTrainedModel, cache: str | None) -> None:
    ids = prompt(18, batch=2)
    mask = torch.ones_like(ids)
    ids[1, :7], mask[1, :7] = 0, 0
    how = {"attention_mask": mask, "do_sample": False, "cache_implementation": cache}
    expected = generated(zeroed(model, SKIPPED), ids, **how)
    with skipping(model, FixedSkipping(PLAN)):
        for _ in range(2):
            actual = generated(model, ids, **how)
            assert torch.equal(actual[0], expected[0])
            torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=1e-5)


def test_assisted_decoding_with_a_fixed_plan() -> None:
    model, ids = tiny_model("llama"), prompt(12)
    with skipping(model, FixedSkipping(PLAN)):
        expected = generated(model, ids, do_sample=False, eos_token_id=2)
        actual = generated(model, ids, do_sample=False, eos_token_id=2, prompt_lookup_num_tokens=3)
    assert torch.equal(actual[0], expected[0])


def test_skipping_model_as_the_draft() -> None:
    target, draft, ids = tiny_model("llama"), tiny_model("llama"), prompt(12)
    expected = generated(target, ids, do_sample=False, eos_token_id=2)
    with skipping(draft, FixedSkipping(PLAN)) as session:
        actual = generated(target, ids, do_sample=False, eos_token_id=2, assistant_model=draft)
    assert torch.equal(actual[0], expected[0])
    # The target's answer is the same whatever the draft proposes: it has to be asked.
    phases = session.summary().phases
    assert set(phases) == {"prefill", "decode"}
    expected_counts = {kind: len(PLAN.layers(kind)) for kind in KINDS}
    assert all(phase.skipped == expected_counts for phase in phases.values())


def test_assisted_decoding_with_a_changing_plan_is_refused() -> None:
    model, ids = tiny_model("llama"), prompt(12)
    with (
        skipping(model, EarlyExit(1), scope="decode"),
        pytest.raises(UnsupportedCallError, match="Assisted decoding"),
    ):
        model.generate(ids, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=3)
    # Outside, it is the model's own business again.
    model.generate(ids, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=3)


def test_no_cache_in_decode_scope_is_refused() -> None:
    model = tiny_model("llama")
    with (
        skipping(model, EarlyExit(1), scope="decode"),
        pytest.raises(UnsupportedCallError, match="use_cache=False"),
    ):
        model(prompt(5), use_cache=False)


def test_attention_weights_of_skipped_attention_are_refused() -> None:
    model = tiny_model("llama", "eager")
    with (
        skipping(model, FixedSkipping(PLAN)),
        pytest.raises(UnsupportedCallError, match="output_attentions"),
    ):
        model(prompt(5), output_attentions=True)
    with skipping(model, FixedSkipping(SkipPlan({Sublayer(1, "ffn"): None}))):
        assert len(model(prompt(5), output_attentions=True).attentions) == N_LAYERS


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_logits_of_skipped_experts_are_refused(family: str) -> None:
    model = tiny_model(family)
    with (
        skipping(model, FixedSkipping(PLAN)),
        pytest.raises(UnsupportedCallError, match="output_router_logits=True"),
    ):
        model(prompt(5), output_router_logits=True)
    expected = len(model(prompt(5), output_router_logits=True).router_logits)
    with skipping(model, FixedSkipping(SkipPlan({Sublayer(0, "attn"): None}))):
        found = model(prompt(5), output_router_logits=True).router_logits
    assert len(found) == expected >= N_LAYERS - 1


def test_a_module_replaced_inside_the_block_is_used(model: PreTrainedModel) -> None:
    other = tiny_model(model.config.model_type, model.config._attn_implementation, seed=3)
    parts = {
        name
        for spec in (BLOCKS[model.config.model_type].attn, BLOCKS[model.config.model_type].ffn)
        for name in (spec.pre, spec.body, spec.post)
        if name is not None
    }
    own = {name: getattr(model.model.layers[1], name) for name in parts}
    with skipping(model, FixedSkipping(SkipPlan({Sublayer(2, "ffn"): None}))):
        before = model(prompt(9)).logits
        for name in parts:
            setattr(model.model.layers[1], name, getattr(other.model.layers[1], name))
        replaced = model(prompt(9)).logits
        expected = zeroed(model, [Sublayer(2, "ffn")])(prompt(9)).logits
        for name, module in own.items():
            setattr(model.model.layers[1], name, module)
        assert torch.equal(model(prompt(9)).logits, before)
    assert not torch.allclose(replaced, before, atol=1e-3)
    torch.testing.assert_close(replaced, expected, rtol=0, atol=1e-5)


def test_nested_skipping_is_refused() -> None:
    model = tiny_model("llama")
    with (
        skipping(model, EarlyExit(1)),
        pytest.raises(UnsupportedCallError, match="inside skipping"),
        skipping(model, EarlyExit(2)),
    ):
        pass


def test_unknown_architecture_is_refused() -> None:
    model = tiny_model("llama")
    model.config.model_type = "gpt_neox"
    with (
        pytest.raises(UnsupportedModelError, match="gpt_neox"),
        skipping(model, EarlyExit(1)),
    ):
        pass


def test_a_hidden_state_per_layer_remains() -> None:
    model = tiny_model("llama")
    with skipping(model, EarlyExit(2)):
        states = model(prompt(5), output_hidden_states=True).hidden_states
    assert len(states) == N_LAYERS + 1
    assert torch.equal(states[2], states[3])


def test_beams_and_batch_changes_reach_the_placeholder() -> None:
    model = tiny_model("llama")
    cache = DynamicCache()
    with skipping(model, FixedSkipping(PLAN)):
        model(prompt(6), past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_select_indices(torch.tensor([0]))
        cache.crop(-2)
        assert cache.get_seq_length() == 4
        logits = model(prompt(1), past_key_values=cache).logits
    ids = torch.cat([prompt(6)[:, :4], prompt(1)], dim=1)
    expected = zeroed(model, SKIPPED)(ids).logits[:, -1:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
