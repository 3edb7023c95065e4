"""What a sweep found, as values: every policy and budget beside dense, on disk as `report.json`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from adaskip.errors import AdaskipError, RunError
from adaskip.plan import Phase, Scope
from adaskip.profiling.intervals import paired_interval
from adaskip.runs.evaluation import no_baseline, notes_on, of_common_rows
from adaskip.runs.files import SCHEMA, Record, read_json, write_json
from adaskip.runs.ledger import RUN_FILE, made_otherwise, read_record, run_folder
from adaskip.runs.reference_quality import PerplexitySettings, read_perplexity
from adaskip.runs.runconfig import DENSE
from adaskip.runs.runner import resolve
from adaskip.runs.scoring import RunScore, TaskScore, difference, score_run
from adaskip.runs.sweepfile import Cell, Sweep


@dataclass(frozen=True)
class ComparedScore(TaskScore):
    """The score of one task of a line, beside that of the dense rows.

    Attributes:
        delta: score minus dense score; None of dense itself, and where there are no dense rows.
        delta_interval: 95 % interval of `delta` by a paired bootstrap over the rows both have;
            None with fewer than two.
        perplexity: that of the reference answers, None if it was not measured.
        perplexity_rows: the rows whose answers these are; None in reports that do not tell.
        perplexity_tokens: of these answers that were scored, together; likewise.
    """

    delta: float | None
    delta_interval: tuple[float, float] | None
    perplexity: float | None
    perplexity_rows: int | None = None
    perplexity_tokens: int | None = None


@dataclass(frozen=True)
class Line:
    """One policy with one budget in one experiment.

    Attributes:
        policy: its name; of a plan that was made, the name of its file.
        unit: of the budget, `"layers"` or `"sublayers"`.
        skipped_share: share of skipped sublayers per phase, mean over tasks.
        ttft: median seconds to the first token, over all rows of all tasks.
        per_token: median seconds per decode step, likewise.
        tasks: the scores by task.
    """

    policy: str
    budget: int
    unit: str
    skipped_share: dict[str, float | None]
    ttft: float | None
    per_token: float | None
    tasks: dict[str, ComparedScore]

    @property
    def label(self) -> str:
        """Policy and budget as figures and notes name them."""
        return self.policy if self.policy == DENSE else f"{self.policy} {self.budget}"

    @property
    def sublayers(self) -> int:
        """The budget in sublayers, whatever its unit."""
        return self.budget * (2 if self.unit == "layers" else 1)


@dataclass(frozen=True)
class Table:
    """One experiment of one model; dense, where there is any, is the first line."""

    model: str
    experiment: Scope
    tasks: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def dense(self) -> Line | None:
        """The line all others are compared with."""
        return next((line for line in self.lines if line.policy == DENSE), None)

    def best(self, task: str) -> set[str]:
        """Labels of the lines with the best score of a task among those of the same budget.

        The paper sets them in bold; a budget whose lines all have the same score, as a single one
        has, has no best, nor has a task at which dense is at chance: its scores compare nothing.
        """
        if self.dense and task in self.dense.tasks and self.dense.tasks[task].at_chance:
            return set()
        groups: dict[int, list[Line]] = {}
        for line in self.lines:
            if line.policy != DENSE and task in line.tasks:
                groups.setdefault(line.sublayers, []).append(line)
        best = set()
        for lines in groups.values():
            scores = {line.label: line.tasks[task].score for line in lines}
            if len({*scores.values()}) > 1:
                top = max(scores.values())
                best |= {label for label, score in scores.items() if score == top}
        return best


@dataclass(frozen=True)
class Report:
    """All that a sweep's report shows, the figures of other commands excepted.

    Attributes:
        n_cells: cells the sweep asks for, a dense one counted once per experiment.
        notes: what must be said beside the scores.
        failures: what stopped the cells that failed, by label.
        recipe: how the rows were made: of each run folder its record.
    """

    name: str
    n_cells: int
    notes: tuple[str, ...]
    failures: dict[str, str]
    recipe: dict[str, Record]
    tables: tuple[Table, ...]

    def save(self, path: Path) -> None:
        """Writes `report.json`, the score of every row included.

        Raises:
            RunError: it cannot be written.
        """
        write_json(path, {"schema": SCHEMA, **asdict(self)})


def read_report(path: Path) -> Report:
    """Reads a `report.json`.

    Raises:
        RunError: it is missing, damaged, or no report of a sweep.
    """
    try:
        return TypeAdapter(Report).validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(
            f"{path} is no report of a sweep ({where}: {first['msg']}); run the sweep again to "
            "write a new one."
        ) from error


def collect(plan: Sweep, failures: Mapping[str, str]) -> Report:
    """Scores every cell that has rows, and compares it with dense.

    Args:
        plan: the sweep.
        failures: what stopped the cells that failed, by label.

    Raises:
        RunError: a file is damaged or cannot be written.
    """
    # Rows that the sweep asks for count, however short it lets them be.
    named = {run_folder(cell.config): cell.config.min_length for cell in plan.cells}
    folders = [folder for folder in named if (folder / RUN_FILE).is_file()]
    limits: dict[Path, dict[str, int | None]] = {}
    for cell in plan.cells:
        limits.setdefault(run_folder(cell.config), {})[cell.task] = cell.config.limit
    runs = {
        folder: score_run(folder, min_length=named[folder], limits=limits[folder])
        for folder in folders
    }
    for run in runs.values():
        run.save()
    otherwise = {
        cell: note
        for cell in plan.cells
        if run_folder(cell.config) in runs and (note := left_out(cell))
    }
    cells = [cell for cell in plan.cells if cell not in otherwise]
    tables = tuple(
        Table(model, experiment, tasks, _lines(cells, model, experiment, runs, plan.perplexity))
        for model in plan.models
        for experiment, tasks in plan.experiments.items()
    )
    lines = [line for table in tables for line in table.lines]
    notes = [
        note
        for line in lines
        for s in line.tasks.values()
        for note in notes_on(line.label, s, is_dense=line.policy == DENSE)
    ]
    notes += [
        no_baseline(task, line.label, "in this sweep")
        for table in tables
        for line in table.lines
        for task, score in line.tasks.items()
        if score.delta is None and table.dense and line != table.dense and task in table.dense.tasks
    ]
    notes += [
        note
        for table in tables
        for line in table.lines
        for task, score in line.tasks.items()
        if score.delta is not None and table.dense
        for note in of_common_rows(line.label, score, table.dense.tasks[task])
    ]
    notes += otherwise.values()
    return Report(
        plan.name,
        sum(len(cell.experiments) for cell in plan.cells),
        tuple(dict.fromkeys(notes)),
        dict(failures),
        {
            folder.name: {k: v for k, v in read_record(folder).as_dict().items() if k != "schema"}
            for folder in folders
        },
        tables,
    )


def left_out(cell: Cell) -> str:
    """What to say of a cell whose rows were made otherwise than is asked; empty if they were not.

    Such rows say nothing of the cell.
    """
    try:
        what = made_otherwise(resolve(cell.config), cell.task)
    except AdaskipError as error:
        what = str(error)
    return what and f"{cell.label}: left out, its rows were made with other settings ({what})."


def _lines(
    cells: Sequence[Cell],
    model: str,
    experiment: Scope,
    runs: Mapping[Path, RunScore],
    perplexity: PerplexitySettings | None,
) -> tuple[Line, ...]:
    found: dict[tuple[str, int], list[tuple[Cell, RunScore]]] = {}
    for cell in cells:
        config = cell.config
        if config.model_name == model and experiment in cell.experiments:
            run = runs.get(run_folder(config))
            score = run.tasks.get(cell.task) if run else None
            if run is not None and score is not None and score.n_rows:
                found.setdefault((config.label, config.budget), []).append((cell, run))
    dense = {cell.task: run for cell, run in found.get((DENSE, 0), [])}
    return tuple(_line(scored, dense, perplexity) for scored in found.values())


def _line(
    scored: Sequence[tuple[Cell, RunScore]],
    dense: Mapping[str, RunScore],
    perplexity: PerplexitySettings | None,
) -> Line:
    config, scores = scored[0][0].config, [run.tasks[cell.task] for cell, run in scored]
    seconds = [pair for score in scores for pair in score.row_seconds.values()]
    steps = [step for _, step in seconds if step is not None]
    bases = {} if config.policy == DENSE else dense
    return Line(
        policy=config.label,
        budget=config.budget,
        unit="sublayers" if config.skip_sub_layer_num is not None else "layers",
        skipped_share={
            str(phase): mean(score.skipped_share[phase] for score in scores) for phase in Phase
        },
        ttft=statistics.median(first for first, _ in seconds),
        per_token=statistics.median(steps) if steps else None,
        tasks={
            cell.task: _compared(cell, run, bases.get(cell.task), perplexity)
            for cell, run in scored
        },
    )


def _compared(
    cell: Cell, run: RunScore, dense: RunScore | None, perplexity: PerplexitySettings | None
) -> ComparedScore:
    """The score of a cell beside that of the dense rows of its settings and weights, if any."""
    score, base = run.tasks[cell.task], None
    if dense is not None and dense.is_base_of(run, cell.task):
        base = dense.tasks[cell.task]
    quality = read_perplexity(cell.config, score.task, perplexity) if perplexity else None
    ends = paired_interval(score.row_scores, base.row_scores) if base else None
    return ComparedScore(
        **vars(score),
        delta=difference(score, base) if base else None,
        delta_interval=(100 * ends[0], 100 * ends[1]) if ends else None,
        perplexity=quality.perplexity if quality else None,
        perplexity_rows=quality.rows if quality else None,
        perplexity_tokens=quality.tokens if quality else None,
    )


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values there are, None without any."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
