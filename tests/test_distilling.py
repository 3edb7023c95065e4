"""Gains and linear maps trained towards the dense model's predictions: against a loop by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from conftest import prompt, tiny_model
from oracle import zeroed
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from adaskip import (
    AdaskipError,
    Linear,
    PlanError,
    RunError,
    SkipPlan,
    Sublayer,
    UnsupportedCallError,
    Window,
    distill_plan,
    divergence,
    fit_linears,
    skipping,
    training,
)
from adaskip.divergence import Course, Trained
from adaskip.fitting import about_other_maps
from adaskip.streams import Sublayers

ATTN0, ATTN2, FFN1, FFN3 = (
    Sublayer(0, "attn"),
    Sublayer(2, "attn"),
    Sublayer(1, "ffn"),
    Sublayer(3, "ffn"),
)
PROMPTS = [prompt(n, seed=n) for n in (90, 75, 80, 85, 70, 65, 33)]
WINDOWS = {
    Sublayer(1, "attn"): Window(8, 2),
    ATTN2: Window(8, 2, heads=(1,), of_heads=2),
}


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


def fitted(
    model: PreTrainedModel, besides: dict[Sublayer, Any], rank: int | None = None
) -> SkipPlan:
    return fit_linears(model, PROMPTS, [ATTN0], rank=rank, plan=SkipPlan(besides))


def numbers(plan: SkipPlan) -> list[Tensor]:
    """Everything of a plan that can be trained."""
    found: list[Tensor] = []
    for each in plan.values():
        if isinstance(each, Linear):
            found += each.tensors
        elif isinstance(each, float):
            found.append(torch.tensor(each))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_reads_the_device_as_often_whatever_the_number_of_maps(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    reads = [0]

    def counted(name: str) -> Any:
        stock = getattr(Tensor, name)

        def method(tensor: Tensor, *args: Any) -> Any:
            reads[0] += 1
            return stock(tensor, *args)

        return method

    found = []
    for n_maps in (1, 4):
        maps = {Sublayer(i, "attn"): Linear(torch.eye(32), torch.zeros(32)) for i in range(n_maps)}
        learns = Trained(Sublayers(model.to(dtype)), SkipPlan(maps))
        course = Course(learns, [{"input_ids": ids} for ids in PROMPTS[:2]], progress=False)
        [given] = course.learned
        with monkeypatch.context() as patched:
            for name in ("__bool__", "item", "__float__", "tolist"):
                patched.setattr(Tensor, name, counted(name))
            reads[0] = 0
            torch.autograd.backward(course.by_token(given, given.spread()).sum())
            found.append(reads[0])
    assert found[0] == found[1]


def trained_by_hand(
    model: PreTrainedModel, plan: SkipPlan, epochs: int, rate: float, n_positions: int
) -> list[Tensor]:
    """A map in the place of ATTN0 and a gain in that of ATTN2 after training, by hooks."""
    copy = zeroed(model, plan).requires_grad_(False)
    tensors = [tensor.clone().requires_grad_() for tensor in numbers(plan)]
    *factors, bias, gain = tensors

    def before(at: int, change: Any) -> None:
        copy.model.layers[at].register_forward_pre_hook(
            lambda _, args, kwargs: ((change(args[0]), *args[1:]), kwargs), with_kwargs=True
        )

    def mapped(x: Tensor) -> Tensor:
        n = x / x.square().mean(dim=-1, keepdim=True).sqrt()
        for factor in factors:
            n = n @ factor
        return x + n + bias

    before(0, mapped)
    before(2, lambda x: x * gain)
    *learned, held = PROMPTS

    def lost(ids: Tensor, at: Tensor) -> Tensor:
        dense, found = (log_softmax(m(ids).logits[0, at], dim=-1) for m in (model, copy))
        return kl_div(found, dense.detach(), reduction="sum", log_target=True) / len(at)

    groups = [{"params": tensors[:-1], "lr": rate}, {"params": [gain], "lr": 10 * rate}]
    optimizer = torch.optim.Adam(groups)
    n_steps = epochs * len(learned)
    rise = math.ceil(0.1 * n_steps)
    generator = torch.Generator().manual_seed(0)
    step = 0
    # The last of them, at places as far from each other as they can be.
    n_held = min(n_positions, held.shape[1])
    spread = torch.tensor([int((held.shape[1] - 1) * i / (n_held - 1)) for i in range(n_held)])
    least, best = float(lost(held, spread).detach()), [t.detach().clone() for t in tensors]
    for _ in range(epochs):
        for number in torch.randperm(len(learned), generator=generator).tolist():
            at = torch.randperm(learned[number].shape[1], generator=generator)[:n_positions]
            optimizer.zero_grad()
            lost(learned[number], at).backward()
            torch.nn.utils.clip_grad_norm_(tensors, 1.0)
            step += 1
            fallen = 0.5 + 0.5 * math.cos(math.pi * max(0, step - rise) / (n_steps + 1 - rise))
            for group, highest in zip(optimizer.param_groups, (rate, 10 * rate), strict=True):
                group["lr"] = highest * min(step / rise, fallen)
            optimizer.step()
        if (found := float(lost(held, spread).detach())) < least:
            least, best = found, [t.detach().clone() for t in tensors]
    return best


@pytest.mark.parametrize(("rank", "n_positions"), [(None, 256), (5, 256), (5, 16)])
def test_what_is_trained_is_what_a_loop_by_hand_makes(
    model: PreTrainedModel, rank: int | None, n_positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "_POSITIONS", n_positions)
    plan = fitted(model, {ATTN2: 1.25}, rank)
    found = distill_plan(model, plan, PROMPTS, epochs=3, learning_rate=1e-3)
    assert found.digest != plan.digest
    for ours, theirs in zip(
        numbers(found), trained_by_hand(model, plan, 3, 1e-3, n_positions), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert found.about["divergence"] < found.about["divergence before distilling"]


def test_gradients_are_those_of_finite_differences_through_windows(model: PreTrainedModel) -> None:
    double = model.double().requires_grad_(False)
    # Before the windows, so that gradients pass through them, of all heads and of one.
    trained = Trained(Sublayers(double), fitted(double, {Sublayer(0, "ffn"): 1.1, **WINDOWS}))
    course = Course(trained, [{"input_ids": ids} for ids in PROMPTS], progress=False)
    (gain,), bias = trained.gains, trained.maps[-1]
    one = course._held[0]
    positions = one.spread()
    assert len(positions) == 33

    def lost() -> float:
        return float(course.by_token(one, positions).mean().detach())

    course.by_token(one, positions).mean().backward()
    for tensor, at in ((gain, ()), (bias, (3,)), (trained.maps[0], (5, 7))):
        assert tensor.grad is not None
        expected, step = float(tensor.grad[at]), 1e-3
        with torch.no_grad():
            tensor[at] += step
            above = lost()
            tensor[at] -= 2 * step
            below = lost()
            tensor[at] += step
        assert (above - below) / (2 * step) == pytest.approx(expected, rel=1e-2, abs=1e-4)


def test_what_does_not_help_is_not_kept(model: PreTrainedModel) -> None:
    plan = fitted(model, {ATTN2: 1.25, FFN3: None, **WINDOWS})
    worse = distill_plan(model, plan, PROMPTS, learning_rate=100.0)
    assert worse.digest == plan.digest
    assert worse.about["divergence"] == worse.about["divergence before distilling"]
    better = distill_plan(model, plan, PROMPTS, epochs=3, learning_rate=1e-3)
    assert better.digest != plan.digest
    # What is replaced by what stays, and so does the time.
    kept = {FFN3: None, **WINDOWS}
    assert [*better] == [*plan]
    assert {sublayer: better[sublayer] for sublayer in kept} == kept


def test_it_is_the_same_for_a_seed(model: PreTrainedModel) -> None:
    plan = fitted(model, {})
    found = [distill_plan(model, plan, PROMPTS, learning_rate=3e-3, seed=s) for s in (1, 1, 2)]
    assert found[0].digest == found[1].digest != found[2].digest


@pytest.mark.parametrize("stops", [1, 4, 8, 13])
def test_one_that_was_interrupted_goes_on(
    model: PreTrainedModel, stops: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_KEPT_EVERY", 0.0)
    plan, record = fitted(model, {ATTN2: 1.25, **WINDOWS}), tmp_path / "new" / "training"
    settings: dict[str, Any] = {"epochs": 3, "learning_rate": 1e-3}
    expected = distill_plan(model, plan, PROMPTS, **settings)
    stock, steps = training.Training._step, 0

    def counted(*args: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == stops:
            raise KeyboardInterrupt
        stock(*args)

    monkeypatch.setattr(training.Training, "_step", counted)
    with pytest.raises(KeyboardInterrupt):
        distill_plan(model, plan, PROMPTS, record=record, **settings)
    assert record.is_file()
    found = distill_plan(model, plan, PROMPTS, record=record, **settings)
    # Of six prompts three times, the one that was cut short is taken once more.
    assert steps == 19
    assert found.digest == expected.digest != plan.digest
    assert found.about == expected.about
    # It is done: nothing is trained again until the file is removed.
    again = distill_plan(model, plan, PROMPTS, record=record, **settings)
    assert (steps, again.digest, again.about) == (19, found.digest, found.about)
    assert [path.name for path in record.parent.iterdir()] == ["training"]


def test_a_record_of_something_else_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    plan, record = fitted(model, {}), tmp_path / "training"
    distill_plan(model, plan, PROMPTS, epochs=1, record=record)
    for changes, message in (
        ({"epochs": 2}, r"of another training \(epochs: 1 then, 2 now\); remove it"),
        ({"seed": 3}, r"\(seed: 0 then, 3 now\)"),
        ({"plan": SkipPlan({FFN1: 1.1})}, r"\(plan: "),
        ({"prompts": PROMPTS[1:]}, r"\(prompts: "),
    ):
        given: dict[str, Any] = {"plan": plan, "prompts": PROMPTS, "epochs": 1, **changes}
        with pytest.raises(RunError, match=message):
            distill_plan(model, **given, record=record)
    model.config.rms_norm_eps = 1e-3
    with pytest.raises(RunError, match=r"\(configuration: \w{16} then"):
        distill_plan(model, plan, PROMPTS, epochs=1, record=record)
    plan.save(tmp_path / "plan.safetensors")
    for wrong in ("plan.safetensors", "text"):
        (tmp_path / "text").write_text("no tensors")
        with pytest.raises(RunError, match="no record of a training, or a damaged one"):
            distill_plan(model, plan, PROMPTS, epochs=1, record=tmp_path / wrong)
    assert SkipPlan.load(tmp_path / "plan.safetensors").digest == plan.digest
    with pytest.raises(RunError, match="cannot be written"):
        distill_plan(model, plan, PROMPTS, epochs=1, record=tmp_path / "text" / "training")


def test_padding_is_not_counted(model: PreTrainedModel) -> None:
    plan = fitted(model, {ATTN2: 1.25})

    def padded(ids: Tensor) -> dict[str, Tensor]:
        fill = torch.zeros(1, 7, dtype=torch.long)
        mask = torch.cat([fill, torch.ones_like(ids)], dim=1)
        return {"input_ids": torch.cat([fill, ids], dim=1), "attention_mask": mask}

    expected = distill_plan(model, plan, PROMPTS, epochs=1, learning_rate=1e-3)
    found = distill_plan(model, plan, map(padded, PROMPTS), epochs=1, learning_rate=1e-3)
    assert found.digest != plan.digest
    for ours, theirs in zip(numbers(found), numbers(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    key = "divergence before distilling"
    assert found.about[key] == pytest.approx(expected.about[key], rel=1e-4)


def test_rows_of_a_batch_count_by_their_tokens(model: PreTrainedModel) -> None:
    plan, short, long = (
        fitted(model, {ATTN2: 1.25, **WINDOWS}),
        prompt(20, seed=1),
        prompt(50, seed=2),
    )
    batch = torch.zeros(2, 50, dtype=torch.long)
    batch[0, 30:], batch[1] = short[0], long[0]
    mask = torch.ones_like(batch)
    mask[0, :30] = 0
    found = distill_plan(model, plan, [PROMPTS[0], {"input_ids": batch, "attention_mask": mask}])
    alone = [distill_plan(model, plan, [PROMPTS[0], each]) for each in (short, long)]
    before = [float(each.about["divergence before distilling"]) for each in (found, *alone)]
    assert before[0] == pytest.approx((20 * before[1] + 50 * before[2]) / 70, rel=1e-4)
    assert before[1] != pytest.approx(before[2], rel=1e-2)


def test_an_offloaded_model_is_left_as_it_was(model: PreTrainedModel) -> None:
    plan = fitted(model, {ATTN2: 1.25})
    expected = distill_plan(model, plan, PROMPTS, epochs=1, learning_rate=1e-3)
    hooked = cpu_offload(model, execution_device=torch.device("cpu"))
    found = distill_plan(hooked, plan, PROMPTS, epochs=1, learning_rate=1e-3)
    assert found.digest == expected.digest != plan.digest
    assert {weight.requires_grad for weight in hooked.parameters()} == {True}
    assert {weight.device.type for weight in hooked.model.layers.parameters()} == {"meta"}


def test_what_overflows_is_not_learned(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, stock, steps = fitted(model, {ATTN2: 1.25}), divergence.Course.by_token, []

    def overflowing(*args: Any) -> Tensor:
        lost = stock(*args)
        steps.append(lost.requires_grad)
        # The last step of the second epoch.
        return lost * (float("inf") if sum(steps) == 12 and steps[-1] else 1.0)

    monkeypatch.setattr(divergence.Course, "by_token", overflowing)
    found = distill_plan(model, plan, PROMPTS, epochs=2, learning_rate=1e-3)
    assert sum(steps) == 12
    assert found.digest != plan.digest
    assert found.about["divergence"] < found.about["divergence before distilling"]
    huge = SkipPlan({ATTN0: 1e38, ATTN2: 1e38})
    with pytest.raises(AdaskipError, match=r"are no numbers in torch\.float32"):
        distill_plan(model, huge, PROMPTS)


@pytest.mark.parametrize("inference", [False, True])
def test_the_model_is_left_as_it_was(model: PreTrainedModel, *, inference: bool) -> None:
    model.model.layers[1].requires_grad_(False)
    model.model.layers[2].mlp.train()
    learning = [weight.requires_grad for weight in model.parameters()]
    weights = [weight.detach().clone() for weight in model.parameters()]
    modes = [module.training for module in model.modules()]
    plan = fitted(model, WINDOWS)
    with torch.inference_mode(inference):
        inputs = [
            {"input_ids": ids.clone(), "attention_mask": torch.ones_like(ids)} for ids in PROMPTS
        ]
        found = distill_plan(model, plan, inputs, learning_rate=3e-3)
    assert found.digest != plan.digest
    assert [weight.requires_grad for weight in model.parameters()] == learning
    assert all(weight.grad is None for weight in model.parameters())
    assert all(map(torch.equal, model.parameters(), weights))
    assert [module.training for module in model.modules()] == modes
    assert not any(tensor.requires_grad for tensor in numbers(found))
    with skipping(model, found):
        model.generate(PROMPTS[0], max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2", "olmo2"])
def test_other_families_and_precisions(family: str) -> None:
    model = tiny_model(family).bfloat16()
    plan = fitted(model, {ATTN2: 1.25})
    found = distill_plan(model, plan, PROMPTS, epochs=3, learning_rate=1e-3)
    assert found.about["divergence"] < found.about["divergence before distilling"]
    assert {tensor.dtype for tensor in numbers(found)} == {torch.float32}


def test_what_is_told_of_a_plan(model: PreTrainedModel) -> None:
    about = {"method": "SEARCH", "loss": 0.01, "predicted acceleration": 1.2}
    plan = SkipPlan({FFN1: 1.1}, about=about)
    found = distill_plan(model, plan, PROMPTS, epochs=1, source="some rows")
    told = {name: found.about[name] for name in found.about if "divergence" not in name}
    assert told == {
        "method": "SEARCH",
        "predicted acceleration": 1.2,
        "loss before fit": 0.01,
        "distilled on": "some rows",
        "distilled epochs": 1,
    }
    assert not {"distilled on", "divergence"} & {*about_other_maps(found)}
    other = tiny_model("llama", seed=3)
    with pytest.raises(PlanError, match="was made for model"):
        distill_plan(other, found, PROMPTS)


def test_what_is_refused(model: PreTrainedModel) -> None:
    plan = SkipPlan({FFN1: 1.1})
    for changes, message in (
        ({"plan": SkipPlan({FFN1: None, **WINDOWS})}, "no gain and no linear map"),
        ({"prompts": PROMPTS[:1]}, "at least 2 prompts, as one is held out to judge by; 1 given"),
        ({"epochs": 0}, "epochs is 0; give a whole number of passes, 1 or more"),
        ({"learning_rate": 0.0}, "A learning rate of 0.0 is none"),
        ({"seed": 0.5}, "A seed of 0.5 is none"),
        ({"seed": 2**70}, "A seed of 1180591620717411303424 is none"),
        ({"plan": SkipPlan({Sublayer(9, "ffn"): 1.1})}, "skips ffn9, but the model"),
        (
            {"plan": SkipPlan({FFN1: 1.1, ATTN2: Window(8, heads=(1,), of_heads=3)})},
            "but the model has 2 key-value heads",
        ),
    ):
        with pytest.raises(AdaskipError, match=message):
            distill_plan(model, **{"plan": plan, "prompts": PROMPTS, **changes})
    with skipping(model, plan), pytest.raises(UnsupportedCallError, match="inside skipping"):
        distill_plan(model, plan, PROMPTS)
    model.hf_quantizer = object()
    with pytest.raises(AdaskipError, match="weights are quantized"):
        distill_plan(model, plan, PROMPTS)


def test_an_eighth_of_the_prompts_is_held_out(model: PreTrainedModel) -> None:
    plan = SkipPlan({ATTN2: 1.25, FFN1: None})
    given = [prompt(8 + n, seed=n) for n in range(17)]
    course = Course(
        Trained(Sublayers(model), plan), [{"input_ids": ids} for ids in given], progress=False
    )
    assert [each.inputs["input_ids"].tolist() for each in course.learned] == [
        ids.tolist() for ids in given[:15]
    ]
    nats = []
    for ids in given[15:]:
        with torch.no_grad():
            dense = log_softmax(model(ids).logits[0], dim=-1)
            with skipping(model, plan):
                found = log_softmax(model(ids).logits[0], dim=-1)
        nats += kl_div(found, dense, reduction="none", log_target=True).sum(-1).tolist()
    # Of all their tokens together, the longer one more.
    assert course.divergence() == pytest.approx(sum(nats) / len(nats), rel=1e-4)
