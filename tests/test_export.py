"""Exported folders of every family beside the plan in the process; loading, skipping in them."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import N_LAYERS, prompt, tiny_model
from export_fixtures import (
    A0,
    A1,
    A2,
    A3,
    ATTENTION,
    EDGES,
    F0,
    F1,
    F3,
    divergence,
    full_model,
    logits,
    plan_of,
    random_plans,
    widened,
)
from hypothesis import given, settings
from test_replacements import random_linear
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)

from adaskip import (
    AdaSkip,
    AdaskipError,
    EarlyExit,
    SkipPlan,
    Sublayer,
    UnsupportedModelError,
    export_checkpoint,
    learn_importance,
    load_model,
    search_plan,
    skipping,
)
from adaskip.blocks import BLOCKS
from adaskip.export import hf
from adaskip.export.folding import Folded
from adaskip.export.refusing import FAMILIES
from adaskip.export.surviving import surviving
from adaskip.growing_cache import kv_tensors
from adaskip.models.exported import exported_class
from adaskip.models.modeling_adaskip import LinearMap
from adaskip.replacements import Window

IDS = prompt(23, batch=2)


@pytest.fixture
def wide_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention, too."""
    softmax = torch.nn.functional.softmax

    def wide(x: Tensor, dim: int | None = None, dtype: Any = None, **kwargs: Any) -> Tensor:
        return softmax(x, dim=dim, dtype=x.dtype, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "softmax", wide)


def written(
    model: PreTrainedModel, plan: SkipPlan, folder: Path, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The checkpoint of a plan, loaded by our own class, without the certificate."""
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    hf.write(model, surviving(plan, N_LAYERS), folder, dtype, {"source": "tiny"})
    raw = json.loads((folder / "config.json").read_text())
    # load_model() knows no float64.
    loader: Any = exported_class(raw["model_type"]) if "block_configs" in raw else type(model)
    loaded: PreTrainedModel = loader.from_pretrained(folder, dtype=dtype).eval()
    loaded.set_attn_implementation(model.config._attn_implementation)
    return widened(loaded) if dtype == torch.float64 else loaded


def own_epsilons(loaded: PreTrainedModel, plan: SkipPlan) -> None:
    """Gives each norm of the stream the eps that undoes the scale of what it reads."""
    left = surviving(plan, N_LAYERS)
    modules: Any = loaded.model
    norms = [(modules.norm, left.final_scale)]
    for index, part in left.parts():
        name = getattr(BLOCKS["llama"], part.source.kind).pre
        if loaded.config.model_type.startswith(("adaskip_gemma", "gemma")):
            name = getattr(BLOCKS["gemma2"], part.source.kind).pre
        if part.linear is None and "olmo2" not in loaded.config.model_type:
            norms.append((getattr(modules.layers[index], name), part.scale))
    for norm, scale in norms:
        name = "eps" if hasattr(norm, "eps") else "variance_epsilon"
        setattr(norm, name, getattr(norm, name) * scale**2)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_edges_are_the_plan_bit_by_bit(family: str, edge: str, tmp_path: Path) -> None:
    model, plan = full_model(family), plan_of(EDGES[edge])
    loaded = written(model, plan, tmp_path / "out")
    assert torch.equal(logits(loaded, IDS), logits(model, IDS, plan))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_plan_is_the_checkpoint_bit_by_bit(family: str, tmp_path: Path) -> None:
    model = full_model(family)

    @given(random_plans())
    @settings(max_examples=6, deadline=None)
    def check(plan: SkipPlan) -> None:
        loaded = written(model, plan, tmp_path / "out")
        assert torch.equal(logits(loaded, IDS), logits(model, IDS, plan))
        assert_survivors(loaded, model, plan)

    check()


def assert_survivors(loaded: PreTrainedModel, model: PreTrainedModel, plan: SkipPlan) -> None:
    """Tensors, parameters and KV are those of what runs, in its order."""
    left = surviving(plan, N_LAYERS)
    expected: dict[str, torch.Size] = {}
    decoder: Any = model.model
    for index, part in left.parts():
        spec = getattr(BLOCKS[model.config.model_type], part.source.kind)
        names = tuple(f"{name}." for name in (spec.pre, spec.body, spec.post) if name)
        for name, tensor in decoder.layers[part.source.layer].state_dict().items():
            if name.startswith(names):
                expected[f"model.layers.{index}.{name}"] = tensor.shape
    state = loaded.state_dict()
    found = {n: t.shape for n, t in state.items() if n.startswith("model.layers.")}
    assert found == expected
    cache = DynamicCache(config=loaded.config)
    with torch.no_grad():
        loaded(IDS, past_key_values=cache)
    filled = [layer for layer in cache.layers if layer.get_seq_length()]
    assert len(filled) == N_LAYERS - len(plan.layers("attn"))
    assert cache.layers[: len(filled)] == filled


@pytest.mark.usefixtures("wide_softmax")
@pytest.mark.parametrize("family", FAMILIES)
def test_gains_fold_exactly_up_to_the_eps_of_norms(family: str, tmp_path: Path) -> None:
    model = widened(full_model(family, torch.float64))

    @given(random_plans(gains=True))
    @settings(max_examples=5, deadline=None)
    def check(plan: SkipPlan) -> None:
        loaded = written(model, plan, tmp_path / "out", torch.float64)
        own_epsilons(loaded, plan)
        torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS, plan), rtol=0, atol=1e-9)

    check()


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gains_of_the_edges_in_float32(family: str, edge: str, tmp_path: Path) -> None:
    model, plan = full_model(family), plan_of(EDGES[edge], gain=1.1)
    loaded = written(model, plan, tmp_path / "out")
    assert divergence(logits(model, IDS, plan), logits(loaded, IDS)) < 1e-5


def test_without_the_anchor_a_small_stream_would_be_another(tmp_path: Path) -> None:
    """The control: the anchor is what keeps eps from mattering where the stream is small."""
    model = full_model("llama", rms_norm_eps=1e-2)
    small = {n: t * 0.05 if "embed" in n else t for n, t in model.state_dict().items()}
    model = type(model)(model.config).eval()
    model.load_state_dict(small)
    plan = SkipPlan({A0: 3.0})
    expected = logits(model, IDS, plan)
    loaded = written(model, plan, tmp_path / "out")
    assert divergence(expected, logits(loaded, IDS)) < 1e-9
    with torch.no_grad():
        loaded.model.embed_tokens.weight /= 3.0
        loaded.model.layers[0].mlp.down_proj.weight /= 3.0
        for layer in loaded.model.layers[1:]:
            layer.self_attn.o_proj.weight /= 3.0
            layer.mlp.down_proj.weight /= 3.0
    assert divergence(expected, logits(loaded, IDS)) > 1e-3


@pytest.mark.usefixtures("wide_softmax")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_and_untied_heads_under_an_anchor(family: str, tied: bool, tmp_path: Path) -> None:
    model = widened(full_model(family, torch.float64, tie_word_embeddings=tied))
    plan = SkipPlan({A0: 1.75, F1: 1.25})
    loaded = written(model, plan, tmp_path / "out", torch.float64)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    own_epsilons(loaded, plan)
    torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS, plan), rtol=0, atol=1e-9)


@pytest.mark.usefixtures("wide_softmax")
@pytest.mark.parametrize("family", FAMILIES)
def test_linear_maps_are_written(family: str, tmp_path: Path) -> None:
    model = widened(full_model(family, torch.float64))
    plan = SkipPlan({A0: random_linear(0), F1: random_linear(1, rank=3), A2: 1.25, A3: None})
    loaded = written(model, plan, tmp_path / "out", torch.float64)
    own_epsilons(loaded, plan)
    torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS, plan), rtol=0, atol=1e-8)
    maps = [m for m in loaded.modules() if isinstance(m, LinearMap)]
    assert [len(m.factors) for m in maps] == [1, 2]
    cache = DynamicCache(config=loaded.config)
    loaded(IDS, past_key_values=cache)
    assert sum(layer.get_seq_length() > 0 for layer in cache.layers) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_layers_need_no_code(family: str, tmp_path: Path) -> None:
    model, plan = full_model(family), SkipPlan({F1: 1.1, A2: 1.2})
    export_checkpoint(model, None, plan, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config
    assert config["model_type"] == family
    assert config["num_hidden_layers"] == 3
    loaded: Any = AutoModelForCausalLM
    stock = loaded.from_pretrained(tmp_path / "out", attn_implementation=ATTENTION.get(family))
    assert type(stock) is type(model)
    assert divergence(logits(model, IDS, plan), logits(stock.eval(), IDS)) < 1e-6


def test_float64_is_of_one_sublayer_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All scaled matrices at once would be a multiple of the model."""
    made = Folded.parts

    def watched(folded: Folded) -> Any:
        wide: list[list[Any]] = []
        for index, part, tensors in made(folded):
            # Whoever iterates has the last ones still.
            assert not any(ref() is not None for refs in wide[:-1] for ref in refs)
            wide.append([weakref.ref(t) for t in tensors.values() if t.dtype == torch.float64])
            yield index, part, tensors
        assert sum(map(bool, wide)) > 2

    monkeypatch.setattr(Folded, "parts", watched)
    written(full_model("llama"), SkipPlan({A0: 1.2, F1: 0.9}), tmp_path / "out")


def test_a_mistral_without_a_window_remains_one(tmp_path: Path) -> None:
    """Kinds of layers, which its code does not read, would make another family of the folder."""
    model = tiny_model("mistral", sliding_window=None, layer_types=["full_attention"] * N_LAYERS)
    export_checkpoint(model, None, SkipPlan({F1: None, A2: None}), tmp_path / "out")
    assert type(load_model(tmp_path / "out", device="cpu")) is type(model)


def test_what_was_true_of_the_source_alone_is_left_out(tmp_path: Path) -> None:
    """Its remote code is not in the folder, and its weights are plain numbers now."""
    model = tiny_model("llama")
    model.config.auto_map = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "x.Y"}
    model.config.quantization_config = {"quant_method": "gguf"}
    export_checkpoint(model, None, SkipPlan({F1: None, A2: None}), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"auto_map", "quantization_config"} & set(config)
    loaded: Any = AutoModelForCausalLM
    remote = loaded.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(remote) is type(model)


def test_without_a_generation_configuration(tmp_path: Path) -> None:
    """The checkpoint has the one that transformers makes of its configuration."""
    model: Any = tiny_model("llama")
    model.generation_config = None
    export_checkpoint(model, None, SkipPlan({F1: None}), tmp_path / "out")
    loaded = load_model(tmp_path / "out", device="cpu")
    assert loaded.generation_config.bos_token_id == model.config.bos_token_id


PLAN = SkipPlan({A0: 1.2, F1: 0.9, A2: None, F3: 1.05})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("exported") / "out"
    export_checkpoint(full_model("llama"), None, PLAN, target)
    return target


@pytest.fixture
def remote(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """The folder as a user of transformers loads it, by its own code."""
    loaded: Any = AutoModelForCausalLM
    model: PreTrainedModel = loaded.from_pretrained(folder, trust_remote_code=True)
    return model.eval()


def test_transformers_loads_it_by_its_own_code(remote: PreTrainedModel) -> None:
    assert type(remote).__module__.startswith("transformers_modules.")
    assert divergence(logits(full_model("llama"), IDS, PLAN), logits(remote, IDS)) < 1e-9


def test_our_loader_runs_none_of_it(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "modeling_adaskip.py").write_text("raise RuntimeError('this code was run')\n")
    loaded = load_model(tmp_path, device="cpu")
    assert type(loaded).__module__ == "adaskip.models.modeling_adaskip"
    assert divergence(logits(full_model("llama"), IDS, PLAN), logits(loaded, IDS)) < 1e-9


@pytest.mark.parametrize("by", ["remote code", "our class"])
def test_saved_again_it_is_the_same(
    by: str, folder: Path, remote: PreTrainedModel, tmp_path: Path
) -> None:
    first = remote if by == "remote code" else load_model(folder, device="cpu")
    first.save_pretrained(tmp_path / "again")
    loader: Any = AutoModelForCausalLM
    for second in (
        loader.from_pretrained(tmp_path / "again", trust_remote_code=True).eval(),
        load_model(tmp_path / "again", device="cpu"),
    ):
        assert torch.equal(logits(second, IDS), logits(first, IDS))
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again")
    )
    for name in ("architectures", "model_type", "block_configs", "auto_map", "adaskip"):
        assert after[name] == before[name], name


def test_padded_rows_and_static_caches(remote: PreTrainedModel) -> None:
    """Left-padded, each row generates what it does alone; a static cache gives the same tokens."""
    ids, mask = prompt(17, batch=2), torch.ones(2, 17, dtype=torch.long)
    ids[0, :6] = mask[0, :6] = 0
    generate: Any = remote.generate
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}
    both = generate(ids, attention_mask=mask, **options)[:, 17:]
    alone = generate(ids[:1, 6:], **options)[:, 11:]
    assert torch.equal(both[:1], alone)
    static = generate(ids, attention_mask=mask, cache_implementation="static", **options)
    assert torch.equal(static[:, 17:], both)
    cache = StaticCache(config=remote.config, max_cache_len=32)
    generate(ids, attention_mask=mask, past_key_values=cache, **options)
    assert [layer.is_initialized for layer in cache.layers] == [True, True, False]


def test_hidden_states_of_every_layer(remote: PreTrainedModel) -> None:
    with torch.no_grad():
        output = remote(IDS, output_hidden_states=True)
    assert len(output.hidden_states) == remote.config.num_hidden_layers + 1


def test_where_it_comes_from_is_kept(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    kept = config["adaskip"]
    assert kept["plan"] == [
        {"layer": 0, "kind": "attn", "gain": 1.2},
        {"layer": 1, "kind": "ffn", "gain": 0.9},
        {"layer": 2, "kind": "attn", "gain": None},
        {"layer": 3, "kind": "ffn", "gain": 1.05},
    ]
    assert kept["version"]
    report = json.loads((folder / "export.json").read_text())
    assert report["attentions"] == report["ffns"] == 2
    assert report["kv_bytes_per_token"] * 2 == report["dense_kv_bytes_per_token"]
    [check] = report["checks"]
    assert check["passed"]
    assert check["kl"] < check["kl_tolerance"]


def test_names_for_vllm(tmp_path: Path) -> None:
    """Served as DeciLM where vLLM can: a Llama whose first layer has an attention."""
    report = export_checkpoint(full_model("qwen2"), None, SkipPlan({A1: None}), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (report.architecture, config["model_type"]) == ("DeciLMForCausalLM", "nemotron-nas")
    assert config["qkv_bias"]
    assert config["block_configs"][1]["attention"] == {"no_op": True, "n_heads_in_group": 2}
    assert "ffn_mult" not in config["block_configs"][1]["ffn"]
    loaded = load_model(tmp_path / "a", device="cpu")
    # vLLM reads them by attribute.
    assert loaded.config.block_configs[1].attention.no_op is True
    assert loaded.config.block_configs[0].ffn.intermediate_size == 64
    for number, (plan, family) in enumerate(
        [
            (SkipPlan({A0: None}), "llama"),
            (SkipPlan({A1: random_linear(0)}), "llama"),
            (SkipPlan({A1: None}), "gemma2"),
        ]
    ):
        report = export_checkpoint(full_model(family), None, plan, tmp_path / str(number))
        assert report.architecture != "DeciLMForCausalLM"
        assert report.engines["vLLM"].startswith("no: ")


class TestSkippingAgain:
    """An exported model is skipped in like any other."""

    @pytest.fixture
    def loaded(self, folder: Path) -> PreTrainedModel:
        # Layers: ffn0 | attn1 ffn2 | attn3.
        return load_model(folder, device="cpu")

    @pytest.mark.parametrize(
        ("again", "original"),
        [
            ((Sublayer(0, "ffn"),), (F0,)),
            ((Sublayer(1, "attn"),), (A1,)),
            ((Sublayer(2, "attn"),), (A3,)),
        ],
    )
    def test_is_the_longer_plan(self, loaded: PreTrainedModel, again: Any, original: Any) -> None:
        generate: Any = loaded.generate
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        with skipping(loaded, SkipPlan(dict.fromkeys(again))) as session:
            found = generate(IDS, **options)
            cache = DynamicCache(config=loaded.config)
            loaded(IDS, past_key_values=cache)
            assert session.plan
        model: Any = full_model("llama")
        with skipping(model, SkipPlan({**PLAN, **dict.fromkeys(original)})):
            assert torch.equal(found, model.generate(IDS, **options))
        assert cache.get_seq_length() == 23
        kept = 2 - sum(s.kind == "attn" for s in again)
        assert sum(getattr(layer, "keys", None) is not None for layer in cache.layers) == kept
        assert torch.equal(generate(IDS, **options), load_again(loaded, options))

    def test_counts_keys_and_values_of_what_is_there(self, loaded: PreTrainedModel) -> None:
        dense = 0
        for plan in (SkipPlan(), SkipPlan({Sublayer(1, "attn"): None})):
            cache = DynamicCache(config=loaded.config)
            with skipping(loaded, plan) as session, torch.no_grad():
                loaded(IDS, past_key_values=cache)
            held = sum(tensor.nbytes for tensor in kv_tensors(cache))
            dense = dense or held
            assert (session.summary().kv_bytes, session.summary().dense_kv_bytes) == (held, dense)

    def test_what_is_gone_is_never_chosen(self, loaded: PreTrainedModel) -> None:
        importance = learn_importance(loaded, [IDS])
        gone = {Sublayer(0, "attn"), Sublayer(1, "attn"), Sublayer(2, "ffn")} - {
            Sublayer(1, "attn")
        }
        assert {s for s, value in importance.similarity.items() if value < -0.999} == gone
        with skipping(loaded, AdaSkip(importance, n_skip=4, online=False)) as session:
            loaded(IDS)
            assert not gone & set(session.plan)
        with (
            skipping(loaded, AdaSkip(importance, n_skip=5, online=False)),
            pytest.raises(AdaskipError, match="exported without"),
        ):
            loaded(IDS)

    def test_leaving_out_what_is_gone_changes_nothing(self, loaded: PreTrainedModel) -> None:
        with skipping(loaded, EarlyExit(1)):
            found = logits(loaded, IDS, None)
        assert torch.equal(found, logits(loaded, IDS, SkipPlan({Sublayer(2, "attn"): None})))

    def test_windows_are_refused(self, loaded: PreTrainedModel) -> None:
        plan = SkipPlan({Sublayer(1, "attn"): Window(8)})
        with skipping(loaded, plan), pytest.raises(AdaskipError, match="exported model a Window"):
            loaded(IDS)

    def test_a_search_in_it_is_refused(self, loaded: PreTrainedModel) -> None:
        rows = [(IDS[:1, :12], IDS[:1, 12:])]
        with pytest.raises(UnsupportedModelError, match="its sublayer is gone"):
            search_plan(loaded, rows, acceleration=1.1, replacements=("gain",))


def load_again(loaded: PreTrainedModel, options: dict[str, Any]) -> torch.Tensor:
    copied = load_model(loaded.config._name_or_path, device="cpu")
    generate: Any = copied.generate
    found: torch.Tensor = generate(IDS, **options)
    return found
