"""The command line of `eval/leaderboard.py`: makes what is missing, reports what exists."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from adaskip.command import Command, say
from adaskip.configuration import config_path
from adaskip.errors import AdaskipError
from adaskip.leaderboard.board import Board
from adaskip.leaderboard.settings import LeaderboardFile
from adaskip.reports.leaderboard import write_report
from adaskip.runs.store import locked
from adaskip.runs.yamlfile import read_yaml

PARTS = ("plans", "losses", "times")


def leaderboard_main(argv: Sequence[str] | None = None) -> int:
    """What `eval/leaderboard.py` calls.

    Args:
        argv: the options, by default those of the command line.

    Returns:
        The exit code.
    """
    return LEADERBOARD.main(argv)


def _act(given: argparse.Namespace) -> int:
    file = read_yaml(given.config or config_path("leaderboard.yaml"), LeaderboardFile)
    contexts = given.contexts or [*file.contexts]
    for context in contexts:
        if context not in file.contexts:
            raise AdaskipError(
                f"{context} tokens are no context of the file; it has "
                f"{', '.join(map(str, file.contexts))}."
            )
        _make(Board(file, context, given.results_dir), given.parts)
    say(write_report([Board(file, c, given.results_dir) for c in file.contexts]))
    return 0


def _make(board: Board, parts: Sequence[str]) -> None:
    with locked(board.folder / str(board.context)):
        if "plans" in parts:
            board.make_plans()
        if "losses" in parts:
            board.score()
        if "times" in parts:
            board.time()


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML (default: configs/leaderboard.yaml)"
    )
    parser.add_argument(
        "--results_dir",
        type=Path,
        default=Path("results/leaderboard"),
        metavar="DIR",
        help="where results go (default: results/leaderboard)",
    )
    parser.add_argument(
        "--contexts", type=int, nargs="+", metavar="N", help="prompt tokens (default: all)"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="what to make; times want a quiet machine (default: all)",
    )


LEADERBOARD = Command(
    "Methods beside each other at equal measured time; goes on where it was.",
    _options,
    _act,
    "--contexts 1000 --parts plans losses",
)
