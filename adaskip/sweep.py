"""Runs every cell of a sweep with one loaded model, then writes its tables and its figure.

`python -m adaskip.sweep configs/demo.yaml`: finished cells are not run again; a failed cell is
reported, the rest goes on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from adaskip.cli.starting import begin

if __name__ == "__main__":
    begin()  # before the imports below load torch

from adaskip.command import FAILED, Command, say
from adaskip.errors import AdaskipError
from adaskip.models.processes import team
from adaskip.reports.sweep_report import write_report
from adaskip.runs.ledger import is_finished, run_folder, task_rows
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.reference_quality import PerplexitySettings, is_measured, measure_perplexity
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.runner import resolve, run
from adaskip.runs.sweepfile import Cell, Sweep, read_sweep, select, sweep_path
from adaskip.tables import markdown_table
from adaskip.tasks.spec import task_spec

logger = logging.getLogger(__name__)


class ModelSlot:
    """The one loaded model of a sweep; another one takes its place when a cell needs it."""

    def __init__(self) -> None:
        self._loaded: LoadedModel | None = None
        self._failed: dict[tuple[str, str | None], Exception] = {}

    def get(self, config: RunConfig) -> LoadedModel:
        """The model a resolved configuration names.

        Raises:
            Exception: it cannot be loaded; tried once.
        """
        key = (config.model_name, config.model_path)
        if key in self._failed:
            raise self._failed[key]
        if self._loaded is None or not self._loaded.fits(config):
            self._loaded = None
            try:
                self._loaded = LoadedModel.open(config)
            except Exception as error:
                self._failed[key] = error
                raise
        return self._loaded


def run_cells(cells: Sequence[Cell], perplexity: PerplexitySettings | None) -> dict[str, str]:
    """Runs the cells that are not finished.

    Returns:
        The error of each cell that failed, by its label.
    """
    slot = ModelSlot()
    failures: dict[str, str] = {}
    for cell in tqdm(cells, desc="cells", unit="cell", disable=not team().is_main):
        try:
            _run_cell(cell, slot, perplexity)
        except Exception as error:
            # Whatever stopped this cell, the others are independent of it.
            if not isinstance(error, AdaskipError):
                logger.exception("%s failed", cell.label)
            failures[cell.label] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            logger.error("%s failed: %s", cell.label, failures[cell.label])
    return failures


def _run_cell(cell: Cell, slot: ModelSlot, perplexity: PerplexitySettings | None) -> None:
    """Makes what is missing of one cell; processes of one command work on it together."""
    config, group = resolve(cell.config), team()
    if not group.on_main(lambda: is_finished(config)):
        logger.info("%s", cell.label)
        with group.together(), group.main_ahead(not config.tp_plan):
            loaded = slot.get(config)
        run(config, loaded)
    if perplexity and not group.on_main(lambda: is_measured(config, cell.task, perplexity)):
        with group.together():
            loaded = slot.get(config)
        measure_perplexity(config, cell.task, loaded, perplexity)


def listed(cells: Sequence[Cell]) -> str:
    """The table `--dry_run` prints: every cell, and how many rows are left of it.

    Raises:
        RunError: a file of an earlier call is damaged, or made with other settings.
    """
    lines, total = [], []
    for cell in cells:
        config = resolve(cell.config)
        done = len(task_rows(run_folder(config), cell.task).rows())
        wanted = task_spec(cell.task).wanted(config.limit)
        left = 0 if is_finished(config) else wanted and max(wanted - done, 0)
        total.append(left)
        lines.append((cell.label, str(done), _or_unknown(left)))
    known = None if None in total else sum(filter(None, total))
    note = " (?: as many as the data has)" if known is None else ""
    table = markdown_table(("cell", "rows done", "rows left"), lines)
    return f"{table}\n\n{len(cells)} cells, {_or_unknown(known)} rows left{note}."


def _or_unknown(count: int | None) -> str:
    return "?" if count is None else str(count)


def sweep(asked: Sweep, only: Sequence[str] = ()) -> int:
    """Runs a sweep and reports on all of it, also on cells of earlier calls.

    Returns:
        The exit code: 0, or 1 if a cell failed.
    """
    start = time.monotonic()
    failures = run_cells(select(asked.cells, only), asked.perplexity)
    say(team().on_main(lambda: write_report(asked, failures)))
    written = f"{asked.folder}/report.html, .md, .json and .png"
    say(f"Took {time.monotonic() - start:.0f} s. Written: {written}.")
    return FAILED if failures else 0


def _options(parser: argparse.ArgumentParser) -> None:
    text = "the sweep's file, e.g. configs/demo.yaml, or the name of a shipped one: demo, paper"
    parser.add_argument("file", help=text)
    parser.add_argument(
        "--only",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="run these cells only: model, experiment, policy, budget, task",
    )
    parser.add_argument("--results_dir", help="in place of the file's")
    parser.add_argument(
        "--allow_pickle",
        action="store_true",
        help="also read weights from .bin files: pickles, of which torch reads tensors only",
    )
    parser.add_argument("--dry_run", action="store_true", help="list the cells, run nothing")


def _act(given: argparse.Namespace) -> int:
    folder = Path(given.results_dir) if given.results_dir else None
    settings = {"allow_pickle": True} if given.allow_pickle else {}
    asked = read_sweep(sweep_path(given.file), folder, **settings)
    if given.dry_run:
        say(listed(select(asked.cells, given.only)))
        return 0
    return sweep(asked, given.only)


SWEEP = Command(
    "Runs every cell of a sweep that is not finished, then writes its tables and figures.",
    _options,
    _act,
    "demo --dry_run",
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `python -m adaskip.sweep`."""
    return SWEEP.main(argv, prog="python -m adaskip.sweep")


if __name__ == "__main__":
    sys.exit(main())
