"""One JSONL file from several writers: part files, merged without duplicates, in planned order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from adaskip.experiments.records import Record, read_rows, repair_rows, write_bytes, writing


def part_path(path: Path, rank: int) -> Path:
    """Where one of several processes writes its rows of `path`."""
    return path.with_name(f"{path.name}.part{rank}")


def settle_rows(path: Path, order: Sequence[str]) -> list[Record]:
    """Brings a JSONL file into the state an uninterrupted single process would have left.

    Cuts off a torn last line, takes in the rows of all part files, and sorts. The file is replaced
    at once, before its parts are deleted: killed in between, the next call finds the rows twice and
    keeps them once.

    Args:
        path: the file; it and its parts may be missing.
        order: ids of the rows as they should follow each other; others stay behind them.

    Returns:
        The rows now in the file.

    Raises:
        RunError: a line is damaged, or a file cannot be changed.
    """
    rows = repair_rows(path)
    parts = sorted(path.parent.glob(f"{path.name}.part*"))
    found = {str(row["id"]): row for row in rows}
    for part in parts:
        for row in read_rows(part):
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
