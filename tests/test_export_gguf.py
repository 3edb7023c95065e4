"""GGUF files read back: their numbers, their shape, their tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import N_LAYERS
from export_fixtures import (
    A0,
    A1,
    A2,
    EDGES,
    F0,
    F1,
    F2,
    F3,
    GGUF,
    N_TOKENS,
    byte_tokenizer,
    divergence,
    full_model,
    gguf_model,
    logits,
    plan_of,
    random_plans,
)
from hypothesis import given, settings
from packaged_models import installed_parts, needs
from test_replacements import random_linear
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaskip import (
    AdaskipError,
    ExportError,
    Linear,
    PlanError,
    SkipPlan,
    UnsupportedModelError,
    export_checkpoint,
    load_tokenizer,
)
from adaskip.export import (
    comparing,
    gguf_file,
    gguf_reading,
    gguf_tokenizer,
    llama_form,
    llamacpp,
)
from adaskip.export.llama_form import LlamaForm, paired, rope_factors
from adaskip.export.surviving import surviving
from adaskip.models.text_splitting import SPLITTINGS

IDS = torch.randint(3, 250, (2, 23), generator=torch.Generator().manual_seed(1))


def written(name: str, plan: SkipPlan, folder: Path, dtype: str = "f32") -> gguf_reading.GgufFile:
    """The file of a plan, read by gguf, without the certificate."""
    folder.mkdir(exist_ok=True)
    fields = gguf_tokenizer.from_tokenizer(byte_tokenizer(), N_TOKENS)
    about = {"source": "tiny", "plan": [], "version": "0"}
    left = surviving(plan, N_LAYERS)
    gguf_file.write(gguf_model(name), left, folder, dtype, about, fields)
    return gguf_reading.GgufFile(folder / gguf_file.NAME)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", GGUF)
def test_the_edges_are_the_plan(name: str, edge: str, tmp_path: Path) -> None:
    plan = plan_of(EDGES[edge], gain=1.1)
    written(name, plan, tmp_path)
    read = gguf_reading.read(tmp_path / gguf_file.NAME, gguf_model(name))
    assert divergence(logits(gguf_model(name), IDS, plan), logits(read, IDS)) < 1e-5


def test_any_plan(tmp_path: Path) -> None:
    model = gguf_model("granite")

    @given(random_plans(gains=True))
    @settings(max_examples=15, deadline=None)
    def check(plan: SkipPlan) -> None:
        file = written("granite", plan, tmp_path)
        read = gguf_reading.read(tmp_path / gguf_file.NAME, model)
        assert divergence(logits(model, IDS, plan), logits(read, IDS)) < 1e-5
        kv_heads = file.shape("attention.head_count_kv")
        kv_heads = kv_heads if isinstance(kv_heads, list) else [kv_heads] * file.n_layers
        assert sum(n > 0 for n in kv_heads) == N_LAYERS - len(plan.layers("attn"))

    check()


def test_the_shape_by_hand(tmp_path: Path) -> None:
    """Layers: ffn0 | attn1 ffn2 | attn3: the first has no attention, the last no FFN."""
    file = written("llama", SkipPlan(dict.fromkeys((A0, F1, A2, F3))), tmp_path)
    assert file.fields["general.architecture"] == "deci"
    assert file.n_layers == 3
    # Layer 0 tells the size of a head, by a matrix of zeros.
    assert file.shape("attention.head_count") == [4, 4, 4]
    assert file.shape("attention.head_count_kv") == [0, 2, 2]
    assert file.shape("feed_forward_length") == [64, 64, 32]
    assert not file.tensors["blk.0.attn_output.weight"].any()
    assert "blk.0.attn_q.weight" not in file.tensors
    assert not file.tensors["blk.2.ffn_down.weight"].any()
    assert file.tensors["blk.2.ffn_up.weight"].shape == (32, 32)
    assert torch.equal(
        file.tensors["blk.1.ffn_up.weight"], gguf_model("llama").model.layers[2].mlp.up_proj.weight
    )


def test_no_sublayer_is_made_before_the_last_one_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, all of a model's weights at once would be four times the model."""
    seen: list[str] = []
    layers, encoded = LlamaForm.layers, gguf_file._encoded

    def made(form: LlamaForm) -> Any:
        for item in layers(form):
            seen.append("made")
            yield item

    def told(*args: Any) -> Any:
        seen.append("encoded")
        return encoded(*args)

    monkeypatch.setattr(LlamaForm, "layers", made)
    monkeypatch.setattr(gguf_file, "_encoded", told)
    written("llama", SkipPlan({A1: None}), tmp_path)
    layers_of = seen[seen.index("made") :]
    assert layers_of == ["made", "encoded"] * (len(layers_of) // 2)


def test_an_ffn_alone_needs_no_stand_in(tmp_path: Path) -> None:
    file = written("llama", SkipPlan({A1: None}), tmp_path)
    assert file.shape("attention.head_count") == [4, 0, 4, 4]
    assert not [name for name in file.tensors if name.startswith("blk.1.attn")]


def test_whole_layers_are_a_plain_llama(tmp_path: Path) -> None:
    file = written("llama", SkipPlan({F1: None, A2: None}), tmp_path)
    assert file.fields["general.architecture"] == "llama"
    assert file.shape("attention.head_count") == 4
    assert file.n_layers == 3


def test_the_context_length_is_the_stretched_one(tmp_path: Path) -> None:
    trained = gguf_model("llama").config.max_position_embeddings
    for name, length in (("llama", trained), ("llama-linear", 4 * trained)):
        assert written(name, SkipPlan(), tmp_path).shape("context_length") == length


def test_factors_of_llama_3_are_those_of_transformers() -> None:
    scaled, plain = gguf_model("llama-3"), gguf_model("llama")
    theta = scaled.config.rope_parameters["rope_theta"]
    frequencies = theta ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    factors = rope_factors(scaled.config, 8)
    assert factors is not None
    expected = scaled.model.rotary_emb.inv_freq.double()
    torch.testing.assert_close(frequencies / factors, expected, rtol=1e-6, atol=0)
    assert rope_factors(plain.config, 8) is None
    # Left, in between, and stretched: each kind is there.
    assert factors[0] == 1.0
    assert 1.0 < factors[1] < 8.0
    assert factors[-1] == 8.0


@pytest.mark.parametrize("field", ["rope_freq_base", "rope_scaling_factor", "rope_freqs.weight"])
def test_a_rotary_embedding_that_is_wrong_is_told_of(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what the file says of it is what the certificate looks at."""
    writer = gguf_file.gguf_package().GGUFWriter
    name = "llama-linear"
    if field == "rope_freqs.weight":
        name = "llama-3"
        monkeypatch.setattr(llama_form, "rope_factors", lambda *_: None)
    else:
        write = getattr(writer, f"add_{field}")
        monkeypatch.setattr(writer, f"add_{field}", lambda self, value: write(self, value / 2))
    monkeypatch.setattr(llamacpp, "is_installed", lambda: False)
    with pytest.raises(ExportError, match=r"read back .* not what the plan does"):
        export_checkpoint(
            gguf_model(name), byte_tokenizer(), SkipPlan(), tmp_path / "out", format="gguf"
        )
    assert not list(tmp_path.iterdir())


def test_pairs_by_hand() -> None:
    """Two heads of four rows: the halves of a head are interleaved."""
    rows = torch.arange(8)[:, None]
    assert paired(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(gguf_reading.unpaired(paired(rows, 2), 2), rows)


def test_a_matrix_in_the_place_of_attention(tmp_path: Path) -> None:
    made = random_linear(0)
    bare = Linear(made.weight, torch.zeros_like(made.bias))
    plan = SkipPlan({A0: bare, A2: 1.25, F2: None})
    written("llama", plan, tmp_path)
    model = gguf_model("llama")
    read = gguf_reading.read(tmp_path / gguf_file.NAME, model)
    assert divergence(logits(model, IDS, plan), logits(read, IDS)) < 1e-6


@pytest.mark.parametrize(
    "plan", [SkipPlan({A1: random_linear(0)}), SkipPlan({F1: random_linear(0)})]
)
def test_other_linear_maps_are_refused(plan: SkipPlan, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has no place in GGUF"):
        export_checkpoint(
            gguf_model("llama"), byte_tokenizer(), plan, tmp_path / "out", format="gguf"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "'yarn'"),
    ],
)
def test_other_llamas_are_refused(settings: dict[str, Any], said: str) -> None:
    from conftest import tiny_model

    model = tiny_model("llama", **settings)
    with pytest.raises(UnsupportedModelError, match=said):
        list(LlamaForm(model, surviving(SkipPlan(), N_LAYERS)).around())


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 1e-5), ("bf16", 1e-3), ("q8_0", 1e-2)])
def test_precisions(dtype: str, tolerance: float, tmp_path: Path) -> None:
    model, plan = gguf_model("llama"), SkipPlan({A1: 1.25, F2: None})
    file = written("llama", plan, tmp_path, dtype)
    expected = logits(model, IDS, plan)
    found = divergence(expected, logits(gguf_reading.read(tmp_path / "model.gguf", model), IDS))
    assert 1e-9 < found < tolerance
    norm = model.model.layers[0].input_layernorm.weight
    assert torch.equal(file.tensors["blk.0.attn_norm.weight"], norm)


def test_rows_that_are_no_whole_blocks_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "samples", lambda *_: pytest.fail("something was computed"))
    tokens = {"vocab_size": N_TOKENS, "bos_token_id": 1, "eos_token_id": 2}
    for length, changes in (
        (40, {"intermediate_size": 40}),
        (24, {"num_attention_heads": 4, "head_dim": 6}),
        (48, {"hidden_size": 48}),
    ):
        model = full_model.__wrapped__("llama", **tokens, **changes)
        with pytest.raises(AdaskipError, match=f"multiple of 32 numbers, .* some of {length}; "):
            export_checkpoint(
                model, byte_tokenizer(), SkipPlan(), tmp_path / "o", format="gguf", dtype="q8_0"
            )
    assert not list(tmp_path.iterdir())


def test_the_whole_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "is_installed", lambda: False)
    plan = SkipPlan({A1: 1.25, F2: None}, about={"budget": "two"})
    report = export_checkpoint(
        gguf_model("llama"), byte_tokenizer(), plan, tmp_path / "out", format="gguf", dtype="f16"
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "export.json"}
    [check] = report.checks
    assert check.engine.endswith("read back")
    file = gguf_reading.GgufFile(tmp_path / "out" / "model.gguf")
    assert json.loads(file.fields["adaskip.plan"])[0] == {"layer": 1, "kind": "attn", "gain": 1.25}
    assert json.loads(file.fields["adaskip.about"]) == {"budget": "two"}
    assert file.fields["adaskip.version"]


class TestTokenizers:
    """The fields that llama.cpp reads a tokenizer from."""

    @needs("smollm2")
    def test_of_smollm2_are_those_of_its_own_file(self) -> None:
        [source] = installed_parts("smollm2") or []
        tokenizer = load_tokenizer("smollm2")
        made = gguf_tokenizer.from_tokenizer(tokenizer, 49152)
        assert made == gguf_tokenizer.from_gguf(source, 49152, tokenizer)
        with pytest.raises(AdaskipError, match="49152 tokens, the model 97"):
            gguf_tokenizer.from_gguf(source, 97)

    def test_kinds_of_tokens(self) -> None:
        made = gguf_tokenizer.from_tokenizer(byte_tokenizer(), N_TOKENS)
        tokens, kinds = (made[f"tokenizer.ggml.{n}"][0] for n in ("tokens", "token_type"))
        by_token = dict(zip(tokens, kinds, strict=True))
        assert by_token["<|im_end|>"] == 3
        assert by_token["<note>"] == 4
        assert by_token["the"] == 1
        assert by_token[f"[PAD{N_TOKENS - 1}]"] == 5
        assert made["tokenizer.ggml.merges"][0][:2] == ["t h", "th e"]
        assert made["tokenizer.ggml.eos_token_id"] == (2, "UINT32")
        assert made["tokenizer.ggml.add_bos_token"] == (False, "BOOL")
        assert "m['content']" in made["tokenizer.chat_template"][0]

    def test_several_chat_templates_are_written_as_the_gguf_package_does(
        self, tmp_path: Path
    ) -> None:
        tokenizer = byte_tokenizer.__wrapped__()
        tokenizer.chat_template = {"default": "plain", "tool_use": "tools", "r-a.g": "sources"}
        fields = gguf_tokenizer.from_tokenizer(tokenizer, N_TOKENS)
        found = {key: sorted(value) for key, (value, _) in fields.items() if "chat" in key}
        writer = gguf_file.gguf_package().GGUFWriter(tmp_path / "a.gguf", "llama")
        given = [{"name": n, "template": t} for n, t in tokenizer.chat_template.items()]
        writer.add_chat_template(given)
        # Its list of names is in no order.
        expected = {k: sorted(v.value) for k, v in writer.kv_data[0].items() if "chat" in k}
        assert found == expected
        assert fields["tokenizer.chat_template"] == ("plain", "STRING")
        left = surviving(SkipPlan(), N_LAYERS)
        gguf_file.write(gguf_model("llama"), left, tmp_path, "f32", {"source": ""}, fields)
        assert gguf_tokenizer.from_gguf(tmp_path / gguf_file.NAME, N_TOKENS) == fields

    @pytest.mark.parametrize("name", ["llama-bpe", "qwen2"])
    def test_splitting_by_a_regular_expression(self, name: str) -> None:
        wanted = SPLITTINGS[name]
        made = split_tokenizer(str(wanted.pattern), ignore_merges=wanted.ignore_merges)
        fields = gguf_tokenizer.from_tokenizer(made, N_TOKENS)
        assert fields["tokenizer.ggml.pre"] == (name, "STRING")
        other = split_tokenizer(r"\s+", ignore_merges=wanted.ignore_merges)
        changed = split_tokenizer(str(wanted.pattern), ignore_merges=not wanted.ignore_merges)
        lowered = split_tokenizer(str(wanted.pattern), ignore_merges=wanted.ignore_merges)
        lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
        for wrong in (other, changed, lowered):
            with pytest.raises(AdaskipError, match="splits texts otherwise"):
                gguf_tokenizer.from_tokenizer(wrong, N_TOKENS)

    def test_patterns_are_those_of_transformers(self) -> None:
        from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

        assert SPLITTINGS["qwen2"].pattern == PRETOKENIZE_REGEX

    def test_a_larger_one_is_refused(self) -> None:
        with pytest.raises(AdaskipError, match="has 266 tokens, the model 97"):
            gguf_tokenizer.from_tokenizer(byte_tokenizer(), 97)

    def test_none_is_refused(self, tmp_path: Path) -> None:
        plan = SkipPlan({A1: None})
        with pytest.raises(AdaskipError, match="needs a tokenizer"):
            export_checkpoint(gguf_model("llama"), None, plan, tmp_path / "o", format="gguf")

    def test_copied_from_a_file(self, tmp_path: Path) -> None:
        written("llama", SkipPlan({F0: None}), tmp_path / "a")
        source = tmp_path / "a" / "model.gguf"
        assert gguf_tokenizer.from_gguf(source, N_TOKENS) == gguf_tokenizer.from_tokenizer(
            byte_tokenizer(), N_TOKENS
        )
        with pytest.raises(AdaskipError, match="cannot be read as GGUF"):
            gguf_tokenizer.from_gguf(tmp_path / "none.gguf", N_TOKENS)

    def test_another_models_is_not_copied(self, tmp_path: Path) -> None:
        """As many tokens do not make it the same vocabulary."""
        written("llama", SkipPlan({F0: None}), tmp_path / "a")
        source = tmp_path / "a" / "model.gguf"
        gguf_tokenizer.from_gguf(source, N_TOKENS, byte_tokenizer())
        other = split_tokenizer(r"\s+", ignore_merges=False)
        with pytest.raises(AdaskipError, match=r"Token 0 is '<\|endoftext\|>' in .* and '!' in"):
            export_checkpoint(
                gguf_model("llama"),
                other,
                SkipPlan({F0: None}),
                tmp_path / "out",
                format="gguf",
                tokenizer_gguf=source,
            )
        assert not (tmp_path / "out").exists()

    def test_spaces_that_converters_write_out_are_the_same(self, tmp_path: Path) -> None:
        tokenizer = byte_tokenizer.__wrapped__()
        tokenizer.add_tokens("▁▁")
        fields = gguf_tokenizer.from_tokenizer(tokenizer, N_TOKENS)
        tokens = fields["tokenizer.ggml.tokens"][0]
        tokens[tokens.index("▁▁")] = "  "
        about = {"source": "tiny"}
        left = surviving(SkipPlan(), N_LAYERS)
        gguf_file.write(gguf_model("llama"), left, tmp_path, "f32", about, fields)
        source = tmp_path / gguf_file.NAME
        assert gguf_tokenizer.from_gguf(source, N_TOKENS, tokenizer) == fields


def split_tokenizer(pattern: str, *, ignore_merges: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits texts by a regular expression."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)
