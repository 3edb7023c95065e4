"""SmolLM2: the packaged GGUF as a model, its tokenizer and its profile."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from packaged_models import installed_parts, needs
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from adaskip import AdaSkip, Importance, SkipPlan, Sublayer, learn_importance, skipping
from adaskip.errors import ProfileError
from adaskip.models.loading import load_model, load_tokenizer, model_spec
from adaskip.models.spec import model_source

needs_package = needs("smollm2")
# Of the files since the first release: caches of older versions hold the same.
SHA256 = {
    "config.json": "b45c4cb34605a1ad6a20d106af55aeeacb6d1d77024f74add7268b1c72984fb7",
    "generation_config.json": "8025b6679dcf077f5d339bd154238d70891decb48f35f294bfaa33a343140439",
    "tokenizer.json": "7d27c493c729a66ecefc837280b05d948b1ed50d130eebdbf911b1b36cf38ed7",
    "tokenizer_config.json": "f1c0f164a42fa039873ddad2f9bf89476a51c2417529d11da1044953104b5560",
    "model.safetensors": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_model("smollm2", device="cpu")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("smollm2")


@needs_package
@pytest.mark.parametrize("name", SHA256)
def test_the_converted_files_are_the_ones_known(name: str):
    content = (Path(model_source("smollm2")) / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256[name]


@needs_package
def test_configuration_is_the_published_one(model: PreTrainedModel):
    shape = dict(model_spec("smollm2").shape)
    for name, value in shape.items():
        assert getattr(model.config, name) == value
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == 134_515_008


@needs_package
def test_a_model_loaded_from_gguf_is_the_converted_one(model: PreTrainedModel):
    """As transformers itself loads the file, quantizer and all."""
    [gguf] = installed_parts("smollm2") or []
    loaded: Any = AutoModelForCausalLM
    plain = loaded.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    ids, logits = torch.arange(40)[None] + 100, []
    plan = SkipPlan({Sublayer(0, "attn"): None, Sublayer(2, "ffn"): None, Sublayer(3, "attn"): 1.1})
    for each in (plain, model):
        with torch.no_grad(), skipping(each, plan):
            logits.append(each(ids).logits)
    assert torch.equal(*logits)
    learned = learn_importance(model, [ids])
    with skipping(plain, AdaSkip(learned, 8)):  # not refused: it is the same model
        answer = plain.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert answer.shape == (1, 48)


@needs_package
def test_weights_are_the_dequantized_ones(model: PreTrainedModel):
    """A 4-bit block is 32 values `scale * digit + minimum`, both float16; digits come in halves."""
    import numpy as np
    from gguf import GGUFReader

    [gguf] = installed_parts("smollm2") or []
    tensors = {tensor.name: tensor for tensor in GGUFReader(str(gguf)).tensors}
    block = np.asarray(tensors["blk.3.ffn_up.weight"].data)[0, :20]
    scale, minimum = block[:4].copy().view(np.float16).astype(np.float32)
    digits = np.concatenate([block[4:] & 15, block[4:] >> 4]).astype(np.float32)
    expected = torch.from_numpy(digits * scale + minimum)
    assert torch.equal(model.model.layers[3].mlp.up_proj.weight[0, :32], expected)
    # Row 1 of a head in GGUF is its row 32 here: rotary pairs are apart by half a head.
    block = np.asarray(tensors["blk.3.attn_q.weight"].data)[1, :20]
    scale, minimum = block[:4].copy().view(np.float16).astype(np.float32)
    digits = np.concatenate([block[4:] & 15, block[4:] >> 4]).astype(np.float32)
    expected = torch.from_numpy(digits * scale + minimum)
    assert torch.equal(model.model.layers[3].self_attn.q_proj.weight[32, :32], expected)


@needs_package
def test_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert model.generation_config.eos_token_id == 2
    assert tokenizer("a<|im_end|>").input_ids[-1] == 2
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert tokenizer.model_max_length == 8192


@needs_package
@pytest.mark.parametrize("text", ["In 2024, it's 12345.", "a\n\n  b", "naïve 你好", " x", ""])
def test_text_round_trip(tokenizer: PreTrainedTokenizerBase, text: str):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text


@needs_package
def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerBase):
    assert tokenizer.tokenize("In 2024") == ["In", "Ġ", "2", "0", "2", "4"]


@needs_package
def test_our_template_is_its_chat_template(tokenizer: PreTrainedTokenizerBase):
    chat = [{"role": "user", "content": "Who?"}]
    expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert model_spec("smollm2").wrap("Who?") == expected


@needs_package
def test_it_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    prompt = model_spec("smollm2").wrap("What is the capital of France? Answer in one sentence.")
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = output[0, inputs.input_ids.shape[1] :].tolist()
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == 2


@needs_package
def test_it_can_be_saved_and_carries_no_quantization_record(model: PreTrainedModel, tmp_path: Path):
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "model.safetensors").unlink()


@needs_package
def test_the_shipped_profile_is_this_models(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
):
    shipped = Importance.load("smollm2")
    shipped.check_model(model)
    assert shipped.n_requests == 20
    # A text of another kind tells something near to it.
    text = "Importance of a sublayer is how much it changes what passes through it. " * 20
    other = learn_importance(model, [text], tokenizer=tokenizer)
    common = set(shipped.ranking()[:16]) & set(other.ranking()[:16])
    assert len(common) >= 10


def test_a_profile_that_is_not_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ProfileError, match=r"profile at smolm2; shipped are .*: gemma3, .*smollm2"):
        Importance.load("smolm2")
    # A file of the name comes first.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").write_text("{")
    with pytest.raises(ProfileError, match="smollm2 cannot be read"):
        Importance.load("smollm2")


@needs_package
def test_loading_again_is_quick(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    start = time.process_time()  # what else the machine does is not its fault
    load_model("smollm2", device="cpu")
    load_tokenizer("smollm2")
    assert time.process_time() - start < 3
