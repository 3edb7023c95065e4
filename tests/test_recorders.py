"""Similarity and gain against a direct computation from hidden states; no hidden device reads."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import N_LAYERS, prompt, tiny_model
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from adaskip import (
    AdaSkip,
    EarlyExit,
    FixedSkipping,
    Importance,
    ProfileError,
    SkipPlan,
    Sublayer,
    UnsupportedCallError,
    learn_importance,
    skipping,
)
from adaskip.plan import all_sublayers
from adaskip.recorders import StepStats, TokenStatistics


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def residuals(model: PreTrainedModel, ids: torch.Tensor, **kwargs: object) -> list[torch.Tensor]:
    """The residual stream before, between and after all sublayers, by plain hooks."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.input_layernorm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        for layer in model.model.layers
    ] + [
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: found.append(args[0])
        )
        for layer in model.model.layers
    ]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: found.append(args[0])))
    model.model(ids, **kwargs)
    for hook in hooks:
        hook.remove()
    assert len(found) == 2 * N_LAYERS + 1
    return found


def test_a_mask_that_does_not_tell_padding_is_refused(model: PreTrainedModel) -> None:
    mask = create_block_mask(lambda batch, head, query, key: query >= key, 1, None, 9, 9, "cpu")
    watching = TokenStatistics("attn")
    with (
        skipping(model, SkipPlan(), recorders=[watching]),
        pytest.raises(UnsupportedCallError, match="of type BlockMask does not tell"),
    ):
        model(prompt(9), attention_mask=mask)
    assert watching.count is None


@pytest.mark.parametrize("tokens", [11, 40])
def test_importance_equals_a_direct_computation(model: PreTrainedModel, tokens: int) -> None:
    prompts = [prompt(tokens, seed=s) for s in range(3)]
    importance = learn_importance(model, prompts)
    assert importance.n_requests == 3
    assert importance.n_tokens == 3 * tokens
    streams = [residuals(model, ids) for ids in prompts]
    for sublayer in all_sublayers(N_LAYERS):
        pairs = [(s[sublayer.position], s[sublayer.position + 1]) for s in streams]
        similarity = [cosine_similarity(x, y, dim=-1).mean() for x, y in pairs]
        norm = [y.norm() / x.norm() for x, y in pairs]
        token = [(y.norm(dim=-1) / x.norm(dim=-1)).quantile(0.5) for x, y in pairs]
        for values, found in (
            (similarity, importance.similarity),
            (norm, importance.gain_norm),
            (token, importance.gain_token),
        ):
            expected = torch.stack(values).mean().item()
            assert found[sublayer] == pytest.approx(expected, rel=2e-6)


def test_padding_is_ignored(model: PreTrainedModel) -> None:
    short, long = prompt(20, seed=1), prompt(32, seed=2)
    ids = torch.cat([torch.cat([torch.zeros(1, 12, dtype=torch.long), short], dim=1), long])
    mask = torch.ones_like(ids)
    mask[0, :12] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    together = learn_importance(model, [batch])
    apart = learn_importance(model, [short, long])
    assert together.n_requests == apart.n_requests == 2
    assert together.n_tokens == apart.n_tokens == 52
    for s in all_sublayers(N_LAYERS):
        assert together.similarity[s] == pytest.approx(apart.similarity[s], abs=1e-6)
        assert together.gain_norm[s] == pytest.approx(apart.gain_norm[s], abs=1e-6)
        assert together.gain_token[s] == pytest.approx(apart.gain_token[s], abs=1e-6)


def test_padding_is_ignored_in_the_masks_of_a_static_cache(model: PreTrainedModel) -> None:
    ids, mask = prompt(20, batch=2), torch.ones(2, 20, dtype=torch.long)
    mask[0, :8] = 0
    counts = []
    for implementation in (None, "static"):
        recorder = TokenStatistics("ffn", phase="prefill")
        with skipping(model, FixedSkipping(SkipPlan()), recorders=[recorder]):
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=3,
                do_sample=False,
                cache_implementation=implementation,
            )
        assert recorder.count is not None
        counts.append([recorder.count.item(), *recorder.total.tolist()])
    assert counts[0][0] == 32
    assert counts[1] == pytest.approx(counts[0])


def test_chunked_prefill_is_one_request(model: PreTrainedModel) -> None:
    from adaskip.learning import ImportanceRecorder

    ids = prompt(40)
    whole = learn_importance(model, [ids])
    recorder = ImportanceRecorder()
    with skipping(model, FixedSkipping(SkipPlan()), recorders=[recorder]):
        model.generate(ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=16)
    means = recorder.per_request()
    assert means.shape == (3, 2 * N_LAYERS, 1)
    for s in all_sublayers(N_LAYERS):
        assert means[0, s.position, 0].item() == pytest.approx(whole.similarity[s], abs=1e-6)
        assert means[1, s.position, 0].item() == pytest.approx(whole.gain_norm[s], abs=1e-6)
        assert means[2, s.position, 0].item() == pytest.approx(whole.gain_token[s], abs=1e-6)
    layers = recorder.layers_per_request().flatten().tolist()
    assert layers == pytest.approx(whole.layer_similarity, abs=1e-6)


def test_prompts_that_take_turns_are_refused(model: PreTrainedModel) -> None:
    from adaskip.learning import ImportanceRecorder

    recorder, one, other = ImportanceRecorder(), DynamicCache(), DynamicCache()
    for _ in range(2):
        # The number of a request begins anew in each block.
        with skipping(model, FixedSkipping(SkipPlan()), recorders=[recorder]), torch.no_grad():
            for part in prompt(12).split(6, dim=1):
                model(part, past_key_values=one)
        one = DynamicCache()
    assert recorder.per_request().shape[-1] == 2
    with skipping(model, FixedSkipping(SkipPlan()), recorders=[recorder]), torch.no_grad():
        for cache in (one, other):
            model(prompt(6), past_key_values=cache)
        with pytest.raises(ProfileError, match="went on after another one had begun"):
            model(prompt(6), past_key_values=one)


def test_token_statistics_of_layers_and_phases(model: PreTrainedModel) -> None:
    ids = prompt(18)
    recorders = {
        phase: TokenStatistics("layer", "attn", phase=phase)
        for phase in ("prefill", "decode", None)
    }
    with skipping(model, FixedSkipping(SkipPlan()), recorders=list(recorders.values())):
        out = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert {phase: int(r.count) for phase, r in recorders.items()} == {
        "prefill": 18,
        "decode": 4,
        None: 22,
    }
    stream = residuals(model, out[:, :-1])
    for row, (layer, span) in enumerate(recorders[None].rows):
        after = 2 * layer + (2 if span == "layer" else 1)
        similarity = cosine_similarity(stream[2 * layer], stream[after], dim=-1)[0]
        for phase, part in (("prefill", similarity[:18]), ("decode", similarity[18:])):
            assert recorders[phase].total[row].item() == pytest.approx(part.sum().item(), abs=1e-4)
            squares = part.square().sum().item()
            assert recorders[phase].squares[row].item() == pytest.approx(squares, abs=1e-4)


class Operations(TorchDispatchMode):
    """Counts the operations that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_rows_are_selected_without_an_index_on_the_device() -> None:
    rows = tuple((n // 3, span) for n, span in enumerate(("attn", "ffn", "layer") * 2))
    values = [torch.randn(6, 2, 3) for _ in range(3)]
    stats = StepStats(rows, *values, None)
    with Operations() as operations:
        chosen = stats.select("attn", "layer")
        none = StepStats(rows[:1], *(each[:1] for each in values), None).select("ffn")
    assert set(operations.calls) <= {"unbind", "stack", "slice"}
    assert [span for _, span in chosen.rows] == ["attn", "layer"] * 2
    for name, each in zip(("inner", "squared_in", "squared_out"), values, strict=True):
        assert torch.equal(getattr(chosen, name), each[[0, 2, 3, 5]])
        assert getattr(none, name).shape == (0, 2, 3)


class CountReads(Operations):
    """Counts the reads from the device: scalars below Python, and whole tensors as lists."""

    def __enter__(self) -> CountReads:
        self._tolist = torch.Tensor.tolist
        self.lists = 0

        def tolist(tensor: torch.Tensor) -> list[float]:
            self.lists += 1
            return self._tolist(tensor)

        torch.Tensor.tolist = tolist
        super().__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        torch.Tensor.tolist = self._tolist
        super().__exit__(*exc)

    @property
    def reads(self) -> int:
        return self.lists + self.calls["_local_scalar_dense"]


def reads(model: PreTrainedModel, **kwargs: object) -> int:
    with CountReads() as counter:
        model.generate(prompt(12), max_new_tokens=30, min_new_tokens=30, do_sample=False, **kwargs)
    return counter.reads


@pytest.mark.parametrize("cache", [None, "static"])
def test_no_more_reads_than_the_stock_model(model: PreTrainedModel, cache: str | None) -> None:
    stock = reads(model, cache_implementation=cache)
    if hasattr(model, "_cache") and cache is not None:
        # Before 5.17 generate() reuses one static cache: whether it begins anew has to be read.
        stock += 2
    with skipping(model, EarlyExit(2)):
        assert reads(model, cache_implementation=cache) <= stock
    importance = learn_importance(model, [prompt(20)])
    with skipping(model, AdaSkip(importance, 2, online=True, window=8)):
        # One decision in the request, one read.
        assert reads(model, cache_implementation=cache) <= stock + 1


def test_learning_reads_the_device_once(model: PreTrainedModel) -> None:
    prompts = [prompt(20, seed=s) for s in range(4)]
    with CountReads() as counter:
        learn_importance(model, prompts)
    # The means and the token count, whatever the number of prompts.
    assert counter.reads == 2


def test_a_skipped_sublayer_runs_nothing(model: PreTrainedModel) -> None:
    def operations(*sublayers: Sublayer) -> Counter[str]:
        plan = SkipPlan(dict.fromkeys(sublayers))
        with skipping(model, FixedSkipping(plan)), Operations() as counter:
            model(prompt(12), use_cache=False)
        return counter.calls

    dense = operations()
    everything = operations(*all_sublayers(N_LAYERS))
    one_ffn = operations(Sublayer(1, "ffn"))
    # Three projections per FFN; the norm's rsqrt and epsilon and the residual add are gone as well.
    assert dense["mm"] - one_ffn["mm"] == 3
    assert dense["rsqrt"] - one_ffn["rsqrt"] == 1
    assert dense["add"] - one_ffn["add"] == 2
    assert everything["rsqrt"] == 1
    assert everything["mm"] == 1
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert (dense[attention], everything[attention]) == (N_LAYERS, 0)


def test_profile_round_trip(model: PreTrainedModel, tmp_path) -> None:  # type: ignore[no-untyped-def]
    importance = learn_importance(model, [prompt(20)], source="random ids")
    path = tmp_path / "profiles" / "a.json"
    importance.save(path)
    assert Importance.load(path) == importance
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
    importance.check_model(model)
    # The same weights in another precision are the same model; other weights are not.
    twin = tiny_model("llama").to(torch.bfloat16)
    importance.check_model(twin)
    with (
        pytest.raises(ProfileError, match="belongs to model"),
        skipping(tiny_model("llama", seed=5), AdaSkip(importance, 2)),
    ):
        pass


_ROW = '"similarity": 1, "gain_norm": NaN, "gain_token": 1'
NAN = (
    '{"version": 2, "fingerprint": "f", "n_requests": 1, "n_tokens": 1, "source": "", "sublayers": '
    f'[{{"layer": 0, "kind": "attn", {_ROW}}}, {{"layer": 0, "kind": "ffn", {_ROW}}}]}}'
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "version 'none'"),
        ('{"version": 99}', "version 99"),
        ('{"version": 1}', "version 1; this adaskip reads version 2. Learn it anew"),
        ('{"version": 2}', "damaged.*sublayers"),
        ('{"version": 2, "sublayers": []}', "damaged"),
        ('{"version": 2, "sublayers": [{"layer": 0, "kind": "attn"}]}', "whole layers"),
        ('{"version": 2, "sublayers": 7}', "damaged"),
        (NAN, r"p\.json is damaged: The gain_norm of attn0 is nan.*Learn it anew"),
    ],
)
def test_damaged_profiles(tmp_path, content: str, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(ProfileError, match=message):
        Importance.load(path)


def test_missing_profile(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ProfileError, match="no importance profile"):
        Importance.load(tmp_path / "none.json")


def test_a_model_of_nan_has_no_importance() -> None:
    broken = tiny_model("llama")
    broken.model.layers[2].mlp.down_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(
        ProfileError, match=r"similarity of ffn2 is nan.*NaN in the model's weights"
    ):
        learn_importance(broken, [prompt(20)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e7])
def test_a_profile_of_nan_is_not_made(value: float) -> None:
    ones = dict.fromkeys(all_sublayers(2), 1.0)
    with pytest.raises(ProfileError, match="gain_norm of attn1 is"):
        Importance(ones, {**ones, Sublayer(1, "attn"): value}, ones, "f", 1, 1)


def test_no_prompts(model: PreTrainedModel) -> None:
    with pytest.raises(ProfileError, match="at least one"):
        learn_importance(model, [])
