"""The record of a search: an interrupted one goes on and finds the same plan, bit for bit."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prompt, tiny_model
from test_search import LONG, MENU_TIMES, times
from transformers import PreTrainedModel

from adaskip import AdaskipError, Linear, RunError, SkipPlan, Sublayer, Window, search_plan
from adaskip.methods import make_plan
from adaskip.profiling import calibration
from adaskip.search import journal
from adaskip.search.describing import identity, record_name
from adaskip.search.journal import VERSION, Journal, short_hash
from adaskip.search.losses import Losses
from adaskip.search.menu import Option
from adaskip.search.trials import Trials
from adaskip.streams import Sublayers, measuring
from adaskip.sublayer_times import PlanTimes

RANK_8 = PlanTimes(times(), {"linear 8": 0.5})
ELSEWHERE = PlanTimes(replace(times(4, 1), context=999), MENU_TIMES.replaced)
WHOLE_MENU = PlanTimes(times(), {"linear": 0.5} | {f"window {n}": 1.5 for n in (64, 128, 256)})
OPTIONS: dict[str, Any] = {
    "acceleration": 1.7,
    "times": MENU_TIMES,
    "rank": 16,
    "windows": (8, 16),
}


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def wide() -> PreTrainedModel:
    """With positions for the usual windows."""
    return tiny_model("llama", max_position_embeddings=1024)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many losses are computed, and after how many of them a search is interrupted."""
    counts, compute = [0, 10**9], Losses.loss

    def counted(self: Losses, *args: Any, **kwargs: Any) -> float:
        if counts[0] == counts[1]:
            raise KeyboardInterrupt
        counts[0] += 1
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(Losses, "loss", counted)
    return counts


def contents(plan: SkipPlan) -> list[Any]:
    """A plan, with what can be compared of its linear maps."""
    return [
        (s, [t.tolist() for t in r.tensors] if isinstance(r, Linear) else r)
        for s, r in plan.items()
    ]


def test_times_of_another_machine_are_measured_anew(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(*args: Any, **kwargs: Any) -> PlanTimes:
        measured.append(args)
        return MENU_TIMES

    monkeypatch.setattr(journal, "measured_plan_times", measure)
    options = OPTIONS | {"times": None, "record": tmp_path / "record.jsonl"}
    options["replacements"] = ["gain", "linear", "window"]
    for machine, n_measured in (("one", 1), ("one", 1), ("another", 2)):
        monkeypatch.setattr(calibration, "hardware", lambda device, name=machine: name)
        search_plan(model, LONG, **options)
        assert len(measured) == n_measured


@pytest.mark.parametrize("after", [3, 20])
def test_an_interrupted_search_goes_on(
    model: PreTrainedModel, tmp_path: Path, looks: list[int], after: int
) -> None:
    whole = search_plan(model, LONG, **OPTIONS)
    n_whole = looks[0]
    record = tmp_path / "new" / "search.jsonl"
    looks[:] = [0, after]
    with pytest.raises(KeyboardInterrupt):
        search_plan(model, LONG, record=record, **OPTIONS)
    # Killed while it wrote.
    record.write_bytes(record.read_bytes() + b'{"step": "attn0 ga')
    looks[:] = [0, 10**9]
    plan = search_plan(model, LONG, record=record, **OPTIONS)
    assert contents(plan) == contents(whole)
    assert plan.about == whole.about
    assert looks[0] == n_whole - after
    # A finished one looks at nothing but the loss of its plan, before and after learning anew.
    looks[0] = 0
    again = search_plan(model, LONG, record=record, **OPTIONS)
    assert contents(again) == contents(whole)
    assert looks[0] <= 3


def test_a_full_disk_is_one_sentence_and_the_search_goes_on(
    model: PreTrainedModel, tmp_path: Path, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    record, stock, opened = tmp_path / "search.jsonl", Path.open, 0

    def full(path: Path, mode: str = "r", **given: Any) -> Any:
        nonlocal opened
        opened += path == record
        if path == record and opened > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return stock(path, mode, **given)

    whole = search_plan(model, LONG, **OPTIONS)
    alone = looks[0]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(RunError, match=r"cannot be written: .*No space left.* goes on"):
            search_plan(model, LONG, record=record, **OPTIONS)
    kept = len(record.read_text().splitlines())
    assert kept == 6
    looks[0] = 0
    assert contents(search_plan(model, LONG, record=record, **OPTIONS)) == contents(whole)
    # The first line says what it is of.
    assert looks[0] == alone - (kept - 1)


@pytest.mark.parametrize(
    ("changed", "least"),
    [
        ({"acceleration": 1.8}, 0.4),
        ({"windows": (8,)}, 0.2),
        ({"exchanges": 2}, 1.0),
        ({"times": ELSEWHERE, "context": 999}, 0.2),
        ({"replacements": ["gain"]}, 0.1),
        ({"replacements": ["linear"], "rank": 8, "times": RANK_8}, 0.0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_record_serves_other_budgets_and_menus_and_changes_no_plan(
    model: PreTrainedModel,
    tmp_path: Path,
    looks: list[int],
    changed: dict[str, Any],
    least: float,
) -> None:
    record = tmp_path / "search.jsonl"
    search_plan(model, LONG, record=record, **OPTIONS)
    options = OPTIONS | changed
    looks[0] = 0
    alone = search_plan(model, LONG, **options)
    n_alone, looks[0] = looks[0], 0
    served = search_plan(model, LONG, record=record, **options)
    assert contents(served) == contents(alone)
    assert served.about == alone.about
    # The loss of the plan, before and after learning anew, is not from the record.
    assert looks[0] - 3 <= (1 - least) * (n_alone - 3)
    assert least > 0 or looks[0] == n_alone


def test_a_loss_is_known_by_what_was_learned_in_front_of_it(model: PreTrainedModel) -> None:
    def asked(*options: Option) -> list[str]:
        """What the record calls the last of these on a plan that was given the others."""
        rows = Trials(Losses(Sublayers(model), LONG), 8, Journal(None, {}))
        for option in options[:-1]:
            rows.accept([option])
        seen: list[str] = []
        rows._journal.add = lambda kind, of, value: seen.append(of)  # type: ignore[method-assign]
        rows.loss([options[-1]])
        return seen

    gain, wide, narrow = (
        Option(Sublayer(1, "ffn"), "gain"),
        Option(Sublayer(0, "attn"), "window 16", Window(16)),
        Option(Sublayer(0, "attn"), "window 16", Window(16, sinks=0)),
    )
    late, none = Option(Sublayer(3, "attn"), "linear 8"), Option(Sublayer(0, "attn"), "nothing")
    with measuring(model):
        assert asked(gain) == ["kl of all rows: ffn1 gain"]
        before = [asked(other, gain)[0] for other in (wide, narrow, none)]
        assert len(set(before)) == 3
        assert all(" behind " in of for of in before)
        # What lies behind does not matter to a gain, but in which order two were learned does.
        assert asked(late, gain) != asked(gain, late)
        assert asked(late, gain)[0].startswith("kl of all rows: ffn1 gain, attn3 linear 8")
        # A window is the same wherever it is.
        assert asked(gain, wide) == ["kl of all rows: attn0 window 16 4, ffn1 gain"]


@pytest.mark.parametrize(
    "made", [partial(search_plan, replacements=["gain"]), partial(make_plan, method="SLEB")]
)
def test_measured_times_are_in_the_record(
    model: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: Callable[..., SkipPlan],
) -> None:
    monkeypatch.setenv("ADASKIP_CACHE", str(tmp_path / "cache"))
    options: dict[str, Any] = {"acceleration": 1.05, "record": tmp_path / "search.jsonl"}
    made = partial(made, model, LONG, **options)
    first = made()
    for path in (tmp_path / "cache").rglob("*.json"):
        path.unlink()
    monkeypatch.setattr(journal, "measured_plan_times", None)
    assert made().about == first.about


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"calibration": LONG[:1]}, "calibration: "),
        ({"model": "qwen2"}, "model: llama.* then, qwen2.* now"),
    ],
)
def test_a_record_of_another_model_or_other_rows_is_refused(
    model: PreTrainedModel, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    record = tmp_path / "search.jsonl"
    search_plan(model, LONG, record=record, **OPTIONS)
    before = record.read_bytes()
    given: dict[str, Any] = {"calibration": LONG, "model": model} | OPTIONS | changed
    if given["model"] == "qwen2":
        given["model"] = tiny_model("qwen2")
    with pytest.raises(RunError, match=message):
        search_plan(given.pop("model"), given.pop("calibration"), record=record, **given)
    assert record.read_bytes() == before


@pytest.mark.parametrize("name", ["SEARCH", "SLEB"])
def test_a_model_whose_predictions_are_no_numbers_is_refused(
    wide: PreTrainedModel, tmp_path: Path, name: str
) -> None:
    record = tmp_path / "record.jsonl"
    with torch.no_grad():
        wide.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(AdaskipError, match=r"are no numbers in torch\.float32; load the model in"):
        make_plan(wide, LONG, name, times=WHOLE_MENU, record=record)
    assert not record.exists() or len(record.read_text().splitlines()) == 1


@pytest.mark.parametrize("name", ["SEARCH", "BLOCKPRUNER"])
def test_a_candidate_that_overflows_is_not_chosen_and_leaves_the_record_readable(
    wide: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    worst, behind = Sublayer(1, "ffn"), Losses._behind

    def overflowing(self: Losses, stream: Any, first: int, plan: Any) -> list[torch.Tensor]:
        *before, last = behind(self, stream, first, plan)
        return [*before, last * torch.nan if worst in plan else last]

    def made(acceleration: float) -> SkipPlan:
        options: dict[str, Any] = {"times": WHOLE_MENU, "record": tmp_path / "record.jsonl"}
        return make_plan(wide, LONG, name, acceleration=acceleration, **options)

    assert worst in made(4.5)
    (tmp_path / "record.jsonl").unlink()
    monkeypatch.setattr(Losses, "_behind", overflowing)
    plan = made(3.7)
    assert worst not in plan
    assert contents(made(3.7)) == contents(plan)
    told = (tmp_path / "record.jsonl").read_text()
    assert "NaN" not in told
    assert "Infinity" not in told
    assert "Infinity" not in str(plan.about)
    with pytest.raises(AdaskipError, match="numbers"):
        made(4.5)


def other_head(model: PreTrainedModel) -> None:
    model.lm_head.weight.data[0] += 1.0


def other_positions(model: PreTrainedModel) -> None:
    model.config.rope_parameters["rope_theta"] = 500.0


def other_bits(model: PreTrainedModel) -> None:
    model.config.quantization_config = {"quant_method": "hqq", "nbits": 4}


def other_bias(model: PreTrainedModel) -> None:
    model.model.layers[2].mlp.up_proj.bias = torch.nn.Parameter(torch.ones(64))


@pytest.mark.parametrize("change", [other_head, other_positions, other_bits, other_bias])
def test_a_record_of_other_settings_of_the_same_weights_is_refused(
    model: PreTrainedModel, tmp_path: Path, change: Callable[[PreTrainedModel], None]
) -> None:
    record = tmp_path / "search.jsonl"
    head = identity(model, LONG)
    Journal(record, head)
    name = record_name(model, LONG)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RunError, match="configuration: "):
        Journal(record, identity(model, LONG))
    change(model)
    with pytest.raises(RunError, match=r"configuration: \w{16} then, \w{16} now"):
        search_plan(model, LONG, record=record, **OPTIONS)
    # Those of earlier versions do not tell, and are called as they were.
    del head["configuration"]
    record.write_text(json.dumps({"version": VERSION, **head}) + "\n")
    Journal(record, identity(model, LONG))
    assert record_name(model, LONG) == name == f"record-{short_hash(head)}.jsonl"


def test_a_damaged_record_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    record = tmp_path / "search.jsonl"
    search_plan(model, LONG, record=record, **OPTIONS)
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join([*lines[:2], "[]\n", *lines[3:]]))
    with pytest.raises(RunError, match=r"Line 3 of the record .* is damaged"):
        search_plan(model, LONG, record=record, **OPTIONS)
    for wrong in ({"loss": "low"}, {"of": 3}, {"loss": None, "times": 2.0}):
        first = json.loads(lines[1]) | wrong
        record.write_text("".join([lines[0], json.dumps(first) + "\n"]))
        with pytest.raises(RunError, match=r"Line 2 of the record .* is damaged"):
            search_plan(model, LONG, record=record, **OPTIONS)
    # As an earlier version wrote them.
    header = json.loads(lines[0]) | {"version": VERSION - 1}
    record.write_text("".join([json.dumps(header) + "\n", *lines[1:]]))
    with pytest.raises(RunError, match=rf"version: {VERSION - 1} then, {VERSION} now"):
        search_plan(model, LONG, record=record, **OPTIONS)
    with pytest.raises(RunError, match="cannot be used"):
        search_plan(model, LONG, record=tmp_path, **OPTIONS)


def test_rows_are_told_apart_by_their_ids(model: PreTrainedModel, tmp_path: Path) -> None:
    record = tmp_path / "search.jsonl"
    options: dict[str, Any] = {"acceleration": 1.1, "times": times(), "replacements": ["gain"]}
    plan = search_plan(model, LONG, record=record, **options)
    as_lists = [(row[0].flatten().tolist(), row[1].flatten().tolist()) for row in LONG]
    assert search_plan(model, as_lists, record=record, **options) == plan
    other = [(LONG[0][0], prompt(7, seed=9)), LONG[1]]
    with pytest.raises(RunError, match="calibration"):
        search_plan(model, other, record=record, **options)
