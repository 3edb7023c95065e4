"""Gemma 3 270M and Qwen2.5-Coder-0.5B-Instruct where they are installed (make models)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packaged_models import needs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaskip import (
    Importance,
    SkipPlan,
    Sublayer,
    Window,
    export_checkpoint,
    learn_importance,
    skipping,
)
from adaskip.errors import AdaskipError
from adaskip.models.loading import load_model, load_tokenizer, model_spec

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
TEXT = "Importance of a sublayer is how much it changes what passes through it. " * 12


@pytest.fixture(scope="module")
def gemma3() -> Loaded:
    return load_model("gemma3", device="cpu"), load_tokenizer("gemma3")


@pytest.fixture(scope="module")
def qwen() -> Loaded:
    return load_model("qwen", device="cpu"), load_tokenizer("qwen")


@needs("gemma3")
def test_gemma3_is_what_its_row_says(gemma3: Loaded):
    model, tokenizer = gemma3
    for name, value in model_spec("gemma3").shape.items():
        assert getattr(model.config, name) == value
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) == model.config.vocab_size == 262144
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert ids == (0, 1, 2)
    assert tokenizer.chat_template is None


@needs("gemma3")
def test_gemma3_cuts_texts_as_published(gemma3: Loaded):
    """As llama.cpp does; transformers 5.23 cuts runs of more than 31 spaces otherwise."""
    _, tokenizer = gemma3
    text = "The capital of Germany is\n\n  it's 12345 你好"
    expected = [2, 818, 5279, 529, 9405, 563, 108, 138, 509, 236789, 236751, 236743]
    expected += [236770, 236778, 236800, 236812, 236810, 43758, 237389]
    assert tokenizer(text).input_ids == expected
    assert tokenizer.decode(expected, skip_special_tokens=True) == text
    assert tokenizer(" " * 35 + "x").input_ids == [2, 167, 140, 236781]


@needs("gemma3")
def test_gemma3_says_what_transformers_reads_from_the_same_file(gemma3: Loaded):
    model, tokenizer = gemma3
    inputs = tokenizer("The capital of Germany is", return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs).logits[0, -1].softmax(-1).topk(3)
    assert [tokenizer.decode([i]) for i in found.indices.tolist()] == [" the", " a", " Berlin"]
    assert found.values.tolist() == pytest.approx([0.152, 0.126, 0.088], abs=1e-3)


@needs("gemma3")
def test_importance_of_gemma3_is_learned_and_its_full_attentions_take_windows(gemma3: Loaded):
    model, tokenizer = gemma3
    importance = learn_importance(model, [TEXT], tokenizer=tokenizer)
    assert len(importance.ranking()) == 36
    inputs = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        dense = model(**inputs).logits
    # A window that nothing lies outside of is the dense attention.
    plan = SkipPlan({Sublayer(layer, "attn"): Window(512) for layer in (5, 11, 17)})
    with skipping(model, plan), torch.no_grad():
        assert torch.allclose(model(**inputs).logits, dense, atol=1e-3)
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.tolist() == model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()
    sliding = SkipPlan({Sublayer(4, "attn"): Window(512)})
    with (
        pytest.raises(AdaskipError, match="layer 4 a Window, but the model gives it a sliding"),
        skipping(model, sliding),
    ):
        model(**inputs)


def check_profile(name: str, loaded: Loaded) -> None:
    """The shipped profile is this model's; a text of another kind tells something near to it."""
    shipped = Importance.load(name)
    shipped.check_model(loaded[0])
    other = learn_importance(loaded[0], [TEXT], tokenizer=loaded[1])
    assert len({*shipped.ranking()[:10]} & {*other.ranking()[:10]}) >= 6


@needs("gemma3")
def test_the_shipped_profile_of_gemma3_is_this_models(gemma3: Loaded):
    check_profile("gemma3", gemma3)


@needs("qwen")
def test_the_shipped_profile_of_qwen_is_this_models(qwen: Loaded):
    check_profile("qwen", qwen)


@needs("gemma3")
def test_gemma3_is_not_written_as_gguf(gemma3: Loaded, tmp_path: Path):
    plan = SkipPlan({Sublayer(3, "attn"): None})
    with pytest.raises(AdaskipError, match="gemma3_text"):
        export_checkpoint(*gemma3, plan, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


@needs("qwen")
def test_qwen_is_what_its_row_says(qwen: Loaded):
    model, tokenizer = qwen
    for name, value in model_spec("qwen").shape.items():
        assert getattr(model.config, name) == value
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.generation_config.eos_token_id == [151645, 151643]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 151645)
    assert tokenizer.pad_token_id == tokenizer.bos_token_id == 151643
    text = "The capital of Germany is\n\n  it's 12345 你好"
    expected = [785, 6722, 315, 9856, 374, 271, 220, 432, 594, 220, 16, 17, 18, 19, 20, 220, 108386]
    assert tokenizer(text).input_ids == expected
    assert tokenizer.decode(expected) == text


@needs("qwen")
def test_our_template_is_the_chat_template_of_qwen(qwen: Loaded):
    _, tokenizer = qwen
    chat = [{"role": "user", "content": "Who?"}]
    expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert model_spec("qwen").wrap("Who?") == expected


@needs("qwen")
def test_qwen_continues_with_and_without_a_skipped_sublayer(qwen: Loaded):
    model, tokenizer = qwen
    inputs = tokenizer("The capital of Germany is", return_tensors="pt")
    plan = SkipPlan({Sublayer(20, "attn"): None})
    answers = [model.generate(**inputs, max_new_tokens=1, do_sample=False)]
    with skipping(model, plan):
        answers.append(model.generate(**inputs, max_new_tokens=1, do_sample=False))
    assert [tokenizer.decode(answer[0, -1:]) for answer in answers] == [" Berlin", " Berlin"]
