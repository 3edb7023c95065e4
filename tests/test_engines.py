"""Skipping beneath accelerate's hooks, and on models whose weights lie elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import prompt, tiny_model
from transformers import PreTrainedModel

from adaskip import (
    AdaSkip,
    EarlyExit,
    SkipPlan,
    Sublayer,
    UnsupportedModelError,
    distill_plan,
    fit_linears,
    learn_importance,
    make_plan,
    measured_times,
    search_plan,
    skipping,
)

accelerate = pytest.importorskip("accelerate")


def tokens(model: PreTrainedModel) -> torch.Tensor:
    return model.generate(prompt(15), max_new_tokens=8, min_new_tokens=8, do_sample=False)


def dispatched(model: PreTrainedModel) -> PreTrainedModel:
    return accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


def offloaded(model: PreTrainedModel) -> PreTrainedModel:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("dispatch", [dispatched, offloaded])
def test_beneath_the_hooks_of_accelerate(dispatch) -> None:  # type: ignore[no-untyped-def]
    plain, hooked = tiny_model("llama"), dispatch(tiny_model("llama"))
    ids = [prompt(30)]
    importance = learn_importance(plain, ids)
    assert learn_importance(hooked, ids).similarity == pytest.approx(importance.similarity)
    before = [dict(vars(module)) for module in hooked.modules()]
    expected_dense = tokens(plain)
    with skipping(plain, EarlyExit(2)):
        expected = tokens(plain)
    with skipping(hooked, EarlyExit(2)):
        assert torch.equal(tokens(hooked), expected)
        assert all("forward" in vars(layer) for layer in hooked.model.layers)
    assert torch.equal(tokens(hooked), expected_dense)
    after = [dict(vars(module)) for module in hooked.modules()]
    for was, now in zip(before, after, strict=True):
        assert list(was) == list(now)
        assert was.get("forward") is now.get("forward")
        assert was.get("_old_forward") == now.get("_old_forward")


def test_what_takes_layers_apart_refuses_several_devices(tmp_path: Path) -> None:
    model = tiny_model("llama")
    hook = accelerate.hooks.AlignDevicesHook("meta")
    accelerate.hooks.add_hook_to_module(model.model.layers[2], hook)
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    plan, ids, rows = SkipPlan({Sublayer(1, "ffn"): 1.1}), [prompt(40)] * 2, [([5, 6, 7], [8, 9])]
    for act in (
        lambda: measured_times(model, "prefill", 8, folder=tmp_path),
        lambda: fit_linears(model, ids, [Sublayer(1, "ffn")]),
        lambda: distill_plan(model, plan, ids),
        lambda: search_plan(model, rows, windows=(8,)),
        lambda: make_plan(model, rows, "NBL"),
        lambda: make_plan(model, rows, "ADA"),
    ):
        with pytest.raises(UnsupportedModelError, match="layers are on cpu, meta"):
            act()


@pytest.mark.parametrize("dispatch", [dispatched, offloaded])
def test_a_profile_fits_the_dispatched_model(dispatch) -> None:  # type: ignore[no-untyped-def]
    importance = learn_importance(tiny_model("llama"), [prompt(30)])
    with skipping(dispatch(tiny_model("llama")), AdaSkip(importance, 2)) as session:
        assert session.step is None
