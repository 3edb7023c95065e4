"""Perplexity of references: against plain forwards, in the right phases, one read per row."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import N_LAYERS, prompt, tiny_model
from run_fixtures import Workplace, save_checkpoint, save_data
from test_recorders import CountReads
from tiny_loaded import TinyLoaded, as_prompt, character_tokenizer, tiny_rows
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from typing_extensions import override

from adaskip import (
    AdaSkip,
    AdaskipError,
    CacheHoleError,
    DataError,
    EarlyExit,
    FixedSkipping,
    RunError,
    SkipDecode,
    SkipPlan,
    SkipPolicy,
    Step,
    Sublayer,
    UnifiedSkipping,
    learn_importance,
)
from adaskip.cli.perplexity import cells_of, measure, perplexity_main, table
from adaskip.plan import SCOPES, Scope, whole_layers
from adaskip.runs import perplexity
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.perplexity import Perplexity, RowLoss, reference_ids, reference_perplexity
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.runner import resolve
from adaskip.tasks.prompts import Prompt


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()


Items = list[tuple[Prompt, str]]


@pytest.fixture(scope="module")
def items(tokenizer: PreTrainedTokenizerFast) -> Items:
    pairs = [("Tell me: what is it?\n", "It is a stone."), ("Is it?", "Yes"), ("Why:", "n")]
    return [(as_prompt(question, tokenizer), answer) for question, answer in pairs]


def plain_nll(model: PreTrainedModel, prompt_ids: list[int], answer: list[int]) -> float:
    """One forward over prompt and answer, without any of our code."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + answer]), use_cache=False).logits[0]
    predictions = logits[len(prompt_ids) - 1 : -1]
    return float(cross_entropy(predictions, torch.tensor(answer), reduction="sum"))


def test_dense_equals_a_plain_forward(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: Items
) -> None:
    answers = ["It is a stone.", " Yes", " n"]
    expected = [
        plain_nll(model, item.input_ids, list(tokenizer(answer)["input_ids"]))
        for (item, _), answer in zip(items, answers, strict=True)
    ]
    found = reference_perplexity(model, tokenizer, None, items)
    assert [row.nll for row in found.rows] == pytest.approx(expected, abs=1e-4)
    assert [row.tokens for row in found.rows] == [14, 4, 2]
    assert found.perplexity == pytest.approx(math.exp(sum(expected) / 20), rel=1e-5)


POLICIES = {
    "EE": lambda importance: EarlyExit(2),
    "US": lambda importance: UnifiedSkipping(2),
    "SD 1": lambda importance: SkipDecode(1),
    "ADA offline": lambda importance: AdaSkip(importance, 3, online=False),
    # Layer 0 tells transformers the cache's length and the size of the mask.
    "attn0": lambda importance: FixedSkipping(SkipPlan({Sublayer(0, "attn"): 1.2})),
    "nothing": lambda importance: FixedSkipping(SkipPlan()),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", POLICIES)
def test_together_equals_one_by_one(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Items,
    name: str,
    scope: Scope,
) -> None:
    importance = learn_importance(model, [prompt(30)])
    found = []
    for one_by_one in (False, True):
        policy = POLICIES[name](importance)
        kwargs = {"scope": scope, "one_by_one": one_by_one}
        found.append(reference_perplexity(model, tokenizer, policy, items, **kwargs))
    assert [r.nll for r in found[0].rows] == pytest.approx([r.nll for r in found[1].rows], abs=1e-4)
    # 14 tokens: the prompt's forward and 13 steps, of which one or all are taken alone.
    assert [f.rows[0].skipped.decode.forwards for f in found] == [2, 13]


def test_scopes_skip_where_they_say(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: Items
) -> None:
    dense = reference_perplexity(model, tokenizer, None, items)
    found = {
        scope: reference_perplexity(model, tokenizer, EarlyExit(2), items, scope=scope)
        for scope in SCOPES
    }
    for scope, result in found.items():
        skipped = result.rows[0].skipped
        assert skipped.prefill.attn == (0 if scope == "decode" else 2)
        assert skipped.decode.attn == 2 * 2
    # What prefill skipped stays skipped, so these are the same computation.
    assert found["prefill"].nll == found["e2e"].nll
    # The first token of a reference is predicted by the prefill.
    first = [
        reference_perplexity(model, tokenizer, policy, items, scope="decode", max_tokens=1).nll
        for policy in (None, EarlyExit(2))
    ]
    assert first[0] == first[1]
    assert abs(found["decode"].nll - dense.nll) > 0.01


def test_skipped_attention_equals_a_zeroed_projection(
    tokenizer: PreTrainedTokenizerFast, items: Items
) -> None:
    model, zeroed = tiny_model("llama"), tiny_model("llama")
    torch.nn.init.zeros_(zeroed.model.layers[1].self_attn.o_proj.weight)
    policy = FixedSkipping(SkipPlan({Sublayer(1, "attn"): None}))
    found = reference_perplexity(model, tokenizer, policy, items)
    assert found.nll == pytest.approx(reference_perplexity(zeroed, tokenizer, None, items).nll)


def test_a_loss_that_is_no_number_is_refused(
    tokenizer: PreTrainedTokenizerFast, items: Items
) -> None:
    model = tiny_model("llama")
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    message = r"row 1 of 3 \(reference 'It is a stone\.'\) is not a number in torch\.float32"
    with pytest.raises(RunError, match=message):
        reference_perplexity(model, tokenizer, None, items)


def test_skip_decode_sees_every_step(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    items = [(as_prompt("Count:", tokenizer), "123456")]
    policy = SkipDecode(3, horizon=4)
    found = reference_perplexity(model, tokenizer, policy, items, scope="decode")
    # Seven tokens with the space, six steps: min(3, ceil(t / 4 * 2) + 1) for t = 0 .. 5.
    assert found.rows[0].tokens == 7
    assert found.rows[0].skipped.decode.forwards == 6
    assert found.rows[0].skipped.decode.attn == 1 + 2 + 2 + 3 + 3 + 3
    assert found.rows[0].skipped.prefill.attn == 0


def test_the_online_extension_comes_after_its_window(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    importance = learn_importance(model, [prompt(30)])
    items = [(as_prompt("Count:", tokenizer), "123456")] * 2
    # Every FFN reaches this threshold.
    importance = replace(importance, similarity=dict.fromkeys(importance.similarity, -1.0))
    found = reference_perplexity(
        model, tokenizer, AdaSkip(importance, 2, online=True, window=2), items
    )
    assert len(found.rows) == 2
    for row in found.rows:
        assert row.skipped.prefill.ffn == 1
        assert row.skipped.decode.forwards == 6
        assert row.skipped.decode.ffn == 6 * 1 + 4 * (N_LAYERS - 1)
    assert found.rows[0].nll == found.rows[1].nll


def test_one_read_per_row(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: Items
) -> None:
    for policy in (EarlyExit(1), SkipDecode(2)):
        with CountReads() as counter:
            reference_perplexity(model, tokenizer, policy, items)
        assert counter.reads == len(items)


class Fickle(SkipPolicy):
    """Changes its plan from step to step and does not say so."""

    @override
    def plan(self, step: Step) -> SkipPlan:
        return whole_layers([1 + step.index % 2])


def test_a_policy_that_hides_its_steps_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: Items
) -> None:
    with pytest.raises(CacheHoleError, match="layer 2 was skipped"):
        reference_perplexity(model, tokenizer, Fickle(), items, scope="decode")


def test_reference_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    def text(question: str, reference: str, limit: int = 99) -> str:
        ids = reference_ids(tokenizer, as_prompt(question, tokenizer), reference, limit)
        return str(tokenizer.decode(ids))

    assert text("Answer:", "Yes") == " Yes"
    assert text("Answer:\n", " Yes \n") == "Yes"
    assert text("Answer:", "Yes, of course", 4) == " Yes"
    # No space before a script without spaces; the tokenizer does not know the character.
    assert reference_ids(tokenizer, as_prompt("A:", tokenizer), "是", 9) == [2]
    with pytest.raises(DataError, match="empty"):
        text("Answer:", " \n")


def test_tokens_that_merge_at_the_border() -> None:
    vocabulary = {"<unk>": 0, "是": 1, "不": 2, "是不": 3}
    merging = Tokenizer(models.BPE(vocabulary, [("是", "不")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging)
    assert tokenizer("是不")["input_ids"] == [3]
    assert reference_ids(tokenizer, Prompt("是", [1], 1, 1, False), "不", 9) == [2]


def test_perplexity_is_of_all_tokens_together() -> None:
    two = Perplexity((RowLoss(math.log(4), 1, {}), RowLoss(3 * math.log(2), 3, {})))
    assert two.perplexity == pytest.approx(2 ** (5 / 4))
    assert (two + two).perplexity == pytest.approx(two.perplexity)
    assert (two + two).tokens == 8
    assert Perplexity((RowLoss(1e6, 1, {}),)).perplexity == math.inf


def test_nothing_to_score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(AdaskipError, match="at least one row"):
        reference_perplexity(model, tokenizer, None, [])


def config(tmp_path: Path, **settings: object) -> RunConfig:
    base = {
        "experiment": "e2e",
        "model_name": "smollm2",
        "policy": "dense",
        "tasks": ("sample_qa", "sample_summarization"),
        "limit": 3,
        "warmup": 2,
        "warmup_task": "sample_qa",
        "results_dir": str(tmp_path),
        "name": "tiny",
    }
    return resolve(RunConfig(**(base | settings)))  # type: ignore[arg-type]


def test_cells_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = TinyLoaded.make()
    opened = []
    monkeypatch.setattr(LoadedModel, "open", lambda config: opened.append(config) or loaded)
    monkeypatch.setattr(
        "adaskip.runs.loaded.sample_rows", lambda task, tokenizer, n, **_: tiny_rows(task, n)
    )
    budgets = {"skip_full_layer_num": [1, 2], "skip_sub_layer_num": [3]}
    cells = cells_of(config(tmp_path), ["EE", "ADA"], budgets)
    assert [(cell.policy, cell.budget) for cell in cells] == [
        ("dense", 0),
        ("EE", 1),
        ("EE", 2),
        ("ADA", 3),
    ]
    path, found = measure(cells[:3], 16)
    assert len(opened) == 1
    assert measure(cells[:2], 16) == (path, found)
    assert len(opened) == 1
    _, found = measure(cells, 16)
    assert len(opened) == 2
    assert [*found][3] == "ADA 3 (gain token, online, 2 rows of sample_qa)"
    row = found["EE 2"]
    assert row.skipped_share == {"prefill": 0.5, "decode": 0.5}
    by_task = row.tasks.values()
    assert row.nll == pytest.approx(sum(task.nll for task in by_task))
    assert row.tokens == sum(n for task in by_task for _, n in task.rows.values())
    lines = table(found, cells).splitlines()
    assert [line.split("|")[1].split()[0] for line in lines[2:]] == ["dense", "EE", "EE", "ADA"]
    # What earlier versions wrote: by the cell's name, in one mapping.
    record = json.loads(path.read_text())
    record["sums"] = {row.pop("id"): row for row in record["sums"]}
    path.write_text(json.dumps(record))
    assert measure(cells, 16) == (path, found)
    assert len(opened) == 2
    with pytest.raises(RunError, match="reference_tokens: 16 then, 8 now"):
        measure(cells[:1], 8)


def interrupted(
    monkeypatch: pytest.MonkeyPatch, cells: list[RunConfig], *, after: int
) -> list[tuple[Any, ...]]:
    """Measures cells until so many rows are scored; what is scored, then and later."""
    stock, scored = perplexity._nll, []
    ends = [after]

    def counted(*given: Any) -> Tensor:
        if len(scored) in ends:
            ends.clear()
            raise KeyboardInterrupt
        scored.append(given)
        return stock(*given)

    monkeypatch.setattr(perplexity, "_nll", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(cells, 16)
    return scored


def test_an_interrupted_cell_goes_on_with_its_next_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadedModel, "open", lambda config: TinyLoaded.make())
    cells = cells_of(config(tmp_path / "whole"), ["EE"], {"skip_full_layer_num": [1]})
    _, whole = measure(cells, 16)
    cells = [replace(cell, results_dir=str(tmp_path / "cut")) for cell in cells]
    scored = interrupted(monkeypatch, cells, after=4)
    path = tmp_path / "cut" / "perplexity" / "tiny-e2e.json"
    # The first task of dense, and one row of the second; a line that was cut off does not count.
    first, second = sorted(path.with_suffix("").iterdir(), key=lambda file: -file.stat().st_size)
    assert [len(file.read_text().splitlines()) for file in (first, second)] == [3, 1]
    with second.open("a") as file:
        file.write('{"id": "sample_summ')
    assert measure(cells, 16) == (path, whole)
    assert len(scored) == 2 * 2 * 3
    assert not path.with_suffix("").exists()


def test_other_prompts_are_not_put_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = TinyLoaded.make()
    monkeypatch.setattr(LoadedModel, "open", lambda config: loaded)
    cells = cells_of(config(tmp_path), ["EE"], {"skip_full_layer_num": [1]})
    scored = interrupted(monkeypatch, cells, after=2)
    path = tmp_path / "perplexity" / "tiny-e2e.json"
    before = path.read_text()
    loaded.spec = replace(loaded.spec, prompt_limit=20)
    with pytest.raises(RunError, match=r"another prompt of row sample_qa sample_qa-0 than it has"):
        measure(cells, 16)
    # Without the file, nor is what was under way taken for theirs.
    path.unlink()
    measure(cells[:1], 16)
    assert len(scored) == 2 + 6
    # What is under way with the others stays.
    (kept,) = path.with_suffix("").iterdir()
    loaded.spec = replace(loaded.spec, prompt_limit=200)
    path.write_text(before)
    measure(cells[:1], 16)
    assert len(scored) == 2 + 6 + 4
    assert not kept.exists()


def test_nothing_is_added_to_what_other_weights_or_rows_gave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Workplace(
        save_checkpoint(tmp_path / "model"), save_data(tmp_path / "data"), tmp_path / "results"
    )
    given = ["--model", "llama", "--tasks", "trec", "--limit", "2", "--reference_tokens", "4"]
    for name in ("model_path", "data_dir", "results_dir", "max_length", "device"):
        given += [f"--{name}", str(place.settings[name])]
    more = ["--policy", "EE", "--skip_full_layer_num", "1"]
    assert perplexity_main(given) == 0
    (file,) = (place.results / "perplexity").glob("*.json")
    kept, data = file.read_bytes(), place.data / "trec_e.jsonl"
    was = data.read_text()
    data.write_text(was.replace("a number", "some number"))
    capsys.readouterr()
    assert perplexity_main([*given, *more]) == 2
    assert "another row trec row0 than the data has now" in capsys.readouterr().err
    data.write_text(was)
    model = LlamaForCausalLM.from_pretrained(place.checkpoint)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    model.save_pretrained(place.checkpoint)
    assert perplexity_main([*given, *more]) == 2
    assert "was made with model llama" in capsys.readouterr().err
    assert file.read_bytes() == kept
    # Nor is it told of them, where nothing is missing.
    assert perplexity_main(given) == 2
    assert "was made with model llama" in capsys.readouterr().err
    save_checkpoint(place.checkpoint)
    assert perplexity_main([*given, *more]) == 0
    assert "EE 1" in capsys.readouterr().out


def test_another_folder_of_warm_up_rows_is_another_measurement(tmp_path: Path) -> None:
    place = Workplace(
        save_checkpoint(tmp_path / "model"), save_data(tmp_path / "data"), tmp_path / "results"
    )
    other = save_data(tmp_path / "other", n=2)
    given = ["--model", "llama", "--tasks", "sample_qa", "--limit", "1", "--reference_tokens", "2"]
    given += ["--policy", "ADA", "--skip_sub_layer_num", "1", "--warmup", "1"]
    given += [
        "--warmup_task",
        "trec",
        "--sample_tokens",
        "4000",
        "--max_length",
        "96",
        "--device",
        "cpu",
    ]
    for name in ("model_path", "results_dir"):
        given += [f"--{name}", str(place.settings[name])]
    for folder in (place.data, other):
        assert perplexity_main([*given, "--data_dir", str(folder)]) == 0
        (file,) = (place.results / "perplexity").glob("*.json")
        _, row = json.loads(file.read_text())["sums"]
        assert row["warmup_data_dir"] == str(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "EE"], "needs its budget: --skip_full_layer_num"),
        (["--policy", "XX", "--skip_full_layer_num", "1"], "XX"),
        (["--skip_sub_layer_num", "4"], "no --policy that counts so"),
        (["--policy", "EE", "--skip_full_layer_num", "-1"], "whole number from 0 up"),
        (["--batch_size", "4"], "unrecognized arguments"),
        (["--reference_tokens", "0"], "--reference_tokens is 0; it must be at least 1"),
        (["--scope", "never"], "invalid choice"),
        (["--gain", "norm"], "'gain' does not apply to dense; policies that take it: ADA"),
        (
            ["--policy", "EE", "--skip_full_layer_num", "1", "--no-online"],
            "'online' does not apply to EE",
        ),
    ],
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert perplexity_main(["--model", "smollm2", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
