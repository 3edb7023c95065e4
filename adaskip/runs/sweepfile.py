"""The shape of a sweep's YAML file: known keys, and values of the right kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaskip.errors import AdaskipError, unknown_name

KEYS = (
    "name",
    "results_dir",
    "models",
    "settings",
    "tasks",
    "policies",
    "experiments",
    "perplexity",
    "estimate",
)


def check_shape(path: Path, content: Mapping[str, Any]) -> None:
    """Refuses keys that are unknown or missing, and values that are not lists, names or numbers."""
    for key in content:
        if key not in KEYS:
            raise AdaskipError(f"{path}: {unknown_name('key', str(key), KEYS)}")
    for key in ("name", "models", "policies", "experiments"):
        if not content.get(key):
            raise AdaskipError(f"{path}: the key {key!r} is missing or empty.")
    good = {
        "models must be a list of names": is_list(content["models"], str),
        "policies must map names to lists of numbers": _is_map(content["policies"], int),
        "experiments must map names to lists of tasks": _is_map(content["experiments"], str),
        "settings must be a mapping": isinstance(content.get("settings") or {}, dict),
        "tasks must map names to settings": isinstance(content.get("tasks") or {}, dict)
        and all(isinstance(own, dict) for own in (content.get("tasks") or {}).values()),
        "results_dir must be a path": isinstance(content.get("results_dir") or "", str),
        "perplexity must be a mapping": isinstance(content.get("perplexity") or {}, dict),
        "name must be a text": isinstance(content["name"], str),
    }
    for sentence, holds in good.items():
        if not holds:
            raise AdaskipError(f"{path}: {sentence}.")


def is_list(value: Any, kind: type) -> bool:
    """Whether it is a list of values of exactly this type."""
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _is_map(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and is_list(items, kind) and items for key, items in value.items()
    )
