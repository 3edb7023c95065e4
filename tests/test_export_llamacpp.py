"""GGUF files in llama.cpp itself: needs xllamacpp, in an environment of its own (make llamacpp)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import N_LAYERS
from export_fixtures import (
    A0,
    A1,
    A2,
    A3,
    EDGES,
    F0,
    F1,
    F2,
    F3,
    GGUF,
    N_TOKENS,
    byte_tokenizer,
    gguf_model,
    plan_of,
)
from packaged_models import needs
from test_replacements import random_linear
from transformers import PreTrainedModel

from adaskip import (
    ExportError,
    Linear,
    SkipPlan,
    Sublayer,
    export_checkpoint,
    load_model,
    load_tokenizer,
)
from adaskip.export import comparing, gguf_file, gguf_tokenizer, llamacpp
from adaskip.export.engines import Engine, Settings
from adaskip.export.llama_form import LlamaForm
from adaskip.export.report import Check
from adaskip.export.surviving import surviving

pytestmark = pytest.mark.skipif(not llamacpp.is_installed(), reason="xllamacpp is not installed")

# Dense models deviate by as much: llama.cpp rounds otherwise.
TOLERANCE = 1e-3
# Every edge in one family, and three of them, by turns, in each other one: layers, what an edge is
# of, are written down alike in all families.
_OTHERS = [
    (name, edge)
    for number, name in enumerate(GGUF)
    for at, edge in enumerate(EDGES)
    if name != "llama" and (edge == "nothing" or at % 3 == number % 3)
]
PLACES = [("llama", edge) for edge in EDGES] + _OTHERS


def checked(model: PreTrainedModel, plan: SkipPlan, folder: Path, dtype: str = "f32") -> Check:
    """llama.cpp beside the plan, without the certificate's verdict."""
    folder.mkdir(exist_ok=True)
    fields = gguf_tokenizer.from_tokenizer(byte_tokenizer(), N_TOKENS)
    left = surviving(plan, N_LAYERS)
    gguf_file.write(model, left, folder, dtype, {"source": "tiny"}, fields)
    texts = comparing.texts_of(model, byte_tokenizer())
    expected = comparing.samples(model, plan, texts)
    tokens = fields["tokenizer.ggml.tokens"][0]
    found = llamacpp.run(folder / gguf_file.NAME, expected, tokens)
    return comparing.compared("llama.cpp", expected, found, 1e-5)


@pytest.mark.parametrize(("name", "edge"), PLACES)
def test_the_edges_are_the_plan(name: str, edge: str, tmp_path: Path) -> None:
    check = checked(gguf_model(name), plan_of(EDGES[edge], gain=1.05), tmp_path)
    assert check.passed, check
    assert check.max_logit_difference < TOLERANCE
    assert check.greedy_tokens > 0


def test_a_matrix_in_the_place_of_attention(tmp_path: Path) -> None:
    made = random_linear(0)
    bare = Linear(made.weight, torch.zeros_like(made.bias))
    for place in (A0, A2):
        check = checked(gguf_model("llama"), SkipPlan({place: bare, F1: 1.25}), tmp_path)
        assert check.passed, check
        assert check.max_logit_difference < TOLERANCE


@pytest.mark.parametrize("plan", [SkipPlan({F1: None}), SkipPlan({F0: None, F1: None, F2: None})])
def test_without_the_zero_ffn_it_would_be_another_model(
    plan: SkipPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: llama.cpp leaves out an attention that no FFN follows, and says nothing."""
    assert checked(gguf_model("llama"), plan, tmp_path / "with").passed
    lengths = property(lambda form: [0 if x.ffn is None else 64 for x in form.surviving.layers])
    monkeypatch.setattr(LlamaForm, "ffn_lengths", lengths)
    monkeypatch.setattr(LlamaForm, "_stand_ins", lambda form: iter(()))
    check = checked(gguf_model("llama"), plan, tmp_path / "without")
    assert not check.passed
    assert check.max_logit_difference > 0.1


def test_an_abort_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the zero FFN in the last layer, llama.cpp stops the process it is in."""
    lengths = property(lambda form: [0 if x.ffn is None else 64 for x in form.surviving.layers])
    monkeypatch.setattr(LlamaForm, "ffn_lengths", lengths)
    monkeypatch.setattr(LlamaForm, "_stand_ins", lambda form: iter(()))
    with pytest.raises(ExportError, match=r"llama.cpp fails on model.gguf \(exit status"):
        checked(gguf_model("llama"), SkipPlan({F3: None}), tmp_path)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_precisions(dtype: str, tmp_path: Path) -> None:
    model = gguf_model("llama")
    plan = SkipPlan({A1: 1.25, F2: None})
    report = export_checkpoint(
        model, byte_tokenizer(), plan, tmp_path / "out", format="gguf", dtype=dtype
    )
    engines = [check.engine.partition(" ")[0] for check in report.checks]
    assert engines == ["transformers", "llama.cpp"]
    assert all(check.passed for check in report.checks)


@needs("smollm2")
def test_smollm2_with_most_kinds_of_gaps(tmp_path: Path) -> None:
    model, tokenizer = load_model("smollm2", device="cpu"), load_tokenizer("smollm2")
    gone = [*(Sublayer(i, "attn") for i in range(10, 22)), Sublayer(29, "ffn"), Sublayer(5, "ffn")]
    plan = SkipPlan(dict.fromkeys(gone, 1.03))
    for file_format in ("hf", "gguf"):
        report = export_checkpoint(
            model, tokenizer, plan, tmp_path / file_format, format=file_format
        )
        for check in report.checks:
            assert check.max_logit_difference < TOLERANCE
            assert check.greedy_equal == check.greedy_tokens > 40
        assert report.kv_bytes_per_token == 18 * 2 * 3 * 64 * 2
    text = tokenizer(comparing.TEXTS[0]).input_ids
    request = {"ids": comparing.TEXTS[0], "n_new": 1}
    with Engine(Settings("llama.cpp", tmp_path / "gguf" / gguf_file.NAME, 256)) as engine:
        told = engine.ask(request)
    # llama.cpp makes the same tokens of the text.
    assert told["prompt_tokens"] == len(text)


def test_only_attentions_have_kv(tmp_path: Path) -> None:
    """Three of four attentions gone: a quarter of the cache, as llama.cpp reports it."""
    plan = SkipPlan(dict.fromkeys((A1, A2, A3)))
    assert checked(gguf_model("llama"), plan, tmp_path).passed
    size = llamacpp.kv_mebibytes(tmp_path / gguf_file.NAME, context=4096)
    # Keys and values of 2 heads of 8 numbers in 16 bits, of one layer.
    assert size == pytest.approx(4096 * 2 * 2 * 8 * 2 / 2**20, abs=0.01)
