"""`python -m adaskip.export`: from a plan file or a policy to a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import prompt
from export_fixtures import byte_tokenizer, gguf_model
from run_fixtures import save_checkpoint

from adaskip import (
    AdaSkip,
    SkipPlan,
    Sublayer,
    export_checkpoint,
    learn_importance,
    load_model,
    load_tokenizer,
)
from adaskip.export import command_line, comparing
from adaskip.export.command_line import EXPORT
from adaskip.export.refusing import plan_of

PLAN = SkipPlan({Sublayer(1, "attn"): 1.1, Sublayer(2, "ffn"): None})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    gguf_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    PLAN.save(tmp_path / "plan.safetensors")
    return folder


def test_from_a_plan_file(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    options = ["--model", str(checkpoint), "--plan", str(tmp_path / "plan.safetensors")]
    options += ["--format", "gguf", "--dtype", "f16", "--device", "cpu", str(out)]
    assert EXPORT.main(options) == 0
    assert "deci (gguf, f16), 4 layers with 3 attentions and 3 FFNs" in capsys.readouterr().out
    assert (out / "model.gguf").is_file()
    assert EXPORT.main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_weights_are_rounded_once_and_pickles_read_where_that_is_asked_for(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[dict[str, Any]] = []

    def load(name: str, **options: Any) -> Any:
        loaded.append(options)
        return load_model(name, **options)

    monkeypatch.setattr("adaskip.export.command_line.load_model", load)
    plan = ["--model", str(checkpoint), "--plan", str(tmp_path / "plan.safetensors")]
    plan += ["--device", "cpu"]
    assert EXPORT.main([*plan, "--dtype", "bf16", "--allow_pickle", str(tmp_path / "asked")]) == 0
    assert EXPORT.main([*plan, str(tmp_path / "as loaded")]) == 0
    assert [(each["dtype"], each["allow_pickle"]) for each in loaded] == [
        ("float32", True),
        (None, False),
    ]


def test_from_a_policy(checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(checkpoint, device="cpu")
    importance = learn_importance(model, [prompt(20)])
    importance.save(tmp_path / "profile.json")
    options = ["--policy", "ADA", "--skip_sub_layer_num", "3", "--gain", "norm"]
    options += ["--importance", str(tmp_path / "profile.json"), "--device", "cpu"]
    assert EXPORT.main(["--model", str(checkpoint), *options, str(tmp_path / "out")]) == 0
    kept = json.loads((tmp_path / "out" / "config.json").read_text())["adaskip"]
    expected = plan_of(AdaSkip(importance, 3, online=False, gain="norm"), 4)
    assert kept["fingerprint"] == importance.fingerprint
    assert kept["about"]["profile"] == importance.name
    assert "AdaSkip(n_skip=3" in kept["about"]["policy"]
    assert kept["source"] == "model"
    # As where it is called from Python.
    report = export_checkpoint(
        model,
        load_tokenizer(checkpoint),
        AdaSkip(importance, 3, online=False, gain="norm"),
        tmp_path / "same",
    )
    same = json.loads((Path(report.folder) / "config.json").read_text())["adaskip"]
    assert {**same, "about": None} == {**kept, "about": None}
    assert same["about"]["profile"] == importance.name
    rows = {Sublayer(row["layer"], row["kind"]): row["gain"] for row in kept["plan"]}
    assert rows == dict(expected)
    # What serves it is in the folder, too.
    assert load_tokenizer(tmp_path / "out")("the").input_ids == byte_tokenizer()("the").input_ids


# What only the model's shape tells.
OF_THE_MODEL = ("SkipDecode skips", "one phase only", "leaves no attention", "cannot be read as")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "Give either a --plan or a --policy"),
        (["--plan", "PLAN", "--policy", "EE"], "Give either a --plan or a --policy"),
        (["--plan", "PLAN", "--gain", "norm"], "--gain is of no use beside --plan"),
        (["--plan", "PLAN", "--scope", "decode"], "--scope is of no use beside --plan"),
        (["--plan", "none.safetensors"], "There is no plan"),
        (["--policy", "EE"], "Policy EE needs its budget: --skip_full_layer_num N"),
        (["--policy", "EE", "--skip_sub_layer_num", "2"], "--skip_sub_layer_num is of no use to"),
        (["--policy", "XX", "--skip_sub_layer_num", "2"], "Unknown policy 'XX'"),
        (["--policy", "ADA", "--skip_sub_layer_num", "2"], "needs what it has learned"),
        (["--policy", "SD", "--skip_full_layer_num", "2"], "SkipDecode skips other sublayers"),
        (["--policy", "EE", "--skip_full_layer_num", "2", "--scope", "prefill"], "one phase only"),
        (["--policy", "EE", "--skip_full_layer_num", "4"], "leaves no attention"),
        (["--plan", "PLAN", "--format", "onnx"], "Unknown format 'onnx'"),
        (["--plan", "PLAN", "--dtype", "q8_0"], "Unknown dtype of format 'hf' 'q8_0'"),
        (["--plan", "PLAN", "--tokenizer", "a.gguf"], "takes no tokenizer from a GGUF file"),
        (["--plan", "PLAN", "--format", "gguf", "--tokenizer", "a.gguf"], "cannot be read as GGUF"),
    ],
)
def test_bad_input(
    options: list[str],
    said: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not said.startswith(OF_THE_MODEL):
        monkeypatch.setattr(command_line, "load_model", lambda *_, **__: pytest.fail("loaded"))
    options = [str(tmp_path / "plan.safetensors") if o == "PLAN" else o for o in options]
    out = tmp_path / "out"
    assert EXPORT.main(["--model", str(checkpoint), "--device", "cpu", *options, str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert not out.exists()


def test_a_folder_that_cannot_be_made(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "samples", lambda *_: pytest.fail("something was computed"))
    plan = tmp_path / "plan.safetensors"
    options = ["--model", str(checkpoint), "--plan", str(plan), "--device", "cpu"]
    capsys.readouterr()
    assert EXPORT.main([*options, str(plan / "x")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: Cannot write {plan / 'x'} (")


def test_a_tokenizer_that_gguf_does_not_know(tmp_path: Path, capsys: Any) -> None:
    """Bytes that are split as GPT-2 does it."""
    checkpoint = save_checkpoint(tmp_path)
    PLAN.save(tmp_path / "plan.safetensors")
    options = ["--plan", str(tmp_path / "plan.safetensors"), "--format", "gguf", "--device", "cpu"]
    assert EXPORT.main(["--model", str(checkpoint), *options, str(tmp_path / "out")]) == 2
    assert "splits texts otherwise" in capsys.readouterr().err
