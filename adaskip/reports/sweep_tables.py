"""The tables of a sweep's report, as frames of text: markdown and page set the same cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pandas import DataFrame

from adaskip.reports.comparison import ComparedScore, Line, Table, mean
from adaskip.runs.files import Record
from adaskip.runs.runconfig import DENSE
from adaskip.tables import MISSING, markdown_table, number, percent, perplexity

# Settings of one run, which differ within every sweep.
_OWN = {"experiment", "policy", "skip_full_layer_num", "skip_sub_layer_num", "name", "tasks"}
_OWN |= {"limit", "max_new_tokens", "results_dir", "resume", "model_name", "n_skip"}
_MACHINE = ("device", "platform", "threads", "python", "torch", "transformers", "adaskip", "commit")


def quality(table: Table) -> DataFrame:
    """Rows policy and budget, columns (task, figure), as in the paper."""
    columns = {("", title): cells for title, cells in _names(table).items()}
    for task in table.tasks:
        found = [line.tasks.get(task) for line in table.lines]
        columns[task, "score"] = [_score(line, task) for line in table.lines]
        columns[task, "Δ [95 %]"] = [_delta(one) for one in found]
        rouge = [getattr(one, "rouge_l", None) for one in found]
        if any(value is not None for value in rouge):
            columns[task, "rougeL"] = [number(value) for value in rouge]
        if any(one is not None and one.perplexity is not None for one in found):
            columns[task, "perplexity"] = [_perplexity(one) for one in found]
    return DataFrame(columns)


def work(table: Table) -> DataFrame:
    """What each line computed: its rows, what it skipped, how long a row took."""
    lines, phases = table.lines, ("prefill", "decode")
    scores = [line.tasks.values() for line in lines]
    return DataFrame(
        {
            **_names(table),
            "rows": [str(sum(score.n_rows for score in own)) for own in scores],
            "truncated %": [percent(mean(score.truncated for score in own)) for own in scores],
            **{
                f"skipped % {phase}": [percent(line.skipped_share[phase]) for line in lines]
                for phase in phases
            },
            "TTFT s": [number(line.ttft) for line in lines],
            "ms/token": [
                number(None if line.per_token is None else 1000 * line.per_token, 1)
                for line in lines
            ],
        }
    )


def prompts(recipe: Mapping[str, Record]) -> DataFrame:
    """Per task: rows, longest answer and the hash of its prompt template."""
    rows = [
        {
            "task": task,
            "rows": str(facts["rows"]),
            "answer tokens": str(facts["max_new_tokens"]),
            "SHA-256 of the prompt template": facts["prompt_sha256"],
        }
        for record in recipe.values()
        for task, facts in record["tasks"].items()
    ]
    return DataFrame(rows).drop_duplicates()


def settings(recipe: Mapping[str, Record]) -> DataFrame:
    """The settings and the values they had; several where runs differ."""
    found: dict[str, dict[str, None]] = {}
    for record in recipe.values():
        for key, value in (record["config"] | record.get("policy", {})).items():
            if key not in _OWN:
                found.setdefault(key, {})[_shown(value)] = None
    rows = [(key, ", ".join(values)) for key, values in found.items() if [*values] != [MISSING]]
    return DataFrame(rows, columns=["setting", "value"])


def machines(recipe: Mapping[str, Record]) -> DataFrame:
    """The machines and versions the rows were made with."""
    rows = []
    for session in _sessions(recipe):
        commit, dirty, _ = str(session.get("commit") or "").partition("-dirty")
        facts = session | {"commit": commit[:12] + dirty}
        rows.append({key: _shown(facts.get(key)) for key in _MACHINE})
    return DataFrame(rows).drop_duplicates()


def days(recipe: Mapping[str, Record]) -> list[str]:
    """The days of the first and the last start of a run; one if they are the same."""
    found = sorted({str(session["started"])[:10] for session in _sessions(recipe)})
    return list(dict.fromkeys([*found[:1], *found[-1:]]))


def profiles(recipe: Mapping[str, Record]) -> list[str]:
    """The names of the importance profiles that were used."""
    return sorted({str(record["importance"]) for record in recipe.values() if record["importance"]})


def as_markdown(frame: DataFrame) -> str:
    """A frame of text as a markdown table; the column of scores is headed by its task."""
    if frame.empty:
        return "No results yet."
    header = [
        column if isinstance(column, str) else column[column[1] != "score"]
        for column in frame.columns
    ]
    return markdown_table(header, frame.values.tolist())


def _names(table: Table) -> dict[str, list[str]]:
    return {
        "policy": [line.policy for line in table.lines],
        "skips": [
            "nothing" if line.policy == DENSE else f"{line.budget} {line.unit}"
            for line in table.lines
        ],
    }


def _score(line: Line, task: str) -> str:
    """The score of a line; dense at chance says so, because the column then tells nothing."""
    score = line.tasks.get(task)
    if score is None:
        return MISSING
    return number(score.score) + (" (chance)" if line.policy == DENSE and score.at_chance else "")


def _delta(score: ComparedScore | None) -> str:
    if score is None or score.delta_interval is None:
        return number(getattr(score, "delta", None), signed=True)
    low, high = (number(end, 1, signed=True) for end in score.delta_interval)
    return f"{number(score.delta, signed=True)} [{low}, {high}]"


def _perplexity(score: ComparedScore | None) -> str:
    """The perplexity and what it rests on: the answers of few rows may have a handful of tokens."""
    value = perplexity(None if score is None else score.perplexity)
    if score is None or score.perplexity_tokens is None:
        return value
    return f"{value} ({score.perplexity_rows} rows, {score.perplexity_tokens} tokens)"


def _sessions(recipe: Mapping[str, Record]) -> Iterable[Record]:
    return (session for record in recipe.values() for session in record["sessions"])


def _shown(value: Any) -> str:
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
