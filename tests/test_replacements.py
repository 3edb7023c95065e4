"""What takes a sublayer's place: linear maps against their formula, fits, and plan files."""

from __future__ import annotations

import copy
import gc
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import N_LAYERS, prompt, tiny_model
from oracle import zeroed
from safetensors import safe_open
from safetensors.torch import save_file
from test_families import DISTINCT, GENERATE, generated
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from adaskip import (
    AdaskipError,
    FixedSkipping,
    Linear,
    PlanError,
    ProfileError,
    SkipPlan,
    SkipPolicy,
    Step,
    Sublayer,
    Window,
    fit_linears,
    refit_linears,
    skipping,
)
from adaskip.blocks import BLOCKS
from adaskip.fingerprint import model_fingerprint
from adaskip.fitting import Moments
from adaskip.plan import KINDS
from adaskip.replacements import scaled
from adaskip.switchboard import Switchboard

HIDDEN = 32
ATTN0, FFN1, ATTN2 = Sublayer(0, "attn"), Sublayer(1, "ffn"), Sublayer(2, "attn")


def random_linear(seed: int, rank: int | None = None, hidden: int = HIDDEN) -> Linear:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    weight = draw(hidden, hidden) if rank is None else (draw(hidden, rank), draw(rank, hidden))
    return Linear(weight, draw(hidden))


LINEARS = {ATTN0: random_linear(0), FFN1: random_linear(1, rank=3)}
PLAN = SkipPlan({**LINEARS, ATTN2: 1.25})


def formula(x: Tensor, linear: Linear) -> Tensor:
    """The replacement's definition, in float64."""
    wide = x.double()
    # The embedding of padding is zero.
    n = wide / wide.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)
    for factor in linear.factors:
        n = n @ factor.double()
    return (wide + n + linear.bias.double()).to(x.dtype)


def reference(model: PreTrainedModel) -> PreTrainedModel:
    """An unpatched copy that computes PLAN: nothing added by the sublayers, hooks around layers."""
    other = zeroed(model, PLAN)
    layers = other.model.layers

    def before(at: int, change: Any) -> None:
        layers[at].register_forward_pre_hook(
            lambda _, args, kwargs: ((change(args[0]), *args[1:]), kwargs), with_kwargs=True
        )

    before(0, lambda x: formula(x, LINEARS[ATTN0]))
    before(2, lambda x: x * 1.25)
    layers[1].register_forward_hook(lambda _, args, out: formula(out, LINEARS[FFN1]))
    return other


@pytest.fixture(scope="module", params=DISTINCT, ids=["-".join(cell) for cell in DISTINCT])
def cell(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(*request.param)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 5])
def test_a_linear_is_its_formula(dtype: torch.dtype, rank: int | None) -> None:
    x = (prompt(HIDDEN, batch=7).float() - 40).to(dtype)[:, None]
    linear = random_linear(3, rank)
    moved = linear.to(torch.device("cpu"), dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.5}[dtype]
    torch.testing.assert_close(moved(x), formula(x, linear), rtol=0, atol=tolerance)
    zeros = torch.zeros(1, 1, HIDDEN, dtype=dtype)
    torch.testing.assert_close(moved(zeros)[0, 0], moved.bias, rtol=0, atol=0)


@pytest.mark.parametrize("mode", GENERATE)
def test_linears_in_every_mode(cell: PreTrainedModel, mode: str) -> None:
    ids = prompt(29, batch=2)
    expected = generated(reference(cell), ids, **GENERATE[mode])
    with skipping(cell, PLAN):
        actual = generated(cell, ids, **GENERATE[mode])
    assert torch.equal(actual[0], expected[0])
    if expected[1] is not None:
        torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=5e-5)


def test_linears_of_padded_rows(cell: PreTrainedModel) -> None:
    ids, mask = prompt(17, batch=2), torch.ones(2, 17, dtype=torch.long)
    ids[0, :6] = mask[0, :6] = 0
    kwargs: Any = {"attention_mask": mask, "do_sample": False}
    expected = generated(reference(cell), ids, **kwargs)
    with skipping(cell, PLAN):
        actual = generated(cell, ids, **kwargs)
    assert torch.equal(actual[0], expected[0])


def test_a_replaced_attention_holds_no_kv(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    with skipping(model, PLAN), torch.no_grad():
        model(prompt(9), past_key_values=cache)
        model(prompt(1), past_key_values=cache)
    assert [i for i, layer in enumerate(cache.layers) if layer.keys is not None] == [1, 3]
    assert cache.get_seq_length() == 10


def test_plans_of_linears_come_and_go(model: PreTrainedModel) -> None:
    ids = prompt(8)
    dense, expected = model(ids).logits, reference(model)(ids).logits
    for _ in range(2):
        with skipping(model, PLAN):
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=5e-5)
        assert torch.equal(model(ids).logits, dense)


def test_what_compiled_graphs_read_lies_where_it_lay(model: PreTrainedModel) -> None:
    plan = SkipPlan({FFN1: 1.25, Sublayer(2, "attn"): random_linear(1)})

    def places() -> tuple[int, ...]:
        board = Switchboard(model.model.layers, BLOCKS["llama"], torch.bfloat16)
        board.set(plan)
        gain: Any = board._switches[1].ffn_replacement
        linear: Any = board._switches[2].attn_replacement
        assert gain == 1.25
        assert linear.bias.dtype == torch.bfloat16
        kept.append(gain)  # or the next one may come to lie where it lay
        return gain.data_ptr(), *(tensor.data_ptr() for tensor in linear.tensors)

    kept: list[Tensor] = []
    with torch.no_grad():
        first = places()
        assert places() == first
    # A backward pass still to come has numbers of its own.
    assert places()[0] != first[0]
    assert places()[1:] == first[1:]


def test_a_model_that_lost_layers_has_gains_of_its_own(model: PreTrainedModel) -> None:
    """As a draft that shares the first layer has."""
    ids, plan = prompt(8), SkipPlan({FFN1: 1.25})
    with skipping(model, plan), torch.no_grad():
        model(ids)
    model.model.layers = model.model.layers[:2]
    expected = []
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, skipping(model, plan):
            expected.append(model(ids).logits)
    assert torch.equal(*expected)


def pickled(linear: Linear) -> Linear:
    found: Linear = pickle.loads(pickle.dumps(linear))  # noqa: S301 - our own
    return found


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickled])
def test_a_map_is_copied_and_stored_without_those_on_devices(how: Any) -> None:
    linear = random_linear(3, rank=5)
    cpu = torch.device("cpu")
    held = linear.on(cpu, torch.bfloat16)
    assert linear.on(cpu, torch.bfloat16) is held
    other = how(linear)
    assert set(vars(other)) == {"weight", "bias"}
    assert all(map(torch.equal, other.tensors, linear.tensors))
    assert other.on(cpu, torch.bfloat16) is not held


def test_a_map_that_was_changed_in_place_is_taken_over_anew(
    model: PreTrainedModel,
) -> None:
    ids, linear = prompt(8), random_linear(1)
    model.bfloat16()

    def logits(of: Linear) -> Tensor:
        with skipping(model, SkipPlan({FFN1: of})), torch.no_grad():
            return model(ids).logits  # type: ignore[no-any-return]

    before = logits(linear)
    linear.bias.add_(3.0)
    after = logits(linear)
    assert torch.equal(after, logits(copy.deepcopy(linear)))
    assert not torch.equal(after, before)
    assert len(linear._copies) == 1
    with torch.inference_mode():
        assert torch.equal(logits(random_linear(1)), before)


@pytest.mark.parametrize("first", [torch.no_grad, torch.enable_grad])
def test_a_map_that_learns_in_another_precision_is_up_to_date(
    model: PreTrainedModel, first: Any
) -> None:
    ids, linear = prompt(8), random_linear(1)
    linear.bias.requires_grad_()
    model.bfloat16()
    with skipping(model, SkipPlan({FFN1: linear})):
        with first():
            before = model(ids, use_cache=False).logits
        model(ids, use_cache=False).logits.float().square().mean().backward()
        assert linear.bias.grad is not None
        with torch.no_grad():
            linear.bias.add_(1.0)
            after = model(ids, use_cache=False).logits
    assert not torch.equal(before, after)
    with skipping(model, SkipPlan({FFN1: copy.deepcopy(linear)})), torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, after)


def test_gains_set_without_gradients_are_not_written_over_before_the_backward_pass(
    model: PreTrainedModel,
) -> None:
    ids, plan = prompt(8), SkipPlan({FFN1: 1.25})
    with skipping(model, plan):
        with torch.no_grad():
            model(ids)
        loss = model(ids).logits.square().mean()
    with skipping(model, SkipPlan({FFN1: 0.5})), torch.no_grad():
        model(ids)
    loss.backward()


def test_maps_of_plans_that_are_gone_are_let_go_of(model: PreTrainedModel) -> None:
    class Ever(SkipPolicy):
        def plan(self, step: Step) -> SkipPlan:
            places = [Sublayer(i, kind) for i in range(N_LAYERS) for kind in KINDS]
            return SkipPlan({s: random_linear(step.request + s.position) for s in places})

    gc.collect()
    before = sum(type(each) is Linear for each in gc.get_objects())
    with skipping(model, Ever()), torch.no_grad():
        for _ in range(12):
            model(prompt(3))
        gc.collect()
        held = sum(type(each) is Linear for each in gc.get_objects()) - before
    # Those as given and those on the device, of three plans at most.
    assert held <= 2 * 3 * 2 * N_LAYERS


def test_linears_in_bfloat16(model: PreTrainedModel) -> None:
    ids = prompt(20)
    expected = reference(model)(ids).logits
    with skipping(model.bfloat16(), PLAN):
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()


# Plans ----------------------------------------------------------------------------------------


def test_a_plan_is_a_mapping_in_depth_order() -> None:
    plan = SkipPlan({ATTN2: 2, FFN1: None, ATTN0: LINEARS[ATTN0]})
    assert list(plan) == [ATTN0, FFN1, ATTN2]
    assert dict(plan) == {ATTN0: LINEARS[ATTN0], FFN1: None, ATTN2: 2.0}
    assert plan.gains == {FFN1: None, ATTN2: 2.0}
    assert plan.layers("attn") == (0, 2)
    same = SkipPlan({ATTN0: LINEARS[ATTN0], FFN1: None, ATTN2: 2.0}, about={"budget": 3})
    assert plan == same
    assert hash(plan) == hash(same)
    assert plan != SkipPlan({ATTN0: random_linear(0), FFN1: None, ATTN2: 2.0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(torch.ones(3, 4), torch.ones(4)), r"a weight \[hidden, hidden\] or two"),
        (lambda: Linear((torch.ones(4, 2), torch.ones(3, 4)), torch.ones(4)), "got"),
        (lambda: Linear((torch.ones(4, 5), torch.ones(5, 4)), torch.ones(4)), "rank 5 is larger"),
        (lambda: Linear(torch.ones(4, 4, dtype=torch.int64), torch.ones(4)), "floating-point"),
        (lambda: Linear([[1.0]], torch.ones(1)), "floating-point"),
        (lambda: Linear(torch.full((4, 4), float("nan")), torch.ones(4)), "not finite"),
        (lambda: SkipPlan({ATTN0: "linear"}), "gain of attn0 is a finite number or None"),
    ],
)
def test_replacements_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(AdaskipError, match=message):
        make()


def test_a_linear_of_another_width_is_refused_before_the_forward(model: PreTrainedModel) -> None:
    with (
        skipping(model, SkipPlan({ATTN0: random_linear(0, hidden=8)})) as session,
        pytest.raises(AdaskipError, match="for a model 8 wide, this one is 32 wide"),
    ):
        model(prompt(3))
    assert session.step is None


# Files ----------------------------------------------------------------------------------------


def test_a_plan_file_gives_the_plan_back(model: PreTrainedModel, tmp_path: Path) -> None:
    made = SkipPlan(
        {**PLAN, Sublayer(3, "ffn"): None},
        fingerprint=model_fingerprint(model),
        about={"acceleration": 1.3, "fitted on": "docs", "rank": None},
    )
    path = tmp_path / "plans" / "plan.safetensors"
    made.save(path)
    loaded = SkipPlan.load(path)
    assert list(loaded) == list(made)
    assert loaded.gains == made.gains
    assert (loaded.fingerprint, dict(loaded.about)) == (made.fingerprint, dict(made.about))
    for sublayer in LINEARS:
        pairs = zip(made[sublayer].tensors, loaded[sublayer].tensors, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    ids = prompt(9)
    with skipping(model, made):
        expected = model(ids).logits
    with skipping(model, loaded):
        assert torch.equal(model(ids).logits, expected)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    empty = tmp_path / "empty.safetensors"
    SkipPlan().save(empty)
    assert SkipPlan.load(empty) == SkipPlan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_plan_file_in_half_precision_serves_such_a_model_bit_for_bit(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    PLAN.save(whole)
    PLAN.save(half, dtype=dtype)
    assert half.stat().st_size < whole.stat().st_size
    plan, ids, served = SkipPlan.load(half), prompt(9), tiny_model("llama").to(dtype)
    assert {t.dtype for s in LINEARS for t in plan[s].tensors} == {dtype}
    with skipping(served, PLAN):
        expected = served(ids).logits
    with skipping(served, plan):
        assert torch.equal(served(ids).logits, expected)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [(torch.int8, "cannot be kept in torch.int8; give one of"), (torch.float16, "too large")],
)
def test_a_plan_that_would_not_be_whole_is_not_written(
    dtype: torch.dtype, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.safetensors"
    plan = SkipPlan({FFN1: Linear(torch.full((4, 4), 1e6), torch.zeros(4))})
    with pytest.raises(AdaskipError, match=message):
        plan.save(path, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_file_of_one_map_in_two_places(tmp_path: Path) -> None:
    linear = random_linear(0)
    plan = SkipPlan({Sublayer(0, "attn"): linear, Sublayer(2, "ffn"): linear})
    plan.save(tmp_path / "plan.safetensors")
    assert SkipPlan.load(tmp_path / "plan.safetensors").digest == plan.digest


def test_a_plan_of_another_model_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    SkipPlan({FFN1: 1.5}, fingerprint=model_fingerprint(model)).save(path)
    plan = SkipPlan.load(path)
    other = tiny_model("llama", seed=1)
    for policy in (plan, FixedSkipping(plan)):
        with pytest.raises(PlanError, match="make a plan for this model"), skipping(other, policy):
            pass
    with skipping(model, plan):
        model(prompt(4))


def rewritten(path: Path, change: Any) -> None:
    """The plan file with other metadata or tensors."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["adaskip.plan"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(content, tensors)
    save_file(tensors, path, metadata={"adaskip.plan": json.dumps(content)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(version=99), "version 99; this adaskip reads versions 1 and 2"),
        (lambda c, t: t.pop("attn0.bias"), "is damaged: .*attn0.bias"),
        (lambda c, t: t.update({"attn0.bias": torch.ones(3)}), "is damaged: A Linear has"),
        (lambda c, t: c["sublayers"][0].update(kind="mlp"), "kind is 'attn' or 'ffn'"),
        (lambda c, t: c["sublayers"][2].update(gain="1"), "gain of attn2 is a finite number"),
        (lambda c, t: c["sublayers"][2].pop("gain"), "is damaged"),
        (lambda c, t: c["sublayers"].append(c["sublayers"][2]), "is damaged: it has .* twice"),
        (lambda c, t: c["sublayers"][2].update(gain=10**400), "is damaged"),
        (lambda c, t: c.pop("fingerprint"), "is damaged: .*fingerprint"),
        (lambda c, t: c.update(about=[]), "is damaged"),
    ],
)
def test_damaged_plan_files(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "plan.safetensors"
    PLAN.save(path)
    rewritten(path, change)
    with pytest.raises(PlanError, match=message):
        SkipPlan.load(path)


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="There is no plan at"):
        SkipPlan.load(tmp_path / "none.safetensors")
    (tmp_path / "torn").write_bytes(b"\x08\x00\x00")
    with pytest.raises(PlanError, match="cannot be read"):
        SkipPlan.load(tmp_path / "torn")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(PlanError, match="is not a plan"):
        SkipPlan.load(tmp_path / "weights.safetensors")


# Fits -----------------------------------------------------------------------------------------


def prompts(lengths: tuple[int, ...] = (60, 45, 70)) -> Iterator[Tensor]:
    return (prompt(n, seed=n) for n in lengths)


def by_hand(x: Tensor, delta: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weight and bias of the fit's definition, in float64: [tokens, hidden] each."""
    x, delta = x.double(), delta.double()
    n = x / x.square().mean(dim=-1, keepdim=True).sqrt()
    cov = torch.cov(n.T, correction=0)
    cov += ridge * cov.diagonal().mean() * torch.eye(len(cov), dtype=torch.float64)
    cross = (n - n.mean(0)).T @ (delta - delta.mean(0)) / len(n)
    weight = torch.linalg.solve(cov, cross)
    return weight, delta.mean(0) - n.mean(0) @ weight


def around_ffn(model: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor]:
    """Input of a layer's FFN and what it adds, over the tokens of `prompts` after the first 4."""
    found: list[tuple[Tensor, Tensor]] = []
    at = model.model.layers[layer]
    seen: dict[str, Tensor] = {}
    hooks = [
        at.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: seen.update(x=args[0][0, 4:])
        ),
        at.mlp.register_forward_hook(lambda *a: found.append((seen["x"], a[2][0, 4:]))),
    ]
    with torch.no_grad():
        for ids in prompts():
            model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    x, delta = (torch.cat(parts) for parts in zip(*found, strict=True))
    return x, delta


def test_a_fit_is_its_definition_on_the_stream_of_the_plan(model: PreTrainedModel) -> None:
    first, second = Sublayer(1, "ffn"), Sublayer(3, "ffn")
    plan = fit_linears(model, prompts(), [second, first], source="random ids")
    assert list(plan) == [first, second]
    assert plan.about["fitted on"] == "random ids"
    weight, bias = by_hand(*around_ffn(model, 1))
    torch.testing.assert_close(plan[first].weight.double(), weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(plan[first].bias.double(), bias, rtol=1e-3, atol=1e-4)
    with skipping(model, SkipPlan({first: plan[first]})):
        seen = around_ffn(model, 3)
    weight, _ = by_hand(*seen)
    torch.testing.assert_close(plan[second].weight.double(), weight, rtol=1e-3, atol=1e-4)


def test_moments_are_the_same_where_autocast_is_on() -> None:
    x, delta = torch.randn(2, 50, HIDDEN, generator=torch.Generator().manual_seed(0))
    plain, within = Moments(x), Moments(x)
    plain.add(x, delta)
    with torch.autocast("cpu", torch.bfloat16):
        within.add(x, delta)
    for one, other in zip(vars(plain).values(), vars(within).values(), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)


def test_a_rank_keeps_what_matters_most(model: PreTrainedModel) -> None:
    full = fit_linears(model, prompts(), [FFN1])[FFN1]
    x, delta = around_ffn(model, 1)
    lost = []
    for rank in (1, 4, 16, HIDDEN):
        found = fit_linears(model, prompts(), [FFN1], rank=rank)[FFN1]
        assert [tuple(f.shape) for f in found.factors] == [(HIDDEN, rank), (rank, HIDDEN)]
        lost.append((found(x) - x - delta).square().mean().item())
    assert lost == sorted(lost, reverse=True)
    assert lost[0] > 1.05 * lost[-1]
    product = found.factors[0] @ found.factors[1]
    torch.testing.assert_close(product, full.weight, rtol=1e-3, atol=1e-3)


def test_a_fit_does_not_tell_what_is_true_of_another_plan(model: PreTrainedModel) -> None:
    about = {"method": "SEARCH", "loss": 0.01, "acceleration": 1.2}
    plan = SkipPlan({Sublayer(0, "ffn"): 1.0}, about=about)
    found = fit_linears(model, [prompt(60)], [Sublayer(1, "attn")], plan=plan)
    assert set(found) == {Sublayer(0, "ffn"), Sublayer(1, "attn")}
    assert dict(found.about) == {
        "linear maps": 1,
        "rank": None,
        "fitted on": "unnamed prompts",
        "besides": plan.digest,
    }


def test_maps_of_a_plan_are_fitted_anew_each_with_its_rank(model: PreTrainedModel) -> None:
    ids = [*prompts()]
    full = fit_linears(model, ids[:2], [FFN1], plan=SkipPlan({Sublayer(0, "ffn"): 1.02}))
    both = fit_linears(model, ids[:2], [Sublayer(3, "attn")], rank=5, plan=full)
    about = {"method": "SEARCH", "loss": 0.01, "predicted acceleration": 1.2}
    plan = SkipPlan(both, fingerprint=both.fingerprint, about=about)
    found = refit_linears(model, plan, ids, source="all of them")
    # Those that fit_linears makes of the same prompts, in depth order.
    first = fit_linears(model, ids, [FFN1], plan=SkipPlan({Sublayer(0, "ffn"): 1.02}))
    expected = fit_linears(model, ids, [Sublayer(3, "attn")], rank=5, plan=first)
    assert (found.digest, found.fingerprint) == (expected.digest, plan.fingerprint)
    assert found.digest != plan.digest
    told = {"method": "SEARCH", "predicted acceleration": 1.2, "fitted on": "all of them"}
    told |= {"loss before fit": 0.01}
    assert dict(found.about) == told
    heads = SkipPlan({**plan, Sublayer(0, "attn"): Window(8, heads=(1,), of_heads=3)})
    with pytest.raises(AdaskipError, match="but the model has 2 key-value heads"):
        refit_linears(model, heads, ids)
    with pytest.raises(AdaskipError, match="The plan has no linear map to fit anew"):
        refit_linears(model, SkipPlan({FFN1: 1.1}), ids)
    with pytest.raises(PlanError, match="was made for model"):
        refit_linears(tiny_model("llama", seed=3), plan, ids)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gain", [1.003, 0.98, 5.0123])
def test_a_gain_is_not_rounded_to_the_models_precision(dtype: torch.dtype, gain: float) -> None:
    class OnCuda(Tensor):
        """Rounds the scalars that it is multiplied by, as a product on CUDA does."""

        is_cuda = True

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "mul" in func.__name__:
                rounded = isinstance(args[1], Tensor) and args[1].ndim == 0
                args = (args[0], args[1].to(args[0].dtype)) if rounded else args
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = (x.float() * torch.tensor(gain)).to(dtype)
    for stream in (x, x.as_subclass(OnCuda)):
        for given in (gain, torch.tensor(gain)):
            found = scaled(stream, given)
            assert found.dtype == dtype
            assert torch.equal(found.as_subclass(Tensor), expected)
    as_scalar = (x.as_subclass(OnCuda) * torch.tensor(gain)).as_subclass(Tensor)
    assert torch.equal(as_scalar, expected) is (dtype == torch.float32)


def test_padding_is_not_fitted_on(model: PreTrainedModel) -> None:
    ids = [*prompts()]
    expected = fit_linears(model, ids, [FFN1])[FFN1]
    padded = []
    for each in ids:
        row = torch.cat([torch.zeros(1, 11, dtype=torch.long), each], dim=1)
        padded.append({"input_ids": row, "attention_mask": (torch.arange(row.shape[1]) > 10)[None]})
    for inputs in padded:
        inputs["attention_mask"] = inputs["attention_mask"].long()
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    found = fit_linears(model, padded, [FFN1])[FFN1]
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-3, atol=1e-3)


def test_windows_know_padding_that_no_layer_is_told_of(model: PreTrainedModel) -> None:
    """Flex attention's masks are no tensors, and an attention function of one's own has none."""
    ids = prompt(60, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    windows = SkipPlan({ATTN0: Window(8, 2), Sublayer(1, "attn"): Window(8, 2)})
    told = {"input_ids": ids, "attention_mask": mask}
    expected = fit_linears(model, [told], [FFN1], plan=windows)[FFN1]
    AttentionInterface.register("unmasked", sdpa_attention_forward)
    found = fit_linears(tiny_model("llama", "unmasked"), [told], [FFN1], plan=windows)[FFN1]
    assert isinstance(expected, Linear)
    assert isinstance(found, Linear)
    assert torch.equal(found.weight, expected.weight)  # type: ignore[arg-type]


def test_fits_of_every_family(cell: PreTrainedModel) -> None:
    chosen = [ATTN0, FFN1, Sublayer(3, "attn")]
    plan = fit_linears(cell, prompts(), chosen, rank=8, plan=SkipPlan({ATTN2: 1.1}))
    assert list(plan) == sorted([*chosen, ATTN2])
    assert all("forward" not in vars(layer) for layer in cell.model.layers)
    # What was fitted comes nearer to the first sublayer, on its prompts, than nothing does.
    found: list[Tensor] = []
    hook = cell.model.layers[1].register_forward_pre_hook(lambda _, args: found.append(args[0]))
    ids = next(prompts())
    after = SkipPlan({Sublayer(0, "ffn"): None})
    for each in (after, after | SkipPlan({ATTN0: plan[ATTN0]}), after | SkipPlan({ATTN0: None})):
        with skipping(cell, each), torch.no_grad():
            cell(ids, use_cache=False)
    hook.remove()
    dense, fitted, skipped = (x[:, 4:] for x in found)
    assert (fitted - dense).square().mean() < (skipped - dense).square().mean()


def test_fits_that_cannot_be(model: PreTrainedModel) -> None:
    with pytest.raises(AdaskipError, match=r"on at least 33 tokens .* 16 were given"):
        fit_linears(model, [prompt(20)], [FFN1])
    with pytest.raises(AdaskipError, match=r"rank 33; in this model .* from 1 to 32"):
        fit_linears(model, prompts(), [FFN1], rank=33)
    with pytest.raises(AdaskipError, match="layers are 0 to 3"):
        fit_linears(model, prompts(), [Sublayer(N_LAYERS, "ffn")])
    with pytest.raises(ProfileError, match="No prompt"):
        fit_linears(model, [], [FFN1])
    with pytest.raises(ProfileError, match="Prompt 1 is"):
        fit_linears(model, [torch.ones(3)], [FFN1])
    for options, said in (
        ({"ridge": -5}, "A ridge of -5 is none"),
        ({"ridge": float("nan")}, "A ridge of nan is none"),
        ({"sinks": -3}, "sinks is -3"),
        ({"sinks": None}, "sinks is None"),
    ):
        with pytest.raises(AdaskipError, match=said):
            fit_linears(model, prompts(), [FFN1], **options)  # type: ignore[arg-type]
    with pytest.raises(AdaskipError, match="tokens are too alike"):
        fit_linears(model, [torch.full((1, 60), 7)], [Sublayer(0, "attn")], ridge=0)
