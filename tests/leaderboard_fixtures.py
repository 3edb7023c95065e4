"""A leaderboard whose numbers can be followed by hand: no model has computed them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaskip.leaderboard.board import Board
from adaskip.leaderboard.rows import DENSE_DIGEST, LossRow, PlanRow, ScoreRow, TimesRow
from adaskip.leaderboard.settings import LeaderboardFile

FILE: dict[str, Any] = {
    "models": ["smollm2"],
    "task": "sample_summarization",
    "rows": 3,
    "reference_tokens": 5,
    "calibration_rows": 2,
    "calibration_tokens": 30,
    "phase": "prefill",
    "rounds": 3,
    "headline": 1.1,
    "contexts": {40: {"accelerations": [1.05, 1.1]}},
    "methods": ["ADA", "SEARCH gain"],
}


def file(**changes: Any) -> LeaderboardFile:
    made = LeaderboardFile.model_validate(FILE | changes)
    made.check()
    return made


# By point: the gap of the first row (the second loses twice as much), and the measured speed.
GAPS = {"ADA 1.05": 0.2, "ADA 1.1": 0.6, "SEARCH gain 1.05": 0.1}
SPEEDS = {"ADA 1.05": 1.0625, "ADA 1.1": 1.125, "SEARCH gain 1.05": 1.25}


def fill(
    board: Board,
    gaps: Mapping[str, float] = GAPS,
    speeds: Mapping[str, float] = SPEEDS,
    scores: Mapping[str, Mapping[str, list[float]]] | None = None,
) -> Board:
    """Writes what a board would have: two rows of two tokens each.

    Args:
        board: it.
        gaps: by point.
        speeds: likewise.
        scores: by task and point, dense included: of each row.
    """
    digests = {"dense": DENSE_DIGEST} | {name: f"digest of {name}" for name in gaps}
    board.plans.append(
        [
            PlanRow(
                id=name,
                plan_digest=digests[name],
                about={"predicted acceleration": 1.1, "calibration": "2 rows"},
            )
            for name in gaps
        ]
    )
    board.losses.append(
        [
            LossRow(
                id=name,
                plan_digest=digests[name],
                rows={"a": [2 * (1 + gap), 2], "b": [2 * (3 + 2 * gap), 2]},
            )
            for name, gap in ({"dense": 0.0} | dict(gaps)).items()
        ]
    )
    lengths = {"characters": {"a": 8, "b": 12}, "prompt_characters": {"a": 100, "b": 200}}
    board.losses.note(**lengths)
    board.sitting(1).append(
        [
            TimesRow(
                id=name,
                plan_digest=digests[name],
                ttft=[1 / s, 1 / s, 2 / s, 3 / s, 3 / s],
                per_token=[0.1] * 5,
                kv_bytes=int(100 / s),
            )
            for name, s in ({"dense": 1.0} | dict(speeds)).items()
        ]
    )
    board.sitting(1).note(
        environment={"device": "abacus", "threads": 2, "torch": "2", "commit": None}
    )
    for task, rows in (scores or {}).items():
        board.scores(task).append(
            [
                ScoreRow(id=n, plan_digest=digests[n], rows=dict(zip("abcdef", row, strict=False)))
                for n, row in rows.items()
            ]
        )
    return board


def filled(folder: Path, **changes: Any) -> Board:
    """A board of `FILE` with numbers in it."""
    given = file(rows=2, **changes)
    return fill(Board(given, "smollm2", 40, folder))


def whole(folder: Path) -> list[Board]:
    """Boards with all that a report can show: models, scores, other calibrations."""
    methods = ["ADA", "SEARCH gain linear window", "EE", "SLEB", "BLOCKPRUNER", "SEARCH window"]
    given = file(
        models=["smollm2", "llama"],
        rows=2,
        methods=methods,
        contexts={
            1000: {"accelerations": [1.1, 1.2]},
            2000: {"accelerations": [1.1, 1.2], "models": ["llama"]},
        },
        scores={"needle_single": {"rows": 6}, "sample_summarization": {"rows": 6}},
        other_calibrations=[
            {
                "model": "smollm2",
                "context": 1000,
                "method": methods[1],
                "acceleration": 1.2,
                "tasks": ["sample_qa"],
                "seeds": [1],
            }
        ],
        shipped=[
            {"model": "smollm2", "context": 1000, "method": "ADA", "acceleration": 1.2},
        ],
    )
    boards = [Board(given, model, context, folder) for model, context in given.boards()]
    for number, board in enumerate(boards):
        names = [point.name for point in board.points]
        # Ever faster and worse within a method, and from method to method.
        gaps = {n: 0.02 * (1 + 3 * (i % 2)) * (1 + i) for i, n in enumerate(names)}
        gaps["ADA 1.2"] = 0.9
        gaps["ADA 1.1"] = 0.3
        speeds = {n: 1.1 + 0.1 * (i % 2) + 0.002 * i + 0.01 * number for i, n in enumerate(names)}
        answers = [0.6, 0.3, 0.5, 0.2, 0.9, 0.4]
        scores = {
            "needle_single": {n: [0.0] * 6 for n in ("dense", *names)},
            "sample_summarization": {
                n: [a * (1 - gaps.get(n, 0)) for a in answers] for n in ("dense", *names)
            },
        }
        fill(board, gaps, speeds, scores)
    return boards
