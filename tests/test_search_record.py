"""The record of a search: an interrupted one goes on and finds the same plan, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import prompt, tiny_model
from test_search import LONG, MENU_TIMES, times
from transformers import PreTrainedModel

from adaskip import Linear, RunError, SkipPlan, search_plan
from adaskip.search.losses import Losses

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


def test_measured_times_are_in_the_record(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADASKIP_CACHE", str(tmp_path / "cache"))
    options: dict[str, Any] = {"acceleration": 1.05, "replacements": ["gain"]}
    record = tmp_path / "search.jsonl"
    first = search_plan(model, LONG, record=record, **options)
    for path in (tmp_path / "cache").rglob("*.json"):
        path.unlink()
    monkeypatch.setattr("adaskip.search.searching.measured_plan_times", None)
    assert search_plan(model, LONG, record=record, **options).about == first.about


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"acceleration": 1.8}, r"acceleration: 1\.7 then, 1\.8 now"),
        ({"windows": (8,)}, "windows: "),
        ({"times": times(), "replacements": ["gain"]}, "is of another search"),
        ({"calibration": LONG[:1]}, "calibration: "),
        ({"model": "qwen2"}, "model: llama.* then, qwen2.* now"),
        ({"exchanges": 2}, "exchanges: 24 then, 2 now"),
    ],
)
def test_a_record_of_another_search_is_refused(
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


def test_a_damaged_record_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    record = tmp_path / "search.jsonl"
    search_plan(model, LONG, record=record, **OPTIONS)
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join([*lines[:2], "[]\n", *lines[3:]]))
    with pytest.raises(RunError, match=r"Line 3 of the record .* is damaged"):
        search_plan(model, LONG, record=record, **OPTIONS)
    # Steps that are not those of this search.
    other = json.dumps({"step": "ffn3 gain few", "loss": 0.0, "forwards": 0.0}) + "\n"
    record.write_text("".join([lines[0], other, *lines[2:]]))
    with pytest.raises(RunError, match="goes on with 'ffn3 gain few' where this search has"):
        search_plan(model, LONG, record=record, **OPTIONS)
    record.write_text("".join([lines[0], json.dumps({"step": "plan"}) + "\n"]))
    with pytest.raises(RunError, match="goes on with 'plan'"):
        search_plan(model, LONG, record=record, **OPTIONS)
    first = json.loads(lines[1]) | {"loss": "low"}
    record.write_text("".join([lines[0], json.dumps(first) + "\n"]))
    with pytest.raises(RunError, match=r"Line 2 of the record .* is damaged"):
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
