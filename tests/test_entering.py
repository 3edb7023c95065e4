"""What `skipping()` refuses on entering: foreign models, layers and policies."""

from __future__ import annotations

import functools
import re
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, prompt, tiny_model
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from adaskip import (
    AdaskipError,
    EarlyExit,
    FixedSkipping,
    SkipPlan,
    SkipPolicy,
    Step,
    Sublayer,
    UnsupportedModelError,
    skipping,
)
from adaskip.blocks import BLOCKS, BlockSpec
from adaskip.cache_name import CACHE

EMPTY = SkipPlan()


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


def refused(model: Any, message: str, policy: Any = EMPTY, **options: Any) -> None:
    """Entering raises, and leaves the model as it was."""
    before = [dict(vars(m)) for m in model.modules()] if isinstance(model, nn.Module) else None
    with pytest.raises(AdaskipError, match=message) as error, skipping(model, policy, **options):
        pytest.fail("it was not refused")
    assert len(str(error.value)) < 420
    if before is not None:
        assert [dict(vars(m)) for m in model.modules()] == before


class Louder(LlamaDecoderLayer):
    """A layer with a formula of its own, under the family of another."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super().forward(hidden_states, **kwargs) * 2


class Renamed(LlamaDecoderLayer):
    """A layer of another name, and the formula it inherits."""


def of_class(model: PreTrainedModel, kind: type[nn.Module]) -> PreTrainedModel:
    for index in range(len(model.model.layers)):
        layer: Any = kind(model.config, index)
        layer.load_state_dict(model.model.layers[index].state_dict())
        model.model.layers[index] = layer.eval()
    return model


@pytest.mark.parametrize("kind", [Louder, Renamed])
def test_a_layer_of_another_class(model: PreTrainedModel, kind: type[nn.Module]) -> None:
    message = rf"layer 0 \(test_entering\.{kind.__name__}\) is not a class of transformers"
    refused(of_class(model, kind), message)


def test_a_family_of_somebody_elses(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BLOCKS, "llama", BlockSpec(package="test_entering"))
    expected = model(prompt(9)).logits
    with skipping(of_class(model, Renamed), EMPTY, verify=True):
        assert torch.equal(model(prompt(9)).logits, expected)
    # Only trying it tells that the row does not describe this one.
    refused(of_class(model, Louder), r"differ by up to [\d.]+ from those outside", verify=True)


def patched(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states * 2


def on_instance(layer: Any, monkeypatch: Any) -> None:
    layer.forward = types.MethodType(patched, layer)


def on_instance_by_wraps(layer: Any, monkeypatch: Any) -> None:
    layer.forward = functools.wraps(layer.forward)(functools.partial(patched, layer))


def on_instance_of_another(layer: Any, monkeypatch: Any) -> None:
    layer.forward = LlamaDecoderLayer(tiny_model("llama").config, 0).forward


def beneath_accelerate(layer: Any, monkeypatch: Any) -> None:
    on_instance(layer, monkeypatch)
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(layer, hooks.ModelHook())


def above_accelerate(layer: Any, monkeypatch: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    on_instance(layer, monkeypatch)


def on_class(layer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(LlamaDecoderLayer, "forward", patched)


def on_class_by_wraps(layer: Any, monkeypatch: Any) -> None:
    forward = functools.wraps(LlamaDecoderLayer.forward)(patched)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)


def by_another_family(layer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(LlamaDecoderLayer, "forward", MistralDecoderLayer.forward)


PATCHES = [
    on_instance,
    on_instance_by_wraps,
    on_instance_of_another,
    beneath_accelerate,
    above_accelerate,
    on_class,
    on_class_by_wraps,
    by_another_family,
]


@pytest.mark.parametrize("patch", PATCHES)
def test_a_forward_that_another_tool_has_patched(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, patch: Callable[[Any, Any], None]
) -> None:
    patch(model.model.layers[2], monkeypatch)
    name = r"\(transformers\.models\.llama\.modeling_llama\.LlamaDecoderLayer\)"
    refused(model, rf"layer [02] {name} has a forward that another tool has put there")


def test_a_hook_that_accelerate_has_removed_leaves_the_layers_own_forward(
    model: PreTrainedModel,
) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model.model.layers[1], hooks.ModelHook())
    hooks.remove_hook_from_module(model.model.layers[1])
    assert "forward" in vars(model.model.layers[1])
    with skipping(model, EMPTY, verify=True):
        pass


def test_a_sharded_layer_is_still_its_familys(model: PreTrainedModel, tmp_path: Path) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    plan = SkipPlan({Sublayer(1, "ffn"): 1.1})
    with skipping(model, plan):
        expected = model(prompt(9)).logits
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/rendezvous"
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fsdp.fully_shard(layer, mesh=mesh)
        with skipping(model, plan, verify=True):
            assert torch.equal(model(prompt(9)).logits, expected)
    finally:
        torch.distributed.destroy_process_group()


class Counting(SkipPolicy):
    """Notes what reaches it."""

    def __init__(self) -> None:
        self.seen = 0

    def plan(self, step: Step) -> SkipPlan:
        self.seen += 1
        return SkipPlan({Sublayer(1, "ffn"): None})


def test_a_newer_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that calls the KV cache otherwise than any before it."""
    model = tiny_model("llama")

    def forward(self: object, input_ids: object = None, memory: object = None) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(type(model.model), "forward", forward)
    refused(model, rf"LlamaModel\.forward takes no {CACHE}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (known,) = (line for line in project["dependencies"] if line.startswith("transformers"))
    refused(model, re.escape(f"pip install '{known}'"))


@pytest.mark.parametrize("family", BLOCKS)
def test_verifying_reaches_no_policy_and_leaves_the_modes(family: str) -> None:
    model, policy = tiny_model(family, "eager").train(), Counting()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    with skipping(model, policy, recorders=[policy], verify=True) as session:
        assert policy.seen == 0
        assert session.step is None
        assert [module.training for module in model.modules()] == modes
        model(prompt(5))
        assert policy.seen == 1
        assert session.step.request == 0


def test_a_layer_that_is_listed_twice(model: PreTrainedModel) -> None:
    layers: Any = model.model.layers
    layers[2] = layers[1]
    refused(model, "layer 2 is the same module as layer 1")


def test_a_plan_is_a_policy(model: PreTrainedModel) -> None:
    plan = SkipPlan({Sublayer(1, "attn"): 1.2})
    with skipping(model, FixedSkipping(plan)):
        expected = model(prompt(7)).logits
    with skipping(model, plan) as session:
        assert torch.equal(model(prompt(7)).logits, expected)
        assert session.plan == plan


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([Sublayer(1, "ffn")], r"policy is \[Sublayer.* of type list; give a policy"),
        ({Sublayer(1, "ffn")}, "of type set"),
        ({Sublayer(1, "ffn"): None}, r"of type dict.*or a plan, e\.g\. SkipPlan"),
        (None, "policy is None of type NoneType"),
        (EarlyExit, "the class EarlyExit; make one of it"),
        ("ADA", "policy is 'ADA' of type str"),
        (SkipPlan({Sublayer(9, "attn"): None}), "skips attn9, but the model's layers are 0 to 3"),
    ],
)
def test_what_is_no_policy(model: PreTrainedModel, policy: Any, message: str) -> None:
    refused(model, message, policy)


def peft_like(model: PreTrainedModel) -> nn.Module:
    """As PEFT does it: a tuner in `base_model`, both passing on what they do not have."""

    class Passing(nn.Module):
        def __init__(self, name: str, inner: nn.Module) -> None:
            super().__init__()
            self.name = name
            self.add_module(name, inner)

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__(vars(self)["name"]), name)

    return Passing("base_model", Passing("model", model))


WRAPPERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "compiled": (torch.compile, r"of type OptimizedModule.*model\._orig_mod\."),
    "peft": (peft_like, r"pass the model it wraps, model\.base_model\.model\."),
    "parallel": (nn.DataParallel, r"of type DataParallel.*model\.module\."),
    "pipeline": (
        lambda model: types.SimpleNamespace(model=model),
        r"of type SimpleNamespace.*model\.model\.",
    ),
    "name": (lambda model: "smollm2", "of type str.*load one with adaskip.load_model"),
    "none": (lambda model: None, "of type NoneType"),
    "module": (lambda model: nn.Linear(2, 2), "of type Linear"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model(model: PreTrainedModel, wrapper: str) -> None:
    wrap, message = WRAPPERS[wrapper]
    with pytest.raises(UnsupportedModelError, match=message), skipping(wrap(model), EMPTY):
        pass


def test_a_base_model_that_is_compiled(model: PreTrainedModel) -> None:
    model.model = torch.compile(model.model)
    message = r"model\.base_model is of type OptimizedModule.*model\.base_model\._orig_mod"
    with pytest.raises(UnsupportedModelError, match=message), skipping(model, EMPTY):
        pass
