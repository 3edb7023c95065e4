"""The command lines of `speed/`: options from a measurement's fields, its record, its report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import Field, fields, replace
from typing import Any, TypeVar, get_args, get_type_hints

from adaskip.cli.command import Parser, guarded, say
from adaskip.reports.speed import as_markdown, draw
from adaskip.speedtest.measurement import Measurement, measure

M = TypeVar("M", bound=Measurement)


def speed_main(measurement: Measurement, argv: Sequence[str] | None = None) -> int:
    """What each script of `speed/` calls: measures what is missing, writes and prints the report.

    Args:
        measurement: with the script's own defaults.
        argv: the options, by default those of the command line.

    Returns:
        The exit code.
    """

    def action() -> int:
        record = measure(with_options(measurement, argv))
        text = as_markdown(measurement.kind, measurement.title, record.content)
        record.write_beside(".md", f"{text}\n".encode())
        written = [str(record.path), record.path.with_suffix(".md").name]
        figure = draw(record.content) if measurement.kind == "speed" else None
        if figure is not None:
            record.write_beside(".png", figure)
            written.append(record.path.with_suffix(".png").name)
        say(text)
        say(f"Written: {', '.join(written)}.")
        return 0

    return guarded(action)


def with_options(measurement: M, argv: Sequence[str] | None) -> M:
    """The measurement with the fields that a command line says.

    Raises:
        AdaskipError: an option is unknown or no such value.
    """
    parser = Parser(description=f"{measurement.title}.", allow_abbrev=False)
    hints = get_type_hints(type(measurement))
    for item in fields(measurement):
        if "help" in item.metadata:
            _add_option(parser, item, hints[item.name], getattr(measurement, item.name))
    given = vars(parser.parse_args(argv))
    lists = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    return replace(measurement, **(given | lists))


def _add_option(
    parser: argparse.ArgumentParser, item: Field[Any], hint: Any, default: object
) -> None:
    """One field: a flag, a value, or several values of one type."""
    settings: dict[str, Any] = {"default": default}
    text = item.metadata["help"]
    if hint is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        # The first of `tuple[int, ...]` and of `int | None`.
        settings["type"] = (get_args(hint) or (hint,))[0]
        shown = default
        if isinstance(default, tuple):
            settings["nargs"] = "+"
            shown = " ".join(map(str, default))
        if shown not in (None, ""):
            text += f" (default: {shown})"
    parser.add_argument(f"--{item.name}", help=text.replace("%", "%%"), **settings)
