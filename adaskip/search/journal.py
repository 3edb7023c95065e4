"""The record of searches: what was measured on calibration rows, line by line."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from adaskip.errors import RunError
from adaskip.fingerprint import first_difference
from adaskip.numbers import is_finite
from adaskip.plan import Phase
from adaskip.profiling.calibration import identity as place
from adaskip.profiling.plan_times import measured_plan_times
from adaskip.replacements import Replacement
from adaskip.search.rows import Row
from adaskip.sublayer_times import GAIN, PlanTimes, timed_as

# Of what was measured, and of how it is called: a loss means nothing to a search that learns what
# takes a sublayer's place in another way.
VERSION = 5
# What may be measured: the loss of a plan, and times.
Kind = Literal["loss", "times"]
Line = dict[str, Any]


class Journal:
    """What was measured, by what it was measured of; also in a file.

    The file's first line says which model and rows it is of, and one of others is refused. What it
    has is not measured again, whatever budget it was measured for: a search that was interrupted
    goes on from there, and another one of the same rows has less to do.

    Args:
        path: JSON lines; None keeps what is measured for this search alone.
        header: which model and rows, ready for JSON.

    Raises:
        RunError: the file is of others, damaged, or cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, header: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._known: dict[tuple[Kind, str], Any] = {}
        if self._path is None:
            return
        first: Line = json.loads(json.dumps({"version": VERSION, **header}))
        try:
            lines = _read(self._path)
            if lines:
                _compare(lines[0], first, self._path)
            else:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._write(first)
        except OSError as error:
            raise RunError(f"The record {self._path} cannot be used: {error}.") from error
        for number, line in enumerate(lines[1:], start=2):
            kind, of, value = _measured(line, number, self._path)
            self._known[kind, of] = value

    def known(self, kind: Kind, of: str) -> Any:
        """What was measured; None if nobody has."""
        return self._known.get((kind, of))

    def add(self, kind: Kind, of: str, value: Any) -> None:
        """Keeps what was measured: a loss, or times ready for JSON.

        Args:
            kind: of value.
            of: what it was measured of, with all that it depends on besides the header.
            value: a number that is not finite is kept for this search alone: JSON has none.
        """
        self._known[kind, of] = value
        if self._path is not None and value != math.inf:
            self._write({kind: value, "of": of})

    def _write(self, line: Line) -> None:
        assert self._path is not None  # noqa: S101 - asked by every caller
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise RunError(
                f"The record {self._path} cannot be written: {error}. What it has is kept, and "
                "the same call goes on from there."
            ) from error


def known_times(
    journal: Journal,
    model: PreTrainedModel,
    phase: Phase | str,
    context: int,
    samples: Sequence[Replacement],
    *,
    batch: int,
) -> PlanTimes:
    """Times as `measured_plan_times` measures them, those of the record where it has them."""
    names = ", ".join(map(timed_as, samples)) or GAIN
    # A record may be taken to another machine.
    of = f"{phase} of {batch} x {context} tokens on {short_hash(place(model))}: {names}"
    known = journal.known("times", of)
    if known is not None:
        return PlanTimes.from_dict(known)
    times = measured_plan_times(model, phase, context, samples, batch=batch)
    journal.add("times", of, times.as_dict())
    return times


def digest_of(rows: Iterable[Row]) -> str:
    """Tells calibration rows apart: a hash of their ids."""
    return short_hash([[torch.as_tensor(part).flatten().tolist() for part in row] for row in rows])


def short_hash(value: object) -> str:
    """Sixteen characters that tell values apart, which are ready for JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


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


def _measured(line: Line, number: int, path: Path) -> tuple[Kind, str, Any]:
    """What a line after the first one says."""
    of = line.get("of")
    if isinstance(of, str) and is_finite(line.get("loss")):
        return "loss", of, float(line["loss"])
    if isinstance(of, str) and isinstance(line.get("times"), dict):
        return "times", of, line["times"]
    raise _damaged(number, path)


def _damaged(number: int, path: Path) -> RunError:
    return RunError(f"Line {number} of the record {path} is damaged; remove the file.")


def _compare(found: Line, header: Line, path: Path) -> None:
    key = first_difference(found, header)
    if key is not None:
        raise RunError(
            f"The record {path} is of another search ({key}: {found.get(key)!s:.60} then, "
            f"{header.get(key)!s:.60} now); give another file."
        )
