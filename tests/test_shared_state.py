"""Who else touches the model: threads, a second block, copies, other tools, backward passes."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import N_LAYERS, prompt, tiny_model
from oracle import zeroed
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
    TextIteratorStreamer,
)
from transformers.cache_utils import DynamicLayer, StaticLayer

from adaskip import (
    AdaSkip,
    EarlyExit,
    FixedSkipping,
    SkipDecode,
    SkipPlan,
    SkipPolicy,
    Sublayer,
    UnsupportedCallError,
    UnsupportedModelError,
    Window,
    fit_linears,
    learn_importance,
    skipping,
)
from adaskip.cache_name import CACHE
from adaskip.kvcache import prepare
from adaskip.plan import Phase, Scope, Step
from adaskip.recorders import TokenStatistics
from adaskip.skipped_cache import SkippedCacheLayer

PLAN = SkipPlan({Sublayer(0, "attn"): None, Sublayer(1, "ffn"): None})


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


def answer(model: PreTrainedModel, ids: Tensor, tokens: int = 8, **kwargs: Any) -> Tensor:
    made: Tensor = model.generate(
        ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **kwargs
    )
    return made


# Threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["decode", "e2e"])
@pytest.mark.parametrize("name", ["fixed", "SkipDecode", "AdaSkip"])
def test_threads_in_one_block_answer_as_alone(
    model: PreTrainedModel, name: str, scope: Any
) -> None:
    importance = learn_importance(model, [prompt(30)])
    policy: SkipPolicy = {
        "fixed": FixedSkipping(PLAN),
        "SkipDecode": SkipDecode(3, horizon=4),
        "AdaSkip": AdaSkip(importance, 4, online=True, window=2),
    }[name]
    prompts = [prompt(9 + i, seed=i) for i in range(3)]
    expected = []
    for ids in prompts:
        with skipping(model, policy, scope=scope):
            expected.append(answer(model, ids))
    found: list[tuple[int, Tensor]] = []
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(4):
                found.append((number, answer(model, prompts[number])))
        except BaseException as error:
            failed.append(error)

    with skipping(model, policy, scope=scope):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []
    assert len(found) == 12
    assert all(torch.equal(tokens, expected[number]) for number, tokens in found)


def test_two_threads_that_enter_with_one_policy_at_once() -> None:
    """Each has it to itself: binding may take long, and the scope is the session's."""
    both = threading.Barrier(2, timeout=30)

    class Slow(FixedSkipping):
        def bind(self, n_layers: int) -> None:
            super().bind(n_layers)
            both.wait()

    policy, used = Slow(SkipPlan()), {}

    def enter(scope: Any) -> None:
        with skipping(tiny_model("llama"), policy, scope=scope) as session:
            both.wait()
            used[scope] = session.policy, session.policy.scope

    threads = [threading.Thread(target=enter, args=(scope,)) for scope in ("e2e", "decode")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {scope: own for scope, (_, own) in used.items()} == {"e2e": "e2e", "decode": "decode"}
    assert used["e2e"][0] is not used["decode"][0]


def test_streaming_from_a_second_thread(model: PreTrainedModel) -> None:
    class Tokenizer:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"<{int(i)}>" for i in ids)

    ids = prompt(9)
    with skipping(model, FixedSkipping(PLAN), scope="decode"):
        expected = answer(model, ids)[0, 9:].tolist()
        streamer = TextIteratorStreamer(Tokenizer(), skip_prompt=True)  # type: ignore[arg-type]
        thread = threading.Thread(target=answer, args=(model, ids), kwargs={"streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == "".join(f"<{i}>" for i in expected)


def test_a_failed_forward_lets_others_in(model: PreTrainedModel) -> None:
    done = []
    with skipping(model, FixedSkipping(PLAN)):
        with pytest.raises(IndexError):
            model(torch.full((1, 3), 10**6))
        thread = threading.Thread(target=lambda: done.append(answer(model, prompt(5))))
        thread.start()
        thread.join(timeout=30)
    assert len(done) == 1


def test_a_forward_within_a_forward_is_refused(model: PreTrainedModel) -> None:
    def again(*_: Any) -> None:
        model(prompt(2))

    with skipping(model, FixedSkipping(PLAN)):
        hook = model.model.layers[1].register_forward_pre_hook(again)
        with pytest.raises(UnsupportedCallError, match="within its own forward"):
            model(prompt(4))
        hook.remove()
        model(prompt(4))


# One policy in two blocks ---------------------------------------------------------------------


@pytest.mark.parametrize("policy", [SkipDecode(3, horizon=4), EarlyExit(2)])
def test_one_policy_in_two_blocks(model: PreTrainedModel, policy: SkipPolicy) -> None:
    deep = type(model)(copy.deepcopy(model.config)).eval()
    deep.config.num_hidden_layers = 2 * N_LAYERS
    deep = type(model)(deep.config).eval()
    expected = []
    for each, scope in ((model, "e2e"), (deep, "prefill")):
        with skipping(each, policy, scope=scope) as session:
            answer(each, prompt(9))
            expected.append(session.plan)
    with skipping(model, policy) as one, skipping(deep, policy, scope="prefill") as other:
        for _ in range(2):
            answer(model, prompt(9))
            answer(deep, prompt(9))
            assert [one.plan, other.plan] == expected


def test_two_blocks_extend_apart(model: PreTrainedModel) -> None:
    other = tiny_model("llama")
    policy = AdaSkip(learn_importance(model, [prompt(30)]), 4, online=True, window=2)
    ids = [prompt(9), prompt(9, seed=8)]
    expected = []
    for tokens in ids:
        with skipping(model, policy):
            expected.append(answer(model, tokens))
    caches = [DynamicCache(), DynamicCache()]
    models = [model, other]
    made = [[ids[0]], [ids[1]]]
    with skipping(model, policy), skipping(other, policy), torch.no_grad():
        for _ in range(8):
            for i in range(2):
                logits = models[i](made[i][-1], past_key_values=caches[i]).logits[:, -1]
                made[i].append(logits.argmax(-1, keepdim=True))
    for parts, tokens in zip(made, expected, strict=True):
        assert torch.equal(torch.cat(parts, dim=1), tokens)


# Copies of the model --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "one layer"])
def test_copies_made_inside_are_dense(model: PreTrainedModel, how: str) -> None:
    ids = prompt(9)
    dense = answer(model, ids)
    with skipping(model, FixedSkipping(PLAN)):
        skipped = answer(model, ids)
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))  # noqa: S301
        elif how == "torch.save":
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        else:
            twin = tiny_model("llama")
            twin.model.layers = torch.nn.ModuleList(
                copy.deepcopy(layer) for layer in model.model.layers
            )
        with torch.no_grad():
            for parameter in model.model.layers.parameters():
                parameter.mul_(0.5)
        assert torch.equal(answer(twin, ids), dense)
    assert torch.equal(answer(twin, ids), dense)
    with skipping(twin, FixedSkipping(PLAN)):
        assert torch.equal(answer(twin, ids), skipped)


# Assistants -----------------------------------------------------------------------------------


def test_drafting_with_the_same_models_first_layers_is_refused(model: PreTrainedModel) -> None:
    with (
        skipping(model, FixedSkipping(SkipPlan({Sublayer(3, "attn"): None}))),
        pytest.raises(UnsupportedCallError, match="assistant_early_exit=2"),
    ):
        answer(model, prompt(9), assistant_early_exit=2)
    assert model.config.num_hidden_layers == N_LAYERS


def test_prompt_lookup_says_its_phases(model: PreTrainedModel) -> None:
    ids = prompt(6).repeat(1, 3)
    expected = answer(zeroed(model, PLAN.gains), ids)
    phases = []
    with skipping(model, FixedSkipping(PLAN)) as session:
        hook = model.register_forward_hook(lambda *_: phases.append(str(session.step.phase)))
        for _ in range(2):
            assert torch.equal(
                answer(model, ids, prompt_lookup_num_tokens=3, eos_token_id=2), expected
            )
        hook.remove()
    half = len(phases) // 2
    assert phases == 2 * (["prefill"] + ["decode"] * (half - 1))


@pytest.mark.skipif(
    not getattr(StaticLayer, "is_croppable", False),
    reason="before transformers 5.24 static caches take nothing back",
)
@pytest.mark.parametrize("layer", [0, 1])
def test_drafted_tokens_are_taken_back_from_static_caches(
    model: PreTrainedModel, layer: int
) -> None:
    plan, ids = SkipPlan({Sublayer(layer, "attn"): None}), prompt(6).repeat(1, 3)
    with skipping(model, plan):
        expected = answer(model, ids)
        for cache in (None, StaticCache(config=model.config, max_cache_len=64)):
            kind = {"cache_implementation": "static"} if cache is None else {CACHE: cache}
            assert torch.equal(answer(model, ids, prompt_lookup_num_tokens=3, **kind), expected)


class WhileDecoding(SkipPolicy):
    """Skips in decode steps alone."""

    def plan(self, step: Any) -> SkipPlan:
        return PLAN if step.phase == "decode" else SkipPlan()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (SkipPlan({Sublayer(1, "attn"): Window(64)}), "what has left a window"),
        (SkipDecode(2, horizon=4), "differs between prefill and decode"),
    ],
)
def test_drafts_that_cannot_be_taken_back_are_refused_beforehand(
    model: PreTrainedModel, policy: Any, message: str
) -> None:
    target = tiny_model("llama", seed=3)
    forwards: list[Any] = []
    target.model.register_forward_pre_hook(lambda *_: forwards.append(None))
    with (
        skipping(model, policy) as session,
        pytest.raises(UnsupportedCallError, match=message),
    ):
        answer(target, prompt(9), assistant_model=model, eos_token_id=2)
    assert session.step is None
    assert not forwards


def test_models_that_share_layers_are_not_inside_two_blocks(model: PreTrainedModel) -> None:
    draft: Any = tiny_model("llama", seed=3)
    draft.model.layers = model.model.layers[:2]
    with skipping(model, PLAN):
        with pytest.raises(UnsupportedCallError, match="one that shares layers with it"):
            skipping(draft, PLAN).__enter__()
        expected = model(prompt(5)).logits
    with skipping(draft, PLAN):
        draft(prompt(5))
    with skipping(model, PLAN):
        assert torch.equal(model(prompt(5)).logits, expected)


def test_a_target_is_not_skipped_in_by_a_draft_that_has_its_layers(model: PreTrainedModel) -> None:
    draft: Any = tiny_model("llama", seed=3)
    draft.model.layers = model.model.layers[:2]
    ids = prompt(9)
    expected, logits = answer(model, ids, eos_token_id=2), model(ids).logits
    with skipping(draft, PLAN):
        skipped = draft(ids).logits
        assert torch.equal(answer(model, ids, assistant_model=draft, eos_token_id=2), expected)
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(draft(ids).logits, skipped)
    assert not torch.equal(draft(ids).logits, skipped)


def test_decode_steps_without_a_cache_are_refused_where_the_phase_matters(
    model: PreTrainedModel,
) -> None:
    with skipping(model, WhileDecoding()) as session:
        with pytest.raises(UnsupportedCallError, match="there are no decode steps"):
            answer(model, prompt(5), use_cache=False)
        # Before its prefill is computed.
        assert session.step is None
        model(prompt(5), use_cache=False)
        assert session.step is not None
    with skipping(model, PLAN):
        assert torch.equal(answer(model, prompt(5), use_cache=False), answer(model, prompt(5)))


def test_a_plan_that_turns_out_to_differ_is_refused_for_drafts(model: PreTrainedModel) -> None:
    with (
        skipping(model, WhileDecoding()),
        pytest.raises(UnsupportedCallError, match="Assisted decoding"),
    ):
        answer(model, prompt(6).repeat(1, 3), prompt_lookup_num_tokens=3, eos_token_id=2)


@pytest.mark.parametrize("name", ["_prefill", "_get_stopping_criteria", "_get_candidate_generator"])
def test_what_guards_need_of_transformers_is_checked_at_entry(
    model: PreTrainedModel, name: str
) -> None:
    setattr(model, name, None)
    with (
        pytest.raises(UnsupportedModelError, match=f"has no {name}"),
        skipping(model, FixedSkipping(PLAN)),
    ):
        pass
    delattr(model, name)
    assert "generate" not in vars(model)
    with skipping(model, FixedSkipping(PLAN)):
        answer(model, prompt(5))


def batched(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """What continuous batching answers to prompts of several lengths."""
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Unless told, it takes most of the memory that there is.
    memory = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    found = model.generate_batch(
        prompts, generation_config=settings, continuous_batching_config=memory
    )
    answers = {tuple(each.prompt_ids): each.generated_tokens for each in found.values()}
    return [answers[tuple(ids)] for ids in prompts]


def one_by_one(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    return [answer(model, torch.tensor([ids]), 5)[0, len(ids) :].tolist() for ids in prompts]


def test_continuous_batching_answers_as_requests_alone_do(model: PreTrainedModel) -> None:
    prompts = [prompt(n, seed=n)[0].tolist() for n in (9, 5, 12)]
    dense = one_by_one(model, prompts)
    # Earlier ones leave the model with an attention that only batches have.
    other = tiny_model("llama")
    try:
        batches = batched(other, prompts) == dense
    except (AttributeError, ImportError, KeyError, TypeError, ValueError):
        batches = False
    if not batches:
        pytest.skip("this transformers does not batch so on a CPU")
    maps = fit_linears(model, [prompt(60)], [Sublayer(3, "attn")], rank=4)
    plan = SkipPlan({**maps, Sublayer(1, "attn"): None, Sublayer(2, "ffn"): 1.1})
    with skipping(model, FixedSkipping(plan)):
        expected = one_by_one(model, prompts)
        assert batched(model, prompts) == expected != dense
    assert batched(model, prompts) == dense


def test_pages_of_batches_do_not_outlast_a_block(model: PreTrainedModel) -> None:
    keeps = {"persistent_manager": True}
    with skipping(model, FixedSkipping(PLAN)):
        for call in (
            lambda: model.generate_batch([[3, 4, 5]], **keeps),
            lambda: model.init_continuous_batching(),
        ):
            with pytest.raises(UnsupportedCallError, match="may outlast the block"):
                call()
    model._cached_continuous_batching_manager = object()
    with (
        pytest.raises(UnsupportedCallError, match="computed without this plan"),
        skipping(model, FixedSkipping(PLAN)),
    ):
        pass
    del model._cached_continuous_batching_manager
    with skipping(model, FixedSkipping(PLAN)):
        answer(model, prompt(5))


def test_the_block_is_not_left_while_batches_go_on(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, ends = threading.Event(), threading.Event()

    def going_on(inputs: list[list[int]], persistent_manager: bool = False) -> None:
        began.set()
        ends.wait(10)

    monkeypatch.setattr(model, "generate_batch", going_on)
    thread = threading.Thread(target=lambda: model.generate_batch([[3, 4]]))

    def leave() -> None:
        with skipping(model, FixedSkipping(PLAN)):
            thread.start()
            began.wait(10)
            # That one's thread is not this one's.
            with pytest.raises(UnsupportedCallError, match="may outlast the block"):
                model.init_continuous_batching()

    with pytest.raises(UnsupportedCallError, match="went on in another thread"):
        leave()
    ends.set()
    thread.join()


def test_a_manager_from_before_the_block_is_refused_in_its_forward(model: PreTrainedModel) -> None:
    pages = type("PagedAttentionCache", (), {})
    pages.__module__ = "transformers.generation.continuous_batching.cache"
    with skipping(model, ByPhase()), pytest.raises(UnsupportedCallError, match="in one forward"):
        model(prompt(5), cache=pages(), use_cache=False)


class ByPhase(SkipPolicy):
    """Skips other sublayers in decode, the same at every step."""

    def plan(self, step: Step) -> SkipPlan:
        return SkipPlan({Sublayer(1, "ffn" if step.phase is Phase.PREFILL else "attn"): None})


@pytest.mark.parametrize(
    ("policy", "scope", "message"),
    [
        (SkipDecode(3), "e2e", "computes prompts and decode steps in one forward"),
        (ByPhase(), "e2e", "computes prompts and decode steps in one forward"),
        (FixedSkipping(PLAN), "decode", "computes prompts and decode steps in one forward"),
        (
            FixedSkipping(SkipPlan({Sublayer(1, "attn"): Window(8, 2)})),
            "e2e",
            "a window would mix up; use generate",
        ),
    ],
)
@pytest.mark.parametrize(
    ("name", "given"), [("generate_batch", [[[3, 4, 5]]]), ("init_continuous_batching", [])]
)
def test_continuous_batching_is_refused_where_it_would_be_wrong(
    model: PreTrainedModel,
    policy: SkipPolicy,
    scope: Scope,
    message: str,
    name: str,
    given: list[Any],
) -> None:
    with (
        skipping(model, policy, scope=scope),
        pytest.raises(UnsupportedCallError, match=message),
    ):
        getattr(model, name)(*given)


@pytest.mark.parametrize("place", ["argument", "generation config"])
@pytest.mark.parametrize("graphs", [None, True, (False, True), False, (False, False)])
def test_statistics_of_batches_are_refused_where_graphs_may_be_replayed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, graphs: Any, place: str
) -> None:
    def answering(
        inputs: Any, generation_config: Any = None, continuous_batching_config: Any = None
    ) -> str:
        return "answers"

    # A CPU has no graphs.
    other = tiny_model("llama").to("meta")
    given: Any = {"continuous_batching_config": SimpleNamespace(use_cuda_graph=graphs)}
    if place == "generation config":
        given = {"generation_config": SimpleNamespace(**given)}
    for each, recorders, expected in (
        (model, [TokenStatistics("attn")], True),
        (other, [], True),
        (other, [TokenStatistics("attn")], graphs in (False, (False, False))),
    ):
        monkeypatch.setattr(each, "generate_batch", answering)
        with skipping(each, FixedSkipping(PLAN), recorders=recorders):
            if expected:
                assert each.generate_batch([[3, 4]], **given) == "answers"
            else:
                with pytest.raises(UnsupportedCallError, match=r"use_cuda_graph=False\)"):
                    each.generate_batch([[3, 4]], **given)


# Caches ---------------------------------------------------------------------------------------


def test_a_cache_of_fewer_layers_is_refused(model: PreTrainedModel) -> None:
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 2
    with (
        skipping(model, FixedSkipping(PLAN)) as session,
        pytest.raises(UnsupportedCallError, match="has 2 layers, the model has 4"),
    ):
        model(prompt(4), past_key_values=DynamicCache(config=config))
    assert session.step is None


@pytest.mark.parametrize(("skipped", "fetched"), [((0, 1), 2), ((3,), 0), ((1, 2, 3), 0)])
def test_an_offloaded_cache_fetches_the_next_attention_that_runs(
    skipped: tuple[int, ...], fetched: int
) -> None:
    class Layer(DynamicLayer):
        asked = 0

        def prefetch(self) -> None:
            self.asked += 1

    cache = DynamicCache()
    layers: list[Any] = [Layer() for _ in range(4)]
    cache.layers = list(layers)
    cache.prefetch_stream = nullcontext()
    prepare(cache, skipped, 0, [torch.device("cpu")] * 4)
    assert isinstance(cache.layers[skipped[0]], SkippedCacheLayer)
    cache.prefetch(skipped[0])
    assert [layer.asked for layer in layers] == [int(i == fetched) for i in range(4)]


# Backward passes ------------------------------------------------------------------------------


def test_gains_may_change_before_the_backward_pass(model: PreTrainedModel) -> None:
    class Rising(SkipPolicy):
        def plan(self, step: Any) -> SkipPlan:
            return SkipPlan({Sublayer(1, "ffn"): 1.0 + step.request})

    weight = model.model.layers[0].mlp.down_proj.weight
    ids = prompt(5)
    expected = torch.zeros_like(weight)
    for gain in (1.0, 2.0):
        with skipping(model, FixedSkipping(SkipPlan({Sublayer(1, "ffn"): gain}))):
            expected += torch.autograd.grad(model(ids).logits.square().mean(), weight)[0]
    with skipping(model, Rising()):
        loss = model(ids, use_cache=False).logits.square().mean()
        loss = loss + model(ids, use_cache=False).logits.square().mean()
        loss.backward()
    torch.testing.assert_close(weight.grad, expected)


def test_entered_in_inference_mode_and_called_outside(model: PreTrainedModel) -> None:
    plans = SkipPlan({Sublayer(0, "attn"): 1.5, Sublayer(1, "ffn"): 0.5})
    with skipping(model, FixedSkipping(plans)):
        expected = model(prompt(5)).logits
    with torch.inference_mode():
        block = skipping(model, FixedSkipping(plans))
        block.__enter__()
        model(prompt(5))
    logits = model(prompt(5)).logits
    logits.sum().backward()
    block.__exit__(None, None, None)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_gradient_checkpointing_is_refused(model: PreTrainedModel) -> None:
    # The second name is that of older releases.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(model, name) for name in names if hasattr(model, name))()
    model.train()
    with skipping(model, FixedSkipping(PLAN)):
        with pytest.raises(UnsupportedCallError, match="Gradient checkpointing inside"):
            model(prompt(5))
        with torch.no_grad():
            model(prompt(5))
        model.eval()
        model(prompt(5)).logits.sum().backward()


# Other tools ----------------------------------------------------------------------------------


def test_a_forward_put_back_after_leaving_skips_nothing(model: PreTrainedModel) -> None:
    ids = prompt(9)
    dense = model(ids).logits
    layer = model.model.layers[0]
    with skipping(model, FixedSkipping(PLAN)):
        assert not torch.equal(model(ids).logits, dense)
        kept, kept_base = layer.forward, model.model.forward
    layer.forward, model.model.forward = kept, kept_base
    assert torch.equal(model(ids).logits, dense)


def test_a_wrapper_put_around_inside_is_told_of(model: PreTrainedModel) -> None:
    ids = prompt(9)
    dense = model(ids).logits
    layer = model.model.layers[0]
    block = skipping(model, FixedSkipping(PLAN))
    block.__enter__()
    ours = layer.forward
    layer.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    model(ids)
    with pytest.warns(UserWarning, match=r"LlamaDecoderLayer\.forward was replaced inside"):
        block.__exit__(None, None, None)
    assert torch.equal(model(ids).logits, dense)
    assert all("forward" not in vars(other) for other in model.model.layers[1:])


def test_removing_the_hooks_of_accelerate_inside(model: PreTrainedModel) -> None:
    accelerate = pytest.importorskip("accelerate")
    ids = prompt(9)
    dense = model(ids).logits
    accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with skipping(model, FixedSkipping(PLAN)):
            skipped = model(ids).logits
            accelerate.hooks.remove_hook_from_submodules(model)
            assert torch.equal(model(ids).logits, skipped)
            assert not torch.equal(skipped, dense)
    assert torch.equal(model(ids).logits, dense)
    with skipping(model, FixedSkipping(PLAN)):
        assert torch.equal(model(ids).logits, skipped)
