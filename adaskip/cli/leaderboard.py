"""The command line of `eval/leaderboard.py`: makes what is missing, reports what exists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaskip.cli.command import Parser, guarded, say
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

    def action() -> int:
        given = _parser().parse_args(argv)
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

    return guarded(action)


def _make(board: Board, parts: Sequence[str]) -> None:
    with locked(board.folder / str(board.context)):
        if "plans" in parts:
            board.make_plans()
        if "losses" in parts:
            board.score()
        if "times" in parts:
            board.time()


def _parser() -> Parser:
    parser = Parser(
        description="Methods beside each other at equal measured time; goes on where it was.",
        allow_abbrev=False,
    )
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
    return parser
