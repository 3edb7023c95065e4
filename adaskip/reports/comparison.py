"""The lines of a sweep's tables: what is compared with what."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adaskip.plan import Phase, Scope
from adaskip.profiling.intervals import paired_interval
from adaskip.runs.ledger import RUN_FILE, run_folder
from adaskip.runs.reference_quality import read_perplexity
from adaskip.runs.runconfig import DENSE
from adaskip.runs.scoring import RunScore, TaskScore, score_run
from adaskip.runs.sweepfile import Cell, Sweep as SweepPlan


@dataclass(frozen=True)
class Line:
    """One row of a table: a policy and its budget; score and references' perplexity per task."""

    policy: str
    budget: int
    unit: str
    scores: dict[str, TaskScore]
    perplexity: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Policy and budget as a figure names them."""
        return self.policy if self.policy == DENSE else f"{self.policy} {self.budget}"

    @property
    def sublayers(self) -> int:
        """The budget in sublayers, whatever its unit."""
        return self.budget * (2 if self.unit == "layers" else 1)

    def share(self, phase: Phase) -> float | None:
        """Skipped share of sublayers in a phase, mean over tasks."""
        return _mean(score.skipped_share[phase] for score in self.scores.values())

    @property
    def truncated(self) -> float | None:
        """Share of prompts that lost their middle, mean over tasks."""
        return _mean(score.truncated for score in self.scores.values())

    def median(self, what: str) -> float | None:
        """Median over all rows of all tasks, in seconds; `what` is `"ttft"` or `"per_token"`."""
        values = [row for score in self.scores.values() for row in _seconds(score, what).values()]
        return statistics.median(values) if values else None

    def speedup(self, dense: Line | None, what: str) -> float | None:
        """Median over rows of dense time / own time."""
        if dense is None or self is dense:
            return None
        ratios = []
        for task, score in self.scores.items():
            own = _seconds(score, what)
            base = _seconds(dense.scores[task], what) if task in dense.scores else {}
            ratios += [base[row] / own[row] for row in own if row in base]
        return statistics.median(ratios) if ratios else None


@dataclass(frozen=True)
class Table:
    """One experiment of one model; the dense line comes first where there is one."""

    model: str
    experiment: Scope
    tasks: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def dense(self) -> Line | None:
        """The line everything is compared with."""
        return next((line for line in self.lines if line.policy == DENSE), None)

    def delta(self, line: Line, task: str) -> float | None:
        """Score minus dense score."""
        dense = self.dense
        if dense is None or line is dense or task not in line.scores or task not in dense.scores:
            return None
        return line.scores[task].score - dense.scores[task].score

    def interval(self, line: Line, task: str) -> tuple[float, float] | None:
        """The 95 % interval of `delta`, by a paired bootstrap over the rows both have."""
        dense = self.dense
        if dense is None or self.delta(line, task) is None:
            return None
        found = paired_interval(line.scores[task].row_scores, dense.scores[task].row_scores)
        return None if found is None else (100 * found[0], 100 * found[1])

    def best(self, task: str) -> set[str]:
        """Labels of the lines with the best score of a task among those of the same skipped share.

        The paper sets them in bold; a share with a single line has no best.
        """
        groups: dict[int, list[Line]] = {}
        for line in self.lines:
            if line.policy != DENSE and task in line.scores:
                groups.setdefault(line.sublayers, []).append(line)
        best = set()
        for lines in groups.values():
            top = max(line.scores[task].score for line in lines)
            if len(lines) > 1:
                best |= {line.label for line in lines if line.scores[task].score == top}
        return best


def collect(plan: SweepPlan) -> list[Table]:
    """The tables, from what is on disk."""
    runs = _score_runs(plan.cells)
    tables = []
    for model in plan.models:
        for experiment, tasks in plan.experiments.items():
            cells = [
                cell
                for cell in plan.cells
                if cell.config.model_name == model and experiment in cell.experiments
            ]
            tables.append(Table(model, experiment, tasks, tuple(_lines(cells, runs))))
    return tables


def _score_runs(cells: Sequence[Cell]) -> dict[Path, RunScore]:
    runs = {}
    for folder in dict.fromkeys(run_folder(cell.config) for cell in cells):
        if (folder / RUN_FILE).is_file():
            runs[folder] = score_run(folder)
            runs[folder].save()
    return runs


def _lines(cells: Sequence[Cell], runs: Mapping[Path, RunScore]) -> list[Line]:
    found: dict[tuple[str, int], Line] = {}
    for cell in cells:
        run = runs.get(run_folder(cell.config))
        score = run.tasks.get(cell.task) if run else None
        if score is not None and score.n_rows:
            config = cell.config
            unit = "sublayers" if config.skip_sub_layer_num is not None else "layers"
            empty = Line(config.policy, config.budget, unit, {})
            line = found.setdefault((config.policy, config.budget), empty)
            line.scores[cell.task] = score
            measured = read_perplexity(config, cell.task)
            if measured is not None:
                line.perplexity[cell.task] = measured
    return list(found.values())


def ideal_speedup(share: float) -> float:
    """The bound if every sublayer cost the same and nothing else cost anything."""
    return 1 / (1 - share) if share < 1 else float("inf")


def _seconds(score: TaskScore, what: str) -> dict[str, float]:
    index = ("ttft", "per_token").index(what)
    times = {row: pair[index] for row, pair in score.row_seconds.items()}
    return {row: time for row, time in times.items() if time is not None}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
