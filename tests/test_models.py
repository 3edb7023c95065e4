"""Names, limits, templates and the loading of models by folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from golden_checkpoints import golden_checkpoint
from safetensors.torch import load_file
from transformers import (
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from adaskip.errors import AdaskipError, UnsupportedModelError
from adaskip.models import loading as models, spec as modelspec
from adaskip.models.devices import resolve_device, resolve_dtype
from adaskip.models.loading import load_model, load_tokenizer, model_names, model_spec, random_model
from adaskip.positions import positions, reach


def tiny_config(**changes: Any) -> LlamaConfig:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama checkpoint."""
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path)
    return tmp_path


def check_golden(model: PreTrainedModel, family: str) -> None:
    """Compares the unskipped model with the released code: 40 greedy ids, two rows of logits."""
    prompts = json.loads((GOLDEN / f"{family}-prompts.json").read_text())["target"]
    (case,) = json.loads((GOLDEN / f"{family}-full.json").read_text())
    logits = load_file(GOLDEN / f"{family}-logits.safetensors")["logits"]
    for prompt, expected in zip(prompts, case["requests"], strict=True):
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=40,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        assert output.sequences[0, len(prompt) :].tolist() == expected["generated"]
        for step, row in ((0, "logits_first"), (29, "logits_30th")):
            difference = (output.logits[step][0] - logits[expected[row]]).abs().max()
            assert float(difference) < 2e-4


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_rows_of_the_paper():
    limits = {name: model_spec(name).prompt_limit for name in ("llama", "internlm", "vicuna")}
    assert limits == {"llama": 31500, "internlm": 7500, "vicuna": 15500}
    assert model_names() == ("llama", "internlm", "vicuna", "smollm2", "gemma3", "qwen")
    assert model_spec("internlm").answer_end == "<eoa>"
    assert model_spec("internlm").hub_id == "internlm/internlm-chat-7b-8k"
    assert model_spec("vicuna").hub_id == "lmsys/vicuna-7b-v1.5-16k"
    assert {model_spec(name).hub_id for name in ("smollm2", "gemma3", "qwen")} == {None}


def test_templates_character_by_character():
    text = "a {b} {prompt_limit} c"
    assert model_spec("llama").wrap(text) == text
    assert model_spec("internlm").wrap(text) == "<|User|>:" + text + "<eoh>\n<|Bot|>:"
    assert model_spec("vicuna").wrap(text) == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
        " USER: " + text + " ASSISTANT:"
    )


def test_every_limit_leaves_room_for_the_longest_answer():
    positions = {"llama": 131072, "internlm": 8192, "vicuna": 16384, "smollm2": 8192}
    positions |= {"gemma3": 32768, "qwen": 32768}
    for name, total in positions.items():
        shape = model_spec(name).shape
        factor = shape.get("rope_parameters", {}).get("factor", 1.0) if name == "vicuna" else 1.0
        assert shape["max_position_embeddings"] * factor == total
        assert model_spec(name).prompt_limit + 512 <= total


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama", 8_030_261_248),
        # Vicuna with a larger vocabulary (twice: input and output) and four biases per layer.
        ("internlm", 6_738_415_616 + 2 * (103_168 - 32_000) * 4096 + 32 * 4 * 4096),
        ("vicuna", 6_738_415_616),
        ("smollm2", 134_515_008),
        ("gemma3", 268_098_176),
        # The published 494,032,768 and a second embedding.
        ("qwen", 494_032_768 + 151_936 * 896),
    ],
)
def test_shapes_have_the_models_parameter_counts(name: str, parameters: int):
    config = models.build_config(model_spec(name).shape)
    with torch.device("meta"):
        model = models.AUTO_MODEL.from_config(config)
    model.tie_weights()
    assert model.num_parameters() == parameters


def test_random_model_is_small_repeatable_and_leaves_the_generator_alone():
    before = torch.random.get_rng_state()
    first = random_model("smollm2", dtype="bfloat16", device="cpu", n_layers=1)
    second = random_model("smollm2", dtype="bfloat16", device="cpu", n_layers=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.config.num_hidden_layers == 1
    assert first.dtype == torch.bfloat16
    assert first.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not first.training
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)
    spread = first.model.layers[0].mlp.up_proj.weight.detach().float().std()
    assert float(spread) == pytest.approx(0.02, rel=0.01)
    assert first(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("n_layers", [0, -1])
def test_random_model_refuses_no_layers(n_layers: int):
    with pytest.raises(AdaskipError, match="at least 1"):
        random_model("smollm2", n_layers=n_layers)


def test_random_model_knows_short_names_only(folder: Path):
    with pytest.raises(AdaskipError, match="Unknown model"):
        random_model(str(folder))


@pytest.mark.parametrize("split", [{"device_map": "auto"}, {"tp_plan": "auto"}])
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_split_model_is_on_no_other_device(
    device: str, split: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    # Before anything is loaded: there is no such model.
    with pytest.raises(AdaskipError, match=f"is on all cuda devices, not on {device}: leave"):
        load_model("nowhere/none", device=device, **split)


def test_a_folder_loads_in_eval_mode_with_the_asked_dtype(folder: Path):
    model = load_model(folder, dtype="float16", device="cpu")
    assert (model.dtype, model.device.type, model.training) == (torch.float16, "cpu", False)
    assert load_model(str(folder), device="cpu").dtype == torch.float32
    if not torch.backends.mps.is_available():
        with pytest.raises(AdaskipError, match="cannot be put on mps"):
            load_model(folder, device="mps")
    # A part is left for template and answer.
    assert model_spec(folder).prompt_limit == 28
    assert model_spec(folder).template is None


def test_a_mistral_with_kinds_of_layers_is_the_model_that_transformers_makes(tmp_path: Path):
    """A Ministral, of whose layers some slide; as a Mistral, all would."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}
    kinds = ["full_attention", "sliding_attention"]
    torch.manual_seed(0)
    config = MinistralConfig(**sizes, **heads, head_dim=8, sliding_window=4, layer_types=kinds)
    MinistralForCausalLM(config).save_pretrained(tmp_path)
    edit_config(tmp_path, model_type="mistral", architectures=["MistralForCausalLM"])
    loaded = load_model(tmp_path, device="cpu")
    stock = models.AUTO_MODEL.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(stock) is MinistralForCausalLM
    ids = torch.arange(3, 15)[None]
    assert torch.equal(loaded(ids).logits, stock(ids).logits)


def test_loading_leaves_the_random_generator_alone(folder: Path):
    before = torch.random.get_rng_state()
    load_model(folder, device="cpu")
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_folder_before_a_hub_id_and_a_short_name_before_a_folder(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    here = tmp_path_factory.mktemp("here")
    for name in ("mine", "owner/mine", "llama"):
        shutil.copytree(folder, here / name)
    monkeypatch.chdir(here)
    assert modelspec.model_source("mine") == "mine"
    assert modelspec.model_source("owner/mine") == "owner/mine"
    assert load_model("owner/mine", device="cpu").config.hidden_size == 16
    assert modelspec.model_source("llama") == "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "llamma",
            r"Unknown model 'llamma'. Did you mean 'llama'\? Choose one of: gemma3, internlm, ",
        ),
        ("./no/such", "There is no folder './no/such'"),
        ("/no/such", "There is no folder '/no/such'"),
        ("a/b/c", "There is no folder 'a/b/c'"),
        (__file__, "is a file: give the folder"),
    ],
)
@pytest.mark.parametrize("call", [load_model, load_tokenizer, model_spec])
def test_what_is_no_model_is_refused(call: Any, name: str, message: str):
    with pytest.raises(AdaskipError, match=message):
        call(name)


def test_a_hub_out_of_reach_names_the_way_out(monkeypatch: pytest.MonkeyPatch):
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise OSError("We couldn't connect.\nMore lines.")

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", offline)
    with pytest.raises(AdaskipError) as caught:
        load_model("llama", device="cpu")
    assert "give its folder (--model_path FOLDER)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unsupported_family_is_found_before_its_weights(tmp_path: Path):
    GPTNeoXConfig().save_pretrained(tmp_path)  # and no weights at all
    with pytest.raises(UnsupportedModelError, match="gpt_neox"):
        load_model(tmp_path, device="cpu")


def test_remote_code_is_never_run(folder: Path):
    (folder / "evil.py").write_text("raise SystemExit('remote code was run')\n")
    edit_config(folder, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    assert type(load_model(folder, device="cpu")) is LlamaForCausalLM
    edit_config(folder, model_type="evil")
    with pytest.raises(UnsupportedModelError):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "config.json"), ('{"a": 1}', "model_type"), (None, "model_type")],
)
def test_damaged_configurations(tmp_path: Path, content: str | None, message: str):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(AdaskipError, match=message):
        load_model(tmp_path, device="cpu")


def test_missing_truncated_and_wrong_weights(folder: Path):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(AdaskipError, match="Cannot load the weights"):
        load_model(folder, device="cpu")
    weights.write_bytes(content)
    edit_config(folder, intermediate_size=32)
    with pytest.raises(AdaskipError, match=r"6 mismatched \(model\.layers\.0\.mlp\.down_proj"):
        load_model(folder, device="cpu")
    edit_config(folder, intermediate_size=24, num_hidden_layers=3)
    with pytest.raises(AdaskipError, match=r"9 missing \(model\.layers\.2\."):
        load_model(folder, device="cpu")
    weights.unlink()
    with pytest.raises(AdaskipError, match="no file named"):
        load_model(folder, device="cpu")


def test_bin_weights_are_read_as_tensors_only_and_if_allowed(folder: Path):
    reference = load_model(folder, device="cpu")
    (folder / "model.safetensors").unlink()
    state = reference.state_dict()
    # Old checkpoints, Vicuna's and InternLM's among them, carry this buffer in every layer.
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(AdaskipError, match="--allow_pickle"):
        load_model(folder, device="cpu")
    loaded = load_model(folder, device="cpu", allow_pickle=True).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in reference.state_dict().items())
    torch.save({"model.norm.weight": Path}, folder / "pytorch_model.bin")
    with pytest.raises(AdaskipError, match="Cannot load the weights"):
        load_model(folder, device="cpu", allow_pickle=True)


def test_devices_and_dtypes():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_dtype(None, torch.device("cpu")) == torch.float32
    assert resolve_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("float16") == resolve_dtype(torch.float16) == torch.float16
    with pytest.raises(AdaskipError, match=r"'bf16'. Did you mean 'bfloat16'\?"):
        resolve_dtype("bf16")
    with pytest.raises(AdaskipError, match="Choose one of: bfloat16, float16, float32"):
        resolve_dtype(torch.int8)
    with pytest.raises(AdaskipError, match="Unknown device 'gpu'"):
        resolve_device("gpu")


def test_a_cuda_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device().type == "cpu"
    with pytest.raises(AdaskipError, match="'cuda' is not available: 0 CUDA devices"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device() == torch.device("cuda")
    with pytest.raises(AdaskipError, match="'cuda:1' is not available"):
        resolve_device("cuda:1")


def test_a_folder_without_tokenizer(folder: Path):
    with pytest.raises(AdaskipError, match="holds no tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("family", ["llama", "vicuna"])
def test_old_configurations_give_the_golden_answers(family: str):
    model = load_model(golden_checkpoint(family), device="cpu")
    rope = model.config.rope_parameters
    expected = {"llama": ("default", 5e5, None), "vicuna": ("linear", 1e4, 4.0)}[family]
    assert (rope["rope_type"], rope["rope_theta"], rope.get("factor")) == expected
    check_golden(model, family)


@pytest.mark.parametrize(
    ("trained", "rope", "expected"),
    [
        (4096, None, 4096),
        (4096, {"rope_type": "default"}, 4096),
        # Vicuna 16k, and as its own file has it.
        (4096, {"rope_type": "linear", "factor": 4.0}, 16384),
        (4096, {"type": "linear", "factor": 4.0}, 16384),
        # Llama 3.1 tells the stretched positions.
        (
            131072,
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            131072,
        ),
        # So does Llama 3.2.
        (
            131072,
            {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192},
            131072,
        ),
        # Qwen2.5 with YaRN does not.
        (
            32768,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            131072,
        ),
        # Gemma 3 stretches the layers that see all.
        (
            131072,
            {
                "sliding_attention": {"rope_type": "default"},
                "full_attention": {"rope_type": "linear", "factor": 8.0},
            },
            131072,
        ),
        (8192, {"rope_type": "dynamic", "factor": 1.0}, 8192),
    ],
)
def test_positions_are_those_of_the_stretched_model(
    trained: int, rope: dict[str, Any] | None, expected: int
) -> None:
    assert reach(trained, rope) == expected


def test_the_models_have_positions_for_their_longest_prompts() -> None:
    for name in model_names():
        spec = model_spec(name)
        config = random_model(name, device="meta", n_layers=7).config
        assert config.num_hidden_layers == 7
        limit = positions(config)
        assert limit is not None
        assert spec.prompt_limit + 512 <= limit, name
