"""Requests and phases, as the session sees them in real forwards."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from conftest import prompt, reset_empties, tiny_model
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
)
from typing_extensions import override

from adaskip import (
    FixedSkipping,
    Phase,
    SkipDecode,
    SkipPlan,
    Step,
    Sublayer,
    UnsupportedCallError,
    skipping,
)
from adaskip.cache_name import CACHE
from adaskip.session import Session
from adaskip.skipped_cache import SkippedCacheLayer

PLAN = SkipPlan({Sublayer(0, "attn"): None})


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def prefill(request: int, index: int, tokens: int) -> Step:
    return Step(Phase.PREFILL, request, index, tokens)


def decode(request: int, index: int, tokens: int = 1) -> Step:
    return Step(Phase.DECODE, request, index, tokens)


@pytest.mark.parametrize("plan", [SkipPlan(), PLAN], ids=["dense", "layer 0 skipped"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_steps_of_two_requests_and_chunks(
    model: PreTrainedModel, plan: SkipPlan, kind: str
) -> None:
    def new_cache() -> DynamicCache | StaticCache:
        if kind == "dynamic":
            return DynamicCache()
        return StaticCache(config=model.config, max_cache_len=32)

    steps = []
    with skipping(model, FixedSkipping(plan)) as session:
        cache = new_cache()
        for tokens in (7, 4, 1, 1, 3):
            model(prompt(tokens), past_key_values=cache)
            steps.append(session.step)
        assert session.step is not None
        assert session.step.decode_steps == 2
        if kind == "dynamic" and not reset_empties():
            cache.crop(-cache.get_seq_length())
        cache.reset()
        for tokens in (5, 1):
            model(prompt(tokens), past_key_values=cache)
            steps.append(session.step)
        # A prompt of one token is a prefill, too.
        cache = new_cache()
        for _ in range(2):
            model(prompt(1), past_key_values=cache)
            steps.append(session.step)
    assert steps == [
        prefill(0, 0, 7),
        prefill(0, 1, 4),
        decode(0, 2),
        decode(0, 3),
        decode(0, 4, tokens=3),
        prefill(1, 0, 5),
        decode(1, 1),
        prefill(2, 0, 1),
        decode(2, 1),
    ]


@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
@pytest.mark.parametrize("whole", [True, False], ids=["model", "base model"])
def test_the_cache_goes_by_both_of_its_names(
    model: PreTrainedModel, name: str, whole: bool
) -> None:
    called, cache = model if whole else model.base_model, DynamicCache(config=model.config)
    with skipping(model, PLAN) as session:
        for tokens in (7, 1):
            called(prompt(tokens), **{name: cache})
        assert session.step == decode(0, 1)
    assert cache.layers[0].get_seq_length() == 8
    assert isinstance(cache.layers[0], SkippedCacheLayer)


def test_two_requests_take_turns(model: PreTrainedModel) -> None:
    first, second = DynamicCache(), DynamicCache()
    with skipping(model, FixedSkipping(PLAN)) as session:
        model(prompt(4), past_key_values=first)
        model(prompt(5), past_key_values=second)
        model(prompt(1), past_key_values=first)
        assert session.step == decode(0, 1)
        model(prompt(1), past_key_values=second)
        assert session.step == decode(1, 1)
    assert (first.get_seq_length(), second.get_seq_length()) == (5, 6)


def test_without_a_cache_each_forward_is_a_request(model: PreTrainedModel) -> None:
    with skipping(model, FixedSkipping(PLAN)) as session:
        for request in range(2):
            model(prompt(4), use_cache=False)
            assert session.step == prefill(request, 0, 4)


def test_prefilled_outside_then_decoded_inside(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    model(prompt(6), past_key_values=cache)
    with skipping(model, FixedSkipping(PLAN), scope="decode") as session:
        model(prompt(1), past_key_values=cache)
        assert session.step == decode(0, 0)
    assert cache.layers[0].keys.shape[-2] == 6
    assert cache.get_seq_length() == 7


def test_cutting_back_under_a_stepwise_policy_is_refused(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    with skipping(model, SkipDecode(2)):
        model(prompt(6), past_key_values=cache)
        model(prompt(1), past_key_values=cache)
        cache.crop(-2)
        with pytest.raises(UnsupportedCallError, match="cut back from 7 to 5"):
            model(prompt(1), past_key_values=cache)


def test_turns_under_a_stepwise_policy_are_requests_of_their_own(model: PreTrainedModel) -> None:
    first, second = DynamicCache(), DynamicCache()
    plans: dict[int, list[tuple[int, ...]]] = {0: [], 1: []}
    with skipping(model, SkipDecode(3, horizon=4)) as session:
        for cache in (first, second):
            model(prompt(5), past_key_values=cache)
        for number, cache in [(0, first), (0, first), (1, second), (0, first), (1, second)]:
            model(prompt(1), past_key_values=cache)
            plans[number].append(session.plan.layers("ffn"))
    # n(t) = min(3, ceil(t / 4 * 2) + 1)
    assert plans == {0: [(1,), (1, 2), (1, 2)], 1: [(1,), (1, 2)]}


def test_a_finished_request_is_not_kept_alive(model: PreTrainedModel) -> None:
    with skipping(model, FixedSkipping(PLAN), scope="decode"):
        cache = DynamicCache()
        model(prompt(6), past_key_values=cache)
        model(prompt(1), past_key_values=cache)
        gone = weakref.ref(cache.layers[0].keys)
        # Reference counting alone must free it: on a GPU, waiting for the collector costs memory.
        gc.disable()
        try:
            del cache
            assert gone() is None
        finally:
            gc.enable()


def test_a_copied_prompt_cache_is_a_request_of_its_own(model: PreTrainedModel) -> None:
    import copy

    ids = prompt(12)
    with skipping(model, FixedSkipping(PLAN)), torch.no_grad():
        expected = model(ids).logits[:, -2:]
        cache = DynamicCache()
        model(ids[:, :10], past_key_values=cache)
        twin = copy.deepcopy(cache)
        for branch in (cache, twin):
            logits = model(ids[:, 10:], past_key_values=branch).logits
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
            assert branch.get_seq_length() == 12


def test_a_refused_forward_is_not_counted(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    with skipping(model, FixedSkipping(PLAN)) as session:
        model(prompt(6), past_key_values=cache)
        with pytest.raises(UnsupportedCallError, match="output_attentions"):
            model(prompt(1), past_key_values=cache, output_attentions=True)
        model(prompt(1), past_key_values=cache)
        assert session.step == decode(0, 1)


def test_tasks_of_an_event_loop_have_phases_of_their_own(model: PreTrainedModel) -> None:
    told: list[tuple[Phase, Phase]] = []
    ids = prompt(8)

    async def request(session: Session) -> None:
        cache = DynamicCache()
        for phase, within, parts in (
            (Phase.PREFILL, session.prefill, ids.split(4, dim=1)),
            (Phase.DECODE, session.decode, ids[:, :3].split(1, dim=1)),
        ):
            with within():
                for part in parts:
                    model(part, past_key_values=cache)
                    assert session.step is not None
                    told.append((phase, session.step.phase))
                    await asyncio.sleep(0)

    async def both(session: Session) -> None:
        first = asyncio.create_task(request(session))
        await asyncio.sleep(0)
        await asyncio.gather(first, asyncio.create_task(request(session)))

    with skipping(model, FixedSkipping(PLAN)) as session, torch.no_grad():
        asyncio.run(both(session))
    assert len(told) == 10
    assert all(said is phase for said, phase in told)


def test_phases_that_end_in_another_order_than_they_began_are_refused(
    model: PreTrainedModel,
) -> None:
    def prefilled(session: Session) -> Iterator[None]:
        with session.prefill():
            yield

    with skipping(model, FixedSkipping(PLAN)) as session:
        first, second = prefilled(session), prefilled(session)
        next(first)
        next(second)
        with pytest.raises(UnsupportedCallError, match="one that had begun within it had not"):
            next(first)
        assert next(second, None) is None
        # Nothing of them is left.
        cache = DynamicCache()
        for tokens in (6, 1):
            model(prompt(tokens), past_key_values=cache)
        assert session.step is not None
        assert session.step.phase is Phase.DECODE


def test_what_is_computed_within_a_generate_speaks_for_itself(model: PreTrainedModel) -> None:
    steps: list[Step | None] = []

    class Asks(LogitsProcessor):
        """Prefills a prompt of its own in chunks, while an answer is decoded."""

        cache = DynamicCache()

        @override
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] == 8:
                for part in prompt(10, seed=4).split(4, dim=1):
                    model(part, past_key_values=self.cache)
                    steps.append(session.step)
            return scores

    with skipping(model, FixedSkipping(PLAN), scope="decode") as session:
        plain = model.generate(prompt(6), max_new_tokens=4, do_sample=False)
        found = model.generate(
            prompt(6),
            max_new_tokens=4,
            do_sample=False,
            logits_processor=LogitsProcessorList([Asks()]),
        )
    assert [step and (step.phase, step.tokens) for step in steps] == [
        (Phase.PREFILL, 4),
        (Phase.PREFILL, 4),
        (Phase.PREFILL, 2),
    ]
    assert torch.equal(found, plain)
