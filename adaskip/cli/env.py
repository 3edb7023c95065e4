"""`adaskip env`: what a report of a problem, or of a figure, has to say about where it was seen."""

from __future__ import annotations

import argparse
import json

from adaskip.command import BEGINS_ANEW, Command, say
from adaskip.models.devices import resolve_device
from adaskip.runs.environment import environment


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="torch device (default: cuda if there is one)")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _act(given: argparse.Namespace) -> int:
    found = environment(str(resolve_device(given.device)))
    if given.json:
        say(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    rows = {key: _shown(value) for key, value in found.items()}
    width = max(map(len, rows))
    say("\n".join(f"{key:<{width}}  {value}" for key, value in rows.items()))
    return 0


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version or 'none'}" for name, version in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


ENV = Command(
    "Prints versions, device and attention implementations.", _options, _act, "", BEGINS_ANEW
)
