"""The command line of `eval/leaderboard.py`: makes what is missing, reports what exists."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from adaskip.command import Command, say
from adaskip.errors import AdaskipError
from adaskip.leaderboard.board import Board
from adaskip.leaderboard.collecting import collect
from adaskip.leaderboard.making import PARTS, Maker, dense_config
from adaskip.leaderboard.settings import LeaderboardFile
from adaskip.leaderboard.shipping import ship
from adaskip.leaderboard.values import REPORT_FILE, Report, read_report
from adaskip.models.processes import refuse_several
from adaskip.reports.leaderboard_readme import check_marks, with_table
from adaskip.reports.leaderboard_report import write_report
from adaskip.runs.files import write_text
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.store import locked
from adaskip.runs.yamlfile import read_yaml, shipped_or_given

REPORT = "report"
ALL = (*PARTS, REPORT)


def leaderboard_main(argv: Sequence[str] | None = None) -> int:
    """What `eval/leaderboard.py` calls.

    Args:
        argv: the options, by default those of the command line.

    Returns:
        The exit code.
    """
    return LEADERBOARD.main(argv)


def _act(given: argparse.Namespace) -> int:
    refuse_several(
        "The leaderboard measures times, and its files have one writer",
        "start it in one process, without torchrun or accelerate",
    )
    path = shipped_or_given(given.config, "leaderboard", "contexts")
    file = read_yaml(path, LeaderboardFile)
    file.check()
    folder: Path = given.results_dir
    # What can be wrong at the end is refused before the hours that it takes to get there.
    if given.readme is not None:
        check_marks(_text_of(given.readme))
    if given.ship is not None and not file.shipped:
        raise AdaskipError("The leaderboard's file ships no plan: name some under 'shipped'.")
    boards = [Board(file, model, context, folder) for model, context in file.boards()]
    models = _Models()
    for board in _asked(boards, given.models, given.contexts):
        _make(board, given.parts, models)
    if REPORT in given.parts:
        say(write_report(file, boards, folder, config=path.name))
    if given.readme is not None:
        text = with_table(_text_of(given.readme), _report_in(folder))
        write_text(given.readme, text)
        say(f"Written: the table of {given.readme}.")
    if given.ship is not None:
        # Not of the report's file, whose plans may have been made anew since.
        written = ship(file, folder, collect(file, boards), given.ship)
        say(f"Shipped: {', '.join(map(str, written))}.")
    return 0


class _Models:
    """Loads the models of boards when something is computed, one at a time."""

    def __init__(self) -> None:
        self._loaded: dict[str, LoadedModel] = {}

    def of(self, board: Board) -> LoadedModel:
        """The model of a board, loaded once for boards that follow each other."""
        if board.model not in self._loaded:
            self._loaded.clear()
            self._loaded[board.model] = LoadedModel.open(dense_config(board))
        return self._loaded[board.model]


def _asked(
    boards: Sequence[Board], models: Sequence[str] | None, contexts: Sequence[int] | None
) -> list[Board]:
    """The boards of some models and context lengths; None for all.

    Raises:
        AdaskipError: the file has no such one, or none of these models at these lengths.
    """
    for what, given, known in (
        ("model", models, [board.model for board in boards]),
        ("context", contexts, [board.context for board in boards]),
    ):
        for one in given or ():
            if one not in known:
                listed = ", ".join(map(str, dict.fromkeys(known)))
                raise AdaskipError(f"{one} is no {what} of the file; it has {listed}.")
    asked = [
        board
        for board in boards
        if board.model in (models or [board.model])
        and board.context in (contexts or [board.context])
    ]
    if not asked:
        there = ", ".join(f"{board.model} {board.context}" for board in boards)
        raise AdaskipError(
            f"The file compares {' and '.join(models or ())} at no context of "
            f"{' and '.join(map(str, contexts or ()))} tokens; it has {there}."
        )
    return asked


def _make(board: Board, parts: Sequence[str], models: _Models) -> None:
    made = [part for part in PARTS if part in parts]
    if made:
        with locked(board.folder / board.name):
            maker = Maker(board, partial(models.of, board))
            for part in made:
                maker.make(part)


def _report_in(folder: Path) -> Report:
    if not (folder / REPORT_FILE).exists():
        raise AdaskipError(f"{folder} has no {REPORT_FILE} yet: give --parts report first.")
    return read_report(folder / REPORT_FILE)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdaskipError(f"The file {path} cannot be read: {error}.") from error


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--config",
        default="leaderboard",
        metavar="FILE",
        help="YAML, or the name of a shipped one: leaderboard (default, hours), quick (minutes)",
    )
    add(
        "--results_dir",
        type=Path,
        default=Path("results/leaderboard"),
        metavar="DIR",
        help="where results go (default: results/leaderboard)",
    )
    add("--models", nargs="+", metavar="NAME", help="of the file (default: all)")
    add("--contexts", type=int, nargs="+", metavar="N", help="prompt tokens (default: all)")
    add(
        "--parts",
        nargs="+",
        choices=ALL,
        default=ALL,
        help="what to make; times want a quiet machine (default: all)",
    )
    add("--readme", type=Path, metavar="FILE", help="also write its table, between its marks")
    add("--ship", type=Path, metavar="DIR", help="also copy the plans that the file ships to it")


LEADERBOARD = Command(
    "Methods beside each other at equal measured time; goes on where it was.",
    _options,
    _act,
    "--config quick --results_dir results/quick",
)
