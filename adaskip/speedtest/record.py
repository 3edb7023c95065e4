"""The record of a measurement: one JSON file, written after every point and continued from there.

Everything that speed measurements read from disk or write to it goes through here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaskip.errors import RunError
from adaskip.profiling.calibration import hardware
from adaskip.runs.files import SCHEMA, environment, read_json, write_bytes, write_json, writing

logger = logging.getLogger(__name__)

# What tells a point from the others of its record, e.g. {"batch": 1, "context": 512}.
Key = Mapping[str, int]
Point = dict[str, Any]
# How lines are compared; part of what made a record.
METHOD = "round by round"
OLD = ".old.json"


@dataclass(frozen=True)
class SpeedRecord:
    """What has been measured so far.

    Attributes:
        path: of the JSON file.
        content: its content: settings, environment, and points, each with its key.
    """

    path: Path
    content: dict[str, Any]

    @classmethod
    def open(
        cls, path: Path, settings: Mapping[str, Any], device: torch.device, *, resume: bool
    ) -> SpeedRecord:
        """The record on disk, if it may be continued, or a new one.

        A record that other code or another machine made is not continued but put aside, so that
        the same command measures in every checkout, whatever results came with it.

        Args:
            path: of the JSON file; it may be missing.
            settings: what all its points have in common.
            device: what computes.
            resume: False puts aside whatever is there.

        Raises:
            RunError: the record there is damaged, or of other settings.
        """
        own = {**settings, "hardware": hardware(device), "method": METHOD}
        new = {
            "schema": SCHEMA,
            "settings": json.loads(json.dumps(own)),
            "environment": environment(device.type),
            "points": [],
        }
        if path.exists():
            old = read_json(path)
            if resume and _origin(old) == _origin(new):
                _compare(path, old["settings"], new["settings"])
                return cls(path, old)
            aside = path.with_suffix(OLD)
            with writing(aside):
                path.replace(aside)
            logger.info("Measuring anew; the record that was there is now %s", aside)
        return cls(path, new)

    def missing(self, keys: Sequence[Key]) -> list[Key]:
        """Those of which there is no point yet."""
        points = self.content["points"]
        return [key for key in keys if not any(key.items() <= point.items() for point in points)]

    def add(self, key: Key, point: Point) -> None:
        """Takes one more point and writes the file.

        Raises:
            RunError: it cannot be written.
        """
        self.content["points"].append({**key, **point})
        self.content["points"].sort(key=lambda each: [each[name] for name in key])
        write_json(self.path, self.content)

    def write_beside(self, suffix: str, data: bytes) -> None:
        """Writes another file of the same name.

        Raises:
            RunError: it cannot be written.
        """
        write_bytes(self.path.with_suffix(suffix), data)


def _origin(record: Mapping[str, Any]) -> list[object]:
    """What made a record: hardware, method, versions and code."""
    settings, made_in = record["settings"], record["environment"]
    versions = [made_in.get(name) for name in ("torch", "transformers", "commit")]
    return [settings.get("hardware"), settings.get("method"), *versions]


def _compare(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    other = [key for key, value in new.items() if old.get(key) != value]
    if other:
        raise RunError(
            f"{path} was measured with another {other[0]} ({old.get(other[0])!r}, now "
            f"{new[other[0]]!r}); give a --name, or --no-resume to measure anew."
        )
