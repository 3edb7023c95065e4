"""Methods at equal measured time: what is made once, and what is said of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import prompt, tiny_model

from adaskip.cli.leaderboard import leaderboard_main
from adaskip.leaderboard import board as boards
from adaskip.leaderboard.board import Board, LossRow, PlanRow, TimesRow
from adaskip.leaderboard.settings import LeaderboardFile
from adaskip.reports.leaderboard import at_speed, collect, write_report
from adaskip.runs.perplexity import Perplexity
from adaskip.tasks.prompts import Prompt

FILE: dict[str, Any] = {
    "model": "smollm2",
    "task": "sample_summarization",
    "rows": 3,
    "reference_tokens": 5,
    "calibration_rows": 2,
    "calibration_tokens": 30,
    "phase": "prefill",
    "rounds": 3,
    "contexts": {40: {"accelerations": [1.05, 1.1]}},
    "methods": ["ADA", "SEARCH gain"],
}


def file(**changes: Any) -> LeaderboardFile:
    return LeaderboardFile.model_validate(FILE | changes)


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    """A board of a tiny model, whose references are ids."""
    monkeypatch.setenv("ADASKIP_CACHE", str(tmp_path / "cache"))
    made = Board(file(), 40, tmp_path / "board")
    ids = [prompt(40, seed=seed)[0].tolist() for seed in range(3)]
    vars(made)["_loaded"] = SimpleNamespace(model=tiny_model("llama"), tokenizer=None)
    vars(made)["_calibration"] = [(each[:30], each[30:35]) for each in ids[:2]]
    vars(made)["_test_rows"] = [SimpleNamespace(id=f"row {n}") for n in range(3)]
    vars(made)["_items"] = [
        (Prompt("", each[:35], 35, 35, truncated=False), str(n)) for n, each in enumerate(ids)
    ]
    monkeypatch.setattr(
        "adaskip.runs.perplexity.reference_ids", lambda t, p, reference, n: ids[int(reference)][35:]
    )
    return made


def test_every_part_is_made_once(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    assert collect(board) is None
    board.make_plans(progress=False)
    board.score(progress=False)
    board.time(progress=False)
    names = ["ADA 1.05", "ADA 1.1", "SEARCH gain 1.05", "SEARCH gain 1.1"]
    made = {row.id: row for row in board.plans.rows()}
    assert [*made] == names
    found = [name for name in names if made[name].error is None]
    assert found
    for name in found:
        assert made[name].about["predicted acceleration"] >= float(name.split()[-1])
        assert made[name].replaced
    assert [row.id for row in board.losses.rows()] == ["dense", *found]
    assert {len(row.ttft) for row in board.times.rows()} == {3}
    before = {path: path.read_bytes() for path in board.folder.rglob("*.json")}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("made a second time")

    for name in ("make_plan", "search_plan", "reference_perplexity", "time_request"):
        monkeypatch.setattr(boards, name, fail)
    board.make_plans(progress=False)
    board.score(progress=False)
    board.time(progress=False)
    assert {path: path.read_bytes() for path in board.folder.rglob("*.json")} == before
    # A plan whose file is gone is made again.
    next(board.folder.rglob("*.safetensors")).unlink()
    with pytest.raises(AssertionError, match="a second time"):
        board.make_plans(progress=False)


def test_losses_go_on_where_they_were(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    board.make_plans(progress=False)
    stock, calls = boards.reference_perplexity, []

    def once(*args: Any, **kwargs: Any) -> Perplexity:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return stock(*args, **kwargs)

    monkeypatch.setattr(boards, "reference_perplexity", once)
    with pytest.raises(KeyboardInterrupt):
        board.score(progress=False)
    assert [row.id for row in board.losses.rows()] == ["dense"]
    board.score(progress=False)
    assert len(calls) == 1 + len(board.losses.rows())


def filled(tmp_path: Path) -> Board:
    """A board with numbers that can be followed by hand: two rows of two tokens each."""
    made = Board(file(rows=2), 40, tmp_path)
    gaps = {"dense": 0.0, "ADA 1.05": 0.2, "ADA 1.1": 0.6, "SEARCH gain 1.05": 0.1}
    speeds = {"dense": 1.0, "ADA 1.05": 1.0625, "ADA 1.1": 1.125, "SEARCH gain 1.05": 1.25}
    made.plans.append(
        [PlanRow(id=n, about={"predicted acceleration": 1.1}) for n in gaps if n != "dense"]
        + [PlanRow(id="SEARCH gain 1.1", error="cannot be reached")]
    )
    made.losses.append(
        [
            LossRow(id=name, rows={"a": [2 * (1 + gap), 2], "b": [2 * (3 + 2 * gap), 2]})
            for name, gap in gaps.items()
        ]
    )
    made.times.append(
        [
            TimesRow(
                id=name, ttft=[1 / s, 2 / s, 3 / s], per_token=[0.1] * 3, kv_bytes=int(100 / s)
            )
            for name, s in speeds.items()
        ]
    )
    return made


def test_gaps_at_equal_time_lie_between_plans(tmp_path: Path) -> None:
    table = collect(filled(tmp_path))
    assert table is not None
    assert table.perplexity == pytest.approx(math.exp(2))
    first = table.entries[0]
    assert (first.ttft.median, first.kv_share) == (1.0625, 0.94)
    # Rows lose 0.2 and 0.4 nats per token.
    assert first.gap == pytest.approx(0.3)
    assert first.interval == pytest.approx((0.2, 0.4))
    # Half way between the plans at 1.0625 and 1.125; below the first, between dense and it.
    halfway = at_speed(table.entries, "ADA", 1.09375)
    assert halfway == pytest.approx({"a": 0.4, "b": 0.8})
    assert at_speed(table.entries, "ADA", 1.03125) == pytest.approx({"a": 0.1, "b": 0.2})
    assert at_speed(table.entries, "ADA", 1.2) is None
    assert at_speed(table.entries, "SEARCH gain", 1.125) == pytest.approx({"a": 0.05, "b": 0.1})


def test_the_report_says_what_exists(tmp_path: Path) -> None:
    text = write_report([filled(tmp_path)])
    assert "| ADA         |  1.05 |     1.100 | 1.062 [1.062–1.062]" in text
    # At 1.1 AdaSkip loses 0.66 nats over both rows, the search 0.06.
    assert "0.060, 9% [9%–9%]" in text
    assert "SEARCH gain 1.1: cannot be reached" in text
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [e["method"] for e in content["tables"][0]["entries"]] == [
        "ADA",
        "ADA",
        "SEARCH gain",
    ]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: smollm2\nmodels: [a]\n", "'models'"),
        ("- a\n", "must be a mapping"),
        (json.dumps(FILE | {"contexts": {"40": {"accelerations": [1.0]}}}), "greater than 1"),
    ],
)
def test_files_that_cannot_be(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "board.yaml"
    path.write_text(text, encoding="utf-8")
    assert leaderboard_main(["--config", str(path), "--results_dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_context_that_the_file_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert leaderboard_main(["--contexts", "3", "--results_dir", str(tmp_path)]) == 2
    assert "3 tokens are no context of the file; it has 1000" in capsys.readouterr().err
