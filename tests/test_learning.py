"""What importance is learned from: prompts that cannot be right, and models left in train mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, prompt, tiny_model
from run_fixtures import save_checkpoint
from transformers import PreTrainedModel

from adaskip import (
    ProfileError,
    UnsupportedModelError,
    learn_importance,
    load_model,
    load_tokenizer,
)


def must_not_run(model: PreTrainedModel) -> PreTrainedModel:
    """The model, which fails a test in which any part of its decoder runs."""
    for module in model.model.modules():
        module.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    return model


@pytest.fixture
def unused() -> PreTrainedModel:
    return must_not_run(tiny_model("llama"))


def masked(mask: Any, ids: torch.Tensor | None = None) -> list[dict[str, Any]]:
    return [{"input_ids": prompt(4, batch=2) if ids is None else ids, "attention_mask": mask}]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("some text", "are one str; give a list of input ids"),
        (["some text"], "input_ids of prompt 1 is a str; .* or of texts with tokenizer="),
        (prompt(5), "are one Tensor; give a list"),
        (None, "are one NoneType"),
        ({"input_ids": prompt(5)}, "are one dict"),
        ([prompt(5), [1, 2, 3]], "prompt 2 is a list"),
        ([{"input_ids": [[1, 2]]}], "prompt 1 is a list"),
        ([{"attention_mask": torch.ones(1, 4)}], "input_ids of prompt 1 is a NoneType"),
        (
            [{"input_ids": prompt(5), "attention_mask": None}],
            "attention_mask of prompt 1 is a None",
        ),
        ([prompt(5)[0]], r"shape \[5\].*adds a batch dimension"),
        ([prompt(5), prompt(5).float()], r"Prompt 2 is torch.float32.*must be int64 ids"),
        ([prompt(5)[:, :0]], r"shape \[1, 0\].*one token or more"),
        ([prompt(5)[:0]], r"shape \[0, 5\]"),
        ([prompt(5) * 0 + VOCAB], f"from {VOCAB} to {VOCAB}, but the model knows 0 to {VOCAB - 1}"),
        ([prompt(5) - 50], "ids from -"),
        (masked(torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])), "prompt 1 is padding only"),
        (masked(torch.ones(2, 3)), r"shape \[2, 3\], its input_ids of \[2, 4\]"),
        ([], "at least one"),
        (iter([prompt(5), prompt(5)[0]]), "Prompt 2"),
    ],
)
def test_prompts_that_cannot_be_right(unused: PreTrainedModel, prompts: Any, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        learn_importance(unused, prompts)


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_prompts_that_are_right(kind: Callable[[list[torch.Tensor]], Iterator[Any]]) -> None:
    importance = learn_importance(tiny_model("llama"), kind([prompt(5), prompt(5).int()]))
    assert importance.n_requests == 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 1,024 positions whose tokens are bytes."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_texts_are_prompts_with_a_tokenizer(checkpoint: Path) -> None:
    model, tokenizer = load_model(checkpoint, device="cpu"), load_tokenizer(checkpoint)
    texts = ["a text of some length", "another one"]
    ids = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    expected = learn_importance(model, ids)
    assert learn_importance(model, texts, tokenizer=tokenizer) == expected
    assert learn_importance(model, [texts[0], ids[1]], tokenizer=tokenizer) == expected
    with pytest.raises(ProfileError, match="are one str"):
        learn_importance(model, texts[0], tokenizer=tokenizer)
    with pytest.raises(ProfileError, match="Text 2 has no token"):
        learn_importance(model, ["a", ""], tokenizer=tokenizer)


def test_a_text_beyond_the_model_is_cut_and_that_is_said(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load_model(checkpoint, device="cpu"), load_tokenizer(checkpoint)
    found = learn_importance(model, ["long " * 300], tokenizer=tokenizer)
    assert found == learn_importance(model, ["long " * 204 + "long"], tokenizer=tokenizer)
    assert found.n_tokens == 1024
    assert "Text 1 has 1500 tokens; the first 1024" in caplog.text


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: None])
def test_a_model_that_is_wrapped_or_missing(
    unused: PreTrainedModel, wrap: Callable[[Any], Any]
) -> None:
    with pytest.raises(UnsupportedModelError, match="not a transformers PreTrainedModel"):
        learn_importance(wrap(unused), [prompt(5)])


def test_dropout_does_not_reach_what_is_learned() -> None:
    model = tiny_model("phi3")
    for layer in model.model.layers:
        layer.resid_attn_dropout.p = layer.resid_mlp_dropout.p = 0.5
    expected = learn_importance(model, [prompt(20)])
    model.train()
    # Modules that the user froze keep their mode, too.
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert learn_importance(model, [prompt(20)]) == expected
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ProfileError):
        learn_importance(model, [prompt(20)[0]])
    assert [module.training for module in model.modules()] == modes
