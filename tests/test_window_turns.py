"""Windows of attention where padding, ended rows and later turns decide what is seen."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import N_LAYERS, prompt, reset_empties, tiny_model
from test_windows import GREEDY, SOME, masked, plan_of
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from typing_extensions import override

from adaskip import SkipPlan, SkipPolicy, Step, Sublayer, UnsupportedCallError, Window, skipping
from adaskip.padding import real_tokens
from adaskip.plan import Scope

WINDOWS = {0: SOME, 2: Window(5, sinks=2)}
WIDE = {0: Window(40, sinks=4, heads=(1,), of_heads=2), 2: Window(40, sinks=4)}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def made(model: PreTrainedModel, kind: str) -> Cache:
    if kind == "dynamic":
        return DynamicCache()
    return StaticCache(config=model.config, max_cache_len=64)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def oracle(model: PreTrainedModel, windows: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits of all tokens at once, under explicit masks."""
    stock = masked(model, windows)
    with torch.no_grad():
        found = stock(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    return found.logits  # type: ignore[no-any-return]


def padded(n_tokens: int, n_padding: int) -> tuple[Tensor, Tensor]:
    ids, mask = prompt(n_tokens, batch=2), torch.ones(2, n_tokens, dtype=torch.long)
    ids[0, :n_padding] = mask[0, :n_padding] = 0
    return ids, mask


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("value", [0, 1])
def test_a_mask_may_have_columns_of_tokens_to_come(
    model: PreTrainedModel, kind: str, value: int
) -> None:
    ids, mask = padded(30, 9)
    whole = torch.cat([mask, torch.full((2, 34), value)], dim=1)
    cache, found, at = made(model, kind), [], positions(mask)
    with skipping(model, plan_of(WINDOWS)), torch.no_grad():
        for start, end in ((0, 20), *((i, i + 1) for i in range(20, 30))):
            part = slice(start, end)
            given = {"attention_mask": whole, "position_ids": at[:, part]}
            found.append(model(ids[:, part], past_key_values=cache, **given).logits)
    expected = oracle(model, WINDOWS, ids, mask)[mask.bool()]
    torch.testing.assert_close(torch.cat(found, 1)[mask.bool()], expected, rtol=0, atol=5e-5)


def test_which_tokens_of_a_mask_are_the_forwards_own() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1, 0]])
    assert real_tokens(mask, 0, 2).tolist() == [[False, True]]  # type: ignore[union-attr]
    assert real_tokens(mask, 2, 3).tolist() == [[True, False, True]]  # type: ignore[union-attr]
    # One of the last tokens only.
    assert real_tokens(mask, 9, 2).tolist() == [[True, False]]  # type: ignore[union-attr]


class Later(SkipPolicy):
    """Windows from a decode step on."""

    def __init__(self, at: int) -> None:
        self.at = at

    @override
    def plan(self, step: Step) -> SkipPlan:
        late = step.phase == "decode" and step.decoded >= self.at
        return plan_of(WINDOWS) if late else SkipPlan()


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("n_padding", [0, 6])
def test_windows_may_begin_at_any_decode_step(
    model: PreTrainedModel, at: int, n_padding: int
) -> None:
    ids, mask = padded(29, n_padding)
    told = {"return_dict_in_generate": True, "output_logits": True}
    with skipping(model, Later(at)):
        answer = model.generate(ids, attention_mask=mask, **GREEDY, **told)
    whole = torch.cat([mask, torch.ones(2, 12, dtype=torch.long)], dim=1)
    stock, cache, where = masked(model, WINDOWS), DynamicCache(), positions(whole)
    for step, logits in enumerate(answer.logits):
        start, end = (0, 29) if step == 0 else (28 + step, 29 + step)
        part = {"attention_mask": whole[:, :end], "position_ids": where[:, start:end]}
        with torch.no_grad():
            each = stock if step > at else model
            expected = each(answer.sequences[:, start:end], past_key_values=cache, **part).logits
        torch.testing.assert_close(logits, expected[:, -1], rtol=0, atol=5e-5)


def test_padding_among_decode_steps(model: PreTrainedModel) -> None:
    """A row that has fewer real tokens than sinks, though as many steps have passed."""
    windows = {2: Window(7, sinks=4)}
    ids, mask = padded(24, 9)
    mask[0, 10:15] = 0
    cache, found, at = DynamicCache(), [], positions(mask)
    with skipping(model, plan_of(windows)) as session, torch.no_grad():
        given = {"attention_mask": mask[:, :10], "position_ids": at[:, :10]}
        found.append(model(ids[:, :10], past_key_values=cache, **given).logits)
        with session.decode():
            for i in range(10, 24):
                given = {"attention_mask": mask[:, : i + 1], "position_ids": at[:, i : i + 1]}
                found.append(model(ids[:, i : i + 1], past_key_values=cache, **given).logits)
    expected = oracle(model, windows, ids, mask)[mask.bool()]
    torch.testing.assert_close(torch.cat(found, 1)[mask.bool()], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("padding_from", [24, 25, 99])
@pytest.mark.parametrize(("windows", "n_first"), [(WIDE, 20), (WIDE, 1), (WINDOWS, 1)])
def test_a_later_turn_says_what_of_an_ended_row_is_padding(
    model: PreTrainedModel,
    windows: dict[int, Window],
    n_first: int,
    padding_from: int,
    chunk: int | None,
) -> None:
    """Row 0 ends with its first token: its end, what follows it or nothing is padding."""
    ids, mask = padded(24, 24 - n_first)
    cache = DynamicCache()
    told = {"return_dict_in_generate": True, "output_logits": True}
    with skipping(model, plan_of(windows)):
        probe = model.generate(ids, attention_mask=mask, **GREEDY)
        end = int(probe[0, 24])
        assert end not in probe[1, 24:]
        given = {"eos_token_id": end, "pad_token_id": 0, "past_key_values": cache}
        first = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **given)
        new = prompt(5, batch=2, seed=9)
        ids = torch.cat([first, new], dim=1)
        mask = torch.cat([mask, torch.ones(2, ids.shape[1] - 24, dtype=torch.long)], dim=1)
        mask[0, padding_from : first.shape[1]] = 0
        more = {} if chunk is None else {"prefill_chunk_size": chunk}
        given |= {"eos_token_id": 96, "attention_mask": mask}
        answer = model.generate(ids, **given, **GREEDY, **told, **more)
    whole = torch.cat([mask, torch.ones(2, 12, dtype=torch.long)], dim=1)
    expected = oracle(model, windows, answer.sequences, whole)[:, ids.shape[1] - 1 : -1]
    found = torch.stack(answer.logits, dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("says", "n_last"), [(True, 1), (True, 5), (False, 5)])
@pytest.mark.parametrize("windows", [WINDOWS, WIDE], ids=["narrow", "wide"])
def test_a_loop_by_hand_says_what_of_an_ended_row_is_padding(
    model: PreTrainedModel, windows: dict[int, Window], says: bool, n_last: int, kind: str
) -> None:
    n_answered = 30
    ids, mask = padded(n_answered + n_last, 3)
    cache = made(model, kind)
    with skipping(model, plan_of(windows)) as session, torch.no_grad():
        for start, end in ((0, 24), *((i, i + 1) for i in range(24, n_answered))):
            part = {"attention_mask": mask[:, :end], "position_ids": positions(mask)[:, start:end]}
            model(ids[:, start:end], past_key_values=cache, **part)
        mask[0, 26:n_answered] = 0
        part = {"attention_mask": mask, "position_ids": positions(mask)[:, n_answered:]}
        with session.prefill() if says else nullcontext():
            found = model(ids[:, n_answered:], past_key_values=cache, **part).logits
    expected = oracle(model, windows, ids, mask)[:, n_answered:]
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("scope", ["prefill", "e2e"])
@pytest.mark.parametrize(
    "plan",
    [plan_of(WINDOWS), plan_of({0: WINDOWS[2]}) | SkipPlan({Sublayer(1, "attn"): None})],
    ids=["windows", "window and gap"],
)
@pytest.mark.parametrize("n_last", [1, 12])
def test_a_cache_that_was_reset_and_filled_outside_of_the_block(
    model: PreTrainedModel, plan: SkipPlan, scope: Scope, kind: str, n_last: int
) -> None:
    """It is what any other cache with the same tokens is, whatever it was before the reset."""
    if kind == "dynamic" and not reset_empties():
        pytest.skip("this transformers' own reset leaves a dynamic cache as long as it was")
    used, fresh = made(model, kind), made(model, kind)
    with skipping(model, plan, scope=scope), torch.no_grad():
        for ids in (prompt(30), prompt(1)):
            model(ids, past_key_values=used)
    used.reset()  # type: ignore[no-untyped-call]
    found = []
    for cache in (used, fresh):
        with torch.no_grad():
            model(prompt(15, seed=2), past_key_values=cache)
        with skipping(model, plan, scope=scope), torch.no_grad():
            for ids in (prompt(n_last, seed=3), prompt(1, seed=4)):
                found.append(model(ids, past_key_values=cache).logits)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize("sizes", [(1, 1, 1, 4), (1, 1, 4, 1, 1, 9)])
def test_few_tokens_before_a_chunk_on_a_static_cache(
    model: PreTrainedModel, sizes: tuple[int, ...]
) -> None:
    windows = {0: Window(7, sinks=4)}
    ids, cache, found = prompt(sum(sizes)), made(model, "static"), []
    with skipping(model, plan_of(windows)), torch.no_grad():
        for part in ids.split(sizes, dim=1):
            found.append(model(part, past_key_values=cache).logits)
    expected = oracle(model, windows, ids, torch.ones_like(ids))
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=5e-5)


def test_a_cache_of_which_some_layers_were_cut_back(model: PreTrainedModel) -> None:
    ids, cache = prompt(24), DynamicCache()
    with skipping(model, plan_of({1: Window(7)})), torch.no_grad():
        dense = model(ids[:, :20], past_key_values=cache).logits
        with pytest.raises(UnsupportedCallError, match="cannot be cut back"):
            cache.crop(-3)
        with pytest.raises(UnsupportedCallError, match="Begin with an empty cache"):
            model(ids[:, 20:], past_key_values=cache)
        again = model(ids[:, :20], past_key_values=DynamicCache()).logits
    assert torch.equal(again, dense)


def test_rows_moved_in_inference_mode(model: PreTrainedModel) -> None:
    ids, cache = prompt(24, batch=2), DynamicCache()
    with skipping(model, plan_of(WINDOWS)):
        with torch.inference_mode():
            model(ids[:, :20], past_key_values=cache)
            cache.reorder_cache(torch.tensor([1, 0]))
        with torch.no_grad():
            found = [
                model(ids.flip(0)[:, i : i + 1], past_key_values=cache).logits
                for i in range(20, 24)
            ]
    expected = oracle(model, WINDOWS, ids, torch.ones_like(ids))[:, 20:].flip(0)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=5e-5)


def test_tokens_that_a_static_cache_has_no_places_for_are_refused(model: PreTrainedModel) -> None:
    windows = dict.fromkeys(range(N_LAYERS), Window(40, sinks=2))
    ids, cache = prompt(30), StaticCache(config=model.config, max_cache_len=24)
    found = []
    with skipping(model, plan_of(windows)), torch.no_grad():
        for part in ids[:, :24].split([20, 1, 1, 1, 1], dim=1):
            found.append(model(part, past_key_values=cache).logits)
        with pytest.raises(UnsupportedCallError, match="places for 24 tokens and would hold 25"):
            model(ids[:, 24:25], past_key_values=cache)
    expected = oracle(model, windows, ids[:, :24], torch.ones(1, 24))
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=5e-5)


def test_an_attention_that_takes_another_s_place_gets_its_window() -> None:
    model, ids = tiny_model("llama"), prompt(20)
    layer = model.model.layers[0]
    first = layer.self_attn
    dense = model(ids).logits
    with skipping(model, plan_of(WINDOWS)), torch.no_grad():
        expected = model(ids).logits
        layer.self_attn = copy.deepcopy(first)
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, dense)
    layer.self_attn = first
    assert torch.equal(model(ids).logits, dense)


@pytest.mark.parametrize("said", [False, True])
def test_several_tokens_see_what_their_mask_says_of_earlier_ones(
    model: PreTrainedModel, said: bool
) -> None:
    ids, mask = padded(30, 0)
    cache = DynamicCache()
    hidden = mask.clone()
    hidden[0, 18:22] = 0
    at = torch.arange(24, 30).expand(2, -1)
    with skipping(model, plan_of(WINDOWS)) as session, torch.no_grad():
        model(ids[:, :24], past_key_values=cache)
        with session.decode() if said else nullcontext():
            found = model(
                ids[:, 24:], attention_mask=hidden, position_ids=at, past_key_values=cache
            ).logits
    stock, cache = masked(model, WINDOWS), DynamicCache()
    with torch.no_grad():
        stock(ids[:, :24], past_key_values=cache)
        expected = stock(
            ids[:, 24:], attention_mask=hidden, position_ids=at, past_key_values=cache
        ).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_a_loop_of_ones_own_within_generate(model: PreTrainedModel) -> None:
    def loop(model: Any, input_ids: Tensor, **given: Any) -> Tensor:
        for name in ("logits_processor", "stopping_criteria", "generation_config"):
            given.pop(name, None)
        cache = DynamicCache()
        at = torch.arange(input_ids.shape[1])[None]
        fed = input_ids
        for _ in range(12):
            # As transformers passes them on: positions without a mask.
            out = model(input_ids=fed, position_ids=at, past_key_values=cache)
            fed, at = out.logits[:, -1:].argmax(-1), at[:, -1:] + 1
            input_ids = torch.cat([input_ids, fed], dim=1)
        return input_ids

    ids = prompt(20)
    with skipping(model, plan_of(WINDOWS)):
        expected = model.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, custom_generate=loop), expected)
        # Without a cache transformers looks for several sequences in the positions.
        with pytest.raises(UnsupportedCallError, match="without an attention_mask"):
            model(ids, position_ids=torch.arange(20)[None], use_cache=False)
