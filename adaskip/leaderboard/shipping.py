"""Copies plans of a leaderboard into the package, with what was measured of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adaskip.errors import AdaskipError
from adaskip.leaderboard.board import Board
from adaskip.leaderboard.restoring import replaced, take_as_long
from adaskip.leaderboard.settings import LeaderboardFile, Shipped
from adaskip.leaderboard.values import Entry, Report, Table
from adaskip.plan import COURSE, SkipPlan
from adaskip.shipped import LIMIT, SUFFIX


def ship(file: LeaderboardFile, results: Path, report: Report, folder: Path) -> list[Path]:
    """Writes the plans that a file names as shipped; all of them, or none.

    Args:
        file: the leaderboard's.
        results: its folder.
        report: what was measured.
        folder: gets one `.safetensors` each, by its name.

    Returns:
        The files.

    Raises:
        AdaskipError: one was not made or measured, or they are too large.
    """
    made = {}
    for one in file.shipped:
        board = Board(file, one.model, one.context, results)
        path = folder / f"{one.name}{SUFFIX}"
        plan = _plan(board, one, path)
        about = {**plan.about, **_measured(one, report)}
        made[path] = SkipPlan(plan, fingerprint=plan.fingerprint, about=about)
    sizes = {path.relative_to(folder): _size(plan) for path, plan in made.items()}
    if sum(sizes.values()) > LIMIT:
        told = ", ".join(f"{path.as_posix()} {size:,}" for path, size in sizes.items())
        raise AdaskipError(
            f"The plans are {sum(sizes.values()):,} bytes together ({told}), at most {LIMIT:,} are "
            "shipped: name fewer, or ones with maps of a lower rank."
        )
    for path, plan in made.items():
        plan.save(path)
    return [*made]


def _plan(board: Board, one: Shipped, path: Path) -> SkipPlan:
    """The plan to be shipped; the one that was shipped before, where its own file is gone.

    One put together from its record has no course: that of the shipped one, if it is the same but
    for the numbers of gains and linear maps, is its own.
    """
    row = board.made.get(one.point.name)
    if row is None:
        raise AdaskipError(f"{one.name} cannot be shipped: {one.point.name} has no plan yet.")
    plan = board.plan_of(one.point, row)
    before = SkipPlan.load(path) if path.exists() else None
    plan = before if plan is None else plan
    if plan is None or plan.digest != row.plan_digest:
        raise AdaskipError(
            f"{one.name} cannot be shipped: its plan {board.path_of(one.point)} is gone. Delete "
            f"its row from {board.plans.path}, then --parts plans makes it anew."
        )
    if before is None or COURSE in plan.about or COURSE not in before.about:
        return plan
    if not take_as_long(replaced(plan), replaced(before)):
        return plan
    about = {**plan.about, COURSE: before.about[COURSE]}
    return SkipPlan(plan, fingerprint=plan.fingerprint, about=about)


def _measured(one: Shipped, report: Report) -> Mapping[str, Any]:
    """What the leaderboard says of a plan, in the words that plans have for it."""
    for table in report.tables:
        here = (table.model, table.context) == (one.model, one.context)
        for entry in table.entries:
            if here and (entry.method, entry.asked) == (one.method, one.acceleration):
                return _told(table, entry, report)
    raise AdaskipError(f"{one.name} cannot be shipped: {one.point.name} has no losses yet.")


def _told(table: Table, entry: Entry, report: Report) -> dict[str, Any]:
    if entry.ttft is None or entry.per_token is None or entry.interval is None:
        raise AdaskipError(
            f"{entry.method} {entry.asked:g} of {table.model} at {table.context} tokens cannot be "
            "shipped: its times were not measured, or its losses are those of one row."
        )
    return {
        "measured acceleration": entry.ttft.median,
        "measured from": entry.ttft.low,
        "measured to": entry.ttft.high,
        "measured acceleration per token": entry.per_token.median,
        "measured kv share": entry.kv_share,
        "measured on": table.hardware,
        "gap": entry.gap,
        "gap from": entry.interval[0],
        "gap to": entry.interval[1],
        "dense perplexity": table.perplexity,
        "tested on": f"{len(table.references)} references of {report.task}",
    }


def _size(plan: SkipPlan) -> int:
    """Bytes of a plan's file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"plan{SUFFIX}"
        plan.save(path)
        return path.stat().st_size
