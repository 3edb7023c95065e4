"""On a CUDA device: the numbers of the CPU, no wait within a step, memory that falls as it must."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.cudagraph_trees import CUDAGraphTreeManager
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from adaskip import (
    AdaSkip,
    EarlyExit,
    FixedSkipping,
    GrowingCache,
    Linear,
    SkipDecode,
    SkipPlan,
    SkipPolicy,
    Sublayer,
    UnifiedSkipping,
    Window,
    learn_importance,
    skipping,
    window_attention,
)
from adaskip.grouped_attention import grouped_decoding
from adaskip.growing_cache import kv_tensors
from adaskip.models.loading import random_model
from adaskip.profiling.calibration import random_prompt
from adaskip.profiling.timing import growing_cache, time_request
from adaskip.recorders import TokenStatistics
from adaskip.replacements import scaled
from adaskip.speedtest.cases import compiled_call
from adaskip.window_flash import takes_flash

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
LAYERS, WINDOW = 6, 4
# Attention of layer 0 included, from whose cache layer transformers reads the length.
PLAN = SkipPlan({Sublayer(0, "attn"): None, Sublayer(2, "ffn"): 1.1, Sublayer(4, "attn"): 0.9})


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model("smollm2", device="cuda", dtype="float32", n_layers=LAYERS)


def replaced(hidden: int) -> SkipPlan:
    """A window, one of two heads of three, a full linear map and one of two factors."""
    torch.manual_seed(0)
    weight, thin = torch.randn(hidden, hidden) / hidden, torch.randn(2, hidden, 4) / hidden
    return SkipPlan(
        {
            Sublayer(0, "attn"): Window(8, sinks=2),
            Sublayer(2, "attn"): Window(8, sinks=2, heads=(0, 2), of_heads=3),
            Sublayer(3, "attn"): Linear(weight, torch.zeros(hidden)),
            Sublayer(4, "ffn"): Linear((thin[0], thin[1].T.contiguous()), torch.zeros(hidden)),
        }
    )


@pytest.fixture(scope="module")
def policies(model: PreTrainedModel) -> dict[str, SkipPolicy]:
    importance = learn_importance(model, [random_prompt(model, 64)])
    return {
        "plan": FixedSkipping(PLAN),
        "replaced": FixedSkipping(replaced(model.config.hidden_size)),
        "EE": EarlyExit(2),
        "SD": SkipDecode(2, horizon=8),
        "US": UnifiedSkipping(2),
        "ADA": AdaSkip(importance, 4, online=True, window=WINDOW),
    }


NAMES = ("plan", "replaced", "EE", "SD", "US", "ADA")


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Within it, whatever waits for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_those_of_the_cpu(
    model: PreTrainedModel, policies: dict[str, SkipPolicy], name: str
) -> None:
    ids = random_prompt(model, 48)
    found = []
    for device in ("cuda", "cpu"):
        own = random_model("smollm2", device="cpu", dtype="float32", n_layers=LAYERS)
        own.load_state_dict(model.state_dict())
        own = own.to(device)
        with torch.no_grad(), skipping(own, policies[name]):
            found.append(own(ids.to(device)).logits.cpu())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_in_float32_are_those_of_the_cpu(
    model: PreTrainedModel, policies: dict[str, SkipPolicy], name: str
) -> None:
    ids = random_prompt(model, 48)
    on_cpu = random_model("smollm2", device="cpu", dtype="float32", n_layers=LAYERS)
    on_cpu.load_state_dict(model.state_dict())
    found = []
    for own in (model, on_cpu):
        with skipping(own, policies[name]):
            found.append(time_request(own, ids.to(own.device), 12).tokens.cpu())
    assert torch.equal(*found)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_near_to_float32_as_the_dense_model_is(
    model: PreTrainedModel, policies: dict[str, SkipPolicy], name: str
) -> None:
    ids = random_prompt(model, 200)
    short = random_model("smollm2", device="cuda", dtype="bfloat16", n_layers=LAYERS)
    exact = random_model("smollm2", device="cuda", dtype="float32", n_layers=LAYERS)
    exact.load_state_dict(short.state_dict())

    def error(policy: SkipPolicy) -> float:
        logits = []
        for own in (short, exact):
            with torch.no_grad(), skipping(own, policy):
                logits.append(own(ids).logits.float())
        return float((logits[0] - logits[1]).norm() / logits[1].norm())

    assert error(policies[name]) < 2 * error(FixedSkipping(SkipPlan()))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_for_nothing(
    model: PreTrainedModel, policies: dict[str, SkipPolicy], name: str
) -> None:
    ids = random_prompt(model, 32)
    token = ids[:, -1:].clone()

    def step(cache: Any) -> None:
        model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    with torch.no_grad():
        cache = growing_cache(model)
        model(ids, past_key_values=cache, use_cache=True)
        with waiting_is_an_error():  # stock transformers: the test is about us
            step(cache)
        with skipping(model, policies[name]) as session:
            cache = growing_cache(model)
            model(ids, past_key_values=cache, use_cache=True)
            plans = set()
            for number in range(2 * WINDOW):
                if name == "ADA" and number == WINDOW - 1:
                    step(cache)  # decides the extension: the one read of a request
                else:
                    with waiting_is_an_error():
                        step(cache)
                plans.add(session.plan)
    if name == "SD":  # a new plan does not wait either
        assert len(plans) == 2


def test_statistics_for_several_watchers_do_not_wait(model: PreTrainedModel) -> None:
    ids = random_prompt(model, 12)
    watchers = [TokenStatistics("attn"), TokenStatistics("ffn", "layer")]
    with torch.no_grad(), skipping(model, SkipPlan(), recorders=watchers):
        cache = growing_cache(model)
        for part in (ids, ids[:, :1]):
            model(part, past_key_values=cache)
        with waiting_is_an_error():
            model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gain_is_the_number_that_it_is_on_the_cpu(dtype: torch.dtype) -> None:
    x, gain = torch.randn(64, 576).to(dtype), torch.tensor(1.003)
    assert torch.equal(scaled(x.cuda(), gain.cuda()).cpu(), x * gain)


@pytest.mark.parametrize("name", ["plan", "replaced", "EE", "US"])
def test_compiled_decoding_chooses_the_same_tokens(
    model: PreTrainedModel, policies: dict[str, SkipPolicy], name: str
) -> None:
    ids = random_prompt(model, 40)

    def static(own: PreTrainedModel) -> StaticCache:
        return StaticCache(config=own.config, max_cache_len=56)

    with skipping(model, policies[name]):
        eager = time_request(model, ids, 12)
        compiled = time_request(model, ids, 12, make_cache=static, decode=compiled_call(model))
    assert torch.equal(eager.tokens, compiled.tokens)


def test_compiled_plans_are_recorded_once(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[Any] = []
    record = CUDAGraphTreeManager.record_function

    def noted(self: Any, *args: Any) -> Any:
        recorded.append(args)
        return record(self, *args)

    monkeypatch.setattr(CUDAGraphTreeManager, "record_function", noted)
    ids = random_prompt(model, 40)
    cache = StaticCache(config=model.config, max_cache_len=72)
    hidden = model.config.hidden_size
    plan = SkipPlan(
        {Sublayer(layer, "attn"): Window(8, sinks=2) for layer in (1, 2, 4)}
        | {Sublayer(1, "ffn"): 1.25, Sublayer(2, "ffn"): 0.75}
        | {Sublayer(3, "attn"): Linear(torch.eye(hidden) / hidden, torch.zeros(hidden))}
    )
    counts = []
    for _ in range(3):
        cache.reset()  # type: ignore[no-untyped-call]
        with grouped_decoding(model), skipping(model, FixedSkipping(plan)):
            time_request(model, ids, 24, make_cache=lambda _: cache, decode=compiled_call(model))
        counts.append(len(recorded))
    # The first request records all there is; what it reads lies where it lay in those that follow.
    assert 0 < counts[0] == counts[1] == counts[2]


def test_decoding_with_grouped_queries_is_the_same(model: PreTrainedModel) -> None:
    ids = random_prompt(model, 40)

    def static(own: PreTrainedModel) -> StaticCache:
        return StaticCache(config=own.config, max_cache_len=56)

    stock = time_request(model, ids, 12, make_cache=static)
    with grouped_decoding(model), skipping(model, FixedSkipping(SkipPlan())):
        grouped = time_request(model, ids, 12, make_cache=static)
    assert torch.equal(stock.tokens, grouped.tokens)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("size", [1, 3, 64, 200, 4000])
@pytest.mark.parametrize("chunks", [[300], [1, 150, 149], [250, 50]])
def test_flash_windows_see_what_blocks_see(
    monkeypatch: pytest.MonkeyPatch, size: int, sinks: int, chunks: list[int]
) -> None:
    own = random_model("smollm2", device="cuda", dtype="bfloat16", n_layers=LAYERS)
    ids = random_prompt(own, sum(chunks), 2)
    plan = SkipPlan(
        {
            Sublayer(0, "attn"): Window(size, sinks),
            Sublayer(2, "attn"): Window(size, sinks, heads=(1,), of_heads=3),
            Sublayer(3, "attn"): Window(size, sinks),
        }
    )
    taken = []

    def logits(*, flash: bool) -> torch.Tensor:
        def takes(query: torch.Tensor, step: Any) -> bool:
            taken.append(takes_flash(query, step))
            return flash and taken[-1]

        monkeypatch.setattr(window_attention, "takes_flash", takes)
        found, cache = [], growing_cache(own)
        with torch.no_grad(), skipping(own, FixedSkipping(plan)) as session:
            with session.prefill():
                for part in ids.split(chunks, dim=1):
                    found.append(own(part, past_key_values=cache, use_cache=True).logits)
            found.append(own(ids[:, -1:], past_key_values=cache, use_cache=True).logits)
        return torch.cat(found, dim=1).float()

    blocks, flash = logits(flash=False), logits(flash=True)
    assert taken
    assert all(taken)
    assert (flash - blocks).norm() / blocks.norm() < 0.03


def test_an_offloaded_cache_is_right(
    model: PreTrainedModel, policies: dict[str, SkipPolicy]
) -> None:
    ids = random_prompt(model, 40)
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    for name in ("plan", "EE", "ADA"):
        with skipping(model, policies[name]):
            kept = model.generate(ids, **options)
        with skipping(model, policies[name]):
            moved = model.generate(ids, cache_implementation="offloaded", **options)
        assert torch.equal(kept, moved)


def test_a_model_that_is_split_over_devices_is_right(
    model: PreTrainedModel, policies: dict[str, SkipPolicy], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    last = {f"model.layers.{layer}": "cpu" for layer in range(LAYERS // 2, LAYERS)}
    first = {f"model.layers.{layer}": 0 for layer in range(LAYERS // 2)}
    # The weights of the last layers stay on the CPU and are fetched for each forward.
    around = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    split = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=first | last | around).eval()
    ids = random_prompt(model, 40)
    for name in NAMES:
        with torch.no_grad(), skipping(model, policies[name]):
            expected = model(ids).logits
        with torch.no_grad(), skipping(split, policies[name]):
            found = split(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_skipped_attention_takes_no_memory(model: PreTrainedModel) -> None:
    ids = random_prompt(model, 2048)
    held = []
    for plan in (SkipPlan(), PLAN):
        cache = GrowingCache(model.config, room=64)
        with torch.no_grad(), skipping(model, FixedSkipping(plan)):
            model.base_model(ids, past_key_values=cache, use_cache=True)
        tensors = sum(tensor.nbytes for tensor in kv_tensors(cache))
        # What goes with the cache is what it takes, whatever else comes and goes.
        gc.collect()
        with_cache = torch.cuda.memory_allocated()
        del cache
        gc.collect()
        held.append((tensors, with_cache - torch.cuda.memory_allocated()))
    (dense, dense_allocated), (skipped, skipped_allocated) = held
    # 2 of 6 attentions.
    assert skipped * LAYERS == dense * (LAYERS - 2)
    assert skipped_allocated / dense_allocated == pytest.approx((LAYERS - 2) / LAYERS, abs=0.02)
