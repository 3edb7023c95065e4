"""Whose phase a forward is, where `generate()` or a loop says it: turns, chunks, copies, rows."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import N_LAYERS, prompt, reset_empties, tiny_model
from oracle import greedy, zeroed
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from adaskip import (
    AdaSkip,
    AdaskipError,
    CacheHoleError,
    FixedSkipping,
    Phase,
    PlanError,
    SkipDecode,
    SkipPlan,
    SkipPolicy,
    Step,
    Sublayer,
    UnsupportedCallError,
    learn_importance,
    skipping,
)
from adaskip.plan import Scope
from adaskip.recorders import Span, StepStats, TokenStatistics

ATTN0, FFN1 = Sublayer(0, "attn"), Sublayer(1, "ffn")
BOTH = FixedSkipping(SkipPlan({ATTN0: None, FFN1: None}))
FFN = FixedSkipping(SkipPlan({FFN1: None}))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def without(model: PreTrainedModel) -> PreTrainedModel:
    return zeroed(model, [ATTN0, FFN1])


def generate(model: PreTrainedModel, ids: Tensor, steps: int = 6, **kwargs: Any) -> Any:
    return model.generate(
        ids,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )


def close(output: Any, expected: Tensor) -> None:
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, rtol=0, atol=5e-5)


class Steps:
    """Keeps every step it is asked about."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def watch(self, step: Step) -> frozenset[Span]:
        self.steps.append(step)
        return frozenset()

    def observe(self, step: Step, stats: StepStats) -> None:
        """Never called: it wants nothing."""


# Chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [20, 10, 4, 1])
def test_a_last_chunk_of_one_token_is_prefill(
    model: PreTrainedModel, without: PreTrainedModel, size: int
) -> None:
    ids = prompt(21)
    _, expected = greedy(model, without, ids, DynamicCache(), 6)
    recorder = Steps()
    with skipping(model, BOTH, scope="decode", recorders=[recorder]):
        close(generate(model, ids, prefill_chunk_size=size), expected)
    n_chunks = -(-21 // size)
    assert [s.phase for s in recorder.steps] == [Phase.PREFILL] * n_chunks + [Phase.DECODE] * 5
    assert [s.decode_steps for s in recorder.steps[n_chunks:]] == [0, 1, 2, 3, 4]


# A second turn --------------------------------------------------------------------------------


def two_turns(
    model: PreTrainedModel, policy: SkipPolicy, scope: Scope, blocks: int
) -> tuple[list[Tensor], list[Step]]:
    """Logits of both turns and all steps, with one block around both turns or one around each."""
    recorder, logits = Steps(), []
    cache, ids = DynamicCache(), prompt(12)
    session = skipping(model, policy, scope=scope, recorders=[recorder])
    session.__enter__()
    for turn in range(2):
        if turn and blocks == 2:
            session.__exit__(None, None, None)
            session = skipping(model, policy, scope=scope, recorders=[recorder])
            session.__enter__()
        output = generate(model, ids, past_key_values=cache)
        logits.append(torch.stack(output.logits, dim=1))
        ids = torch.cat([output.sequences, prompt(9, seed=5)], dim=1)
    session.__exit__(None, None, None)
    return logits, recorder.steps


def test_a_second_turn_is_prefilled_dense_in_scope_decode(model: PreTrainedModel) -> None:
    without = zeroed(model, [FFN1])
    cache, ids = DynamicCache(), prompt(12)
    first, expected_first = greedy(model, without, ids, cache, 6)
    more = torch.cat([first[:, -1:], prompt(9, seed=5)], dim=1)
    _, expected_second = greedy(model, without, more, cache, 6)
    logits, steps = two_turns(model, FFN, "decode", blocks=1)
    torch.testing.assert_close(logits[0], expected_first, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1], expected_second, rtol=0, atol=1e-5)
    phases = [Phase.PREFILL] + [Phase.DECODE] * 5
    assert [s.phase for s in steps] == 2 * phases
    assert [s.request for s in steps] == 6 * [0] + 6 * [1]
    assert [s.index for s in steps] == 2 * list(range(6))


@pytest.mark.parametrize("scope", ["prefill", "decode", "e2e"])
@pytest.mark.parametrize("name", ["fixed", "SkipDecode", "AdaSkip"])
def test_one_block_around_two_turns_is_two_blocks(
    model: PreTrainedModel, scope: Scope, name: str
) -> None:
    importance = learn_importance(model, [prompt(30)])
    policy: SkipPolicy = {
        "fixed": FFN if scope == "decode" else BOTH,
        "SkipDecode": SkipDecode(2, horizon=4),
        "AdaSkip": AdaSkip(importance, 3, online=True, window=2),
    }[name]
    # Attention that decode steps skip cannot run in the next prompt, which then skips less.
    if (name, scope) in {("SkipDecode", "decode"), ("SkipDecode", "e2e"), ("AdaSkip", "decode")}:
        with pytest.raises(CacheHoleError, match="a second prompt on the same cache"):
            two_turns(model, policy, scope, blocks=1)
        return
    together = two_turns(model, policy, scope, blocks=1)[0]
    apart = two_turns(model, policy, scope, blocks=2)[0]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_cache_cut_back_into_the_prompt_is_whole_again(
    model: PreTrainedModel, without: PreTrainedModel
) -> None:
    ids, other = prompt(20), prompt(21, seed=3)
    other[:, :15] = ids[:, :15]
    _, expected = greedy(model, without, other, DynamicCache(), 6)
    with skipping(model, BOTH, scope="decode"):
        cache = DynamicCache()
        generate(model, ids, past_key_values=cache)
        cache.crop(15 - cache.get_seq_length())
        close(generate(model, other, past_key_values=cache), expected)
        # With the answer still in it, attention 0 lacks keys: refused before anything is computed.
        with pytest.raises(CacheHoleError, match="layer 0"):
            generate(model, prompt(40), past_key_values=cache)


def test_a_prefix_cache_and_a_question_of_one_token(
    model: PreTrainedModel, without: PreTrainedModel
) -> None:
    ids = prompt(13)
    _, expected = greedy(model, without, ids, DynamicCache(), 6)
    with skipping(model, BOTH, scope="decode"), torch.no_grad():
        prefix = DynamicCache()
        model(ids[:, :12], past_key_values=prefix)
        close(generate(model, ids, past_key_values=prefix), expected)


def test_a_second_prompt_in_a_loop_has_to_be_said(model: PreTrainedModel) -> None:
    without = zeroed(model, [FFN1])
    cache = DynamicCache()
    ids, more = prompt(12), prompt(7, seed=4)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        without(ids[:, :1], past_key_values=cache)
        expected = model(more, past_key_values=cache).logits
    with skipping(model, FFN, scope="decode") as session, torch.no_grad():
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        with pytest.raises(UnsupportedCallError, match=r"session\.prefill\(\)"):
            model(more, past_key_values=cache)
        with session.prefill():
            logits = model(more, past_key_values=cache).logits
        assert session.step == Step(Phase.PREFILL, 1, 0, 7)
        torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)
        with session.decode():
            model(more, past_key_values=cache)
        assert session.step == Step(Phase.DECODE, 1, 1, 7)


def test_a_base_model_cannot_say_it(model: PreTrainedModel) -> None:
    with (
        pytest.raises(UnsupportedCallError, match="pass the causal language model"),
        skipping(model.model, FFN, scope="decode"),
    ):
        pass
    with skipping(model.model, BOTH) as session, torch.no_grad():
        model.model(prompt(5))
        assert session.plan.layers("attn") == (0,)


# Static caches --------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["decode", "e2e"])
@pytest.mark.parametrize("policy", [BOTH, FFN], ids=["both", "ffn"])
def test_a_static_cache_reset_by_hand_begins_anew(
    model: PreTrainedModel, policy: SkipPolicy, scope: Scope
) -> None:
    def run(cache: StaticCache, prefill: PreTrainedModel, decode: PreTrainedModel) -> Tensor:
        _, logits = greedy(prefill, decode, prompt(8), cache, 4)
        cache.reset()
        return torch.cat([logits, greedy(prefill, decode, prompt(1), cache, 4)[1]], dim=1)

    def new() -> StaticCache:
        return StaticCache(config=model.config, max_cache_len=32)

    without = zeroed(model, policy.plan(Step(Phase.PREFILL, 0, 0, 1)).gains)
    expected = run(new(), model if scope == "decode" else without, without)
    with skipping(model, policy, scope=scope):
        actual = run(new(), model, model)
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5)


def extending(model: PreTrainedModel, window: int) -> AdaSkip:
    """AdaSkip whose bar is low enough for FFNs to be taken in."""
    learned = learn_importance(model, [prompt(30)])
    importance = replace(learned, similarity={s: v - 2 for s, v in learned.similarity.items()})
    return AdaSkip(importance, 4, online=True, window=window)


def reloaded(cache: DynamicCache) -> DynamicCache:
    """A cache that was stored and loaded."""
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded: DynamicCache = torch.load(file, weights_only=False)
    return loaded


def test_a_prompt_of_one_token_on_a_static_cache_that_was_reset(model: PreTrainedModel) -> None:
    cache = StaticCache(config=model.config, max_cache_len=32)
    with skipping(model, BOTH) as session, torch.no_grad():
        for tokens in (8, 1):
            model(prompt(tokens), past_key_values=cache)
        cache.reset()
        model(prompt(1), past_key_values=cache)
        assert session.step == Step(Phase.PREFILL, 1, 0, 1)


# Copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["prefill", "decode", "e2e"])
def test_copies_of_a_prompt_go_on_as_the_prompt(
    model: PreTrainedModel, without: PreTrainedModel, scope: Scope
) -> None:
    ids = prompt(12)
    prefill = model if scope == "decode" else without
    _, expected = greedy(prefill, without, ids, DynamicCache(), 6)
    with skipping(model, BOTH, scope=scope), torch.no_grad():
        cache = DynamicCache()
        first = model(ids, past_key_values=cache).logits[:, -1]
        for _ in range(2):
            twin = copy.deepcopy(cache)
            logits = [first]
            while len(logits) < 6:
                token = logits[-1].argmax(-1, keepdim=True)
                logits.append(model(token, past_key_values=twin).logits[:, -1])
            torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=0, atol=5e-5)


def test_a_cache_whose_layers_disagree_is_refused(model: PreTrainedModel) -> None:
    """Some were cut back before one refused, or a forward failed on its way."""
    with skipping(model, SkipPlan({Sublayer(1, "attn"): None})), torch.no_grad():
        cut, failed = DynamicCache(), DynamicCache()
        for cache in (cut, failed):
            model(prompt(12), past_key_values=cache)
        for layer in cut.layers[:2]:
            layer.crop(-4)

        def fail(*args: Any) -> None:
            raise RuntimeError("out of memory")

        handle = model.model.layers[2].self_attn.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(prompt(1), past_key_values=failed)
        handle.remove()
        for cache, message in ((cut, r"hold \d+ tokens and others \d+, as"), (failed, "midway")):
            with pytest.raises(UnsupportedCallError, match=message):
                model(prompt(1), past_key_values=cache)


def test_a_cache_whose_first_layer_alone_is_empty_is_refused(model: PreTrainedModel) -> None:
    """As one that was made anew of the keys and values that a cache held, without placeholders."""
    cache = DynamicCache()
    with torch.no_grad():
        model(prompt(9), past_key_values=cache)
    cache.layers[0] = DynamicLayer()
    with (
        skipping(model, SkipPlan({Sublayer(0, "attn"): None})) as session,
        pytest.raises(UnsupportedCallError, match="hold 0 tokens and others 9"),
    ):
        model(prompt(3), past_key_values=cache)
    assert session.step is None


def test_a_copy_keeps_the_extension_and_the_count(model: PreTrainedModel) -> None:
    importance = learn_importance(model, [prompt(30)])
    policies: list[SkipPolicy] = [
        AdaSkip(importance, 4, online=True, window=2),
        SkipDecode(3, horizon=4),
    ]
    for policy in policies:
        with skipping(model, policy) as session, torch.no_grad():
            cache = DynamicCache()
            for tokens in (9, 1, 1):
                model(prompt(tokens), past_key_values=cache)
            twin = copy.deepcopy(cache)
            plans = []
            for branch in (cache, twin, cache, twin):
                model(prompt(1), past_key_values=branch)
                plans.append((session.plan, session.step.decode_steps))
            assert plans[0] == plans[1]
            assert plans[2] == plans[3]
            assert [steps for _, steps in plans] == [2, 2, 3, 3]
        if isinstance(policy, AdaSkip):
            assert len(policy.extension) > 0


@pytest.mark.parametrize("n_before", [2, 4])
@pytest.mark.parametrize("how", ["copied", "stored"])
@pytest.mark.parametrize("original", ["goes on", "is gone"])
def test_a_copy_is_what_its_original_was_then(
    model: PreTrainedModel, original: str, how: str, n_before: int
) -> None:
    """Before its decode steps decide what else is skipped, and afterwards."""
    policy = extending(model, window=3)

    def steps(cache: DynamicCache, *seeds: int) -> Tensor:
        found = [model(prompt(1, seed=seed), past_key_values=cache).logits for seed in seeds]
        return torch.cat(found, dim=1)

    with skipping(model, policy) as session, torch.no_grad():
        cache = DynamicCache()
        model(prompt(9), past_key_values=cache)
        expected = steps(cache, 1, 2, 3, 4, 5)[:, n_before:]
        plan = session.plan
        assert len(policy.extension) > 0
        cache = DynamicCache()
        model(prompt(9), past_key_values=cache)
        steps(cache, *range(1, n_before + 1))
        twin = copy.deepcopy(cache) if how == "copied" else reloaded(cache)
        if original == "goes on":
            steps(cache, 7, 8, 9, 10)
        else:
            del cache
        assert torch.equal(steps(twin, *range(n_before + 1, 6)), expected)
        assert session.plan == plan
        assert session.step is not None
        assert session.step.decode_steps == 4


def test_a_stored_cache_keeps_its_extension_in_another_block(model: PreTrainedModel) -> None:
    policy = extending(model, window=2)
    with skipping(model, policy) as session, torch.no_grad():
        cache = DynamicCache()
        for tokens in (9, 1, 1, 1):
            model(prompt(tokens), past_key_values=cache)
        plan, held = session.plan, session.summary().kv_bytes
    assert len(plan) > 4
    with skipping(model, policy) as session, torch.no_grad():
        model(prompt(1), past_key_values=reloaded(cache))
        assert session.plan == plan
        assert held < session.summary().kv_bytes < held * 14 / 12
    # What was learned online is nothing to a policy that learns nothing there.
    with skipping(model, AdaSkip(policy.importance, 4)) as session, torch.no_grad():
        model(prompt(1), past_key_values=reloaded(cache))
        assert len(session.plan) == 4


@pytest.mark.parametrize(("n_skip", "window"), [(2, 4), (1, 2), (2, 6)])
def test_half_a_window_of_another_block_is_taken_up_or_begun_anew(
    model: PreTrainedModel, n_skip: int, window: int
) -> None:
    importance = learn_importance(model, [prompt(30)])
    cache = DynamicCache()
    with skipping(model, AdaSkip(importance, 1, online=True, window=4)), torch.no_grad():
        for tokens in (9, 1, 1):
            model(prompt(tokens), past_key_values=cache)
    policy = AdaSkip(importance, n_skip, online=True, window=window)
    with skipping(model, policy) as session, torch.no_grad():
        for _ in range(window):
            model(prompt(1), past_key_values=cache)
        (own,) = session.policy._windows.values()
    ran = [Sublayer(n, "ffn") for n in range(N_LAYERS) if Sublayer(n, "ffn") not in policy.chosen()]
    # Only what one and the same FFNs showed is put together.
    assert [*own.ffns] == ran
    assert {len(step[0]) for step in own.seen} == {len(ran)}
    assert own.is_full


def test_a_copy_that_was_reset_is_an_empty_cache_anywhere(model: PreTrainedModel) -> None:
    ids = prompt(9)
    expected = model(ids).logits
    with skipping(model, BOTH), torch.no_grad():
        cache = DynamicCache()
        model(ids, past_key_values=cache)
    twin = copy.deepcopy(cache)
    with pytest.raises(CacheHoleError):
        model(ids, past_key_values=twin)
    if not reset_empties():
        pytest.skip("this transformers' own reset leaves a dynamic cache as long as it was")
    twin.reset()
    with torch.no_grad():
        logits = [model(ids[:, :5], past_key_values=twin).logits]
        logits.append(model(ids[:, 5:], past_key_values=twin).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=5e-5)


def test_a_prefix_cache_can_be_stored(model: PreTrainedModel, without: PreTrainedModel) -> None:
    ids = prompt(12)
    expected = without(ids).logits[:, 8:]
    with skipping(model, BOTH), torch.no_grad():
        cache = DynamicCache()
        model(ids[:, :8], past_key_values=cache)
        loaded = reloaded(cache)
        for _ in range(2):
            branch = copy.deepcopy(loaded)
            logits = model(ids[:, 8:], past_key_values=branch).logits
            torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)


# Rows and masks -------------------------------------------------------------------------------


class Weights:
    """Keeps which rows counted in each decode step."""

    def __init__(self) -> None:
        self.real: list[list[bool]] = []

    def watch(self, step: Step) -> frozenset[Span]:
        return frozenset({"ffn"}) if step.phase is Phase.DECODE else frozenset()

    def observe(self, step: Step, stats: StepStats) -> None:
        self.real.append((stats.weights()[:, 0] > 0).tolist())


@pytest.mark.parametrize("cache", [None, "static"])
def test_rows_that_have_ended_do_not_count_in_generate(
    model: PreTrainedModel, cache: str | None
) -> None:
    ids = prompt(10, batch=2)
    free = model.generate(ids, max_new_tokens=8, do_sample=False)[:, 10:]
    # The second row's third token ends it; it must not come earlier, nor in the first row.
    end = int(free[1, 2])
    assert end not in free[0].tolist()
    assert end not in free[1, :2].tolist()
    recorder = Weights()
    with skipping(model, FixedSkipping(SkipPlan()), recorders=[recorder]):
        model.generate(
            ids,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=0,
            cache_implementation=cache,
        )
    assert recorder.real == 2 * [[True, True]] + 5 * [[True, False]]


def test_prompts_that_generate_computes_besides_its_own(model: PreTrainedModel) -> None:
    ids, other = prompt(10, batch=2), prompt(4, batch=2, seed=5)
    mask, other_mask = torch.ones_like(ids), torch.ones_like(other)
    mask[0, :3] = other_mask[1, :2] = 0
    counted: list[tuple[Phase, int, list[int]]] = []

    class Counting(Weights):
        def watch(self, step: Step) -> frozenset[Span]:
            return frozenset({"ffn"})

        def observe(self, step: Step, stats: StepStats) -> None:
            real = stats.weights().sum(dim=1).int().tolist()
            counted.append((step.phase, step.request, real))

    guided: Any = {"negative_prompt_ids": other, "negative_prompt_attention_mask": other_mask}
    with skipping(model, BOTH, scope="decode", recorders=[Counting()]):
        model.generate(
            ids,
            attention_mask=mask,
            guidance_scale=1.5,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            **guided,
        )
    prefill, decode = Phase.PREFILL, Phase.DECODE
    assert counted[:4] == [
        (prefill, 0, [7, 10]),
        (prefill, 1, [4, 2]),
        (decode, 0, [1, 1]),
        (decode, 1, [1, 1]),
    ]


def test_rows_are_counted_without_a_cache_too(model: PreTrainedModel) -> None:
    ids, mask = prompt(10, batch=2), torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    counted = []

    class Counting(Weights):
        def watch(self, step: Step) -> frozenset[Span]:
            return frozenset({"ffn"})

        def observe(self, step: Step, stats: StepStats) -> None:
            counted.append(stats.weights().sum(dim=1).int().tolist())

    with skipping(model, BOTH, recorders=[Counting()]):
        model.generate(ids, attention_mask=mask, use_cache=False, max_new_tokens=3)
    assert counted == [[7, 10], [8, 11], [9, 12]]


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("tokens", [15, 40])
def test_online_adaskip_on_a_static_sliding_cache(family: str, tokens: int) -> None:
    model = tiny_model(family)
    learned = learn_importance(model, [prompt(30)])
    # Low enough for every FFN to be taken in, so that all their gains are compared.
    importance = replace(learned, similarity={s: v - 2 for s, v in learned.similarity.items()})
    ids, mask = prompt(tokens, batch=2), torch.ones(2, tokens, dtype=torch.long)
    mask[0, :4] = 0
    kwargs: Any = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False}
    outcomes = []
    for cache in (None, "static"):
        policy = AdaSkip(importance, 4, online=True, window=3)
        with skipping(model, policy) as session:
            out = model.generate(ids, cache_implementation=cache, **kwargs)
            outcomes.append((out.tolist(), session.plan.layers("ffn"), policy.extension.gains))
    assert outcomes[0][:2] == outcomes[1][:2]
    assert outcomes[0][2] == pytest.approx(outcomes[1][2])
    assert outcomes[0][2]


def test_one_row_of_a_mask_stands_for_all(model: PreTrainedModel) -> None:
    ids = prompt(9, batch=4)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    masks = [torch.ones(1, 9, dtype=torch.long), causal[None, None], None]
    found = []
    for mask in masks:
        recorder = TokenStatistics("attn", "ffn")
        with skipping(model, SkipPlan(), recorders=[recorder]), torch.no_grad():
            model(ids, attention_mask=mask)
        assert recorder.total is not None
        assert recorder.count is not None
        found.append((recorder.count.item(), recorder.total))
    assert [count for count, _ in found] == [36, 36, 36]
    for _, total in found[:2]:
        torch.testing.assert_close(total, found[2][1])


def test_recorders_keep_no_graph(model: PreTrainedModel) -> None:
    for tokens in (5, 40):
        recorder = TokenStatistics("attn", "ffn")
        with skipping(model, SkipPlan(), recorders=[recorder]):
            loss = model(prompt(tokens)).logits.sum()
        assert loss.requires_grad
        assert recorder.total is not None
        assert not recorder.total.requires_grad


def test_a_policy_is_given_what_it_asked_for_only(model: PreTrainedModel) -> None:
    class Watching(SkipPolicy):
        def __init__(self) -> None:
            self.seen: list[set[Span]] = []

        def plan(self, step: Step) -> SkipPlan:
            return SkipPlan()

        def watch(self, step: Step) -> frozenset[Span]:
            return frozenset({"ffn"})

        def observe(self, step: Step, stats: StepStats) -> None:
            self.seen.append({span for _, span in stats.rows})

    policy = Watching()
    with skipping(model, policy, recorders=[TokenStatistics("attn", "layer")]), torch.no_grad():
        model(prompt(9))
    assert policy.seen == [{"ffn"}]


def test_statistics_of_other_sublayers_are_not_added(model: PreTrainedModel) -> None:
    recorder, cache = TokenStatistics("attn", "ffn"), DynamicCache()
    with skipping(model, FFN, scope="decode", recorders=[recorder]), torch.no_grad():
        model(prompt(9), past_key_values=cache)
        with pytest.raises(AdaskipError, match="one for each phase"):
            model(prompt(1), past_key_values=cache)


def test_a_policy_may_not_return_the_plan_of_another_model(model: PreTrainedModel) -> None:
    class Foreign(SkipPolicy):
        def plan(self, step: Step) -> SkipPlan:
            return SkipPlan({FFN1: None}, fingerprint="of another model")

    with (
        skipping(model, Foreign()),
        pytest.raises(PlanError, match="make a plan for this model"),
    ):
        model(prompt(9))


def test_several_tokens_of_a_phase_nobody_says(model: PreTrainedModel) -> None:
    """Where the plan depends on the phase, though not on the steps before."""

    class ByPhase(SkipPolicy):
        def plan(self, step: Step) -> SkipPlan:
            return SkipPlan({FFN1: None}) if step.phase is Phase.DECODE else SkipPlan()

    for policy, refused in ((ByPhase(), True), (FFN, False)):
        with skipping(model, policy) as session, torch.no_grad():
            cache = DynamicCache()
            for tokens in (6, 1):
                model(prompt(tokens), past_key_values=cache)
            if refused:
                with pytest.raises(UnsupportedCallError, match="matters whether they are"):
                    model(prompt(6), past_key_values=cache)
            with session.prefill():
                model(prompt(6), past_key_values=cache)
            assert session.plan == policy.plan(Step(Phase.PREFILL, 0, 0, 6))


def test_padding_is_found_in_the_masks_of_sliding_windows() -> None:
    from adaskip.padding import real_tokens

    def mask(past: int, tokens: int, width: int, padding: int) -> Tensor:
        """Causal, seeing the last `width` keys only, the first `padding` of all tokens masked."""
        query = torch.arange(past, past + tokens)[:, None]
        key = torch.arange(past + tokens)[None]
        allowed = (key <= query) & (key > query - width) & (key >= padding)
        return allowed[None, None]

    whole = mask(6, 3, 100, padding=7)
    expected = [[False, True, True]]
    assert real_tokens(whole, 6, 3).tolist() == expected
    # As a static cache gives it: room for tokens to come, or the last keys only.
    roomy = torch.nn.functional.pad(whole, (0, 5), value=False)
    assert real_tokens(roomy, 6, 3).tolist() == expected
    narrow = mask(6, 3, 4, padding=7)[..., 3:]
    assert real_tokens(narrow, 6, 3).tolist() == expected
    both = {"sliding_attention": narrow, "full_attention": None}
    assert real_tokens(both, 6, 3).tolist() == expected
