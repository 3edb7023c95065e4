"""One JSONL file made by several processes: shared out, merged without duplicates, in order."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaskip.errors import RunError
from adaskip.models.processes import team
from adaskip.runs.records import (
    Record,
    has_id,
    lock,
    read_rows,
    repair_rows,
    write_bytes,
    writing,
)


@dataclass(frozen=True)
class Share:
    """One process's part in making the rows of a file.

    Attributes:
        done: ids of the rows that are there.
        target: the file it appends rows to; None if another process writes the same ones.
        rank: its number among those that make different rows.
        world: how many of them there are.
    """

    done: frozenset[str]
    target: Path | None
    rank: int
    world: int


def make_rows(
    path: Path,
    order: Sequence[str],
    work: Callable[[Share], None],
    *,
    same: bool = False,
    check: Callable[[Any], None] = has_id,
) -> list[Record]:
    """Has the missing rows of a file made by the processes of this command, each its share.

    Args:
        path: the JSONL file, in a folder that all processes share.
        order: ids of the rows it shall hold, in their order.
        work: makes the rows of a share and appends them to its target.
        same: all processes make all rows together, and the first writes them.
        check: raises a `ValueError` for a line that does not belong there.

    Returns:
        The rows of the file.

    Raises:
        RunError: the file holds other rows, a line is damaged, or it cannot be written.
        Exception: what `work` raised, on all processes; what was made until then is kept.
    """
    group = team()

    def settled() -> list[Record]:
        return settle_rows(path, order, check)

    done = group.on_first(lambda: frozenset(str(row["id"]) for row in settled()))
    if done - set(order) and set(order) - done:
        raise RunError(
            f"{path} holds rows that are not among those asked for now: give the --limit and the "
            "data it was made with, or another --results_dir."
        )
    if same:
        share = Share(done, path if group.is_first else None, 0, 1)
    else:
        target = path if group.world == 1 else part_path(path, group.rank)
        share = Share(done, target, group.rank, group.world)
    try:
        with group.together():
            work(share)
    except Exception:
        # What the other processes made until then counts.
        group.on_first(settled)
        raise
    made = group.on_first(settled)
    missing = set(order) - {str(row["id"]) for row in made}
    if missing:
        raise RunError(
            f"{path} lacks {len(missing)} of {len(order)} rows that other processes made: "
            "--results_dir must be one folder that all machines share."
        )
    return made


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for the processes of this command.

    Raises:
        RunError: another command holds it, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        team().on_first(lambda: stack.enter_context(lock(folder)))
        yield


def part_path(path: Path, rank: int) -> Path:
    """Where one of several processes writes its rows of `path`."""
    return path.with_name(f"{path.name}.part{rank}")


def settle_rows(
    path: Path, order: Sequence[str], check: Callable[[Any], None] = has_id
) -> list[Record]:
    """Brings a JSONL file into the state an uninterrupted single process would have left.

    Cuts off a torn last line, takes in the rows of all part files, and sorts. The file is replaced
    at once, before its parts are deleted: killed in between, the next call finds the rows twice and
    keeps them once.

    Args:
        path: the file; it and its parts may be missing.
        order: ids of the rows as they should follow each other; others stay behind them.
        check: raises a `ValueError` for a line that does not belong there.

    Returns:
        The rows now in the file.

    Raises:
        RunError: a line is damaged, or a file cannot be changed.
    """
    rows = repair_rows(path, check)
    parts = sorted(path.parent.glob(f"{path.name}.part*"))
    found = {str(row["id"]): row for row in rows}
    for part in parts:
        for row in read_rows(part, check):
            found.setdefault(str(row["id"]), row)
    place = {row: index for index, row in enumerate(order)}
    wanted = sorted(found.values(), key=lambda row: place.get(str(row["id"]), len(place)))
    if wanted != rows:
        write_bytes(path, b"".join(as_line(row) for row in wanted))
    for part in parts:
        with writing(part):
            part.unlink()
    return wanted


def as_line(row: Record) -> bytes:
    """A row as it stands in a JSONL file."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()
