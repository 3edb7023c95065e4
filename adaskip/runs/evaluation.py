"""The table `eval/eval.py` prints: every budget of a run beside its dense baseline."""

from __future__ import annotations

from pathlib import Path

from adaskip.runs.runconfig import DENSE
from adaskip.runs.scoring import (
    MIN_LENGTH,
    TaskScore,
    dense_scores,
    difference,
    runs_of,
    score_run,
)
from adaskip.tables import MISSING, markdown_table, number, percent

AT_CHANCE = "no better than guessing, so this task tells nothing of what skipping loses"
_HEADER = (
    *("task", "run", "score", "to dense", "rougeL", "rows"),
    *("truncated %", "skipped % prefill", "skipped % decode"),
)


def evaluate(results_dir: Path, name: str, *, min_length: int = MIN_LENGTH) -> str:
    """Scores every budget of a run, writes each `result.json`, and returns the table with notes.

    Raises:
        RunError: there is no such run, or its files are damaged.
    """
    runs = [score_run(path, min_length=min_length) for path in runs_of(results_dir, name)]
    bases = [dense_scores(run.folder.parent, run, min_length=min_length) for run in runs]
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for task in dict.fromkeys(task for run in runs for task in run.tasks):
        base = next((found[task] for found in bases if task in found), None)
        shown = [
            (run.folder.name, run.config.policy == DENSE, run.tasks[task], found.get(task))
            for run, found in zip(runs, bases, strict=True)
            if task in run.tasks
        ]
        if base is not None and all(run.config.policy != DENSE for run in runs):
            shown.insert(0, (DENSE, True, base, None))
        for label, is_dense, score, own in shown:
            rows.append(_row(label, score, own, is_dense=is_dense))
            notes += notes_on(label, score, is_dense=is_dense)
            if own is None and not is_dense:
                notes.append(no_baseline(task, label, f"in {runs[0].folder.parent}"))
            notes += [] if own is None else of_common_rows(label, score, own)
    for run in runs:
        run.save()
    written = f"Written: result.json in {', '.join(str(run.folder) for run in runs)}."
    return "\n".join([markdown_table(_HEADER, rows), "", *notes, written])


def notes_on(name: str, score: TaskScore, *, is_dense: bool) -> list[str]:
    """What must be said beside a score: missing rows, rows left out, failures, the code metric."""
    notes: list[str] = []
    if not score.complete:
        notes.append(f"{_how_many(score)} rows")
    if score.n_short:
        notes.append(f"{score.n_short} rows too short to count left out")
    if score.unscored:
        notes.append(score.unscored)
    if score.backend:
        notes.append(f"code compared by fuzzywuzzy with {score.backend}")
    if is_dense and score.at_chance:
        notes.append(AT_CHANCE)
    return [f"{score.task}, {name}: {note}." for note in notes]


def of_common_rows(name: str, score: TaskScore, base: TaskScore) -> list[str]:
    """What must be said of a difference to dense rows that are not the same ones."""
    if base.row_scores.keys() == score.row_scores.keys():
        return []
    shared = len(base.row_scores.keys() & score.row_scores.keys())
    return [f"{score.task}, {name}: to dense over the {shared} rows that both have."]


def _how_many(score: TaskScore) -> str:
    """The rows of a score, and of how many where some are missing."""
    return str(score.n_rows) if score.complete else f"{score.n_rows} of {score.n_planned or 'all'}"


def no_baseline(task: str, name: str, where: str) -> str:
    """What must be said of a run that stands beside no dense one, and how to make that."""
    return (
        f"{task}, {name}: no dense run with the same settings and weights {where}, no delta; the "
        "same command with --policy dense in place of policy and budget makes one."
    )


def _row(
    label: str, score: TaskScore, base: TaskScore | None, *, is_dense: bool
) -> tuple[str, ...]:
    return (
        score.task,
        label,
        number(score.score) + (" (chance)" if is_dense and score.at_chance else ""),
        number(difference(score, base), signed=True) if base else MISSING,
        number(score.rouge_l),
        _how_many(score),
        percent(score.truncated),
        percent(score.skipped_share["prefill"]),
        percent(score.skipped_share["decode"]),
    )
