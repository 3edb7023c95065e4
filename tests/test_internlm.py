"""InternLM v1: configuration, weights, exact range, tokenizer."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_checkpoints import golden_checkpoint
from test_models import check_golden
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from adaskip import SkipPlan, Sublayer, export_checkpoint
from adaskip.errors import AdaskipError, UnsupportedCallError, UnsupportedModelError
from adaskip.models import internlm
from adaskip.models.internlm import check_prompt_length, position_limit
from adaskip.models.loading import load_model, load_tokenizer, model_spec

CONFIG: dict[str, Any] = {
    "model_type": "internlm",
    "architectures": ["InternLMForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"},
    "bias": True,
    "rotary": {"base": 10000, "type": "dynamic"},
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 12,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TEXTS = [
    "Hello world, it is 12 o'clock.",
    "The brown fox can't jump!",
    "What is it ?",
    "你好，世界",
]


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny InternLM checkpoint, exact up to 12 tokens."""
    torch.manual_seed(0)
    LlamaForCausalLM(internlm.llama_config(CONFIG)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    write_config(tmp_path)
    return tmp_path


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return load_model(folder, device="cpu")


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a tiny sentencepiece model and InternLM's added tokens."""
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("pieces")
    with (folder / "tokenizer.model").open("wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 9),
            model_writer=file,
            vocab_size=330,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    size = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    write_config(folder, vocab_size=size + 2)
    (folder / "added_tokens.json").write_text(json.dumps({"<eoh>": size, "<eoa>": size + 1}))
    settings = {
        "auto_map": {"AutoTokenizer": ["tokenization_internlm.InternLMTokenizer", None]},
        "tokenizer_class": "InternLMTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_configuration_becomes_llama():
    config = internlm.llama_config(CONFIG)
    assert (config.model_type, config.attention_bias, config.mlp_bias) == ("llama", True, False)
    assert config.rope_parameters == {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0}
    assert position_limit(config) == 12
    plain = internlm.llama_config(CONFIG | {"rotary": {"base": 5, "type": "origin"}, "bias": False})
    assert plain.rope_parameters["rope_type"] == "default"
    assert plain.rope_parameters["rope_theta"] == 5.0
    assert not plain.attention_bias
    assert position_limit(plain) is None


def test_old_configurations_without_rotary_bias_and_kv_heads():
    missing = ("rotary", "bias", "num_key_value_heads")
    config = internlm.llama_config({k: v for k, v in CONFIG.items() if k not in missing})
    assert config.rope_parameters["rope_type"] == "dynamic"
    assert config.attention_bias
    assert config.num_key_value_heads == 2


@pytest.mark.parametrize(
    "rotary",
    [{"base": 1, "type": "linear"}, {"base": 1, "type": "dynamic", "scaling_factor": 2.0}],
)
def test_other_rotaries_are_refused(rotary: dict[str, Any]):
    with pytest.raises(UnsupportedModelError, match="rotary"):
        internlm.llama_config(CONFIG | {"rotary": rotary})


def test_it_loads_natively_with_biases_on_attention_only(model: PreTrainedModel):
    assert type(model) is LlamaForCausalLM
    layer = model.model.layers[0]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert getattr(layer.self_attn, name).bias is not None
    assert layer.mlp.up_proj.bias is None


@pytest.mark.parametrize(
    ("written", "read", "message"),
    [
        (False, True, r"8 missing \(model\.layers\.0"),
        (True, False, r"8 unexpected \(model\.layers"),
    ],
)
def test_weights_must_be_complete(folder: Path, written: bool, read: bool, message: str):
    LlamaForCausalLM(internlm.llama_config(CONFIG | {"bias": written})).save_pretrained(folder)
    write_config(folder, bias=read)
    with pytest.raises(AdaskipError, match=message):
        load_model(folder, device="cpu")


def test_golden_answers():
    model = load_model(golden_checkpoint("internlm-origin"), device="cpu")
    check_golden(model, "internlm-origin")
    model(torch.ones(1, 600, dtype=torch.long))  # "origin" has no limit


def test_dynamic_and_default_rotary_agree_within_the_exact_range():
    dynamic = load_model(golden_checkpoint("internlm"), device="cpu")
    plain = load_model(golden_checkpoint("internlm-origin"), device="cpu")
    ids = torch.arange(3, 67)[None]
    assert torch.equal(dynamic(ids).logits, plain(ids).logits)


def test_forward_refuses_more_than_the_exact_range(model: PreTrainedModel):
    ids = torch.ones(1, 13, dtype=torch.long)
    assert model(ids[:, :12]).logits.shape == (1, 12, 64)
    embeds = model.get_input_embeddings()(ids)
    for call in (
        lambda: model(ids),
        lambda: model.model(ids),
        lambda: model(inputs_embeds=embeds),
        lambda: model.generate(ids, max_new_tokens=1),
        lambda: model.generate(ids[:, :10], max_new_tokens=4, min_new_tokens=4, do_sample=False),
        lambda: model.generate(
            ids[:, :10],
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            cache_implementation="static",
        ),
    ):
        with pytest.raises(UnsupportedCallError, match="exact only up to 12 tokens"):
            call()
    answer = model.generate(ids[:, :10], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape == (1, 13)  # the last token is never an input


def test_continuous_batching_cannot_be_held_to_it(model: PreTrainedModel):
    for call in (lambda: model.generate_batch([[3, 4]]), lambda: model.init_continuous_batching()):
        with pytest.raises(UnsupportedCallError, match="cannot be held to; use generate"):
            call()


def test_decode_steps_count_what_the_cache_holds(model: PreTrainedModel):
    cache = DynamicCache(config=model.config)
    ids = torch.ones(1, 12, dtype=torch.long)
    model(ids[:, :11], past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)
    with pytest.raises(UnsupportedCallError, match="this forward reaches 13"):
        model(ids[:, :1], past_key_values=cache)


def test_the_limit_survives_saving(model: PreTrainedModel, tmp_path: Path):
    model.save_pretrained(tmp_path / "copy")
    with pytest.raises(UnsupportedCallError, match="exact only up to 12 tokens"):
        load_model(tmp_path / "copy", device="cpu")(torch.ones(1, 13, dtype=torch.long))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_the_limit_survives_copying_and_compiling(model: PreTrainedModel, copied: Any):
    ids = torch.ones(1, 13, dtype=torch.long)
    compiled = torch.compile(copied(model), backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids[:, :12]).logits, model(ids[:, :12]).logits)
        with pytest.raises(UnsupportedCallError, match="exact only up to 12 tokens"):
            compiled(ids)


def test_check_prompt_length(model: PreTrainedModel):
    check_prompt_length(model, 12)
    check_prompt_length(model, 10, n_new=3)
    for n_tokens, n_new in ((13, 0), (10, 4)):
        with pytest.raises(UnsupportedCallError, match=f"this prompt has {n_tokens} tokens"):
            check_prompt_length(model, n_tokens, n_new)


def test_limits_of_the_default_checkpoint():
    shape = model_spec("internlm").shape
    assert position_limit(internlm.llama_config(shape)) == 8192


@pytest.mark.parametrize("text", [*TEXTS, "two  spaces\nand é 世 unseen"])
def test_tokenizer_equals_sentencepiece(pieces: Path, text: str):
    from sentencepiece import SentencePieceProcessor

    tokenizer = load_tokenizer(pieces)
    processor = SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    ids = processor.encode(text)
    assert tokenizer(text).input_ids == [1, *ids]
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    decoded = tokenizer.decode([1, *ids, 2], skip_special_tokens=True)
    assert decoded == processor.decode(ids).replace(" ?", "?")


def test_decode_rule(pieces: Path):
    tokenizer = load_tokenizer(pieces)
    ids = tokenizer.encode("What is it ?", add_special_tokens=False)
    assert tokenizer.decode(ids) == "What is it?"
    # A run of special tokens puts one space before the text in front of it.
    assert tokenizer.decode([1, *ids]) == " <s>What is it?"
    assert tokenizer.decode([*ids, 2, 2, *ids]) == " What is it?</s></s>What is it?"
    assert tokenizer.decode([]) == ""
    spaced = "it 's , I 've , do n't"
    assert tokenizer.decode(tokenizer.encode(spaced)[1:]) == "it's, I've, don't"


def test_chat_prompt_and_answer(pieces: Path):
    tokenizer, spec = load_tokenizer(pieces), model_spec("internlm")
    size = tokenizer.vocab_size
    assert tokenizer.convert_tokens_to_ids(["<eoh>", "<eoa>"]) == [size, size + 1]
    ids = tokenizer(spec.wrap("Hello world")).input_ids
    assert ids[0] == 1
    assert ids.count(size) == 1
    answer = tokenizer.encode("it is 12", add_special_tokens=False)
    text = tokenizer.decode([*answer, size + 1, *answer], skip_special_tokens=True)
    assert text.partition(str(spec.answer_end))[0] == "it is 12"


def test_batches_are_padded_on_the_left(pieces: Path):
    tokenizer = load_tokenizer(pieces)
    batch = tokenizer(["Hello world", "Hello"], padding=True)
    assert batch.input_ids[1][0] == tokenizer.pad_token_id == 2
    assert batch.attention_mask[1][0] == 0


def test_tokenizer_survives_saving(pieces: Path, tmp_path: Path):
    tokenizer = load_tokenizer(pieces)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as a converted model's
    again = load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer)
    assert again("Hello<eoh> 12").input_ids == tokenizer("Hello<eoh> 12").input_ids


def test_an_export_says_its_limit_and_that_its_tokenizer_is_ours(pieces: Path, tmp_path: Path):
    vocab_size = json.loads((pieces / "config.json").read_text())["vocab_size"]
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": 256}
    model = LlamaForCausalLM(internlm.llama_config(CONFIG | sizes)).eval()
    tokenizer, plan = load_tokenizer(pieces), SkipPlan({Sublayer(0, "attn"): None})
    report = export_checkpoint(model, tokenizer, plan, tmp_path / "out")
    said = "; exact up to 256 tokens; with token ids only, for its InternLMTokenizer"
    assert said in report.engines["transformers"]
    assert report.engines["vLLM"].startswith("no: its first layer needs an attention")
    assert "tokens" not in report.engines["vLLM"]
    assert type(load_tokenizer(tmp_path / "out")) is type(tokenizer)


def test_a_damaged_tokenizer(pieces: Path, tmp_path: Path):
    shutil.copytree(pieces, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(AdaskipError, match="Cannot load the tokenizer"):
        load_tokenizer(tmp_path / "copy")
