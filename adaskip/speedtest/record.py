"""The record of a measurement: one JSON file, written after every point and continued from there.

Everything that speed measurements read from disk or write to it goes through here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaskip.profiling.calibration import hardware
from adaskip.runs.environment import environment
from adaskip.runs.files import put_aside, read_json, write_bytes
from adaskip.runs.store import Store

# What tells a point from the others of its record, e.g. {"batch": 1, "context": 512}.
Key = Mapping[str, int]
Point = dict[str, Any]
# The numbers that tell points apart, in any measurement.
_KEYS = ("batch", "context", "busy")
# Says in a point why it could not be measured; it is tried again by the next command.
ERROR = "error"
# How lines are compared; part of what made a record.
METHOD = "round by round"


@dataclass(frozen=True)
class StoredPoint:
    """A point as the store keeps it: told by the numbers of its key."""

    content: Point

    @property
    def id(self) -> str:
        """Its key, e.g. `context=512 batch=1`."""
        return key_id({name: self.content[name] for name in _KEYS if name in self.content})

    @classmethod
    def from_dict(cls, content: Any) -> StoredPoint:
        """Raises a `ValueError` for what is no point."""
        if not isinstance(content, dict) or not any(name in content for name in _KEYS):
            raise ValueError("it is no point of a measurement")
        return cls(content)

    def as_dict(self) -> Point:
        """Its content."""
        return self.content


def key_id(key: Key) -> str:
    """A point's key as a text."""
    return " ".join(f"{name}={key[name]}" for name in _KEYS if name in key)


@dataclass
class SpeedRecord:
    """What has been measured so far, in one JSON file.

    Attributes:
        store: its points.
        is_anew: whether another record is still there, to be put aside for the first point.
    """

    store: Store[StoredPoint]
    is_anew: bool = False

    @classmethod
    def open(
        cls, path: Path, settings: Mapping[str, Any], device: torch.device, *, resume: bool
    ) -> SpeedRecord:
        """The record on disk, if it may be continued, or a new one.

        A record that other code or another machine made is not continued but put aside once there
        is a first point, so that the same command measures in every checkout, whatever results
        came with it.

        Args:
            path: of the JSON file; it may be missing.
            settings: what all its points have in common.
            device: what computes.
            resume: False puts aside whatever is there.

        Raises:
            RunError: the record there is damaged, or of other settings.
        """
        own = {**settings, "hardware": hardware(device), "method": METHOD}
        made_in = environment(device.type)
        is_anew = False
        if path.exists():
            old = read_json(path)
            was = _origin(old.get("settings", {}), old.get("environment", {}))
            is_anew = not resume or was != _origin(own, made_in)
        hint = "give a --name, or --no-resume to measure anew"
        store = Store(path, StoredPoint, own, {"environment": made_in}, key="points", hint=hint)
        if not is_anew:
            store.record()
        return cls(store, is_anew)

    @property
    def path(self) -> Path:
        """The JSON file."""
        return self.store.path

    @property
    def content(self) -> Point:
        """What the file holds: settings, environment, and points, each with its key."""
        return {**self.store.record(), "points": [row.content for row in self.store.rows()]}

    def missing(self, keys: Sequence[Key]) -> list[Key]:
        """Those that are not measured yet, or could not be."""
        if self.is_anew:
            return list(keys)
        done = {row.id for row in self.store.rows() if ERROR not in row.content}
        return [key for key in keys if key_id(key) not in done]

    def add(self, key: Key, point: Point) -> None:
        """Takes one more point and writes the file, its points in the order of their keys.

        Raises:
            RunError: it cannot be written.
        """
        if self.is_anew:
            put_aside(self.path)
            self.is_anew = False
        self.store.append([StoredPoint({**key, **point})])
        rows = sorted(self.store.rows(), key=lambda row: [row.content[name] for name in key])
        self.store.merge([row.id for row in rows])

    def write_beside(self, suffix: str, data: bytes) -> None:
        """Writes another file of the same name.

        Raises:
            RunError: it cannot be written.
        """
        write_bytes(self.path.with_suffix(suffix), data)


def _origin(settings: Mapping[str, Any], made_in: Mapping[str, Any]) -> list[object]:
    """What made a record: hardware, method, versions and code."""
    versions = [made_in.get(name) for name in ("torch", "transformers", "adaskip", "commit")]
    return [settings.get("hardware"), settings.get("method"), *versions]
