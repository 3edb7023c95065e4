"""What a row of a run must hold: one check, for continuing, counting and scoring it."""

from __future__ import annotations

from typing import Any

from adaskip.plan import KINDS, Phase

_NUMBER = (int, float)
_FIELDS: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "prediction": (str,),
    "references": (list,),
    "classes": (list, type(None)),
    "length": (int,),
    "tokens_after": (int,),
    "truncated": (bool,),
    "generated_tokens": (int,),
    "skipped": (dict,),
    "seconds": (dict,),
    "session": (str,),
}
_SECONDS: dict[str, tuple[type, ...]] = {"ttft": _NUMBER, "per_token": (*_NUMBER, type(None))}


def check_row(row: Any) -> None:
    """Checks that a line of a run's JSONL file is a row that a run wrote.

    Raises:
        ValueError: it is not; the message names the field.
    """
    _check(row, "row", _FIELDS)
    _check(row["seconds"], "seconds", _SECONDS)
    for phase in Phase:
        _check(row["skipped"].get(phase), str(phase), dict.fromkeys(("forwards", *KINDS), (int,)))
    texts = [*row["references"], *(row["classes"] or ())]
    if not row["references"] or not all(isinstance(text, str) for text in texts):
        raise ValueError("its references and classes must be texts, one at least")


def _check(content: Any, name: str, fields: dict[str, tuple[type, ...]]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"its {name} must be a mapping")
    for key, kinds in fields.items():
        if key not in content:
            raise ValueError(f"{key!r} is missing")
        if not isinstance(content[key], kinds):
            raise ValueError(f"{key!r} is of type {type(content[key]).__name__}")
