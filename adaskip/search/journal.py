"""The record of a search: what it computed, line by line, so that it can go on from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from adaskip.errors import RunError
from adaskip.numbers import is_finite
from adaskip.search.losses import Row

# Of the search: one that goes another way cannot take up its record.
VERSION = 4
Line = dict[str, Any]


class Journal:
    """Steps of a deterministic search, in their order.

    The first line says what is searched; a file of another search is refused. What was computed
    before is given back in its order, so that a search that was interrupted takes the same way.

    Args:
        path: JSON lines; None keeps nothing.
        header: what the search depends on, ready for JSON.

    Raises:
        RunError: the file is of another search, damaged, or cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, header: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._known: list[Line] = []
        self._next = 0
        if self._path is None:
            return
        first: Line = json.loads(json.dumps({"version": VERSION, **header}))
        try:
            known = _read(self._path)
            if known:
                _compare(known[0], first, self._path)
                self._known = known[1:]
            else:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._write(first)
        except OSError as error:
            raise RunError(f"The record {self._path} cannot be used: {error}.") from error

    @property
    def n_left(self) -> int:
        """Steps of an earlier call that have not been taken again."""
        return len(self._known) - self._next

    def earlier(self, step: str) -> Line | None:
        """What is known of the next step; None if it has to be computed.

        Raises:
            RunError: the record has another step here.
        """
        if not self.n_left:
            return None
        line = self._known[self._next]
        if line.get("step") != step:
            raise RunError(
                f"The record {self._path} goes on with {line.get('step')!r} where this search has "
                f"{step!r}: it was made on another machine or with other packages. Remove it to "
                "search anew."
            )
        self._next += 1
        return line

    def loss(self, step: str) -> tuple[float, float] | None:
        """The loss of the next step, and the forwards it took; None if it has to be computed.

        Raises:
            RunError: the record has another step here, or no such numbers.
        """
        line = self.earlier(step)
        if line is None:
            return None
        loss, forwards = line.get("loss"), line.get("forwards")
        if not (is_finite(loss) and is_finite(forwards)):
            raise _damaged(self._next + 1, self._path)
        return float(loss), float(forwards)

    def add(self, step: str, **values: Any) -> None:
        """Keeps what was computed in a step."""
        if self._path is not None:
            self._write({"step": step, **values})

    def _write(self, line: Line) -> None:
        assert self._path is not None  # noqa: S101 - asked by every caller
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def digest_of(rows: Iterable[Row]) -> str:
    """Tells calibration rows apart: a hash of their ids."""
    ids = [[torch.as_tensor(part).flatten().tolist() for part in row] for row in rows]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def _read(path: Path) -> list[Line]:
    """The whole lines of a file, which loses the rest of one that was cut off."""
    if not path.exists():
        return []
    found: list[Line] = []
    whole, end, rest = path.read_bytes().rpartition(b"\n")
    if rest:
        os.truncate(path, len(whole) + len(end))
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise _damaged(number, path)
        found.append(line)
    return found


def _damaged(number: int, path: Path | None) -> RunError:
    return RunError(f"Line {number} of the record {path} is damaged; remove the file.")


def _compare(found: Line, header: Line, path: Path) -> None:
    for key in {**found, **header}:
        if found.get(key) != header.get(key):
            raise RunError(
                f"The record {path} is of another search ({key}: {found.get(key)!s:.60} then, "
                f"{header.get(key)!s:.60} now); give another file, or the same arguments."
            )
