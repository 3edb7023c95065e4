"""Attention over a window: against explicit masks in the stock model, and what it holds."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from conftest import N_LAYERS, prompt, reset_empties, tiny_model
from test_compile import new_graphs
from test_families import DISTINCT, GENERATE, generated
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AttentionInterface,
    DynamicCache,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from adaskip import (
    AdaskipError,
    CacheHoleError,
    FixedSkipping,
    SkipPlan,
    Sublayer,
    UnsupportedCallError,
    Window,
    skipping,
)
from adaskip.blocks import block_spec
from adaskip.cache_name import CACHE
from adaskip.growing_cache import kv_tensors
from adaskip.streams import Sublayers, measuring
from adaskip.window_track import BLOCK

# The prompt of the matrix has 29 tokens, the answer 12: one window is passed in prefill, one later.
NARROW, WIDE = Window(7, sinks=3), Window(33, sinks=2)
# The models have two key-value heads, each of which two query heads read.
SOME = Window(7, sinks=3, heads=(1,), of_heads=2)
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}

# What lets some layer of a family see all that is before it.
UNSLID: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma3_text": {"layer_types": ["full_attention", "sliding_attention"] * (N_LAYERS // 2)},
}


def full_layers(model: PreTrainedModel) -> list[int]:
    """The layers in which each token sees all before it."""
    config: Any = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * N_LAYERS
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


def windows_for(model: PreTrainedModel, first: Window = NARROW) -> dict[int, Window]:
    layers = full_layers(model)
    return {layers[-1]: WIDE, layers[0]: first}


both_sorts = pytest.mark.parametrize("first", [NARROW, SOME], ids=["all heads", "one head"])


def plan_of(windows: Mapping[int, Window]) -> SkipPlan:
    return SkipPlan({Sublayer(layer, "attn"): window for layer, window in windows.items()})


def masked(model: PreTrainedModel, windows: Mapping[int, Window]) -> PreTrainedModel:
    """An unpatched copy whose attention is given the definition of a window as a mask."""
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    for layer, window in windows.items():
        other.model.layers[layer].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, window=window: (args, narrowed(module, kwargs, window)),
            with_kwargs=True,
        )
    return other


def narrowed(module: nn.Module, kwargs: dict[str, Any], window: Window) -> dict[str, Any]:
    """What an attention is given, with the mask of a window."""
    x, cache, given = (kwargs.get(n) for n in ("hidden_states", CACHE, "attention_mask"))
    past = 0 if cache is None else int(cache.get_seq_length(module.layer_idx))
    n_keys = past + x.shape[1] if given is None else given.shape[-1]
    if cache is not None and cache.is_compileable:
        n_keys = cache.layers[module.layer_idx].max_cache_len
    real = torch.ones(len(x), n_keys, dtype=torch.bool)
    if given is not None:
        last = given[:, 0, -1]
        real = (last if last.dtype == torch.bool else last >= 0).expand(len(x), -1).clone()
    query = torch.arange(past, past + x.shape[1])[:, None]
    key = torch.arange(n_keys)
    seen = (key > query - window.size) | ((real.cumsum(-1) - 1) < window.sinks)[:, None]
    # Padding sees itself, as in the library.
    seen = (seen & (key <= query) & real[:, None]) | (key == query)
    by_head = seen[:, None]
    if window.heads is not None:
        whole = ((key <= query) & real[:, None]) | (key == query)
        heads = range(module.config.num_attention_heads)
        group = len(heads) // module.config.num_key_value_heads
        by_head = torch.stack([seen if h // group in window.heads else whole for h in heads], dim=1)
    mask = torch.zeros(by_head.shape).masked_fill(~by_head, torch.finfo(torch.float32).min)
    return kwargs | {"attention_mask": mask}


@pytest.fixture(scope="module", params=DISTINCT, ids=["-".join(cell) for cell in DISTINCT])
def cell(request: pytest.FixtureRequest) -> PreTrainedModel:
    family, attention = request.param
    return tiny_model(family, attention, **UNSLID.get(family, {}))


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


@both_sorts
@pytest.mark.parametrize("mode", GENERATE)
def test_windows_in_every_mode(cell: PreTrainedModel, mode: str, first: Window) -> None:
    windows = windows_for(cell, first)
    plan = plan_of(windows) | SkipPlan({Sublayer(1, "ffn"): 1.25})
    stock = masked(cell, windows)
    ids = prompt(29, batch=2)
    with skipping(stock, SkipPlan({Sublayer(1, "ffn"): 1.25})):
        expected = generated(stock, ids, **GENERATE[mode])
    with skipping(cell, plan):
        actual = generated(cell, ids, **GENERATE[mode])
    assert torch.equal(actual[0], expected[0])
    if expected[1] is not None:
        torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=5e-5)
    dense = generated(cell, ids, **GENERATE[mode])
    assert not torch.equal(actual[0], dense[0]) or mode == "sampling"


@both_sorts
@pytest.mark.parametrize("mode", ["greedy", "beam search", "chunked prefill", "static cache"])
def test_windows_of_padded_rows(cell: PreTrainedModel, mode: str, first: Window) -> None:
    windows = windows_for(cell, first)
    ids, mask = prompt(29, batch=3), torch.ones(3, 29, dtype=torch.long)
    for row, n_padding in ((0, 6), (2, 23)):
        ids[row, :n_padding] = mask[row, :n_padding] = 0
    kwargs = GENERATE[mode] | {"attention_mask": mask}
    expected = generated(masked(cell, windows), ids, **kwargs)
    with skipping(cell, plan_of(windows)):
        actual = generated(cell, ids, **kwargs)
    assert torch.equal(actual[0], expected[0])


@pytest.mark.parametrize("chunks", [(200,), (1,) * 60, (3, 1, 60, 2, 20, 1, 1, 1, 70, 1, 40)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "window",
    [Window(1, 0), Window(1, 5), Window(16, 4), Window(63), Window(64), Window(65, 0), Window(250)],
    ids=str,
)
def test_chunks_of_any_size_are_one_prefill(
    model: PreTrainedModel, chunks: tuple[int, ...], padded: bool, window: Window
) -> None:
    ids, real = prompt(sum(chunks), batch=2), torch.ones(2, sum(chunks), dtype=torch.long)
    if padded:
        real[0, :37] = 0
    positions = (real.cumsum(-1) - 1).clamp_min(0)
    windows = {0: window, 2: window}
    with torch.no_grad():
        expected = masked(model, windows)(
            ids, attention_mask=real, position_ids=positions, use_cache=False
        ).logits
        cache, found, at = DynamicCache(), [], 0
        with skipping(model, plan_of(windows)) as session:
            for tokens in chunks:
                end = at + tokens
                with session.prefill():
                    out = model(
                        ids[:, at:end],
                        attention_mask=real[:, :end] if padded else None,
                        position_ids=positions[:, at:end] if padded else None,
                        past_key_values=cache,
                    )
                found.append(out.logits)
                at = end
    seen = real.bool()
    torch.testing.assert_close(torch.cat(found, dim=1)[seen], expected[seen], rtol=0, atol=1e-4)


def test_a_window_holds_its_tokens_and_no_more(model: PreTrainedModel) -> None:
    windows = {1: NARROW, 3: NARROW, 2: SOME}
    cache = DynamicCache()
    plan = plan_of(windows) | SkipPlan({Sublayer(0, "attn"): 1.1})
    with skipping(model, plan) as session, torch.no_grad():
        for tokens in (40, 1, 1, 25, 1):
            model(prompt(tokens, batch=2), past_key_values=cache)
            context = cache.get_seq_length()
            heads, width, bytes_per = 2, 8, 4
            per_token = 2 * 2 * heads * width * bytes_per
            held = sum(t.numel() * t.element_size() for t in kv_tensors(cache))
            own = context / 2 + 2.5 * (7 + 3)
            assert held == own * per_token
            assert session.summary().kv_bytes == held
    assert context == 68


def test_a_short_context_does_not_take_a_whole_window(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    with skipping(model, plan_of({0: Window(200, 4)})), torch.no_grad():
        model(prompt(10), past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == 4 + BLOCK
        for _ in range(4):
            model(prompt(50), past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == 204


def test_prefill_computes_blocks(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaskip import window_attention

    stock, products = window_attention.scaled_dot_product_attention, []

    def counted(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        products.append(query.shape[:-2].numel() * query.shape[-2] * key.shape[-2])
        return stock(query, key, *args, **kwargs)

    monkeypatch.setattr(window_attention, "scaled_dot_product_attention", counted)
    with skipping(model, plan_of({0: NARROW})), torch.no_grad():
        model(prompt(3 * BLOCK), use_cache=False)
    heads = 4
    assert sum(products) == heads * 3 * BLOCK * (3 + 6 + BLOCK)


def test_many_blocks_are_computed_part_by_part(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, plan = prompt(240, batch=2), plan_of({0: NARROW})
    with skipping(model, plan), torch.no_grad():
        expected = model(ids).logits
        monkeypatch.setattr("adaskip.window_attention._TOGETHER", 1)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


@both_sorts
def test_a_window_that_begins_with_decoding(cell: PreTrainedModel, first: Window) -> None:
    windows = windows_for(cell, first)
    stock = masked(cell, windows)
    ids, mask = prompt(29, batch=2), torch.ones(2, 29, dtype=torch.long)
    ids[0, :6] = mask[0, :6] = 0
    kwargs = {"attention_mask": mask, "do_sample": False}
    for mode in ({}, {"cache_implementation": "static"}):
        cache = DynamicCache(config=cell.config)
        if mode:
            cache = StaticCache(config=cell.config, max_cache_len=64)
        with torch.no_grad():
            answer = cell.generate(
                ids, max_new_tokens=1, past_key_values=cache, min_new_tokens=1, **kwargs
            )
            token, grown = answer[:, -1:], torch.cat([mask, torch.ones(2, 1).long()], dim=1)
            positions = (grown.cumsum(-1) - 1)[:, -1:]
            expected = stock(
                token, attention_mask=grown, position_ids=positions, past_key_values=cache
            ).logits
        with skipping(cell, plan_of(windows), scope="decode") as session:
            tokens = cell.generate(ids, max_new_tokens=3, min_new_tokens=3, **kwargs, **mode)
            assert torch.equal(tokens[:, 29], answer[:, 29])
            assert torch.equal(tokens[:, 30], expected[:, -1].argmax(-1))
            assert session.plan == plan_of(windows)


@pytest.mark.parametrize("heads", [(0,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_any_heads_in_any_chunks(heads: tuple[int, ...]) -> None:
    model = tiny_model("llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    windows = {0: Window(16, 2, heads, 3), 1: Window(16, 2), 2: Window(16, 2, (1,), 3)}
    ids = prompt(90, batch=2)
    cache, found = DynamicCache(), []
    with torch.no_grad():
        expected = masked(model, windows)(ids, use_cache=False).logits
        with skipping(model, plan_of(windows)) as session:
            for part in ids.split([1, 40, 1, 30, 18], dim=1):
                with session.prefill():
                    found.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=5e-5)
    held = [sum(t.shape[1] * t.shape[2] for t in kv_tensors(only(cache, n))) for n in range(4)]
    n_own = len(heads)
    assert held == [
        2 * (n_own * 18 + (3 - n_own) * 90),
        2 * 3 * 18,
        2 * (18 + 2 * 90),
        2 * 3 * 90,
    ]


def only(cache: DynamicCache, layer: int) -> Any:
    """A cache of one layer of another one."""
    one = copy.copy(cache)
    one.layers = [cache.layers[layer]]
    return one


def test_decoding_from_a_full_cache_frees_what_no_window_sees(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    with skipping(model, plan_of({1: NARROW}), scope="decode"), torch.no_grad():
        model(prompt(40), past_key_values=cache)
        assert cache.layers[1].keys.shape[2] == 40
        model(prompt(1), past_key_values=cache)
    assert cache.layers[1].keys.shape[2] == 10
    assert sum(t.shape[2] for t in kv_tensors(cache)) == 2 * (3 * 41 + 10)


def test_windows_in_bfloat16(model: PreTrainedModel) -> None:
    windows = {0: SOME, 2: WIDE}
    ids = prompt(50)
    expected = masked(model, windows)(ids).logits
    with skipping(model.bfloat16(), plan_of(windows)), torch.no_grad():
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()


def test_one_graph_per_plan_of_windows(model: PreTrainedModel) -> None:
    torch._dynamo.reset()
    # Once one for the language model's head.
    for windows, n_new in (({0: NARROW, 2: NARROW}, 2), ({0: SOME, 2: NARROW}, 1)):
        assert new_graphs(model, FixedSkipping(plan_of(windows))) == n_new
        assert new_graphs(model, FixedSkipping(plan_of(windows))) == 0
    torch._dynamo.reset()


def test_leaving_gives_the_stock_attention_back(model: PreTrainedModel) -> None:
    ids = prompt(40)
    dense = model(ids).logits
    configs = [layer.self_attn.config for layer in model.model.layers]
    with skipping(model, plan_of({0: NARROW})), torch.no_grad():
        model(ids)
        inside = copy.deepcopy(model)
    with contextlib.suppress(RuntimeError), skipping(model, plan_of({0: NARROW})):
        model(ids)
        raise RuntimeError("amid")
    assert [layer.self_attn.config for layer in model.model.layers] == configs
    assert torch.equal(model(ids).logits, dense)
    assert torch.equal(inside(ids).logits, dense)


@both_sorts
def test_gradients_are_those_of_the_mask(model: PreTrainedModel, first: Window) -> None:
    ids = prompt(40)
    grads = []
    stock = masked(model, {0: first})
    for each, plan in ((stock, SkipPlan()), (model, plan_of({0: first}))):
        with skipping(each, plan):
            each(ids).logits.square().mean().backward()
        grads.append(each.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


def test_copied_caches_go_on_apart(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    ids, other = prompt(31), prompt(31, seed=5)
    with skipping(model, plan_of({0: NARROW, 1: SOME})), torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        twin = copy.deepcopy(cache)
        one = model(ids[:, 20:], past_key_values=cache).logits
        two = model(other[:, 20:], past_key_values=twin).logits
        whole = torch.cat([ids[:, :20], other[:, 20:]], dim=1)
        torch.testing.assert_close(model(ids).logits[:, 20:], one, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(whole).logits[:, 20:], two, rtol=0, atol=1e-5)


@both_sorts
def test_the_stream_of_a_window_is_that_of_the_model(cell: PreTrainedModel, first: Window) -> None:
    windows = windows_for(cell, first)
    plan = plan_of(windows)
    ids = prompt(50)
    with measuring(cell):
        sublayers = Sublayers(cell)
        x, calls = sublayers.begin({"input_ids": ids})
        for layer in range(N_LAYERS):
            for kind in ("attn", "ffn"):
                x = sublayers.through(Sublayer(layer, kind), x, calls, plan)
        found = sublayers.logits(ids, x, 50)
    with skipping(cell, plan), torch.no_grad():
        expected = cell(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_plan_file_keeps_windows(tmp_path: Path) -> None:
    plan = plan_of({0: NARROW, 2: WIDE, 3: SOME}) | SkipPlan({Sublayer(1, "attn"): 1.5})
    plan.save(tmp_path / "plan.safetensors")
    loaded = SkipPlan.load(tmp_path / "plan.safetensors")
    assert loaded == plan
    assert loaded.windows == {0: NARROW, 2: WIDE, 3: SOME}
    assert loaded.digest == plan.digest != (plan | plan_of({3: NARROW})).digest
    assert loaded.layers("attn") == (1,)
    assert loaded.gains == {Sublayer(1, "attn"): 1.5}


@pytest.mark.parametrize(
    ("size", "sinks", "message"),
    [(0, 4, "size is a whole number from 1 up, not 0"), (3.0, 4, "not 3.0"), (4, -1, "from 0 up")],
)
def test_windows_that_cannot_be(size: Any, sinks: Any, message: str) -> None:
    with pytest.raises(AdaskipError, match=message):
        Window(size, sinks)


def test_some_heads_of_a_model_split_over_processes(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = full_layers(model)[0]
    embedded: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[2]))
    monkeypatch.setattr(model, "_tp_size", 2)  # which transformers sets
    with skipping(model, plan_of({layer: NARROW})):
        model(prompt(20))
    assert len(embedded) == 1
    with (
        skipping(model, plan_of({layer: SOME})),
        pytest.raises(UnsupportedCallError, match="split over 2 processes, each with heads of its"),
    ):
        model(prompt(20))
    assert len(embedded) == 1


@pytest.mark.parametrize(
    ("heads", "of_heads", "message"),
    [
        ((0, 1), 2, "some of 0 to 1, not \\(0, 1\\)"),
        ((2,), 2, "some of 0 to 1, not \\(2,\\)"),
        ((-1,), 2, "some of 0 to 1"),
        ((), 2, "says which, and of how many"),
        ((1,), None, "says which, and of how many"),
        (None, 2, "says which, and of how many"),
        (1, 2, "says which, and of how many"),
    ],
)
def test_heads_that_cannot_be(heads: Any, of_heads: Any, message: str) -> None:
    with pytest.raises(AdaskipError, match=message):
        Window(8, 4, heads, of_heads)


def test_what_no_model_or_sublayer_takes(model: PreTrainedModel) -> None:
    with pytest.raises(AdaskipError, match="takes the place of attention, not of ffn1"):
        SkipPlan({Sublayer(1, "ffn"): NARROW})
    cases = [
        (model, {0: Window(256, 1)}, "256 \\+ 1 tokens, more than the model's 256 positions"),
        (model, {0: Window(8, 1, (0,), 3)}, "heads \\(0,\\) of 3, but the model has 2"),
        (
            tiny_model("gemma3_text", use_bidirectional_attention=True, **UNSLID["gemma3_text"]),
            {0: NARROW},
            "lets it see later ones, too",
        ),
        (tiny_model("llama", is_causal=False), {0: NARROW}, "lets it see later ones, too"),
        (tiny_model("mistral"), {1: NARROW}, "sliding window of 24 tokens already"),
        (tiny_model("gemma2", "eager"), {0: NARROW}, "sliding window of 16 tokens already"),
    ]
    for each, windows, message in cases:
        with (
            skipping(each, plan_of(windows)) as session,
            pytest.raises(AdaskipError, match=message),
        ):
            each(prompt(3))
        assert session.step is None


def test_calls_in_which_a_window_would_be_wrong(model: PreTrainedModel) -> None:
    ids = prompt(20)
    four = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    calls: list[tuple[dict[str, Any], str]] = [
        ({"attention_mask": four}, "not one that says for each token"),
        ({"attention_mask": {"full_attention": four}}, "not one that says for each token"),
        ({"attention_mask": create_block_mask(causal, 1, None, 20, 20, "cpu")}, "says for each"),
        ({"position_ids": torch.arange(20)[None] % 10}, "several sequences into one row"),
        ({"is_causal": False}, "lets tokens see later ones"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 20])}, "several sequences into one row"),
        ({"output_attentions": True}, "has no weights to return"),
    ]
    with skipping(model, plan_of({0: NARROW})) as session, torch.no_grad():
        for kwargs, message in calls:
            with pytest.raises(UnsupportedCallError, match=message):
                model(ids, **kwargs)
            assert session.step is None
        with (
            session.prefill(),
            pytest.raises(UnsupportedCallError, match="several sequences into one row"),
        ):
            model(ids, position_ids=torch.arange(20)[None] % 10, use_cache=False)
        with pytest.raises(UnsupportedCallError, match="without an assistant"):
            model.generate(ids, max_new_tokens=4, prompt_lookup_num_tokens=2)
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        with pytest.raises(UnsupportedCallError, match="cannot be cut back"):
            cache.layers[0].crop(10)


def test_what_a_window_dropped_does_not_come_back(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    with skipping(model, plan_of({0: NARROW})), torch.no_grad():
        model(prompt(20), past_key_values=cache)
    for plan in (SkipPlan(), plan_of({0: WIDE}), plan_of({0: SOME})):
        with (
            skipping(model, plan),
            torch.no_grad(),
            pytest.raises(CacheHoleError, match="had a window of 7 tokens earlier"),
        ):
            model(prompt(2), past_key_values=cache)
    # Skipping it from now on needs nothing of what was dropped.
    with skipping(model, SkipPlan({Sublayer(0, "attn"): None})), torch.no_grad():
        model(prompt(2), past_key_values=cache)
    assert block_spec("llama").attn.body == "self_attn"


def test_heads_without_a_window_have_the_models_own_attention_function() -> None:
    """Flash attention's looks its kernel up by the configuration, where ours has another name."""
    seen = set()

    def named(module: Any, *states: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        seen.add((module.config._attn_implementation, module.layer_idx, module.training))
        return sdpa_attention_forward(module, *states, **kwargs)

    AttentionInterface.register("named", named)
    plan, found = plan_of({1: SOME}), []
    for attention in ("sdpa", "named"):
        model, cache = tiny_model("llama", attention), DynamicCache()
        with skipping(model, plan), torch.no_grad():
            found.append([model(prompt(n), past_key_values=cache).logits for n in (20, 1)])
    assert seen == {("named", layer, False) for layer in range(N_LAYERS)}
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_a_cache_with_windows_outside_of_the_block(model: PreTrainedModel) -> None:
    ids = prompt(20)
    dense = model(ids).logits
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=64)):
        with skipping(model, plan_of({0: NARROW, 2: SOME})), torch.no_grad():
            model(ids, past_key_values=cache)
        with torch.no_grad(), pytest.raises(CacheHoleError, match="cannot run again"):
            model(ids, past_key_values=cache)
        if isinstance(cache, DynamicCache) and not reset_empties():
            continue
        cache.reset()
        with torch.no_grad():
            found = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(found, dense, rtol=0, atol=1e-5)


def test_windows_beneath_the_hooks_of_accelerate(model: PreTrainedModel) -> None:
    ids = prompt(40, batch=2)
    windows = {0: NARROW, 2: SOME, 3: WIDE}
    expected = generated(masked(model, windows), ids, do_sample=False)
    hooked = cpu_offload(model, execution_device=torch.device("cpu"))
    with skipping(hooked, plan_of(windows)):
        actual = generated(hooked, ids, do_sample=False)
    assert torch.equal(actual[0], expected[0])


@pytest.mark.parametrize(
    "plan", [plan_of({0: NARROW}), plan_of({0: SOME}), SkipPlan({Sublayer(1, "attn"): None})]
)
def test_a_static_cache_keeps_its_tensors_from_request_to_request(
    model: PreTrainedModel, plan: SkipPlan
) -> None:
    # A CUDA graph is recorded anew where they have moved.
    cache = StaticCache(config=model.config, max_cache_len=64)
    found, places = [], []
    with skipping(model, plan):
        for seed in (1, 2, 1):
            cache.reset()
            found.append(model.generate(prompt(20, seed=seed), past_key_values=cache, **GREEDY))
            layers: list[Any] = [*cache.layers]
            stand_ins = [layer for layer in layers if hasattr(layer, "position")]
            tensors = [layer.position for layer in stand_ins] + kv_tensors(cache)
            places.append([tensor.data_ptr() for tensor in tensors])
    assert len(places[0]) > 1
    assert places[0] == places[1] == places[2]
    assert torch.equal(found[0], found[2])
    with skipping(model, plan):
        fresh = model.generate(prompt(20, seed=2), cache_implementation="static", **GREEDY)
    assert torch.equal(found[1], fresh)


def test_a_window_takes_no_more_room_than_a_static_cache(model: PreTrainedModel) -> None:
    windows = {0: Window(200, sinks=3), 2: Window(200, sinks=3, heads=(1,), of_heads=2)}
    cache, ids = StaticCache(config=model.config, max_cache_len=48), prompt(20)
    expected = model.generate(ids, **GREEDY)
    with skipping(model, plan_of(windows)):
        for _ in range(2):
            cache.reset()
            assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
    layers: list[Any] = [*cache.layers]
    assert layers[0].keys.shape[2] == layers[2].keys.shape[2] == 48 + 3


def test_a_window_cannot_begin_on_a_cache_that_holds_other_forms(model: PreTrainedModel) -> None:
    try:
        cache = QuantizedCache("fp8", model.config)
    except (ImportError, ValueError):
        pytest.skip("this transformers quantizes no cache without another package")
    with skipping(model, plan_of({1: NARROW}), scope="decode"), torch.no_grad():
        model(prompt(20), past_key_values=cache)
        with pytest.raises(UnsupportedCallError, match="in the middle of a request on a"):
            model(prompt(1), past_key_values=cache)
