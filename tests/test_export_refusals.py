"""What is not exported is refused in one sentence, and a failed export leaves nothing."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import prompt, tiny_model
from export_fixtures import A0, A1, A2, F1, F2, full_model
from safetensors import SafetensorError
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from adaskip import (
    AdaSkip,
    AdaskipError,
    EarlyExit,
    ExportError,
    PlanError,
    SkipDecode,
    SkipPlan,
    Step,
    Sublayer,
    UnifiedSkipping,
    UnsupportedModelError,
    export_checkpoint,
    learn_importance,
    load_model,
    skipping,
)
from adaskip.blocks import BLOCKS
from adaskip.export import comparing, formats, hf
from adaskip.export.refusing import FAMILIES, check_model, plan_of
from adaskip.models.exported import is_exported
from adaskip.plan import Phase
from adaskip.policy import SkipPolicy

PLAN = SkipPlan({A1: 1.1, F2: None})


@pytest.fixture
def model() -> PreTrainedModel:
    return full_model("llama")


class OnlyDecode(SkipPolicy):
    """Skips in decode steps only."""

    def plan(self, step: Step) -> SkipPlan:
        return PLAN if step.phase is Phase.DECODE else SkipPlan()


class LongPrompts(SkipPolicy):
    """Skips in requests whose prompts are long."""

    def bind(self, n_layers: int) -> None:
        super().bind(n_layers)
        self.long: dict[int, bool] = {}

    def plan(self, step: Step) -> SkipPlan:
        long = self.long.setdefault(step.request, step.tokens > 2000)
        return PLAN if long else SkipPlan()


class FirstRequest(SkipPolicy):
    """Skips in the first request."""

    def plan(self, step: Step) -> SkipPlan:
        return SkipPlan() if step.request else PLAN


def refused(
    error: type[AdaskipError], said: str, tmp_path: Path, *args: Any, **kwargs: Any
) -> None:
    """An export that is refused, before anything is computed or written."""
    model, *rest = args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "samples", lambda *_: pytest.fail("something was computed"))
        with pytest.raises(error, match=said) as caught:
            export_checkpoint(model, None, *rest, tmp_path / "out", **kwargs)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_policies_that_change(model: PreTrainedModel, tmp_path: Path) -> None:
    importance = learn_importance(model, [prompt(9)])
    own = (OnlyDecode(), LongPrompts(), FirstRequest())
    for policy in (SkipDecode(2, horizon=8), AdaSkip(importance, 3, online=True), *own):
        refused(PlanError, f"{type(policy).__name__} skips other", tmp_path, model, policy)


def test_fixed_policies_are_their_plans(model: PreTrainedModel) -> None:
    importance = learn_importance(model, [prompt(9)])
    for policy in (EarlyExit(1), UnifiedSkipping(2), AdaSkip(importance, 3)):
        with skipping(model, policy) as session:
            model(prompt(9))
            expected = session.plan
        assert expected
        assert plan_of(policy, 4) == expected


def test_a_policy_in_use_goes_on_as_it_was(model: PreTrainedModel, tmp_path: Path) -> None:
    policy = SkipDecode(n_skip=3)
    other = full_model("llama")
    with skipping(other, policy, scope="prefill") as session:
        other(prompt(9))
        before = session.plan
        refused(PlanError, "SkipDecode skips other", tmp_path, model, policy)
        other(prompt(9))
        assert session.plan == before
    assert policy.scope == "prefill"


def test_one_phase_alone() -> None:
    for scope in ("prefill", "decode"):
        with pytest.raises(PlanError, match=f"Scope '{scope}' skips in one phase"):
            plan_of(PLAN, 4, scope)


def test_models(model: PreTrainedModel, tmp_path: Path) -> None:
    error = UnsupportedModelError
    for family in ("mistral", "gemma2", "gemma3_text"):
        sliding = tiny_model(family, "eager")
        refused(error, f"attention of this {family} slides over a window", tmp_path, sliding, PLAN)
    for family in ("mistral", "phi3"):
        # Their code slides over the window whatever is said of the layers.
        sliding = tiny_model(family, sliding_window=24, layer_types=["full_attention"] * 4)
        refused(error, f"attention of this {family} slides over a window", tmp_path, sliding, PLAN)
    refused(
        error,
        "GGUF has no architecture.*qwen3.*format 'hf'",
        tmp_path,
        full_model("qwen3"),
        PLAN,
        format="gguf",
    )
    for family in sorted(set(BLOCKS) - set(FAMILIES)):
        said = f"family {family} are not exported; those of llama, "
        refused(error, said, tmp_path, tiny_model(family), PLAN)
    base: Any = model.base_model
    refused(error, "no causal language model", tmp_path, base, PLAN)
    with torch.device("meta"):
        empty = type(model)(model.config)
    refused(error, "quantized, offloaded or shared out", tmp_path, empty, PLAN)
    changed = tiny_model("llama")
    torch.nn.utils.parametrizations.weight_norm(changed.lm_head)
    refused(error, "remove adapters and parametrizations", tmp_path, changed, PLAN)
    unsaved = tiny_model("llama")
    unsaved.generation_config.temperature = 0.9
    refused(error, "generation configuration cannot be saved", tmp_path, unsaved, PLAN)
    # GGUF has none, and neither may the model.
    check_model(unsaved, "gguf")
    unsaved.generation_config = None
    check_model(unsaved, "hf")

    class Own(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig, size: int) -> None:
            super().__init__(config)

    own = Own(unsaved.config, 3).eval()
    refused(error, "A Own is not made of its configuration alone", tmp_path, own, PLAN)
    short = tiny_model("llama", max_position_embeddings=24)
    refused(AdaskipError, "has 24 positions, and comparing", tmp_path, short, PLAN)


def test_a_tokenizer_of_another_model(model: PreTrainedModel, tmp_path: Path) -> None:
    class Larger:
        def __call__(self, text: str, **_: object) -> Any:
            return SimpleNamespace(input_ids=torch.tensor([[1, model.config.vocab_size]]))

    with pytest.raises(AdaskipError, match="the model knows 0 to"):
        export_checkpoint(model, Larger(), PLAN, tmp_path / "out")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_plans(model: PreTrainedModel, tmp_path: Path) -> None:
    refused(
        PlanError,
        "leaves no attention",
        tmp_path,
        model,
        SkipPlan(dict.fromkeys((A0, A1, A2, type(A0)(3, "attn")))),
    )
    refused(PlanError, "only positive gains", tmp_path, model, SkipPlan({A1: -1.0}))
    refused(AdaskipError, "skips ffn9", tmp_path, model, SkipPlan({type(A0)(9, "ffn"): None}))
    other = SkipPlan({A1: None}, fingerprint="llama-4x32-000000:AAAA")
    refused(PlanError, "made for model", tmp_path, model, other)


def test_formats_and_precisions(model: PreTrainedModel, tmp_path: Path) -> None:
    refused(AdaskipError, "Unknown format 'onnx'", tmp_path, model, PLAN, format="onnx")
    refused(AdaskipError, "dtype of format 'hf' 'q8_0'", tmp_path, model, PLAN, dtype="q8_0")
    refused(AdaskipError, "'q4_k'", tmp_path, model, PLAN, dtype="q4_k", format="gguf")
    double = full_model("llama", torch.float64)
    for dtype in (None, "f32"):
        said = "The model is in float64; load it in float32"
        refused(UnsupportedModelError, said, tmp_path, double, PLAN, dtype=dtype)


def test_a_folder_that_is_not_empty(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    for place in (tmp_path, tmp_path / "kept.txt"):
        with pytest.raises(AdaskipError, match="give a folder that is empty or new"):
            export_checkpoint(model, None, PLAN, place)
    assert (tmp_path / "kept.txt").read_text() == "kept"
    hidden = tmp_path / "prepared" / ".prepared.x1"
    hidden.mkdir(parents=True)
    with pytest.raises(AdaskipError, match=r"is there already and holds \.prepared\.x1; give a"):
        export_checkpoint(model, None, PLAN, hidden.parent)
    empty = tmp_path / "empty"
    empty.mkdir()
    export_checkpoint(model, None, PLAN, empty)
    assert (empty / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["current", "link"])
def test_an_empty_folder_that_cannot_be_replaced(
    kind: str, model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, link = tmp_path / "prepared", tmp_path / "link"
    prepared.mkdir()
    prepared.chmod(0o750)
    link.symlink_to(prepared)
    monkeypatch.chdir(prepared)
    report = export_checkpoint(model, None, PLAN, "." if kind == "current" else link)
    assert report.folder == ("." if kind == "current" else str(link))
    assert load_model(prepared, device="cpu").config.model_type == "nemotron-nas"
    assert {path.name for path in tmp_path.iterdir()} == {"prepared", "link"}
    assert link.is_symlink()
    assert prepared.stat().st_mode & 0o777 == 0o750
    assert not [path for path in prepared.iterdir() if path.is_dir()]


def test_a_folder_that_is_filled_meanwhile(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = comparing.compared

    def filled(*args: Any) -> Any:
        (tmp_path / "model.safetensors").write_text("another's")
        return compared(*args)

    monkeypatch.setattr(comparing, "compared", filled)
    with pytest.raises(AdaskipError, match="no longer empty"):
        export_checkpoint(model, None, PLAN, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_text() == "another's"


def test_others_may_read_it_as_far_as_the_umask_lets_them(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    before = os.umask(0o027)
    try:
        export_checkpoint(model, None, PLAN, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {f.name: f.stat().st_mode & 0o777 for f in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == 0o640
    assert set(modes.values()) == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("skipped", [(F1,), (F1, A2)], ids=["a sublayer", "a whole layer"])
def test_an_exported_model_is_not_exported_again(
    skipped: tuple[Sublayer, ...], model: PreTrainedModel, tmp_path: Path
) -> None:
    export_checkpoint(model, None, SkipPlan(dict.fromkeys(skipped)), tmp_path / "a")
    loaded = load_model(tmp_path / "a", device="cpu")
    with pytest.raises(UnsupportedModelError, match="from the model it was made from"):
        export_checkpoint(loaded, None, SkipPlan({A1: None}), tmp_path / "b")


def test_inside_skipping(model: PreTrainedModel, tmp_path: Path) -> None:
    with skipping(model, PLAN), pytest.raises(AdaskipError, match="inside skipping"):
        export_checkpoint(model, None, PLAN, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(formats.comparing, "run", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        export_checkpoint(model, None, PLAN, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_of(model: PreTrainedModel, tmp_path: Path) -> None:
    """The weights' own writer tells of it by an error that is none of the system's."""
    out = tmp_path / "out"
    said = rf"Cannot write {out} \(.*File too large.*\): make room there"
    with full_disk(), pytest.raises(AdaskipError, match=said) as caught:
        export_checkpoint(model, None, PLAN, out)
    assert isinstance(caught.value.__cause__, SafetensorError)
    assert not list(tmp_path.iterdir())


@contextmanager
def full_disk() -> Iterator[None]:
    """Lets files grow to a few thousand bytes only."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32_768, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_is_wrong_is_told_of_and_not_kept(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = hf._state

    def wrong(*args: Any) -> dict[str, torch.Tensor]:
        state = right(*args)
        state["model.layers.1.mlp.down_proj.weight"] = (
            state["model.layers.1.mlp.down_proj.weight"] * 1.01
        )
        return state

    monkeypatch.setattr(hf, "_state", wrong)
    with pytest.raises(ExportError, match=r"transformers .* not what the plan does: KL .* at text"):
        export_checkpoint(model, None, PLAN, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_others_wrote_under_such_a_name() -> None:
    with pytest.raises(UnsupportedModelError, match="written by something else"):
        is_exported({"model_type": "nemotron-nas", "block_configs": []})
