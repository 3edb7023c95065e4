"""How a sweep's numbers were made: prompts, settings, versions, hardware, from each `run.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adaskip.reports.paper_tables import Column, Grid
from adaskip.runs.files import Record
from adaskip.runs.ledger import RUN_FILE, read_record, run_folder
from adaskip.runs.sweepfile import Sweep as SweepPlan
from adaskip.tables import MISSING

# Of one run, not of the sweep.
_OWN = {"experiment", "policy", "skip_full_layer_num", "skip_sub_layer_num", "name", "tasks"}
_OWN |= {"limit", "max_new_tokens", "results_dir", "resume", "model_name", "n_skip"}
_MACHINE = ("device", "platform", "threads", "python", "torch", "transformers", "adaskip", "commit")


def read_recipe(plan: SweepPlan) -> dict[str, Record]:
    """Per run folder what its `run.json` holds.

    Raises:
        RunError: one of them is damaged.
    """
    recipe = {}
    for folder in dict.fromkeys(run_folder(cell.config) for cell in plan.cells):
        if (folder / RUN_FILE).is_file():
            record = read_record(folder).as_dict()
            recipe[folder.name] = {key: value for key, value in record.items() if key != "schema"}
    return recipe


def prompts_grid(recipe: Mapping[str, Record]) -> Grid:
    """Per task: rows, longest answer and the hash of its prompt template."""
    found: dict[tuple[str, ...], None] = {}
    for record in recipe.values():
        for task, facts in record["tasks"].items():
            digest = facts["prompt_sha256"]
            found[(task, str(facts["rows"]), str(facts["max_new_tokens"]), digest)] = None
    columns = (
        Column("task", is_text=True),
        Column("rows"),
        Column("answer tokens"),
        Column("SHA-256 of the prompt template", is_text=True),
    )
    return Grid(columns, tuple(found))


def settings_grid(recipe: Mapping[str, Record]) -> Grid:
    """The settings and the values they had; several where runs differ."""
    found: dict[str, dict[str, None]] = {}
    for record in recipe.values():
        for key, value in (record["config"] | record.get("policy", {})).items():
            if key not in _OWN:
                found.setdefault(key, {})[_shown(value)] = None
    rows = [(key, ", ".join(values)) for key, values in found.items() if [*values] != [MISSING]]
    return Grid((Column("setting", is_text=True), Column("value", is_text=True)), tuple(rows))


def machines_grid(recipe: Mapping[str, Record]) -> Grid:
    """The machines and versions the rows were made with."""
    found: dict[tuple[str, ...], None] = {}
    for session in _sessions(recipe):
        commit, dirty, _ = str(session.get("commit") or "").partition("-dirty")
        facts = session | {"commit": commit[:12] + dirty}
        found[tuple(_shown(facts.get(key)) for key in _MACHINE)] = None
    columns = tuple(Column(key, is_text=True) for key in _MACHINE)
    return Grid(columns, tuple(found))


def period(recipe: Mapping[str, Record]) -> tuple[str, str] | None:
    """The days of the first and the last start of a run."""
    days = sorted(str(session["started"])[:10] for session in _sessions(recipe))
    return (days[0], days[-1]) if days else None


def profiles(recipe: Mapping[str, Record]) -> list[str]:
    """The importance profiles that were used, by name."""
    return sorted({str(record["importance"]) for record in recipe.values() if record["importance"]})


def _sessions(recipe: Mapping[str, Record]) -> Iterable[Record]:
    return (session for record in recipe.values() for session in record["sessions"])


def _shown(value: Any) -> str:
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
