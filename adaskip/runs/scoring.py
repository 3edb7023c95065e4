"""Scores runs, finished or not: the metric of each task, and what a reader must know of it."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaskip.errors import RunError, did_you_mean
from adaskip.fingerprint import same_model
from adaskip.metrics import ScoreLog, corpus_score, rouge_l, score_each, similarity_backend
from adaskip.plan import Phase
from adaskip.runs.files import SCHEMA, Record, check_file_name, write_json
from adaskip.runs.ledger import RUN_FILE, covers, read_record, task_rows
from adaskip.runs.rows import GeneratedRow, Skips
from adaskip.runs.runconfig import DENSE, WARMING_UP, RunConfig
from adaskip.tasks.chance import at_chance
from adaskip.tasks.spec import task_spec

RESULT_FILE = "result.json"
MIN_LENGTH = 4000
_RUN_FOLDER = re.compile(r".+-SKIP-([0-9]+)")
_POLICY_SETTINGS = ("experiment", "policy", "skip_full_layer_num", "skip_sub_layer_num")


@dataclass(frozen=True)
class TaskScore:
    """One task of one run.

    Attributes:
        n_rows: rows scored.
        n_short: rows left out because they are not longer than the limit.
        n_planned: rows that were asked for; None where that is all of them and the run has not been
            asked for so many, so that nobody counted them.
        score: the task's metric x100, two decimals; NaN without a row.
        rouge_l: rouge-score's rougeL x100 for summarization, else None.
        unscored: one sentence on predictions the metric could not compare, None if none.
        truncated: share of prompts that lost their middle.
        skipped_share: share of skipped sublayers over all forwards, per phase.
        ttft: median seconds to the first token.
        per_token: median seconds per decode step; None if no answer had one.
        backend: what fuzzywuzzy compared code with, None for other metrics.
        row_scores: score per row id, 0..1.
        row_seconds: per row id time to first token and per decode step.
        sessions: the ids of the commands that made the rows.
    """

    task: str
    n_rows: int
    n_short: int
    n_planned: int | None
    score: float
    rouge_l: float | None
    unscored: str | None
    truncated: float | None
    skipped_share: dict[str, float | None]
    ttft: float | None
    per_token: float | None
    backend: str | None
    row_scores: dict[str, float]
    row_seconds: dict[str, tuple[float, float | None]]
    sessions: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every row that was asked for is there."""
        return self.n_planned is not None and self.n_rows + self.n_short >= self.n_planned

    @property
    def at_chance(self) -> bool:
        """Whether guessing would be as good; of dense rows: they compare nothing."""
        return at_chance(self.task, [*self.row_scores.values()])

    def as_dict(self) -> Record:
        """Ready for JSON."""
        return {**vars(self), "score": None if self.score != self.score else self.score}


@dataclass(frozen=True)
class Asked:
    """What the model was asked in one task of a run.

    Attributes:
        max_new_tokens: of an answer.
        prompt_sha256: of the prompt template.
        around: the prompt limit and the hash of the chat template, None where a record does not
            tell.
        rows: per row id what tells it from another one (`GeneratedRow.source`).
    """

    max_new_tokens: int
    prompt_sha256: str
    around: tuple[int | None, str | None]
    rows: dict[str, tuple[list[str], int]]

    def is_like(self, other: Asked) -> bool:
        """Whether another run was asked the same, in the rows that both have."""
        alike = (self.max_new_tokens, self.prompt_sha256) == (
            other.max_new_tokens,
            other.prompt_sha256,
        )
        known = [pair for pair in zip(self.around, other.around, strict=True) if None not in pair]
        if not alike or any(own != its for own, its in known):
            return False
        return all(other.rows.get(row, own) == own for row, own in self.rows.items())


@dataclass(frozen=True)
class RunScore:
    """All tasks of one run.

    Attributes:
        model: the fingerprint of its weights; empty where its record does not tell.
    """

    folder: Path
    config: RunConfig
    n_layers: int
    model: str
    tasks: dict[str, TaskScore]
    asked: dict[str, Asked]

    def is_base_of(self, other: RunScore, task: str) -> bool:
        """Whether a task's rows are those of another run but for what is skipped."""
        own, its = self.asked.get(task), other.asked.get(task)
        if own is None or its is None or _comparable(self.config) != _comparable(other.config):
            return False
        known = bool(self.model and other.model)
        return own.is_like(its) and (not known or same_model(self.model, other.model))

    def save(self) -> None:
        """Writes `result.json` into the run's folder."""
        content = {
            "schema": SCHEMA,
            "config": self.config.recorded(),
            "tasks": {name: score.as_dict() for name, score in self.tasks.items()},
        }
        write_json(self.folder / RESULT_FILE, content)


def score_run(
    folder: Path, *, min_length: int = MIN_LENGTH, limits: Mapping[str, int | None] | None = None
) -> RunScore:
    """Scores what is there of a run.

    Args:
        folder: a run's folder.
        min_length: LongBench rows must be longer than this to count.
        limits: of the rows of tasks that are compared, of which a run may have more or fewer; None
            is a task's own.

    Raises:
        RunError: there is no such run, or its files are damaged.
    """
    if not (folder / RUN_FILE).is_file():
        raise RunError(f"{folder} holds no run: there is no {RUN_FILE} in it.")
    record = read_record(folder)
    scores, asked = {}, {}
    for task, facts in record.tasks.items():
        rows = task_rows(folder, task).rows()
        planned: int | None = facts.rows
        if limits and task in limits:
            wanted = task_spec(task).wanted(limits[task])
            if not covers(task, facts.limit, limits[task]):
                planned = wanted
            elif len(rows) >= facts.rows:
                # They stand in the data's order, but what is not finished may have holes.
                rows = rows[:wanted]
                planned = len(rows)
        scores[task] = score_rows(
            task, rows, n_layers=record.n_layers, n_planned=planned, min_length=min_length
        )
        sources = {row.id: row.source for row in rows}
        around = (facts.prompt_limit, facts.template_sha256)
        asked[task] = Asked(facts.max_new_tokens, facts.prompt_sha256, around, sources)
    return RunScore(folder, record.run_config, record.n_layers, record.model, scores, asked)


def score_rows(
    task: str,
    rows: Sequence[GeneratedRow],
    *,
    n_layers: int,
    n_planned: int | None,
    min_length: int = MIN_LENGTH,
) -> TaskScore:
    """Scores the rows of one task, leaving LongBench's short ones out (METHOD, "Evaluation")."""
    spec = task_spec(task)
    limit = -1 if spec.offline else min_length
    kept = [row for row in rows if row.length > limit]
    log = ScoreLog()
    values: dict[str, float] = {}
    for row in kept:
        scored = score_each(task, row.prediction, row.references, row.classes)
        log.add(scored)
        values[row.id] = scored.score
    lengths = [row.length for row in kept]
    seconds = {row.id: (row.seconds.ttft, row.seconds.per_token) for row in kept}
    return TaskScore(
        task=task,
        n_rows=len(kept),
        n_short=len(rows) - len(kept),
        n_planned=n_planned,
        score=corpus_score([*values.values()], lengths, min_length=limit),
        rouge_l=_mean_rouge_l(kept) if spec.metric.startswith("rouge") else None,
        unscored=log.message(),
        truncated=_share(row.truncated for row in kept),
        skipped_share=phase_shares((row.skipped for row in kept), n_layers),
        ttft=_median(first for first, _ in seconds.values()),
        per_token=_median(step for _, step in seconds.values()),
        backend=similarity_backend() if spec.metric == "code_sim" else None,
        row_scores=values,
        row_seconds=seconds,
        sessions=tuple(dict.fromkeys(row.command for row in kept)),
    )


def runs_of(results_dir: Path, name: str) -> list[Path]:
    """The folders of every budget of a run, by budget.

    Args:
        results_dir: the folder that holds the runs, or the folder of a sweep, whose runs lie one
            folder deeper.
        name: a run's name, or that of one folder: a run's name with its budget.

    Raises:
        RunError: there is none, and the message lists the runs there are; or several folders in
            it hold one.
    """
    check_file_name("run name (--name)", name)
    known: list[Path] = []
    for pattern in (f"*-SKIP-*/{RUN_FILE}", f"*/*-SKIP-*/{RUN_FILE}"):
        runs = [path.parent for path in results_dir.glob(pattern) if _budget(path.parent)]
        found = [run for run in runs if name in (run.name, run.name.rpartition("-SKIP-")[0])]
        places = sorted({run.parent.name for run in found})
        if len(places) > 1:
            raise RunError(
                f"Run {name!r} is in {' and '.join(places)} of {results_dir}; say which, e.g. "
                f"--results_dir {results_dir / places[0]}."
            )
        if found:
            return sorted(found, key=lambda run: int(_budget(run)))
        known += runs
    names = sorted({run.name for run in known})
    held = f"its runs are: {', '.join(names)}" if names else "it holds no run"
    hint = did_you_mean(name, [run.rpartition("-SKIP-")[0] for run in names])
    raise RunError(f"No run {name!r} in {results_dir}; {held}.{hint}")


def _budget(folder: Path) -> str:
    """The number at the end of a run's folder; empty if it is no run's."""
    match = _RUN_FOLDER.fullmatch(folder.name)
    return match[1] if match else ""


def dense_scores(
    results_dir: Path, run: RunScore, *, min_length: int = MIN_LENGTH
) -> dict[str, TaskScore]:
    """Per task of `run`, the dense run of the same settings and weights, if there is one.

    The one that has most of the run's rows is taken; among those one of the same experiment, though
    a dense run is the same in all of them.
    """
    found: dict[str, TaskScore] = {}
    best: dict[str, tuple[int, bool]] = {}
    folders = [path.parent for path in sorted(results_dir.glob(f"*-SKIP-0/{RUN_FILE}"))]
    for folder in folders:
        if read_record(folder).run_config.policy != DENSE:
            continue
        dense = score_run(folder, min_length=min_length)
        same = dense.config.experiment == run.config.experiment
        for task, score in dense.tasks.items():
            if task not in run.tasks or not dense.is_base_of(run, task):
                continue
            shared = len(score.row_scores.keys() & run.tasks[task].row_scores.keys())
            if task not in found or (shared, same) >= best[task]:
                found[task], best[task] = score, (shared, same)
    return found


def difference(score: TaskScore, base: TaskScore) -> float | None:
    """A score minus that of its dense rows, over the rows that both have; None if none are."""
    if score.row_scores.keys() == base.row_scores.keys():
        return score.score - base.score
    pairs = [(own, base.row_scores.get(row)) for row, own in score.row_scores.items()]
    found = [own - other for own, other in pairs if other is not None]
    return 100 * statistics.fmean(found) if found else None


def _comparable(config: RunConfig) -> dict[str, Any]:
    """The settings a run shares with its dense baseline."""
    left_out = {*_POLICY_SETTINGS, *WARMING_UP}
    return {key: value for key, value in config.settings().items() if key not in left_out}


def phase_shares(skipped: Iterable[Skips], n_layers: int) -> dict[str, float | None]:
    """Skipped sublayers / all sublayers, per phase and over all forwards; None without any."""
    skipped = list(skipped)
    shares: dict[str, float | None] = {}
    for phase in Phase:
        counts = [each.of(phase) for each in skipped]
        forwards = sum(count.forwards for count in counts)
        left_out = sum(count.attn + count.ffn for count in counts)
        shares[str(phase)] = left_out / (2 * n_layers * forwards) if forwards else None
    return shares


def _mean_rouge_l(rows: Sequence[GeneratedRow]) -> float | None:
    values = [max(rouge_l(row.prediction, text) for text in row.references) for row in rows]
    return round(100 * statistics.fmean(values), 2) if values else None


def _share(flags: Iterable[bool]) -> float | None:
    values = list(flags)
    return sum(values) / len(values) if values else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
